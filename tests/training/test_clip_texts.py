"""The text tower of the pictures' own network: vectors once, an adapter that leaves them where they are at first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys_ray.artifacts import Artifact, stage
from recsys_ray.config import Config, ConfigError
from recsys_ray.data.attribute_items import text_vectors
from recsys_ray.models.attribute_adapter import AdapterCard, AttributeAdapter, ImageTowerConfig, load_image_tower
from recsys_ray.models.image_encoder import ImageEncoder, ImageEncoderConfig
from recsys_ray.retrieval.embed_images import embed_rows
from recsys_ray.schema import IMAGE, PRODUCT_TEXT, conform
from recsys_ray.training.clip_texts import ClipTexts, clip_text_vectors

ARCHITECTURE = "tiny-adapter-clip"
WORDS = {"p0": "a red dress", "p1": "blue jeans", "p2": "without a picture"}


@pytest.fixture(scope="module")
def encoder(tiny_clip: Callable[[str], Path]) -> ImageEncoder:
    return ImageEncoder(ImageEncoderConfig(model=ARCHITECTURE, pretrained=str(tiny_clip(ARCHITECTURE)), device="cpu",
                                           dtype="float32"))


@pytest.fixture(scope="module")
def pictures(encoder: ImageEncoder, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    names = ["p0", "p1"]
    framed = [np.full((32, 32, 3), shade, np.uint8) for shade in (30, 200)]
    rows = pa.table({"image_id": names, "product_id": names, "data": pa.array([b"x", b"y"], pa.large_binary())})
    with stage(tmp_path_factory.mktemp("pictures"), "image_vectors", "f") as staging:
        table = embed_rows(conform(rows, IMAGE, "images"), framed, encoder)
        return staging.commit([staging.write_table("vectors/part-00000.parquet", table)], config=Config(),
                              facts={"encoder": encoder.identity})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    rows = pa.table({"row_id": [0, 1, 2], "product_id": list(WORDS), "text": list(WORDS.values()),
                     "text_hash": list(WORDS)})
    with stage(root, "prepared", "f") as staging:
        staging.commit([staging.write_table("product_text/bucket-00000.parquet", conform(rows, PRODUCT_TEXT, "texts"))],
                       config=Config())
    return root


def test_texts_of_pictured_products_are_in_the_pictures_space(encoder: ImageEncoder, pictures: Artifact,
                                                              prepared: Path, tmp_path: Path) -> None:
    """As OpenCLIP's own `encode_text` puts them there, from the checkpoint to the artefact and to the loaded tower."""
    import open_clip

    config = ClipTexts(prepared=prepared, encoder=encoder.config)
    made = clip_text_vectors(config.resolved(), pictures, tmp_path / "texts")
    assert made.manifest.rows("vectors/") == 2
    vectors = text_vectors(made, pa.array(["p1", "p0"]))
    theirs = open_clip.create_model(ARCHITECTURE, pretrained=encoder.config.pretrained).eval()
    with torch.no_grad():
        words = open_clip.get_tokenizer(ARCHITECTURE)([WORDS["p1"], WORDS["p0"]])
        wanted = theirs.encode_text(words, normalize=True).numpy()
    assert np.abs(wanted[0] - wanted[1]).max() > 0.01       # random weights, and still two texts are two vectors
    assert np.allclose(vectors, wanted, atol=1e-5)
    assert clip_text_vectors(config, pictures, tmp_path / "texts").manifest.version == made.manifest.version

    card = AdapterCard(image=encoder.identity, text=made.manifest.facts["encoder"], attributes={"sleeve": ("cap",)})
    AttributeAdapter(card).save(tmp_path / "adapter")
    tower = load_image_tower(ImageTowerConfig(encoder=encoder.config, adapter=str(tmp_path / "adapter")))
    assert np.allclose(tower.encode_texts([WORDS["p1"], WORDS["p0"]]), wanted, atol=1e-5)   # an untrained head


def test_texts_of_another_network_are_refused(encoder: ImageEncoder, prepared: Path, tmp_path: Path) -> None:
    with stage(tmp_path / "pictures", "image_vectors", "f") as staging:
        other = staging.commit([], config=Config(), facts={"encoder": {**encoder.identity, "weights_sha256": "0"}})
    with pytest.raises(ConfigError, match="are in one space only where both are of one network"):
        clip_text_vectors(ClipTexts(prepared=prepared, encoder=encoder.config), other, tmp_path / "texts")

"""BGE-M3 against a plain padded forward with loops; its real files, whole, missing and damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from recsys_ray.models.bge_m3 import BgeM3, BgeM3Encoder, sparse_rows
from recsys_ray.models.bge_m3_heads import BgeM3Heads
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.models.sentence_layout import EncoderError
from recsys_ray.models.text_encoder import TextEncoderConfig, encoder_identity
from recsys_ray.models.trainable_bert import TrainableConfig

TEXTS = ["soft red velvet sofa", "red red red", "", "a", "oak table for the small room of a flat", "red red red",
         "zz top", "x" * 400, "  ", "ünknown \U0001f600 signs"]


@pytest.fixture
def model(tiny_text_model: Callable[..., Path]) -> Path:
    """A random XLM-R with both heads in float16 files, as the published model has them."""
    root = tiny_text_model(body="xlm-roberta", pooling="cls")
    torch.manual_seed(3)
    for name, outputs in (("sparse_linear.pt", 1), ("colbert_linear.pt", 24)):
        torch.save(nn.Linear(32, outputs).half().state_dict(), root / name)
    return root


def config_of(root: Path, **changes: Any) -> TextEncoderConfig:
    return TextEncoderConfig.model_validate({"model": str(root), "device": "cpu", "dtype": "float32", "sparse": True,
                                             "multi_vector": True, "multi_vector_dtype": "float32", **changes})


def reference(root: Path, texts: list[str]) -> tuple[np.ndarray, list[dict[int, float]], list[np.ndarray]]:
    """The model hub's own padded forward, then loops over texts and tokens."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, body = AutoTokenizer.from_pretrained(root), AutoModel.from_pretrained(root).eval()
    batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    states = {name: torch.load(root / f"{name}_linear.pt", weights_only=True) for name in ("sparse", "colbert")}
    special = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    dense, sparse, multi = [], [], []
    with torch.inference_mode():
        hidden = body(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        for row, ids, mask in zip(hidden, batch["input_ids"], batch["attention_mask"], strict=True):
            dense.append((row[0] / row[0].norm()).numpy())
            weights: dict[int, float] = {}
            for state, token in zip(row[mask.bool()], ids[mask.bool()].tolist(), strict=True):
                weight = float(states["sparse"]["weight"].float()[0] @ state + states["sparse"]["bias"].float()[0])
                if token not in special and weight > 0:
                    weights[token] = max(weight, weights.get(token, 0.0))
            sparse.append(weights)
            own = row[mask.bool()][1:] @ states["colbert"]["weight"].float().T + states["colbert"]["bias"].float()
            multi.append((own / own.norm(dim=1, keepdim=True)).numpy())
    return np.array(dense), sparse, multi


@pytest.mark.parametrize("token_budget", [1, 30, 10_000])
def test_all_parts_equal_a_padded_forward_with_loops(model: Path, token_budget: int) -> None:
    encoder = build_text_encoder(config_of(model, token_budget=token_budget))
    assert isinstance(encoder, BgeM3Encoder)
    found = encoder.encode(TEXTS)
    dense, sparse, multi = reference(model, TEXTS)
    np.testing.assert_allclose(found.dense, dense, atol=1e-5)
    np.testing.assert_allclose(encoder.encode_documents(TEXTS), dense, atol=1e-5)
    rows, vectors = found.signals.sparse, found.signals.multi
    assert rows is not None
    assert vectors is not None
    assert len(rows) == len(vectors) == len(TEXTS)
    assert sum(map(len, sparse)) > 10
    assert any(len(one) > 3 for one in sparse)
    for number, weights in enumerate(sparse):
        tokens, own = rows.row(number)
        assert tokens.tolist() == sorted(weights)
        np.testing.assert_allclose(own, [weights[token] for token in sorted(weights)], atol=1e-5)
        np.testing.assert_allclose(vectors.row(number), multi[number], atol=1e-5)
    assert len(rows.row(2)[0]) == 0
    assert len(vectors.row(2)) == 1
    assert rows.weights.dtype == vectors.vectors.dtype == np.float32


def test_only_what_is_asked_for_is_computed_and_stored_as_asked(model: Path) -> None:
    both = build_text_encoder(config_of(model, multi_vector_dtype="float16"))
    assert isinstance(both, BgeM3Encoder)
    whole = both.encode_all_queries(TEXTS)
    assert whole.signals.multi is not None
    assert whole.signals.multi.vectors.dtype == np.float16
    part = both.encode(TEXTS, dense=False, multi_vector=False)
    assert part.dense is None
    assert part.signals.multi is None
    np.testing.assert_array_equal(part.signals.sparse.weights, whole.signals.sparse.weights)  # type: ignore[union-attr]
    nothing = both.encode([])
    assert nothing.dense is not None
    assert nothing.dense.shape == (0, 32)
    assert nothing.signals.sparse is not None
    assert len(nothing.signals.sparse) == 0
    assert nothing.signals.multi is not None
    assert nothing.signals.multi.vectors.shape == (0, 24)
    sparse_only = build_text_encoder(config_of(model, multi_vector=False))
    assert isinstance(sparse_only, BgeM3Encoder)
    assert sparse_only.encode_all_documents(TEXTS).signals.multi is None
    with pytest.raises(EncoderError, match="multi_vector=True"):
        sparse_only.encode(TEXTS)
    assert not isinstance(build_text_encoder(config_of(model, sparse=False, multi_vector=False)), BgeM3Encoder)


def test_a_repeated_token_counts_once_with_its_largest_weight() -> None:
    ids = [np.array([0, 7, 5, 7, 2], np.int32), np.array([0, 2], np.int32), np.array([0, 5, 2], np.int32)]
    weights = np.array([9, 1, 0, 3, 9, 9, 9, 9, 4, 9], np.float32)
    rows = sparse_rows(ids, weights, special_ids=(0, 1, 2, 3))
    assert rows.offsets.tolist() == [0, 1, 1, 2]
    assert (rows.token_ids.tolist(), rows.weights.tolist()) == ([7, 5], [3.0, 4.0])


def test_the_identity_knows_the_heads(model: Path) -> None:
    plain = encoder_identity(config_of(model, sparse=False, multi_vector=False))
    assert not [key for key in plain if key.startswith(("sparse", "multi"))]
    both = encoder_identity(config_of(model))
    assert both["multi_vector_dimension"] == 24
    assert {**both, **plain} == both
    torch.save(nn.Linear(32, 1).state_dict(), model / "sparse_linear.pt")
    assert encoder_identity(config_of(model))["sparse_sha256"] != both["sparse_sha256"]


@pytest.mark.parametrize("name", ["sparse_linear.pt", "colbert_linear.pt"])
@pytest.mark.parametrize(("harm", "message"), [
    ("missing", "missing; this model has no such head"), ("torn", "cannot be read"), ("pickle", "cannot be read"),
    ("other_keys", "not exactly weight and bias"), ("other_body", "the head is of another body"),
    ("other_bias", "the head is of another body"), ("nan", "NaN or infinity"), ("list", "not exactly weight and bias")])
def test_a_head_that_is_missing_or_wrong_is_refused(model: Path, name: str, harm: str, message: str) -> None:
    path = model / name
    state = torch.load(path, weights_only=True)
    if harm == "missing":
        path.unlink()
    elif harm == "torn":
        path.write_bytes(path.read_bytes()[:300])
    elif harm == "pickle":
        torch.save({"weight": Path("x"), "bias": print}, path)
    else:
        torch.save({"other_keys": {"weight": state["weight"]},
                    "other_body": {**state, "weight": state["weight"][:, :-1]},
                    "other_bias": {**state, "bias": torch.zeros(7)},
                    "nan": {**state, "bias": state["bias"] * torch.nan}, "list": [state]}[harm], path)
    with pytest.raises(EncoderError, match=message) as raised:
        build_text_encoder(config_of(model))
    assert name in str(raised.value)


def test_heads_need_a_packed_body(tiny_text_model: Callable[..., Path]) -> None:
    root = tiny_text_model(body="xlm-roberta", pooling="mean")
    BgeM3Heads.new(32).save(root)
    with pytest.raises(EncoderError, match="backend"):
        build_text_encoder(config_of(root, backend="sentence_transformers"))


def test_a_model_pooled_by_its_mean_keeps_its_own_vector(tiny_text_model: Callable[..., Path]) -> None:
    root = tiny_text_model(body="bert", pooling="mean")
    BgeM3Heads.new(32).save(root)
    encoder = build_text_encoder(config_of(root))
    assert isinstance(encoder, BgeM3Encoder)
    plain = build_text_encoder(config_of(root, sparse=False, multi_vector=False)).encode_documents(TEXTS)
    np.testing.assert_array_equal(encoder.encode(TEXTS).dense, plain)
    ids = [np.array(one, np.int32) for one in _tokenised(root, TEXTS)]
    trained = BgeM3.load(TrainableConfig(model=str(root), device="cpu", dtype="float32")).eval()
    with torch.no_grad():
        np.testing.assert_allclose(trained(ids).dense.numpy(), plain, atol=1e-5)


def test_new_heads_give_the_bodys_states_and_equal_weights() -> None:
    hidden = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    whole = BgeM3Heads.new(32)
    torch.testing.assert_close(whole.token_vectors(hidden), torch.nn.functional.normalize(hidden, dim=-1))
    assert whole.token_weights(hidden).unique().tolist() == [pytest.approx(0.2)]
    small = BgeM3Heads.new(32, 8)
    weight = small.colbert_linear.weight  # type: ignore[union-attr]
    torch.testing.assert_close(weight @ weight.T, torch.eye(8), atol=1e-5, rtol=0)


def test_the_sparse_head_is_fitted_to_wanted_weights() -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(400, 32, generator=generator)
    wanted = 0.7 + hidden @ torch.linspace(-0.05, 0.05, 32)
    heads = BgeM3Heads.new(32)
    heads.fit_sparse(hidden, wanted)
    torch.testing.assert_close(heads.token_weights(hidden), wanted, atol=0.02, rtol=0)
    heads.fit_sparse(torch.ones(5, 32), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]))     # states that say nothing
    torch.testing.assert_close(heads.token_weights(torch.ones(2, 32)), torch.full((2,), 0.3))


def test_heads_come_back_as_they_were_saved(model: Path, tmp_path: Path) -> None:
    torch.manual_seed(8)
    heads = BgeM3Heads.new(32, 12)
    heads.save(tmp_path)
    again = BgeM3Heads.load(tmp_path, 32)
    for name, tensor in heads.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)
    hidden = torch.randn(5, 32)
    with pytest.raises(EncoderError, match="sparse=True"):
        BgeM3Heads.load(tmp_path, 32, sparse=False).token_weights(hidden)
    assert BgeM3Heads.load(tmp_path, 32, multi=False).token_weights(hidden.bfloat16()).dtype == torch.float32


def test_a_trained_model_is_saved_where_the_encoder_loads_it(model: Path, tmp_path: Path) -> None:
    config = TrainableConfig(model=str(model), device="cpu", dtype="float32")
    trained = BgeM3.load(config).eval()
    token_ids = [np.array([0, 7, 5, 7, 2], np.int32), np.array([0, 2], np.int32), np.arange(0, 30, dtype=np.int32)]
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        expected = trained(token_ids)
    trained.save(tmp_path / "saved")
    again = BgeM3.load(TrainableConfig(model=str(tmp_path / "saved"), device="cpu", dtype="float32")).eval()
    with torch.no_grad():
        found = again(token_ids)
    for name in ("dense", "weights", "multi"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-6)
    encoder = build_text_encoder(config_of(tmp_path / "saved"))
    assert isinstance(encoder, BgeM3Encoder)
    encoding = encoder.encode(TEXTS)
    ids = [np.array(one, np.int32) for one in _tokenised(tmp_path / "saved", TEXTS)]
    with torch.no_grad():
        states = again(ids)
    np.testing.assert_allclose(encoding.dense, states.dense.numpy(), atol=1e-5)
    np.testing.assert_allclose(encoding.signals.multi.vectors, states.multi.numpy(), atol=1e-5)  # type: ignore[union-attr]
    rows = sparse_rows(ids, states.weights.numpy(), again.special_ids)
    np.testing.assert_array_equal(encoding.signals.sparse.token_ids, rows.token_ids)  # type: ignore[union-attr]
    np.testing.assert_allclose(encoding.signals.sparse.weights, rows.weights, atol=1e-5)  # type: ignore[union-attr]


def _tokenised(root: Path, texts: list[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    found: list[list[int]] = AutoTokenizer.from_pretrained(root)(texts, truncation=True, max_length=64)["input_ids"]
    return found


def test_a_first_training_makes_the_heads(tiny_text_model: Callable[..., Path], model: Path) -> None:
    bare = tiny_text_model(body="xlm-roberta", pooling="cls")
    config = TrainableConfig(model=str(bare), device="cpu", dtype="float32")
    with pytest.raises(EncoderError, match="no such head"):
        BgeM3.load(config)
    assert BgeM3.load(config, new_heads=16)([np.array([0, 5, 2], np.int32)]).multi.shape == (2, 16)
    with pytest.raises(EncoderError, match="has heads already"):
        BgeM3.load(TrainableConfig(model=str(model), device="cpu"), new_heads=16)

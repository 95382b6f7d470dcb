"""Scores of the packed cross-encoder against sentence-transformers' own, before and after saving."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from recsys_ray.models.cross_encoder import (
    CrossEncoder,
    CrossEncoderConfig,
    PairTokenizer,
    TrainableCrossEncoder,
    batches,
    cross_encoder_identity,
)
from recsys_ray.models.registry import build_cross_encoder
from recsys_ray.models.sentence_layout import EncoderError, read_pair_layout
from recsys_ray.models.trainable_bert import TrainableOptions

TinyModel = Callable[..., Path]
QUERIES = ["likes abc by def", "a", "", "likes " + "long " * 40, "x y z"]
TEXTS = ["def ghi", "b c d e f", "text", "short", "also " * 50]


@pytest.fixture(scope="module", params=["bert", "xlm-roberta"])
def folder(request: pytest.FixtureRequest, tiny_pair_model: TinyModel) -> Path:
    return tiny_pair_model(request.param)


def scorer(folder: Path, **changes: object) -> CrossEncoder:
    return build_cross_encoder(CrossEncoderConfig.model_validate(
        {"model": str(folder), "device": "cpu", "dtype": "float32", **changes}))


def theirs(folder: Path) -> np.ndarray:
    from sentence_transformers import CrossEncoder as TheirCrossEncoder

    model = TheirCrossEncoder(str(folder), device="cpu", local_files_only=True)
    return np.asarray(model.predict(list(zip(QUERIES, TEXTS, strict=True)), show_progress_bar=False))


def test_scores_are_sentence_transformers_own(folder: Path) -> None:
    found = scorer(folder).score(QUERIES, TEXTS)
    assert found.dtype == np.float32
    assert np.allclose(found, theirs(folder), atol=2e-5)
    assert found.std() > 1e-3       # a model whose scores are all alike would agree with anything


def test_the_batch_and_its_order_change_nothing(folder: Path) -> None:
    whole, small = scorer(folder), scorer(folder, token_budget=20)
    assert np.allclose(whole.score(QUERIES, TEXTS), small.score(QUERIES, TEXTS), atol=1e-5)
    turned = whole.score(QUERIES[::-1], TEXTS[::-1])[::-1]
    assert np.allclose(whole.score(QUERIES, TEXTS), turned, atol=1e-5)
    assert len(whole.score([], [])) == 0
    with pytest.raises(ValueError, match="2 queries for 1 texts"):
        whole.score(["a", "b"], ["c"])


def test_bf16_keeps_the_order_of_clear_scores(folder: Path) -> None:
    exact, rounded = scorer(folder).score(QUERIES, TEXTS), scorer(folder, dtype="bfloat16").score(QUERIES, TEXTS)
    assert np.abs(exact - rounded).max() < 0.1 * np.ptp(exact) + 0.02


def test_a_trainable_one_gives_the_same_and_saves_what_they_load(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TrainableCrossEncoder.load(str(folder), TrainableOptions(), "float32", "cpu").eval()
    ids, second = PairTokenizer(model.layout, 48, 1000)(QUERIES, TEXTS)
    with torch.no_grad():
        for one in model.parameters():
            one.add_(0.01 * torch.randn_like(one))      # as after a step
        logits = model(ids, second).numpy()
    model.save(tmp_path / "saved", 48, "# card")
    assert np.allclose(logits, theirs(tmp_path / "saved"), atol=2e-5)
    assert np.allclose(logits, scorer(tmp_path / "saved").score(QUERIES, TEXTS), atol=2e-5)
    assert not np.allclose(logits, scorer(folder).score(QUERIES, TEXTS), atol=1e-3)
    assert (tmp_path / "saved" / "README.md").read_text() == "# card"
    assert read_pair_layout(tmp_path / "saved").max_tokens == 48
    again = TrainableCrossEncoder.load(str(tmp_path / "saved"), TrainableOptions(), "float32", "cpu").eval()
    assert np.allclose(again(ids, second).detach().numpy(), logits, atol=1e-6)


def test_gradients_are_those_of_the_hubs_own_model(folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = TrainableCrossEncoder.load(str(folder), TrainableOptions(), "float32", "cpu").eval()
    ids, second = PairTokenizer(model.layout, 48, 1000)(QUERIES, TEXTS)
    model(ids, second).square().sum().backward()
    own = AutoModelForSequenceClassification.from_pretrained(str(folder)).eval()
    tokens = AutoTokenizer.from_pretrained(str(folder))(QUERIES, TEXTS, padding=True, truncation=True, max_length=48,
                                                        return_tensors="pt")
    own(**tokens).logits.square().sum().backward()
    wanted = {name: one.grad for name, one in own.named_parameters() if one.grad is not None}
    found = {name: one.grad for name, one in model._model[0].named_parameters() if one.grad is not None}
    assert set(found) == set(wanted)
    for name, one in wanted.items():
        assert torch.allclose(found[name], one, rtol=2e-3, atol=1e-4 * float(one.abs().max()) + 1e-6), name


def test_dropout_is_a_function_of_the_pair_and_the_seed(folder: Path) -> None:
    model = TrainableCrossEncoder.load(str(folder), TrainableOptions(dropout=0.3), "float32", "cpu").train()
    ids, second = PairTokenizer(model.layout, 48, 1000)(QUERIES, TEXTS)
    model.dropout_seed = 5
    once, alone = model(ids, second), model(ids[:2], second[:2])
    assert torch.allclose(once[:2], alone, atol=1e-5)
    model.dropout_seed = 6
    assert not torch.allclose(once, model(ids, second), atol=1e-3)


def test_a_body_gets_a_new_head_from_the_seed(tiny_text_model: TinyModel, tmp_path: Path) -> None:
    body = tiny_text_model()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(TrainableCrossEncoder.load(str(body), TrainableOptions(), "float32", "cpu"))
    first, same, other = (one.classifier.weight for one in found)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    with pytest.raises(EncoderError, match="fine-tune it first"):
        scorer(body)
    with pytest.raises(EncoderError, match=r"body\.lora"):
        TrainableCrossEncoder.load(str(body), TrainableOptions.model_validate({"lora": {}}), "float32", "cpu")


def test_the_activation_is_the_folders(tiny_pair_model: TinyModel) -> None:
    folder = tiny_pair_model("bert")
    logits = scorer(folder).score(QUERIES, TEXTS)
    config = json.loads((folder / "config.json").read_text())
    config["sentence_transformers"] = {"activation_fn": "torch.nn.modules.activation.Sigmoid"}
    (folder / "config.json").write_text(json.dumps(config))
    scores = scorer(folder).score(QUERIES, TEXTS)
    assert np.allclose(scores, 1 / (1 + np.exp(-logits)), atol=1e-5)
    assert np.allclose(scores, theirs(folder), atol=2e-5)


def test_the_identity_tells_models_apart(folder: Path, tiny_pair_model: TinyModel) -> None:
    one, same, other, cut = (cross_encoder_identity(CrossEncoderConfig.model_validate({"model": str(path), **changes}))
                             for path, changes in ((folder, {}), (folder, {"dtype": "float32"}),
                                                   (tiny_pair_model("bert", seed=9), {}), (folder, {"max_tokens": 16})))
    assert one == same
    assert one != other
    assert one != cut
    with pytest.raises(EncoderError, match="more than the"):
        scorer(folder, max_tokens=500)


def test_another_architecture_runs_through_sentence_transformers(tmp_path: Path, tiny_pair_model: TinyModel) -> None:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    folder = tiny_pair_model("bert")
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    DistilBertForSequenceClassification(DistilBertConfig(
        vocab_size=vocabulary, dim=32, n_heads=2, n_layers=1, hidden_dim=64, max_position_embeddings=64,
        num_labels=1)).save_pretrained(folder)
    assert np.allclose(scorer(folder).score(QUERIES, TEXTS), theirs(folder), atol=1e-5)


def test_batches_hold_the_budget_and_everything_once() -> None:
    lengths = [9, 7, 7, 5, 2, 2, 1]
    found = batches(np.arange(len(lengths)), lengths, 14)
    assert [one.tolist() for one in found] == [[0], [1, 2], [3, 4, 5, 6]]

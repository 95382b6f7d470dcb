"""Explanations of a concern model: what each way gives, and how it is scored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from recsys_ray.evaluation.explain import (
    AttentionReader,
    Listed,
    attended_tokens,
    chance_weights,
    deletion_insertion,
    occlusion,
    order_of,
    precision,
    ranked_attention,
)
from recsys_ray.models.bt_bert import BtBert, BtBertCard, Calibration, Concern
from recsys_ray.models.bt_bert_scorer import BtBertConfig, BtBertScorer
from recsys_ray.models.trainable_bert import TrainableOptions

ACNE = Concern(name="acne", query="ac")
LISTED = Listed(("aqua", "salicylic acid", "zinc, pca"), "a gel")


@pytest.fixture(scope="module")
def folder(tiny_text_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    card = BtBertCard(max_tokens=64, concerns=(ACNE,))
    model = BtBert.load(str(tiny_text_model()), card, TrainableOptions(), "float32", "cpu")
    root = tmp_path_factory.mktemp("model")
    model.save(root, Calibration())
    return root


@pytest.fixture(scope="module")
def scorer(folder: Path) -> BtBertScorer:
    return BtBertScorer(BtBertConfig(model=str(folder), dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def reader(folder: Path, scorer: BtBertScorer) -> AttentionReader:
    return AttentionReader(folder, scorer.tokenizer)


def test_every_token_of_the_list_belongs_to_its_ingredient(reader: AttentionReader) -> None:
    pair, owners = reader.pair(ACNE, LISTED)
    tokens = reader.tokens(pair.ids[pair.ingredients])
    letters = ["".join(token.removeprefix("##") for token, owner in zip(tokens, owners, strict=True) if owner == one)
               for one in range(3)]
    assert letters == ["aqua", "salicylicacid", "zinc,pca".replace(",", "[UNK]")]
    assert [token for token, owner in zip(tokens, owners, strict=True) if owner < 0] == ["[UNK]", "[UNK]"]


def test_attention_is_the_hubs_and_its_weights_add_up(reader: AttentionReader) -> None:
    pair, owners = reader.pair(ACNE, LISTED)
    attention = reader.attention(pair.ids)
    assert attention.shape == (4, len(pair.ids), len(pair.ids))
    np.testing.assert_allclose(attention.sum(axis=-1), 1, atol=1e-5)
    weights = ranked_attention(attention, pair, owners, 3)
    by_hand = attention[:, :3, pair.ingredients].sum(axis=(0, 1))
    assert weights[1] == pytest.approx(by_hand[owners == 1].sum())
    assert weights.sum() == pytest.approx(by_hand[owners >= 0].sum())


def test_the_published_method_takes_the_most_attended_of_every_row() -> None:
    attention = np.zeros((1, 4, 4))
    attention[0, :, 2] = 0.9
    attention[0, 3, 1] = 1.0
    tokens = ["[CLS]", "acid", ",", "zinc"]
    assert attended_tokens(attention, tokens, {"[CLS]"}, 1) == ["acid"]     # the comma is no explanation
    assert attended_tokens(attention, tokens, {"[CLS]"}, 9) == ["acid", "zinc"]


def test_occlusion_is_the_fall_of_the_logit(scorer: BtBertScorer) -> None:
    found = occlusion(scorer, ACNE, LISTED)
    whole, without = scorer.logits([LISTED.text(), "aqua, zinc, pca"], ["a gel"] * 2, (ACNE,))[:, 0]
    assert found[1] == pytest.approx(float(whole - without), abs=1e-5)


def test_precision_looks_at_as_many_as_act() -> None:
    weights = np.array([0.1, 0.9, 0.5, 0.5])
    assert order_of(weights).tolist() == [1, 2, 3, 0]
    assert precision(weights, {1}) == 1.0
    assert precision(weights, {2}) == 0.0
    assert precision(weights, {1, 0}) == 0.5
    assert precision(weights, {0, 1, 2, 3}) == 1.0
    assert np.isnan(precision(weights, set()))


class Planted:
    """A scorer whose answer is known: 0.9 with the acid in the list, else 0.1."""

    def score(self, texts: list[str], titles: list[str], concerns: tuple[Concern, ...]) -> np.ndarray:
        return np.array([[0.9 if "acid" in text else 0.1] for text in texts])


def test_areas_reward_the_order_that_takes_the_cause_first() -> None:
    right = deletion_insertion(Planted(), ACNE, LISTED, np.array([0, 1, 0]))    # type: ignore[arg-type]
    wrong = deletion_insertion(Planted(), ACNE, LISTED, np.array([2, 0, 1]))    # type: ignore[arg-type]
    # right: .9 .1 .1 .1 and .1 .9 .9 .9; wrong: .9 .9 .9 .1 and .1 .1 .1 .9, each three steps of a third
    assert right == pytest.approx((0.7 / 3, 2.3 / 3))
    assert wrong == pytest.approx((2.3 / 3, 0.7 / 3))


def test_chance_is_the_same_for_the_same_seed() -> None:
    assert np.array_equal(chance_weights(LISTED, 1), chance_weights(LISTED, 1))
    assert not np.array_equal(chance_weights(LISTED, 1), chance_weights(LISTED, 2))

"""BT-BERT against the model hub's own attentions, its modes, its start and its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_ray.models.bt_bert import BtBert, BtBertCard, Calibration, Concern, Mode, read_card
from recsys_ray.models.bt_bert_scorer import BtBertConfig, BtBertScorer
from recsys_ray.models.fronts import Fronts, hub_inputs
from recsys_ray.models.sentence_layout import EncoderError
from recsys_ray.models.trainable_bert import TrainableOptions

CONCERNS = (Concern(name="acne", query="ac"), Concern(name="redness", query="re"))
INGREDIENTS = ["aqua, glycerin", "aqua, salicylic acid, niacinamide, parfum", None]
TITLES = ["night cream", "a gel", "balm"]


def model_of(root: Path, mode: str, layout: str = "paper", **options: Any) -> BtBert:
    torch.manual_seed(0)
    card = BtBertCard.model_validate({"mode": mode, "layout": layout, "max_tokens": 48,
                                      "concerns": [one.model_dump() for one in CONCERNS]})
    return BtBert.load(str(root), card, TrainableOptions(dropout=0.0, **options), "float32", "cpu").eval()


def inputs_of(model: BtBert) -> list[Any]:
    tokens = model.tokenizer()
    products = tokens.products(INGREDIENTS, TITLES)
    if model.card.mode == "explicit":
        return [tokens.pair(None, one).ids for one in products]
    queries = [tokens.query(one.query) for one in CONCERNS]
    if model.card.style == "shared":
        return [tokens.shared(queries, one) for one in products]
    return [tokens.pair(query, one).ids for one in products for query in queries]


def attention_of_hub(root: Path, ids: Any, fronts: Fronts | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores before, weights after the softmax) of token 0 for itself in the last layer, (H,) each."""
    from transformers import AutoModel

    hub = AutoModel.from_pretrained(str(root), attn_implementation="eager").eval()
    with torch.no_grad():
        found = hub(input_ids=torch.from_numpy(ids.astype(np.int64))[None], output_attentions=True,
                    output_hidden_states=True, **hub_inputs(fronts, len(ids)))
        mixer, state = hub.encoder.layer[-1].attention.self, found.hidden_states[-2][0, 0]
        heads = hub.config.num_attention_heads
        query, key = mixer.query(state).view(heads, -1), mixer.key(state).view(heads, -1)
    return (query * key).sum(1) / query.shape[1] ** 0.5, found.attentions[-1][0, :, 0, 0]


@pytest.mark.parametrize("body", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("layout", ["paper", "seed"])
def test_logits_are_made_of_the_hubs_own_attention(tiny_text_model: Callable[..., Path], body: str, layout: str
                                                   ) -> None:
    root = tiny_text_model(body)
    for mode in ("presoftmax", "literal_softmax16", "affine16", "logodds"):
        model = model_of(root, mode, layout)
        ids = inputs_of(model)
        raw = model.raw(ids).detach()
        for one, found in zip(ids, raw, strict=True):
            before, after = attention_of_hub(root, one)
            mean = after.mean()
            wanted = {"presoftmax": before.sum(), "literal_softmax16": after.sum(), "affine16": 16 * after.sum(),
                      "logodds": torch.log(mean / (1 - mean))}[mode]
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_shared_product_is_answered_as_each_pair_alone(tiny_text_model: Callable[..., Path]) -> None:
    """By the hub's attentions of one query and the product, which does not see it."""
    root = tiny_text_model()
    for mode in ("presoftmax", "affine16", "logodds"):
        model = model_of(root, mode, "shared")
        tokens = model.tokenizer()
        queries = [tokens.query(one.query) for one in CONCERNS]
        raw_NC = model.raw(inputs_of(model)).detach()
        assert raw_NC.shape == (3, 2)
        for product, row in zip(tokens.products(INGREDIENTS, TITLES), raw_NC, strict=True):
            for query, found in zip(queries, row, strict=True):
                ids = tokens.pair(query, product).ids
                before, after = attention_of_hub(root, ids, Fronts(1, 3))
                mean = after.mean()
                wanted = {"presoftmax": before.sum(), "affine16": 16 * after.sum(),
                          "logodds": torch.log(mean / (1 - mean))}[mode]
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_query_has_a_constant_place(tiny_text_model: Callable[..., Path]) -> None:
    root = tiny_text_model()
    tokens = model_of(root, "presoftmax").tokenizer()
    product = tokens.products(["aqua, glycerin"], ["night cream"])[0]
    padded = tokens.query("a")
    assert len(padded) == 3
    assert padded[1] == padded[2]
    pair = tokens.pair(padded, product)
    assert pair.query == slice(0, 3)
    assert np.array_equal(pair.ids[pair.ingredients], product.ingredients)
    assert np.array_equal(pair.ids[pair.ingredients.stop + 1:], product.title)


def test_a_long_list_leaves_room_for_the_title(tiny_text_model: Callable[..., Path]) -> None:
    tokens = model_of(tiny_text_model(), "presoftmax").tokenizer()
    many = tokens.products([", ".join(["aqua"] * 3000)], ["a b c d e"])[0]
    pair = tokens.pair(tokens.query("a"), many)
    assert len(pair.ids) == 48
    assert np.array_equal(pair.ids[pair.ingredients.stop + 1:], many.title)


def test_a_thinned_list_has_whole_ingredients_in_their_order(tiny_text_model: Callable[..., Path]) -> None:
    tokens = model_of(tiny_text_model(), "presoftmax").tokenizer()
    names = ["aqua", "salicylic acid", "zinc", "parfum", "glycerin"]
    product = tokens.products([", ".join(names)], ["night cream"])[0]
    whole = [tokens.products([name], [""])[0].ingredients.tolist() for name in names]
    comma = [one for number, one in zip(product.numbers, product.ingredients.tolist(), strict=True)
             if number == 0][len(whole[0]):]
    seen = set()
    for seed in range(20):
        thin = product.thinned(0.4, np.random.default_rng(seed))
        kept = tuple(sorted(set(thin.numbers.tolist())))
        wanted = [token for number in kept for token in whole[number] + (comma if number < 4 else [])]
        assert thin.ingredients.tolist() == wanted
        assert len(thin.spans) == len(wanted)
        seen.add(kept)
    assert len(seen) > 10
    assert 2 < np.mean([len(one) for one in seen]) < 4


def test_a_query_that_does_not_fit_is_named(tiny_text_model: Callable[..., Path]) -> None:
    tokens = model_of(tiny_text_model(), "presoftmax").tokenizer()
    with pytest.raises(EncoderError, match=r"'a b c d'.*room for 3"):
        tokens.query("a b c d")
    with pytest.raises(EncoderError, match="no token"):
        tokens.query(" ")


@pytest.fixture(scope="module")
def literal(tiny_text_model: Callable[..., Path]) -> BtBert:
    return model_of(tiny_text_model(), "literal_softmax16")


@settings(max_examples=25)
@given(ingredients=st.text(max_size=60), title=st.text(max_size=30), growth=st.floats(-30, 30))
def test_the_published_logit_never_says_no(literal: BtBert, ingredients: str, title: str, growth: float) -> None:
    """Weights are not negative, so their sum is not, so no probability is below one half, whatever is learned."""
    tokens = literal.tokenizer()
    with torch.no_grad():
        literal.query.weight.copy_(growth * torch.eye(len(literal.query.weight)))
        pair = tokens.pair(tokens.query("ac"), tokens.products([ingredients], [title])[0])
        assert float(torch.sigmoid(literal([pair.ids]))[0]) >= 0.5


@pytest.mark.parametrize("mode", [mode for mode in get_args(Mode) if mode != "literal_softmax16"])
def test_the_first_predictions_equal_the_prior(tiny_text_model: Callable[..., Path], mode: str) -> None:
    model = model_of(tiny_text_model(), mode)
    ids = inputs_of(model)
    prior = torch.tensor([0.2, 0.05]) if mode == "explicit" else torch.tensor(0.13)
    model.start(ids, prior)
    found = torch.sigmoid(model(ids)).detach().mean(dim=0)
    torch.testing.assert_close(found, prior, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["presoftmax", "affine16", "logodds"])
def test_training_takes_a_running_mean_off_and_saves_the_same_model(tiny_text_model: Callable[..., Path],
                                                                   mode: str) -> None:
    """The mean follows the batches of training alone; settled, the mean prediction is the prior."""
    model = model_of(tiny_text_model(), mode)
    ids = inputs_of(model)
    model.start(ids, torch.tensor(0.2))
    with torch.no_grad():
        model.key.weight.add_(0.1 * torch.randn_like(model.key.weight))     # as learned: they may start at zero
    told = {name: one.clone() for name, one in model.head().items()}
    model.take_head(model.card, told)           # as a trained model is opened to learn more
    before = model(ids).detach()
    model.recenter(ids)
    torch.testing.assert_close(model(ids).detach(), before, rtol=1e-3, atol=1e-3)
    raw = model.raw(ids).detach()
    with torch.no_grad():
        model.mean.add_(1.0)        # as if all scores had fallen by 1
    model.train()
    model(ids)
    model.eval()
    torch.testing.assert_close(model.mean, raw.mean() + 0.9, rtol=1e-4, atol=1e-4)
    model.settle(ids, 0.1)
    torch.testing.assert_close(torch.sigmoid(model(ids)).detach().mean(), torch.tensor(0.1), rtol=1e-3, atol=1e-4)
    head = model.head()
    torch.testing.assert_close(head["scale"] * raw + head["bias"], model(ids), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("mode", "kept"), [("presoftmax", 0.0), ("explicit", 1.0)])
def test_what_moves_a_concerns_scores_together_counts_less(tiny_text_model: Callable[..., Path], mode: str, kept: float
                                                           ) -> None:
    """Of the gradient: a tenth of each concern's mean is left; of the mean of all nothing where a mean is taken off.

    The last pair does not count: its gradient stays zero, and it is in no mean.
    """
    model = model_of(tiny_text_model(), mode, "shared").train()
    got: list[torch.Tensor] = []
    original = model.raw

    def raw(ids: Any) -> torch.Tensor:
        found = original(ids) + torch.zeros((), requires_grad=True)
        found.retain_grad()
        got.append(found)
        return found

    model.raw = raw  # type: ignore[method-assign]
    ids = inputs_of(model)
    asked = torch.tensor([[1.0, 3.0], [2.0, 3.0], [6.0, 0.0]])
    (model(ids) * asked).sum().backward()
    counted = (asked > 0).float()
    wanted = counted * (asked - 0.9 * asked.sum(dim=0) / counted.sum(dim=0))
    wanted = wanted - (1 - kept) * counted * wanted.sum() / counted.sum()
    assert wanted[2, 1] == 0
    torch.testing.assert_close(got[0].grad, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["paper", "shared"])
@pytest.mark.parametrize("mode", get_args(Mode))
def test_a_saved_model_scores_the_same_and_is_an_ordinary_folder(tiny_text_model: Callable[..., Path], mode: str,
                                                                 layout: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    model = model_of(tiny_text_model(), mode, layout)
    ids = inputs_of(model)
    model.start(ids, torch.tensor(0.3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    logits = model(ids).detach().reshape(len(TITLES), len(CONCERNS))
    model.save(tmp_path / "saved", Calibration(temperature=2.0, thresholds={"acne": 0.4}), "# a card")
    assert AutoModel.from_pretrained(str(tmp_path / "saved")).config.num_hidden_layers == 2
    again = BtBert.load(str(tmp_path / "saved"), None, TrainableOptions(dropout=0.0), "float32", "cpu").eval()
    torch.testing.assert_close(again(ids).reshape(logits.shape), logits)
    scorer = BtBertScorer(BtBertConfig(model=str(tmp_path / "saved"), dtype="float32", device="cpu", token_budget=70))
    np.testing.assert_allclose(scorer.logits(INGREDIENTS, TITLES), logits.numpy(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(scorer.score(INGREDIENTS, TITLES), torch.sigmoid(logits / 2).numpy(), atol=1e-4)
    assert scorer.card.calibration.thresholds == {"acne": 0.4}


def test_a_new_concern_is_a_new_query(tiny_text_model: Callable[..., Path], tmp_path: Path) -> None:
    new = Concern(name="age", query="age")
    for mode in ("presoftmax", "explicit"):
        model = model_of(tiny_text_model(), mode)
        model.save(tmp_path / mode, Calibration())
        scorer = BtBertScorer(BtBertConfig(model=str(tmp_path / mode), dtype="float32", device="cpu"))
        if mode == "explicit":
            with pytest.raises(EncoderError, match="no output for age; it knows acne, redness"):
                scorer.score(INGREDIENTS, TITLES, (new,))
        else:
            both = scorer.score(INGREDIENTS, TITLES, (*CONCERNS, new))
            assert both.shape == (3, 3)
            np.testing.assert_allclose(both[:, :2], scorer.score(INGREDIENTS, TITLES), atol=1e-6)


def test_known_outputs_are_kept_when_a_concern_is_added(tiny_text_model: Callable[..., Path], tmp_path: Path) -> None:
    model = model_of(tiny_text_model(), "explicit")
    model.save(tmp_path / "old", Calibration())
    card = model.card.replace(concerns=[{"name": "age", "query": "age"}, *[one.model_dump() for one in CONCERNS]])
    wider = BtBert.load(str(tmp_path / "old"), card, TrainableOptions(), "float32", "cpu")
    torch.testing.assert_close(wider.output.weight[1:], model.output.weight)
    assert read_card(tmp_path / "old").names() == ["acne", "redness"]


def test_a_bare_body_needs_concerns_and_a_folder_without_a_card_is_named(tiny_text_model: Callable[..., Path]) -> None:
    root = tiny_text_model()
    with pytest.raises(EncoderError, match="bare body"):
        BtBert.load(str(root), None, TrainableOptions(), "float32", "cpu")
    with pytest.raises(EncoderError, match="finetune_bt_bert"):
        BtBertScorer(BtBertConfig(model=str(root)))

"""Losses against worked examples, numerical gradients and sentence-transformers' own."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recsys_ray.evaluation.gate import GateConfig
from recsys_ray.evaluation.significance import Units
from recsys_ray.training.contrastive import ContrastiveConfig, GuideScores, PairBatch, contrastive_backward
from recsys_ray.training.losses import (
    TeacherError,
    attribute_cross_entropy,
    distillation_kl,
    guided,
    info_nce,
    known_to_differ,
    margin_mse,
    matryoshka,
    require_better_teacher,
    same_key,
    scores,
)


def wide(*rows: Sequence[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_scores_are_cosines_or_products() -> None:
    """q = (3, 4), x = (4, 3): the product is 24, both are 5 long, the cosine 24 / 25."""
    query, document = wide([3, 4]), wide([4, 3], [0, 2])
    assert scores(query, document, "dot").tolist() == [[24, 8]]
    assert torch.allclose(scores(query, document, "cosine"), wide([24 / 25, 4 / 5]))


def test_half_precision_is_scored_in_float32() -> None:
    rows = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(scores(rows, rows, "dot"), rows.float() @ rows.float().T)


def test_info_nce_by_hand() -> None:
    """s = (0, log 2, log 3), positive 0, t = 1: l = log(1 + 2 + 3) - 0 = log 6.

    Without document 2: log 3. With document 1 counted four times: log(1 + 8 + 3) = log 12.
    At t = 1/2 scores double: log(1 + 4 + 9) = log 14.
    """
    score, positive = wide([0, math.log(2), math.log(3)]), torch.tensor([0])
    assert info_nce(score, positive, 1.0).item() == pytest.approx(math.log(6))
    assert info_nce(score, positive, 0.5).item() == pytest.approx(math.log(14))
    allowed = torch.tensor([[True, True, False]])
    assert info_nce(score, positive, 1.0, allowed).item() == pytest.approx(math.log(3))
    weights = wide([0, math.log(4), 0])
    assert info_nce(score, positive, 1.0, None, weights).item() == pytest.approx(math.log(12))
    alone = torch.tensor([[True, False, False]])
    assert info_nce(score, positive, 1.0, alone).item() == 0


def test_masks_by_hand() -> None:
    assert same_key(torch.tensor([1, 2]), torch.tensor([2, 1, 3])).tolist() == [[False, True, False],
                                                                               [True, False, False]]
    guide, of_positive = wide([0.5, 0.41, 0.39, 0.5], [0.2, 0.9, 0.1, -1]), torch.tensor([0.5, 0.9]).double()
    assert guided(guide, of_positive, 0.1).tolist() == [[True, True, False, True], [False, True, False, False]]
    assert guided(guide, of_positive).tolist() == [[True, False, False, True], [False, True, False, False]]


def test_margin_mse_by_hand() -> None:
    """Margins of the student 1 and 3, of the teacher 2 and 1: ((1 - 2)^2 + (3 - 1)^2) / 2 = 2.5.

    The second query's teacher knows its positive alone, the third's nothing: nothing to learn.
    """
    nan = math.nan
    student = wide([3, 2, 0, 9], [1, 2, 3, 4], [1, 2, 3, 4]).requires_grad_()
    teacher = wide([7, 5, 6, nan], [nan, 1, nan, nan], [nan] * 4)
    found = margin_mse(student, teacher, torch.tensor([0, 1, 2]))
    assert found.tolist() == [2.5, 0, 0]
    found.sum().backward()
    # d/ds_1 = -2 (1 - 2) / 2 = 1, d/ds_2 = -2 (3 - 1) / 2 = -2, and the positive takes the opposite
    assert student.grad is not None
    assert student.grad.tolist() == [[1, 1, -2, 0], [0] * 4, [0] * 4]


def test_kl_by_hand() -> None:
    """P = (3/4, 1/4), S = (1/2, 1/2) over the two scored documents: 3/4 log(3/2) + 1/4 log(1/2)."""
    nan = math.nan
    student, teacher = wide([2, 5, 2], [1, 2, 3]).requires_grad_(), wide([math.log(3), nan, 0], [nan, nan, 4])
    found = distillation_kl(student, teacher, torch.tensor([0, 2]))
    assert found.tolist() == pytest.approx([0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0])
    found.sum().backward()
    assert student.grad is not None
    assert torch.allclose(student.grad, wide([0.5 - 0.75, 0, 0.5 - 0.25], [0, 0, 0]))     # S - P


def test_a_teacher_that_left_the_positive_out_is_refused() -> None:
    teacher = wide([1, 2], [math.nan, 2])
    for loss in (margin_mse, distillation_kl):
        with pytest.raises(TeacherError, match="query 1 and not its positive"):
            loss(wide([1, 2], [1, 2]), teacher, torch.tensor([0, 0]))


def test_matryoshka_sums_the_weighted_losses_of_prefixes() -> None:
    query, document = wide([1, 2, 3]), wide([4, 5, 6])
    found = matryoshka(lambda q, x: (q * x).sum(), query, document, {3: 1.0, 1: 0.5})
    assert found.item() == (4 + 10 + 18) + 0.5 * 4
    for sizes in ({4: 1.0}, {}):
        with pytest.raises(ValueError, match="matryoshka"):
            matryoshka(lambda q, x: (q * x).sum(), query, document, sizes)


POSITIVE = torch.tensor([0, 1, 3])
ALLOWED = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0], [1, 0, 1, 1, 1]]).bool()
TEACHER = wide([1, 2, 0, math.nan, 3], [math.nan, 1, -1, 0, 0], [math.nan] * 5)


@pytest.mark.parametrize("loss", [
    lambda s: info_nce(s, POSITIVE, 0.3, ALLOWED, torch.arange(15).view(3, 5).double() / 10 * (1 - torch.eye(3, 5))),
    lambda s: info_nce(s, POSITIVE, 0.7),
    lambda s: margin_mse(s, TEACHER, POSITIVE),
    lambda s: distillation_kl(s, TEACHER, POSITIVE),
])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_gradients_are_those_of_differences(loss: Callable[[Tensor], Tensor], similarity: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    query, document = (torch.randn(rows, 6, generator=generator, dtype=torch.float64, requires_grad=True)
                       for rows in (3, 5))

    def total(query: Tensor, document: Tensor) -> Tensor:
        return matryoshka(lambda q, x: loss(scores(q, x, similarity)), query, document, {6: 1.0, 2: 0.3})

    assert torch.autograd.gradcheck(total, (query, document))


def test_only_a_teacher_shown_to_be_better_may_teach() -> None:
    rng = np.random.default_rng(0)
    student = rng.random(200)
    better = np.clip(student + 0.1 + rng.normal(0, 0.1, 200), 0, 2)
    assert require_better_teacher(better, student).difference.low > 0
    with pytest.raises(TeacherError, match=r"not measurably better than the student \(worse\)"):
        require_better_teacher(student, better)
    with pytest.raises(TeacherError, match="undecidable"):
        require_better_teacher(student + rng.normal(0, 0.1, 200), student)
    with pytest.raises(TeacherError, match="at least 30 are needed"):
        require_better_teacher(better[:20], student[:20])
    with pytest.raises(TeacherError, match="undecidable"):
        require_better_teacher(better, student, gate=GateConfig(margin=0.2))
    with pytest.raises(TeacherError, match="40 units"):     # 200 queries of 40 people are not 200 witnesses
        require_better_teacher(better, student, Units.of(np.arange(200) // 5), GateConfig(min_units=50))
    with pytest.raises(TeacherError, match="one value a query"):
        require_better_teacher(better[:-1], student)


# --- sentence-transformers as the oracle: the same model, the same texts, loss and gradients of every parameter ---

QUERIES = ["warm coat", "red shoes for a wedding", "desk lamp", "a book on bees", "tea", "night cream"]
POSITIVES = ["winter coat, wool", "satin pumps", "lamp with clip", "the bee keeper", "green tea 100g", "night balm"]
NEGATIVES = ["summer dress", "red socks", "floor lamp standing", "a book on ants", "coffee beans", "sun cream"]


@pytest.fixture(scope="module")
def model(tiny_text_model: Callable[..., Path]) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(tiny_text_model()), device="cpu").double().eval()


def gradients(model: Any) -> list[Tensor]:
    found = [one.grad.clone() for one in model.parameters() if one.grad is not None]
    model.zero_grad()
    assert len(found) > 10
    return found


def theirs(model: Any, loss: Any, *columns: Sequence[str]) -> tuple[float, list[Tensor]]:
    value = loss([dict(model.preprocess(list(column))) for column in columns], torch.zeros(len(columns[0])))
    value.backward()
    return float(value.detach()), gradients(model)


def ours(model: Any, config: ContrastiveConfig, *columns: Sequence[str], **given: Any) -> tuple[float, list[Tensor]]:
    queries, documents = columns[0], [text for column in columns[1:] for text in column]

    def encode(token_ids: Sequence[np.ndarray]) -> Tensor:
        padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(one).long() for one in token_ids], batch_first=True,
                                                 padding_value=model.tokenizer.pad_token_id)
        lengths = torch.tensor([len(one) for one in token_ids])
        features = {"input_ids": padded, "attention_mask": (torch.arange(padded.shape[1]) < lengths[:, None]).long()}
        return model(features)["sentence_embedding"]  # type: ignore[no-any-return]

    def tokens(texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(one, dtype=np.int32) for one in model.tokenizer(list(texts))["input_ids"]]

    count = len(queries)
    owner = np.concatenate([np.full(count, -1), *(np.arange(count) for _ in columns[2:])])
    batch = PairBatch(
        tokens(queries), tokens(documents), positive=np.arange(count), query_group=np.arange(count),
        document_group=np.arange(len(documents)), negative_of=owner,
        document_text=np.array([zlib.crc32(text.encode()) for text in documents]))
    return contrastive_backward(encode, encode, batch, config, **given).loss, gradients(model)


def assert_equal(found: tuple[float, list[Tensor]], wanted: tuple[float, list[Tensor]]) -> None:
    assert found[0] == pytest.approx(wanted[0], abs=1e-11)
    assert max(float((one - other).abs().max()) for one, other in zip(found[1], wanted[1], strict=True)) < 1e-11
    assert max(float(one.abs().max()) for one in wanted[1]) > 1e-5


@pytest.mark.parametrize("columns", [(QUERIES, POSITIVES), (QUERIES, POSITIVES, NEGATIVES)], ids=["pairs", "triplets"])
@pytest.mark.parametrize("mini_batch", [None, 4])
def test_ranking_losses_are_sentence_transformers(model: Any, columns: Any, mini_batch: int | None) -> None:
    from sentence_transformers.util import dot_score

    st = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    config = ContrastiveConfig(temperature=1 / 20, mini_batch=mini_batch)
    wanted = theirs(model, st.MultipleNegativesRankingLoss(model, scale=20), *columns)
    assert_equal(ours(model, config, *columns), wanted)
    assert_equal(theirs(model, st.CachedMultipleNegativesRankingLoss(model, scale=20, mini_batch_size=4), *columns),
                 wanted)
    dot = st.MultipleNegativesRankingLoss(model, scale=3, similarity_fct=dot_score)
    assert_equal(ours(model, config.replace(similarity="dot", temperature=1 / 3), *columns),
                 theirs(model, dot, *columns))
    both = st.MultipleNegativesRankingLoss(model, scale=20, directions=("query_to_doc", "doc_to_query"),
                                           partition_mode="per_direction")
    assert_equal(ours(model, config.replace(symmetric=True), *columns), theirs(model, both, *columns))


@pytest.mark.parametrize("mini_batch", [None, 4])
def test_matryoshka_is_sentence_transformers(model: Any, mini_batch: int | None) -> None:
    st = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    inner = (st.MultipleNegativesRankingLoss(model, scale=20) if mini_batch is None
             else st.CachedMultipleNegativesRankingLoss(model, scale=20, mini_batch_size=mini_batch))
    loss = st.MatryoshkaLoss(model, inner, matryoshka_dims=[32, 16, 5], matryoshka_weights=[1.0, 0.7, 0.2])
    config = ContrastiveConfig(temperature=1 / 20, mini_batch=mini_batch, matryoshka={32: 1.0, 16: 0.7, 5: 0.2})
    columns = (QUERIES, POSITIVES, NEGATIVES)
    assert_equal(ours(model, config, *columns), theirs(model, loss, *columns))


@pytest.mark.parametrize("margin", [-2e-4, 0.0, 2e-4])
@pytest.mark.parametrize("mini_batch", [None, 4])
def test_guided_loss_is_sentence_transformers(model: Any, tiny_text_model: Callable[..., Path], margin: float,
                                              mini_batch: int | None) -> None:
    """Without its anchor-anchor and positive-positive terms, which are not part of this loss.

    The margins are those of a random guide, whose cosines differ by some 2e-4.
    """
    from sentence_transformers import SentenceTransformer

    st = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    guide = SentenceTransformer(str(tiny_text_model(seed=1)), device="cpu").double().eval()
    columns = (QUERIES, POSITIVES, NEGATIVES)
    embedded = [torch.from_numpy(guide.encode(list(one), normalize_embeddings=True)) for one in columns]
    given = GuideScores(embedded[0], torch.cat(embedded[1:]))
    settings = {"temperature": 0.05, "margin": margin, "contrast_anchors": False, "contrast_positives": False}
    loss = (st.GISTEmbedLoss(model, guide, **settings) if mini_batch is None
            else st.CachedGISTEmbedLoss(model, guide, mini_batch_size=4, **settings))
    config = ContrastiveConfig(temperature=0.05, mini_batch=mini_batch, guide_margin=margin)
    found = ours(model, config, *columns, guide=given)
    assert_equal(found, theirs(model, loss, *columns))
    unguided = ours(model, config.replace(guide_margin=None), *columns)
    assert abs(unguided[0] - found[0]) > 1e-5


@pytest.mark.parametrize(("kind", "temperature"), [("margin_mse", 1.0), ("kl", 1.0), ("kl", 0.4)])
def test_distillation_is_sentence_transformers(model: Any, kind: Any, temperature: float) -> None:
    """What distillation adds to the ranking loss, over each query's positive and two negatives of its own."""
    from sentence_transformers.util import pairwise_cos_sim

    st = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    count, columns = len(QUERIES), (QUERIES, POSITIVES, NEGATIVES, NEGATIVES[::-1])
    wanted = torch.from_numpy(np.random.default_rng(2).normal(size=(count, 3)))
    loss = (st.MarginMSELoss(model, similarity_fct=pairwise_cos_sim) if kind == "margin_mse"
            else st.DistillKLDivLoss(model, similarity_fct=pairwise_cos_sim, temperature=temperature))
    value = loss([dict(model.preprocess(list(column))) for column in columns], wanted)
    value.backward()
    distilled = float(value.detach()), gradients(model)
    teacher = torch.full((count, 3 * count), math.nan, dtype=torch.float64)
    for column in range(3):
        teacher[torch.arange(count), torch.arange(count) + column * count] = wanted[:, column]
    config = ContrastiveConfig.model_validate({"distillation": {
        "kind": kind, "temperature": temperature, "teacher_temperature": temperature}})
    whole = ours(model, config, *columns, teacher=teacher)
    ranked = ours(model, config.replace(distillation=None), *columns)
    found = [one - other for one, other in zip(whole[1], ranked[1], strict=True)]
    assert_equal((whole[0] - ranked[0], found), distilled)


def test_a_column_stands_as_negative_only_where_it_is_known_to_differ_in_what_is_shared() -> None:
    """Anchor (dress, denim, crew) and positive (dress, denim, unknown) share the first two."""
    anchor = torch.tensor([[0, 4, 2], [0, 4, 2], [-1, -1, -1]])
    positive = torch.tensor([[0, 4, -1], [1, 5, 3], [0, 4, 2]])
    columns = torch.tensor([[0, 4, 3], [0, 5, 2], [1, -1, -1], [0, -1, -1], [-1, -1, -1]])
    found = known_to_differ(anchor, positive, columns)
    assert found[0].tolist() == [False, True, True, False, False]   # another neckline does not make it unlike
    assert found[1].all()           # nothing known is shared (views of one product): every column may
    assert found[2].all()


def test_attribute_cross_entropy_by_hand() -> None:
    """Two equal logits: log 2, four: log 4. Weights 1 and 2: (log 2 + 2 log 4) / 3; the second unknown: log 2 / 3."""
    logits = {"material": torch.zeros(3, 2), "neckline": torch.zeros(3, 4)}
    found = attribute_cross_entropy(logits, torch.tensor([[0, 3], [1, -1], [-1, -1]]), {"neckline": 2.0})
    assert found.tolist() == pytest.approx([5 * math.log(2) / 3, math.log(2) / 3, 0.0], rel=1e-6)

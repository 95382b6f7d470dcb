"""Ranking and classification metrics with every choice in the name: one number, one definition.

    MetricSpec.parse("nDCG(discount=1/rank)@10")   what is measured, frozen, with a printed definition
    rank_judgments(judgments, candidates)          where each judged product stands in each answer
    score(ranked, spec)                            one value per query, NaN where the metric is undefined

Only judged products can carry gain, so an answer enters as the ranks of the judged products in it
(0 = not in it). Memory grows with the judgments, not with queries x depth; the answers may arrive
in pieces of any size. Recall, Precision, MRR and MAP are computed by trec_eval (pytrec_eval); nDCG
is ours, because trec_eval takes no fractional gains (ESCI's are 1, 0.1, 0.01) and knows neither the
1/rank discount nor a constant ideal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, ValidationError, model_validator

from recsys_ray.config import Config

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Measure = Literal["nDCG", "Recall", "Precision", "MRR", "MAP", "Judged"]
ALIASES = {"ndcg": "nDCG", "recall": "Recall", "r": "Recall", "precision": "Precision", "p": "Precision",
           "mrr": "MRR", "rr": "MRR", "map": "MAP", "ap": "MAP", "judged": "Judged"}
NAME = re.compile(r"(?P<measure>[A-Za-z]+)(?:\((?P<options>[^()]*)\))?(?:@(?P<k>\d+))?")
QUERIES_PER_CALL = 8192  # of trec_eval: bounds its dictionaries


class MetricError(ValueError):
    """A metric that cannot be read, or judgments and answers it cannot be computed on."""


class MetricSpec(Config):
    """One metric, all of its choices explicit; `name` is short and unique, `definition` is a paragraph."""

    measure: Measure
    k: int | None = Field(default=None, ge=1)                   # cut-off; None: the whole answer
    gain: Literal["linear", "exponential"] = "linear"           # g or 2^g - 1 (nDCG)
    discount: Literal["log2", "1/rank"] = "log2"                # 1/log2(1 + rank) or 1/rank (nDCG)
    ideal: Literal["query", "constant"] = "query"               # the query's judgments in best order, or k best ones
    ideal_gain: float | None = Field(default=None, gt=0)        # gain of each of the k products of a constant ideal
    scope: Literal["catalogue", "judged"] = "catalogue"         # the answer as given, or the order of judged ones
    unjudged: Literal["zero", "skip"] = "zero"                  # an unjudged product has gain 0, or is taken out
    relevant_gain: float | None = Field(default=None, gt=0)     # binary metrics: relevant from here; None: given later
    no_relevant: Literal["skip", "zero"] = "skip"               # a query without any relevant product

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return _parse(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.measure in ("Recall", "Precision", "Judged") and self.k is None:
            raise ValueError(f"{self.measure} needs a cut-off, as in {self.measure}@10")
        if self.measure != "nDCG" and (self.gain, self.discount, self.ideal) != ("linear", "log2", "query"):
            raise ValueError(f"gain, discount and ideal belong to nDCG, not to {self.measure}")
        if (self.ideal == "constant") != (self.ideal_gain is not None):
            raise ValueError("ideal=constant and ideal_gain go together, as in nDCG(ideal=constant,ideal_gain=2)@10")
        if self.ideal == "constant" and self.k is None:
            raise ValueError("a constant ideal needs a cut-off")
        if self.measure == "Judged" and (self.scope, self.unjudged) != ("catalogue", "zero"):
            raise ValueError("Judged@k counts unjudged products, so it cannot take them out")
        return self

    @classmethod
    def parse(cls, name: str) -> Self:
        """The metric of a name such as `nDCG@10`, `Recall@100` or `nDCG(gain=exponential,discount=1/rank)@10`."""
        try:
            return cls.model_validate(name)
        except ValidationError as error:
            raise MetricError(f"metric {name!r}: {error.errors()[0]['msg']}") from None

    @property
    def name(self) -> str:
        """The measure, the choices that are not the default, and the cut-off; `parse` reads it back."""
        fields = type(self).model_fields
        given = [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
                 for key, value in self.model_dump(exclude={"measure", "k"}).items() if value != fields[key].default]
        return self.measure + (f"({','.join(given)})" if given else "") + (f"@{self.k}" if self.k else "")

    def definition(self, relevant_gain: float = 1.0) -> str:
        """The whole definition in words and formulas, to be printed beside the figures."""
        return " ".join(_sentences(self, self.relevant_gain or relevant_gain))


def _parse(name: str) -> dict[str, Any]:
    found = NAME.fullmatch(name.strip().replace(" ", ""))
    measure = ALIASES.get(found["measure"].lower()) if found else None
    if found is None or measure is None:
        raise ValueError(f"no such metric; a name is one of {', '.join(get_args(Measure))}, "
                         "then options in brackets, then @k, as in nDCG(discount=1/rank)@10")
    values: dict[str, Any] = {"measure": measure, "k": int(found["k"]) if found["k"] else None}
    for option in filter(None, (found["options"] or "").split(",")):
        key, _, value = option.partition("=")
        values[key] = value
    return values


def _sentences(spec: MetricSpec, relevant_gain: float) -> Iterator[str]:
    top = f"the first {spec.k} products" if spec.k else "the whole answer"
    if spec.measure == "nDCG":
        gain = "gain" if spec.gain == "linear" else "2^gain - 1"
        discount = "log2(1 + rank)" if spec.discount == "log2" else "rank"
        ideal = ("the same sum over the query's judged products in their best order" if spec.ideal == "query"
                 else f"the same sum over {spec.k} products of gain {spec.ideal_gain:g}, the same for every query")
        yield f"{spec.name}: sum of ({gain}) / {discount} over {top}, divided by {ideal}."
    elif spec.measure == "Judged":
        yield f"{spec.name}: share of {top} that carry a judgment (places left empty count as unjudged)."
        return
    else:
        formula = {
            "Recall": f"share of the query's relevant products found in {top}",
            "Precision": f"number of relevant products in {top}, divided by {spec.k}",
            "MRR": f"1 / rank of the first relevant product in {top}, 0 if there is none",
            "MAP": f"mean over the query's relevant products of the precision at each one's rank, 0 outside {top}",
        }[spec.measure]
        yield f"{spec.name}: {formula}; relevant means gain >= {relevant_gain:g}."
    if spec.scope == "judged":
        yield "Scope: only the order of the judged products; those missing from the answer stand last, worst first."
    elif spec.unjudged == "skip":
        yield "Scope: whole catalogue; products without a judgment are taken out and those below move up."
    else:
        yield "Scope: whole catalogue; a product without a judgment has gain 0."
    if spec.ideal == "query":
        yield ("A query without a relevant product is left out and counted." if spec.no_relevant == "skip"
               else "A query without a relevant product counts 0.")
    yield "A query without an answer counts 0. The mean is over queries."


@dataclass(frozen=True)
class RankedJudgments:
    """Judgments of Q queries and where one system put them: arrays of J, sorted by query."""

    query_ids: tuple[str, ...]      # length Q; queries without an answer are among them
    query: Ints                   # index into query_ids
    gain: Floats                  # >= 0
    rank: Ints                    # 1 = top of the answer, 0 = not in the answer
    length: Ints                  # products in each answer


def rank_judgments(judgments: pa.Table, candidates: Iterable[pa.Table],
                   query_ids: Sequence[str] | None = None) -> RankedJudgments:
    """Where each judgment stands in the answers; `judgments` is a JUDGMENT table, `candidates` CANDIDATE tables.

    `query_ids` are the queries to score (default: those with a judgment, sorted); judgments and
    answers of other queries are left out. Errors: `MetricError` for a pair judged twice, a negative
    or missing gain, a product listed twice for one query, or a rank below 1 or taken twice.
    """
    if query_ids is None:
        query_ids = sorted(str(one) for one in judgments["query_id"].unique().to_pylist())
    queries = pa.array(query_ids, pa.string())
    products = pa.array(judgments["product_id"].unique().to_pylist(), pa.string())
    key_J = _pair_keys(judgments, queries, products)
    gain_J = judgments["gain"].cast(pa.float64()).to_numpy()
    keep = key_J >= 0
    order = np.argsort(key_J[keep], kind="stable")
    key_J, gain_J = key_J[keep][order], gain_J[keep][order]
    _check_judgments(key_J, gain_J, query_ids, products)
    rank_J, length_Q = np.zeros(len(key_J), np.int64), np.zeros(len(query_ids), np.int64)
    best_Q, taken = np.zeros(len(query_ids), np.int64), []
    for table in candidates:
        key, rank = _pair_keys(table, queries, products), table["rank"].cast(pa.int64()).to_numpy()
        query = _positions(table["query_id"], queries)
        _count_ranks(query, rank, length_Q, best_Q, query_ids)
        place = np.searchsorted(key_J, key)
        hit = (key >= 0) & (place < len(key_J)) & (key_J[np.minimum(place, len(key_J) - 1)] == key)
        taken.append(place[hit])
        rank_J[place[hit]] = rank[hit]
    _check_answers(key_J, taken, rank_J, length_Q, best_Q, query_ids, products)
    return RankedJudgments(tuple(query_ids), key_J // max(1, len(products)), gain_J, rank_J, length_Q)


def _positions(column: pa.ChunkedArray[Any], values: pa.Array[Any]) -> Ints:
    """Index of each string in `values`, -1 where absent."""
    found: Any = pc.index_in(column.cast(pa.string()), value_set=values)
    return np.asarray(found.fill_null(-1).to_numpy(), dtype=np.int64)


def _pair_keys(table: pa.Table, queries: pa.Array[Any], products: pa.Array[Any]) -> Ints:
    """One integer per (query, product) row, sorted like (query index, product index); -1 where either is unknown."""
    query, product = _positions(table["query_id"], queries), _positions(table["product_id"], products)
    return np.where((query < 0) | (product < 0), -1, query * len(products) + product)


def _check_judgments(key_J: Ints, gain_J: Floats, query_ids: Sequence[str], products: pa.Array[Any]) -> None:
    twice = np.flatnonzero(key_J[1:] == key_J[:-1])
    if len(twice):
        raise MetricError(f"{_pair(key_J[twice[0]], query_ids, products)} is judged more than once "
                          f"({len(twice)} such rows); merge the judgments first")
    bad = np.flatnonzero(~(gain_J >= 0))  # catches NaN too
    if len(bad):
        raise MetricError(f"{_pair(key_J[bad[0]], query_ids, products)} has gain {gain_J[bad[0]]}; gains are >= 0")


def _count_ranks(query: Ints, rank: Ints, length_Q: Ints, best_Q: Ints, query_ids: Sequence[str]) -> None:
    known = query >= 0
    if known.any() and rank[known].min() < 1:
        raise MetricError(f"query {query_ids[query[known][rank[known].argmin()]]!r}: a rank below 1; the top is 1")
    length_Q += np.bincount(query[known], minlength=len(query_ids))
    np.maximum.at(best_Q, query[known], rank[known])


def _check_answers(key_J: Ints, taken: list[Ints], rank_J: Ints, length_Q: Ints, deepest_Q: Ints,
                   query_ids: Sequence[str], products: pa.Array[Any]) -> None:
    times = np.bincount(np.concatenate(taken) if taken else np.zeros(0, np.int64), minlength=len(key_J))
    if (times > 1).any():
        raise MetricError(f"{_pair(key_J[times.argmax()], query_ids, products)} is listed {times.max()} times")
    uneven = np.flatnonzero(length_Q != deepest_Q)
    if len(uneven):
        one = uneven[0]
        raise MetricError(f"query {query_ids[one]!r}: {length_Q[one]} products but ranks up to {deepest_Q[one]}; "
                          "ranks are 1, 2, 3, ... without gaps or repeats")
    found = rank_J > 0
    pairs = (key_J[found] // max(1, len(products))) * (int(deepest_Q.max(initial=0)) + 1) + rank_J[found]
    if len(np.unique(pairs)) != len(pairs):
        raise MetricError("two products of one query have the same rank; ranks are 1, 2, 3, ...")


def _pair(key: int, query_ids: Sequence[str], products: pa.Array[Any]) -> str:
    return f"query {query_ids[key // len(products)]!r}, product {products[key % len(products)].as_py()!r}"


def score(ranked: RankedJudgments, spec: MetricSpec, relevant_gain: float = 1.0) -> Floats:
    """The metric of each query, shape (Q,); NaN where `no_relevant` says to leave the query out.

    `relevant_gain` is the threshold of binary metrics unless the metric names its own.
    """
    return score_all(ranked, [spec], relevant_gain)[:, 0]


def score_all(ranked: RankedJudgments, specs: Sequence[MetricSpec], relevant_gain: float = 1.0) -> Floats:
    """`score` of several metrics at once, shape (Q, len(specs)): shared work is done once."""
    values = np.zeros((len(ranked.query_ids), len(specs)))
    by_list: dict[tuple[bool, bool, float], list[int]] = {}
    for column, spec in enumerate(specs):
        rank_J = _list_ranks(ranked, judged=spec.scope == "judged", skip=spec.unjudged == "skip")
        if spec.measure == "nDCG":
            values[:, column] = _ndcg(ranked, rank_J, spec)
        elif spec.measure == "Judged":
            values[:, column] = _per_query(ranked, _discount(ranked.rank, spec) > 0) / (spec.k or 1)
        else:
            threshold = spec.relevant_gain or relevant_gain
            by_list.setdefault((spec.scope == "judged", spec.unjudged == "skip", threshold), []).append(column)
    for (judged, skip, threshold), columns in by_list.items():
        rank_J = _list_ranks(ranked, judged=judged, skip=skip)
        relevant_J = ranked.gain >= _float32(threshold)
        values[:, columns] = _trec(ranked, rank_J, relevant_J, [specs[one] for one in columns])
    return values


def _float32(gain: float) -> float:
    """A threshold as the float32 that gains are stored in, so that 0.1 >= 0.1 holds."""
    return min(gain, float(np.float32(gain)))


def _per_query(ranked: RankedJudgments, weight_J: npt.NDArray[Any]) -> Floats:
    weights = weight_J.astype(np.float64)
    return np.bincount(ranked.query, weights=weights, minlength=len(ranked.query_ids)).astype(np.float64)


def _list_ranks(ranked: RankedJudgments, *, judged: bool, skip: bool) -> Ints:
    """The ranks after the metric's scope: as given, judged products closed up, or all judged products in a row."""
    if not judged and not skip:
        return ranked.rank
    last = np.where(ranked.rank > 0, ranked.rank, np.iinfo(np.int64).max)
    order = np.lexsort((ranked.gain, last, ranked.query))  # missing ones last, worst first
    rank_J = np.empty_like(ranked.rank)
    rank_J[order] = _place_in_query(ranked)
    return rank_J if judged else np.where(ranked.rank > 0, rank_J, 0)


def _place_in_query(ranked: RankedJudgments) -> Ints:
    """1, 2, 3, ... within each query, shape (J,): `query_J` is sorted, so any order within a query may use it."""
    first_Q = np.searchsorted(ranked.query, np.arange(len(ranked.query_ids)))
    return np.arange(len(ranked.query)) - first_Q[ranked.query] + 1


def _ndcg(ranked: RankedJudgments, rank_J: Ints, spec: MetricSpec) -> Floats:
    """Järvelin and Kekäläinen 2002 (log2 discount from rank 1 on, as in trec_eval and Burges et al. 2005)."""
    gain_J = ranked.gain if spec.gain == "linear" else np.exp2(ranked.gain) - 1
    found = _per_query(ranked, gain_J * _discount(rank_J, spec))
    if spec.ideal == "constant":
        best = spec.ideal_gain or 0.0
        best = best if spec.gain == "linear" else float(np.exp2(best) - 1)
        return np.asarray(found / (best * _discount(np.arange(1, (spec.k or 0) + 1), spec).sum()))
    order = np.lexsort((-gain_J, ranked.query))
    ideal = _per_query(ranked, gain_J[order] * _discount(_place_in_query(ranked), spec))
    undefined = np.nan if spec.no_relevant == "skip" else 0.0
    return np.asarray(np.divide(found, ideal, out=np.full(len(ideal), undefined), where=ideal > 0))


def _discount(rank: Ints, spec: MetricSpec) -> Floats:
    """The weight of each rank; 0 for rank 0 (not found) and beyond the cut-off."""
    counted = (rank > 0) & (rank <= (spec.k or np.iinfo(np.int64).max))
    safe = np.maximum(rank, 1)
    weight = 1 / np.log2(1 + safe) if spec.discount == "log2" else 1 / safe
    return np.where(counted, weight, 0.0)


def _trec(ranked: RankedJudgments, rank_J: Ints, relevant_J: npt.NDArray[np.bool_],
          specs: Sequence[MetricSpec]) -> Floats:
    """Recall, Precision, MRR and MAP of each query by trec_eval, shape (Q, len(specs))."""
    num_relevant = _per_query(ranked, relevant_J)
    values = np.zeros((len(ranked.query_ids), len(specs)))
    rows = np.flatnonzero(relevant_J)
    depths = sorted({spec.k for spec in specs if spec.k and spec.measure == "MRR"})
    for first in range(0, len(ranked.query_ids), QUERIES_PER_CALL):
        part = rows[slice(*np.searchsorted(ranked.query[rows], (first, first + QUERIES_PER_CALL)))]
        qrels: dict[str, dict[str, int]] = {}
        for position, (query, rank) in enumerate(zip(ranked.query[part], rank_J[part], strict=True)):
            qrels.setdefault(str(query), {})[str(rank) if rank else f"missing {position}"] = 1
        if not qrels:
            continue
        depth = int(rank_J[part].max())
        for cut in (None, *depths):  # recip_rank has no cut-off of its own: the answer is cut instead
            wanted = [(column, spec) for column, spec in enumerate(specs)
                      if (spec.k if spec.measure == "MRR" else None) == cut]
            for query, found in _trec_call(qrels, min(depth, cut or depth), [spec for _, spec in wanted]).items():
                values[int(query), [column for column, _ in wanted]] = [found[_trec_name(spec)] for _, spec in wanted]
    for column, spec in enumerate(specs):
        values[num_relevant == 0, column] = np.nan if spec.no_relevant == "skip" else 0.0
    return values


def _trec_name(spec: MetricSpec) -> str:
    cut = f"_{spec.k}" if spec.k else ""
    return {"Recall": f"recall{cut}", "Precision": f"P{cut}", "MRR": "recip_rank",
            "MAP": f"map_cut{cut}" if spec.k else "map"}[spec.measure]


def _trec_call(qrels: dict[str, dict[str, int]], depth: int,
               specs: Sequence[MetricSpec]) -> dict[str, dict[str, float]]:
    import pytrec_eval

    if not specs:
        return {}
    # Products are named by their rank, so every query has the same answer and only the judgments differ.
    answer = {str(rank): float(-rank) for rank in range(1, max(1, depth) + 1)}
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {_trec_name(spec) for spec in specs})
    found: dict[str, dict[str, float]] = evaluator.evaluate(dict.fromkeys(qrels, answer))
    return found


def roc_auc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """Area under the ROC curve: chance that a positive scores above a negative, ties half; labels are 0 or 1.

    Errors: `MetricError` when one of the two classes is absent, where the area is undefined.
    """
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(_both_classes(labels, "ROC AUC"), np.asarray(scores, dtype=np.float64)))


def average_precision(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """Average precision, sum over thresholds of (recall step) x precision, tied scores as one step (scikit-learn)."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(_both_classes(labels, "AP"), np.asarray(scores, dtype=np.float64)))


def _both_classes(labels: npt.ArrayLike, name: str) -> npt.NDArray[np.int64]:
    values = np.asarray(labels).astype(np.int64)
    if set(np.unique(values)) != {0, 1}:
        raise MetricError(f"{name} needs labels 0 and 1, both present; found {np.unique(values)[:5].tolist()}")
    return values

"""How well systems order given candidates: rows of (query, product, label, a score per system) -> figures.

Two kinds of figures, both with intervals over queries (users): pooled ones, ROC AUC and AP over all
rows at once (scikit-learn's definitions), and per-query ones, MAP and nDCG (`evaluation.metrics`).
Equal scores are put in an order that is drawn by lot, the same for every system, so that a system
cannot win by the order in which its candidates were listed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recsys_ray.evaluation.metrics import MetricSpec, RankedJudgments, average_precision, roc_auc, score_all
from recsys_ray.evaluation.significance import Interval, Resampling, Units, compare_columns, mean_intervals

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
RANDOM = "random"       # the floor: rows in an order drawn by lot
POOLED = ("ROC AUC", "AP")
SPECS = tuple(MetricSpec.parse(name) for name in ("MAP", "nDCG@3", "nDCG@5", "nDCG@10"))
CELLS_PER_CHUNK = 1 << 22


class RankingError(ValueError):
    """Scores that cannot be compared; the message names the row or the column and the mend."""


@dataclass(frozen=True)
class ScoredPairs:
    """N rows sorted by query: which query, relevant or not, and every system's score."""

    query_ids: tuple[str, ...]
    query: Ints                     # (N,), index into query_ids, ascending
    label: Ints                     # (N,), 0 or 1
    scores: dict[str, Floats]       # system -> (N,)
    lot: Ints                       # (N,): the order of equal scores

    @property
    def first(self) -> Ints:
        """Where each query's rows begin, (Q,)."""
        return np.searchsorted(self.query, np.arange(len(self.query_ids)))

    def ranked(self, system: str) -> RankedJudgments:
        """Every row as a judgment at its rank within its query."""
        order = np.lexsort((self.lot, -self.scores[system], self.query))
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order)) - self.first[self.query] + 1
        length = np.bincount(self.query, minlength=len(self.query_ids))
        return RankedJudgments(self.query_ids, self.query, self.label.astype(np.float64), rank, length)


def scored_pairs(table: pa.Table, systems: Sequence[str] = (), seed: int = 7) -> ScoredPairs:
    """The rows of a table with query_id, product_id, label (0 or 1) and a column of scores per system.

    `systems` are the columns to take (default: all of floats); `random` comes on top. Errors:
    `RankingError` for a missing column, a label other than 0 and 1, a score that is no number, a pair listed twice.
    """
    given = [field.name for field in table.schema if pa.types.is_floating(field.type) and field.name != "label"]
    systems = list(systems) or given
    missing = [name for name in ("query_id", "product_id", "label", *systems) if name not in table.column_names]
    if missing or not systems:
        raise RankingError(f"no column {', '.join(missing) or 'of scores'}; there are {', '.join(table.column_names)}")
    table = table.sort_by([("query_id", "ascending"), ("product_id", "ascending")])
    label = table["label"].cast(pa.float64()).to_numpy()
    if not np.isin(label, (0.0, 1.0)).all():
        raise RankingError(f"label: {label[~np.isin(label, (0.0, 1.0))][0]} where 0 or 1 is needed")
    ids = table["query_id"].cast(pa.string()).combine_chunks()
    query_ids = tuple(pc.unique(ids).to_pylist())
    codes: Any = pc.index_in(ids, value_set=pa.array(query_ids, pa.string()))
    query = np.asarray(codes.to_numpy(), dtype=np.int64)
    product = table["product_id"].cast(pa.string()).to_numpy()
    twice = np.flatnonzero((query[1:] == query[:-1]) & (product[1:] == product[:-1]))
    if len(twice):
        raise RankingError(f"query {query_ids[query[twice[0]]]!r}: product {product[twice[0]]!r} is listed twice")
    scores = {name: _scores(table, name) for name in systems}
    lot = np.random.default_rng(seed).permutation(len(label))
    return ScoredPairs(query_ids, query, label.astype(np.int64), {RANDOM: lot.astype(np.float64), **scores}, lot)


def _scores(table: pa.Table, name: str) -> Floats:
    values = np.asarray(table[name].cast(pa.float64()).to_numpy(), dtype=np.float64)
    bad = np.flatnonzero(np.isnan(values))
    if len(bad):
        row = table.slice(int(bad[0]), 1)
        raise RankingError(f"{name}: {len(bad)} rows without a score, e.g. query {row['query_id'][0]}, product "
                           f"{row['product_id'][0]}; give every candidate one")
    return values


def whole_ranking(query_ids: Sequence[str], scores_QI: npt.NDArray[Any], relevant: Sequence[Sequence[int]],
                  allowed_QI: npt.NDArray[np.bool_], seed: int = 7) -> RankedJudgments:
    """Where each query's relevant items stand among all items it may be shown: no sampled negatives.

    An item that is not allowed (already known to the user) is no candidate; relevant ones must be allowed.
    """
    lot_I = np.random.default_rng(seed).permutation(scores_QI.shape[1])
    query, rank = [], []
    for row, items in enumerate(relevant):
        for item in items:
            if not allowed_QI[row, item]:
                raise RankingError(f"query {query_ids[row]!r}: relevant item {item} is not among the allowed ones")
            own = scores_QI[row, item]
            above = (scores_QI[row] > own) | ((scores_QI[row] == own) & (lot_I < lot_I[item]))
            query.append(row)
            rank.append(1 + int((above & allowed_QI[row]).sum()))
    return RankedJudgments(tuple(query_ids), np.array(query, np.int64), np.ones(len(query)), np.array(rank, np.int64),
                           allowed_QI.sum(axis=1).astype(np.int64))


# --- figures --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Measured:
    """What systems reached on the same queries: per-query values, and draws of the pooled figures if there are any."""

    values: dict[str, Floats]                               # system -> (Q, len(SPECS))
    resampling: Resampling
    pooled: dict[str, Floats] = field(default_factory=dict)     # system -> (1 + samples, 2): first the figure itself

    def rows(self) -> list[dict[str, Any]]:
        """A row per system and metric: mean, low, high."""
        return [{"system": system, "metric": metric, "mean": one.mean, "low": one.low, "high": one.high}
                for system in self.values for metric, one in self.intervals[system].items()]

    @cached_property
    def intervals(self) -> dict[str, dict[str, Interval]]:
        """Every figure with its interval over queries, by system and metric."""
        found = {}
        for system, values in self.values.items():
            units = Units.rows(len(values))
            each = dict(zip((spec.name for spec in SPECS), mean_intervals(values, units, self.resampling), strict=True))
            pooled = {name: self._interval(self.pooled[system][:, column], len(values))
                      for column, name in enumerate(POOLED) if system in self.pooled}
            found[system] = {**pooled, **each}
        return found

    def mean(self, system: str, metric: str) -> float:
        """One figure."""
        return self.intervals[system][metric].mean

    def compare(self, system: str, baseline: str) -> dict[str, dict[str, Any]]:
        """By metric: the difference system minus baseline with its interval, paired over queries.

        Per-query metrics carry a p-value, wins and losses besides.
        """
        values, base = self.values[system], self.values[baseline]
        found: dict[str, dict[str, Any]] = {}
        if system in self.pooled and baseline in self.pooled:
            draws = self.pooled[system] - self.pooled[baseline]
            found = {name: asdict(self._interval(draws[:, column], len(values))) for column, name in enumerate(POOLED)}
        for spec, one in zip(SPECS, compare_columns(values, base, Units.rows(len(values)), self.resampling),
                             strict=True):
            flat = one.as_dict()
            found[spec.name] = {**flat.pop("difference"), **flat}
        return found

    def best(self, systems: Iterable[str], metric: str) -> str:
        """The system with the highest figure."""
        return max(systems, key=lambda name: self.mean(name, metric))

    def _interval(self, draws: Floats, queries: int) -> Interval:
        tail = (1 - self.resampling.level) / 2
        low, high = np.quantile(draws[1:], [tail, 1 - tail])
        return Interval(float(draws[0]), float(low), float(high), queries, queries)


def measure(pairs: ScoredPairs, resampling: Resampling) -> Measured:
    """Pooled and per-query figures of every system; all systems meet the same draws of queries."""
    values = {name: score_all(pairs.ranked(name), SPECS) for name in pairs.scores}
    pooled = {name: pooled_draws(pairs.label, scores, pairs.query, resampling) for name, scores in pairs.scores.items()}
    return Measured(values, resampling, pooled)


def measure_whole(rankings: Mapping[str, RankedJudgments], resampling: Resampling) -> Measured:
    """Per-query figures of rankings of everything (`whole_ranking`)."""
    return Measured({name: score_all(one, SPECS) for name, one in rankings.items()}, resampling)


def pooled_draws(label: Ints, scores: Floats, query: Ints, resampling: Resampling) -> Floats:
    """(ROC AUC, AP) over all rows, then over `samples` draws of whole queries with replacement, (1 + samples, 2).

    A draw weighs each row by how often its query came up, which scikit-learn's `sample_weight` would do too,
    sorting the rows each time; here they are sorted once.
    """
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.inf))     # groups of equal scores, best first
    is_positive, query_N = label[order] == 1, query[order]
    queries = int(query.max()) + 1
    rng = np.random.default_rng(resampling.seed)
    found = [np.array([[roc_auc(label, scores), average_precision(label, scores)]])]
    chunk = max(1, CELLS_PER_CHUNK // len(label))
    for first in range(0, resampling.samples, chunk):
        count = min(chunk, resampling.samples - first)
        weight_BN = rng.multinomial(queries, np.full(queries, 1 / queries), size=count)[:, query_N].astype(np.float64)
        positive_BG = np.add.reduceat(weight_BN * is_positive, starts, axis=1)
        all_BG = np.add.reduceat(weight_BN, starts, axis=1)
        found.append(np.stack([_auc(positive_BG, all_BG), _ap(positive_BG, all_BG)], axis=1))
    return np.concatenate(found)


def _auc(positive_BG: Floats, all_BG: Floats) -> Floats:
    """Share of (positive, negative) pairs in the right order, equal scores half (Mann and Whitney 1947)."""
    negative_BG = all_BG - positive_BG
    total = negative_BG.sum(axis=1)
    below = total[:, None] - negative_BG.cumsum(axis=1) + negative_BG / 2
    return np.asarray((positive_BG * below).sum(axis=1) / (positive_BG.sum(axis=1) * total))


def _ap(positive_BG: Floats, all_BG: Floats) -> Floats:
    """Sum over groups of (step of recall) x precision."""
    found_BG, seen_BG = positive_BG.cumsum(axis=1), all_BG.cumsum(axis=1)
    precision = np.divide(found_BG, seen_BG, out=np.zeros_like(found_BG), where=seen_BG > 0)
    return np.asarray((positive_BG * precision).sum(axis=1) / found_BG[:, -1])

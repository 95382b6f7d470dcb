"""(query, product) pairs that people judged, for training on real labels: chosen queries only, fold by fold.

A query is in one fold whatever file or order it came in, so a nested cross-validation trains on the
very folds that it does not report. Judged irrelevant products can serve as true negatives.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from recsys_ray.artifacts import Artifact
from recsys_ray.config import Config
from recsys_ray.data.pairs import PairError, draws, pair_row
from recsys_ray.data.preprocess import clean_query
from recsys_ray.data.sources.tables import load_table
from recsys_ray.ids import bucket_of, row_ids
from recsys_ray.schema import JUDGMENT, QUERY

_JUDGED = pa.schema([JUDGMENT.field("query_id"), JUDGMENT.field("product_id"), pa.field("gain", pa.float32()),
                     JUDGMENT.field("label")])
_ASKED = pa.schema([QUERY.field("query_id"), QUERY.field("query")])


class JudgmentFolds(Config):
    """Tables of judged queries, and which of the queries are for training."""

    queries: str                                    # table of queries: query_id, query
    judgments: str                                  # table of judgments: query_id, product_id, gain or label
    query_columns: dict[str, str] = Field(default_factory=dict)     # our column -> theirs
    judgment_columns: dict[str, str] = Field(default_factory=dict)
    gain_of_label: dict[str, float] | None = None   # when the table has labels instead of gains
    query_ids: tuple[str, ...] | None = None        # these queries alone; None: all that are judged
    folds: int = Field(default=5, ge=2)
    train_folds: tuple[int, ...] | None = None      # None: all but valid_folds
    valid_folds: tuple[int, ...] = ()
    seed: int = 7

    @model_validator(mode="after")
    def _folds_exist(self) -> Self:
        named = [*(self.train_folds or ()), *self.valid_folds]
        if any(not 0 <= fold < self.folds for fold in named):
            raise ValueError(f"train_folds and valid_folds name folds from 0 to {self.folds - 1}; found {named}")
        if len(set(named)) < len(named):
            raise ValueError(f"train_folds and valid_folds share a fold: {named}")
        return self

    def split_of(self, fold: int) -> str | None:
        """train, valid, or None for a fold that is kept out."""
        if fold in self.valid_folds:
            return "valid"
        return "train" if self.train_folds is None or fold in self.train_folds else None


class JudgedQueries(JudgmentFolds):
    """Which judged queries become pairs, and from which gain on a product is a positive."""

    min_gain: float = 1.0                           # of a positive
    negative_gain: float | None = None              # products judged at most this are negatives; None: none are
    max_positives: int = Field(default=20, ge=1)    # of one query, the best and then by draw
    max_negatives: int = Field(default=4, ge=1)     # of one pair

    @model_validator(mode="after")
    def _gains_in_order(self) -> Self:
        if self.negative_gain is not None and self.negative_gain >= self.min_gain:
            raise ValueError(f"negative_gain {self.negative_gain} is not below min_gain {self.min_gain}")
        return self


@dataclass(frozen=True)
class GradedQuery:
    """One query with the gain of each product that was judged for it."""

    query_id: str
    query: str
    split: str
    gains: dict[str, float]


@dataclass(frozen=True)
class JudgedQuery:
    """One query with the products that answer it and, if asked for, those that do not."""

    query_id: str
    query: str
    split: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]


def query_folds(query_ids: Iterable[str], folds: int, seed: int) -> dict[str, int]:
    """The fold of each query: equal sizes (within one), decided by the set of ids and the seed alone."""
    ids = sorted(set(query_ids))
    order = np.argsort(draws(ids, seed), kind="stable")
    return {ids[place]: number % folds for number, place in enumerate(order.tolist())}


def judged_queries(config: JudgedQueries) -> list[JudgedQuery]:
    """The queries of the configured folds with their positives and negatives, by query id; errors as below."""
    found = [JudgedQuery(one.query_id, one.query, one.split, *_products(one.query_id, one.gains, config))
             for one in graded_queries(config)]
    return [one for one in found if one.positives]


def graded_queries(config: JudgmentFolds) -> list[GradedQuery]:
    """The queries of the configured folds with the gains of their products, by query id.

    Errors: `PairError` for a label without a gain, judgments of unknown queries, or `query_ids` without judgments.
    """
    asked = load_table(config.queries, config.query_columns, _ASKED)
    judged = load_table(config.judgments, config.judgment_columns, _JUDGED)
    texts = dict(zip(asked["query_id"].to_pylist(), asked["query"].to_pylist(), strict=True))
    gains = _gains(judged, config)
    found: dict[str, dict[str, float]] = {}
    for query, product, gain in zip(judged["query_id"].to_pylist(), judged["product_id"].to_pylist(), gains,
                                    strict=True):
        products = found.setdefault(query, {})
        products[product] = max(gain, products.get(product, gain))
    unknown = sorted(set(found) - set(texts))
    if unknown:
        raise PairError(f"{config.judgments}: judges {len(unknown)} queries that {config.queries} does not have, "
                        f"e.g. {unknown[0]!r}")
    wanted = set(found) if config.query_ids is None else set(config.query_ids)
    if wanted - set(found):
        raise PairError(f"judged.query_ids: {config.judgments} does not judge {sorted(wanted - set(found))[0]!r}")
    folds = query_folds(wanted, config.folds, config.seed)
    chosen = []
    for query in sorted(wanted):
        split = config.split_of(folds[query])
        if split is not None:
            chosen.append(GradedQuery(query, clean_query(texts[query]), split, found[query]))
    return [one for one in chosen if one.query]


def _gains(judged: pa.Table, config: JudgmentFolds) -> list[float]:
    if config.gain_of_label is None:
        if judged["gain"].null_count:
            raise PairError(f"{config.judgments}: {judged['gain'].null_count} judgments have no gain; map the column "
                            "in judgment_columns, or set gain_of_label")
        gains: list[float] = judged["gain"].to_pylist()
        return gains
    unknown = set(judged["label"].to_pylist()) - set(config.gain_of_label)
    if unknown:
        raise PairError(f"{config.judgments}: label {sorted(map(str, unknown))[0]!r} has no gain in gain_of_label")
    return [config.gain_of_label[label] for label in judged["label"].to_pylist()]


def _products(query: str, gains: dict[str, float], config: JudgedQueries) -> tuple[tuple[str, ...], tuple[str, ...]]:
    names = sorted(gains)
    draw = dict(zip(names, draws((f"{query}/{name}" for name in names), config.seed).tolist(), strict=True))
    positives = sorted((name for name in names if gains[name] >= config.min_gain),
                       key=lambda name: (-gains[name], draw[name]))
    worst = config.negative_gain
    negatives = [] if worst is None else sorted((name for name in names if gains[name] <= worst), key=draw.__getitem__)
    return tuple(positives[: config.max_positives]), tuple(negatives)


def digest(queries: Sequence[JudgedQuery | GradedQuery]) -> str:
    """32 hex digits of the queries and their products."""
    return hashlib.sha256(repr(queries).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def judged_rows(queries: Sequence[JudgedQuery], prepared: Artifact, config: JudgedQueries,
                counts: Counter[str]) -> list[dict[str, Any]]:
    """TRAINING_PAIR rows of the queries, the texts as they are indexed; products outside the catalogue are counted.

    A pair's negatives are drawn from the query's judged ones, never of the group of any of its positives.
    """
    names = sorted({name for one in queries for name in (*one.positives, *one.negatives)})
    products = catalogue_rows_of(prepared, names)
    counts["judged products not in the catalogue"] += len(names) - len(products)
    rows = []
    for one in queries:
        right = {products[name]["group_id"] for name in one.positives if name in products}
        wrong = [products[name] for name in one.negatives
                 if name in products and products[name]["group_id"] not in right]
        for name in one.positives:
            if name not in products:
                continue
            pair_id = f"{one.query_id}/{name}"
            row = pair_row(pair_id, one.query, "judged", products[name], products[name]["text"], one.split)
            order = np.argsort(draws((f"{pair_id}/{product['product_id']}" for product in wrong), config.seed))
            taken = [wrong[place] for place in order[: config.max_negatives].tolist()]
            rows.append({**row, "negative_row_ids": [product["row_id"] for product in taken],
                         "negative_texts": [product["text"] for product in taken],
                         "negative_group_ids": [product["group_id"] for product in taken]})
    return rows


def catalogue_rows_of(prepared: Artifact, product_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """row_id, product_id, group_id and text of those of the products that the catalogue has, read bucket by bucket."""
    wanted = row_ids(product_ids)
    buckets: npt.NDArray[np.int32] = bucket_of(wanted, prepared.manifest.facts["num_buckets"])
    found = {}
    for bucket in np.unique(buckets).tolist():
        name, here = f"bucket-{bucket:05d}.parquet", pa.array(wanted[buckets == bucket])
        products = prepared.table(f"products/{name}", ["row_id", "product_id", "group_id"])
        texts = prepared.table(f"product_text/{name}", ["row_id", "text"])
        mask = pc.is_in(products["row_id"], value_set=here)
        some = products.append_column("text", texts["text"]).filter(mask)   # both are sorted by row id
        found.update({row["product_id"]: row for row in some.to_pylist()})
    return found

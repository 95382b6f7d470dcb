"""The features of a query's candidates: one float32 table, made by the same function offline and in the service.

Every feature has a name and a family. A value that is not known is NaN, which LightGBM sends its own way at
every split. Ranks and gaps are among the candidates given, so a model must see as many of them as it was
trained with. What is read of a product is `FEATURE_COLUMNS` and nothing else: statistics come from reviews
written before a point in time, never from counts that a crawl found on the product's page later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys_ray.ranking.concern_words import named_concerns
from recsys_ray.ranking.text_match import QueryWords, named, price_limit, words
from recsys_ray.retrieval.segments import STATISTICS

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

DAY_MS = 86_400_000
RRF_CONSTANT = 60
HEAD = 10               # "among the first": a retriever's ten best
PRIOR_REVIEWS = 5.0     # weight of the candidates' mean in a smoothed rating
FIELDS = ("title", "brand", "color", "category", "text")
FEATURE_COLUMNS = ("row_id", *FIELDS, "price_cents", *STATISTICS, "concerns")
SCORES = ("dense", "lexical", "sparse", "multi")    # by which a retriever ranks; `fused` is what became of them
MATCHING = ("lexical", "sparse")                    # of these, 0 says that nothing matched

FAMILIES: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "query": ("query_words", "query_rarity", "query_matches"),
    "lexical": (
        "lexical_score", "lexical_rank", "lexical_gap", "lexical_share",
        "title_bm25", "text_bm25", "brand_bm25", "category_bm25",
        "title_coverage", "title_rare_coverage", "title_said", "title_order", "title_first", "title_words",
        "text_coverage", "text_rare_coverage", "text_order", "text_first", "text_words",
        "brand_coverage", "category_coverage", "any_coverage", "any_rare_coverage"),
    "dense": ("dense_score", "dense_rank", "dense_gap"),
    "signals": ("sparse_score", "sparse_rank", "sparse_gap", "multi_score", "multi_rank", "multi_gap"),
    "fused": ("fused_score", "fused_rank", "fused_gap", "fused_lead"),
    "agreement": ("best_rank", "worst_rank", "rank_spread", "reciprocal_ranks", "heads"),
    "cross": ("cross_score", "cross_rank", "cross_gap"),
    "match": ("brand_named", "brand_conflict", "brand_share", "color_named", "color_conflict", "category_named",
              "category_conflict", "category_share", "number_coverage", "price_over_limit"),
    "concerns": ("concern_named", "concern_named_rank", "concern_surest"),
    "product": ("num_reviews", "reviews_rank", "verified_share", "rating_mean", "rating_std", "rating_smoothed",
                "review_age_days", "mean_review_chars", "price", "price_to_median", "price_rank"),
})
FEATURES: tuple[str, ...] = tuple(name for family in FAMILIES.values() for name in family)


class FeatureError(ValueError):
    """Candidates that features cannot be made of; the message says what does not fit."""


@dataclass(frozen=True)
class Candidates:
    """The C candidates of one query: scores and rows aligned, in any order."""

    row_ids: Ints
    scores: Mapping[str, Floats | None]     # dense, lexical, sparse, multi, fused; (C,) each, NaN or None: not asked
    rows: pa.Table                          # FEATURE_COLUMNS

    def __post_init__(self) -> None:
        """Errors: `FeatureError` naming what is missing or of another length."""
        if self.scores.get("fused") is None:
            raise FeatureError("candidates need a fused score: what they were retrieved by")
        lengths = {name: len(one) for name, one in self.scores.items() if one is not None} | {"rows": len(self.rows)}
        if wrong := [f"{size} {name}" for name, size in lengths.items() if size != len(self)]:
            raise FeatureError(f"{len(self)} row ids, but {', '.join(wrong)}")
        if missing := set(FEATURE_COLUMNS) - set(self.rows.column_names):
            raise FeatureError(f"rows: no column {', '.join(sorted(missing))}; build the index again")

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def fused(self) -> Floats:
        """What they were retrieved by, (C,)."""
        fused = self.scores["fused"]
        assert fused is not None
        return fused

    def take(self, places: Ints) -> Candidates:
        """The candidates at these places, in their order."""
        return Candidates(self.row_ids[places], {name: None if one is None else one[places]
                                                 for name, one in self.scores.items()},
                          self.rows.take(pa.array(places, pa.int64())))


def feature_table(query: str, candidates: Candidates, cross: Floats | None = None, as_of_ms: int | None = None
                  ) -> Floats:
    """The features of C candidates, float32 (C, F) with a column per name of `FEATURES`.

    `cross` holds cross-encoder scores (C,), NaN where none was made. `as_of_ms` is the query's time, which the
    statistics in `candidates.rows` must precede; None: the time of the latest review among the candidates.
    """
    if not len(candidates):
        return np.zeros((0, len(FEATURES)), np.float32)
    columns = {**_text_features(query, candidates), **_score_features(candidates, cross),
               **_product_features(query, candidates, as_of_ms), **_concern_features(query, candidates.rows)}
    table: Floats = np.stack([np.broadcast_to(np.asarray(columns[name], dtype=np.float32), len(candidates))
                              for name in FEATURES], axis=1)
    return table


# --- words ----------------------------------------------------------------------------------------
def _text_features(query: str, candidates: Candidates) -> dict[str, Floats]:
    fields = {name: [words(one or "") for one in candidates.rows[name].to_pylist()] for name in FIELDS}
    asked = QueryWords(query, fields)
    found: dict[str, Floats] = {
        "query_words": np.array([len(asked.listed)], np.float32), "query_rarity": np.array([asked.rarity], np.float32),
        "title_said": asked.said("title"), "number_coverage": asked.numbers(),
        "brand_coverage": asked.coverage("brand"), "category_coverage": asked.coverage("category"),
    }
    for name in ("title", "text", "brand", "category"):
        found[f"{name}_bm25"] = asked.bm25(name)
    for name in ("title", "text"):
        found |= {f"{name}_order": asked.order(name), f"{name}_first": asked.first(name),
                  f"{name}_words": np.array([len(one.listed) for one in fields[name]], np.float32)}
    for name in ("title", "text", "any"):
        found |= {f"{name}_coverage": asked.coverage(name), f"{name}_rare_coverage": asked.rare_coverage(name)}
    for name in ("brand", "color", "category"):
        found[f"{name}_named"], found[f"{name}_conflict"] = named(asked.said(name))
    return found


# --- scores ---------------------------------------------------------------------------------------
def _score_features(candidates: Candidates, cross: Floats | None) -> dict[str, Floats]:
    unknown = np.full(len(candidates), np.nan, np.float32)
    scores = {name: unknown if (one := candidates.scores.get(name)) is None else one for name in (*SCORES, "fused")}
    scores["cross"] = unknown if cross is None else cross
    ranked = {name: np.where(one > 0, one, np.nan).astype(np.float32) if name in MATCHING else one
              for name, one in scores.items()}      # without a shared word there is no rank
    ranks = {name: ranks_of(one) for name, one in ranked.items()}
    found: dict[str, Floats] = {}
    for name, one in scores.items():
        found |= {f"{name}_score": one, f"{name}_rank": ranks[name], f"{name}_gap": _best(one) - one}
    best = _best(ranked["lexical"])
    found |= {"lexical_share": scores["lexical"] / best, "fused_lead": _lead(scores["fused"]),
              "query_matches": np.array([np.isfinite(ranked["lexical"]).mean()], np.float32)}
    return {**found, **_agreement(np.stack([ranks[name] for name in SCORES]))}


def ranks_of(scores: Floats) -> Floats:
    """1 for the best score; equal scores share the best rank of their group, NaN has none."""
    known = np.isfinite(scores)
    order = np.sort(-scores[known])
    ranks = np.full(len(scores), np.nan, np.float32)
    ranks[known] = np.searchsorted(order, -scores[known]) + 1
    return ranks


def _best(scores: Floats) -> np.float32:
    return np.float32(np.nanmax(scores)) if np.isfinite(scores).any() else np.float32(np.nan)


def _lead(scores: Floats) -> Floats:
    """How far each score is above the next lower one; 0 for the last."""
    order = np.argsort(-scores, kind="stable")
    lead = np.zeros(len(scores), np.float32)
    lead[order[:-1]] = scores[order[:-1]] - scores[order[1:]]
    return lead


def _agreement(ranks_SC: npt.NDArray[np.floating[Any]]) -> dict[str, Floats]:
    """What the retrievers that ranked a candidate say together."""
    there = np.isfinite(ranks_SC)
    low = np.where(there, ranks_SC, np.inf).min(axis=0)
    high = np.where(there, ranks_SC, -np.inf).max(axis=0)
    any_SC = there.any(axis=0)
    return {
        "best_rank": np.where(any_SC, low, np.nan).astype(np.float32),
        "worst_rank": np.where(any_SC, high, np.nan).astype(np.float32),
        "rank_spread": np.where(any_SC, high - np.where(any_SC, low, 0), np.nan).astype(np.float32),
        "reciprocal_ranks": np.where(there, 1 / (RRF_CONSTANT + ranks_SC), 0).sum(axis=0).astype(np.float32),
        "heads": (there & (ranks_SC <= HEAD)).sum(axis=0).astype(np.float32),
    }


# --- products -------------------------------------------------------------------------------------
def _product_features(query: str, candidates: Candidates, as_of_ms: int | None) -> dict[str, Floats]:
    rows = candidates.rows
    number = {name: _column(rows, name) for name in ("price_cents", *STATISTICS)}
    price, last = number["price_cents"] / 100, number["last_review_ms"]
    reviews = np.nan_to_num(number["num_reviews"])
    rating = number["rating_mean"]
    mean = np.nanmean(rating) if np.isfinite(rating).any() else np.nan
    now = float(as_of_ms) if as_of_ms is not None else (np.nanmax(last) if np.isfinite(last).any() else np.nan)
    median = np.nanmedian(price) if np.isfinite(price).any() else np.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        found: dict[str, npt.NDArray[Any]] = {
            "num_reviews": reviews, "reviews_rank": ranks_of(reviews.astype(np.float32)),
            "verified_share": number["verified_share"], "rating_mean": rating, "rating_std": number["rating_std"],
            "rating_smoothed": (np.nan_to_num(rating) * reviews + PRIOR_REVIEWS * mean) / (reviews + PRIOR_REVIEWS),
            "review_age_days": (now - last) / DAY_MS, "mean_review_chars": number["mean_review_chars"],
            "price": price, "price_to_median": np.log(price / median),
            "price_rank": ranks_of(-price.astype(np.float32)),
            "price_over_limit": np.log(price / price_limit(query)),
        }
    finite = {name: np.where(np.isfinite(one), one, np.nan).astype(np.float32) for name, one in found.items()}
    return {**finite, **{f"{name}_share": _shared(rows, name) for name in ("brand", "category")}}


def _concern_features(query: str, rows: pa.Table) -> dict[str, Floats]:
    """The largest probability of a concern that the query names, its rank, and the largest of all concerns."""
    if rows["concerns"].null_count == len(rows):
        return dict.fromkeys(FAMILIES["concerns"], np.full(len(rows), np.nan, np.float32))
    scored = [dict(one or ()) for one in rows["concerns"].to_pylist()]
    asked = named_concerns(query, frozenset[str]().union(*scored))
    told = np.array([max((one[name] for name in asked if name in one), default=np.nan) for one in scored], np.float32)
    surest = np.array([max(one.values(), default=np.nan) for one in scored], np.float32)
    return {"concern_named": told, "concern_named_rank": ranks_of(told), "concern_surest": surest}


def _column(rows: pa.Table, name: str) -> npt.NDArray[np.float64]:
    return np.asarray(rows[name].cast(pa.float64()).fill_null(float("nan")).to_numpy(), dtype=np.float64)


def _shared(rows: pa.Table, name: str) -> Floats:
    """Share of the candidates that have the same value; NaN where there is none."""
    values = rows[name].to_pylist()
    counts = Counter(values)
    return np.array([np.nan if not value else counts[value] / len(values) for value in values], np.float32)

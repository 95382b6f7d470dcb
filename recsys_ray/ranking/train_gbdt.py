"""Candidates of a period -> trees that reorder them: features, labels, LambdaMART, figures on a later period.

Time is divided so that no score used as a feature has seen its label. Encoders and cross-encoders learn from
T1, the train split. Candidates of the valid split are the trees' own: its earlier part, T2, is fitted to, its later
part, T3, says when to stop. T4, the test split, is only measured on. Statistics of a product are those of the moment
of each query. Of an encoder whose best step was chosen on the valid split, T2 knows a little: choose it by train
reviews where that matters. Queries without a time (judged ones) are divided by a hash of their ids instead, and
must then be none that the cross-encoder was trained on: nested folds, as in benchmarks/rerank_labels.py.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, model_validator

from recsys_ray.artifacts import Artifact, Staging, find_artifact, open_artifact, stage, write_text
from recsys_ray.config import Config, fingerprint
from recsys_ray.data.judged_pairs import query_folds
from recsys_ray.evaluation.judgments import CandidateJudgments, JudgmentSource, read_judgments
from recsys_ray.evaluation.ranker_figures import explanation, explanation_page
from recsys_ray.evaluation.reranking import reranking_figures, reranking_values
from recsys_ray.evaluation.significance import Resampling, Units
from recsys_ray.models.cross_encoder import cross_encoder_identity
from recsys_ray.ranking.asked_lists import (
    Asked,
    Labelled,
    as_lists,
    asked_lists,
    queries_of,
    query_times,
    reranked,
    retrieved,
    with_cross,
)
from recsys_ray.ranking.clicks import labelled_events, read_events
from recsys_ray.ranking.features import FAMILIES, FEATURES
from recsys_ray.ranking.gbdt import KIND, MODEL, GbdtConfig, GbdtRanker, Lists
from recsys_ray.ranking.gbdt_workers import TreeWorkers, grow
from recsys_ray.ranking.rerank import RerankConfig, Reranker
from recsys_ray.retrieval.segments import Index, concern_model_of, open_index
from recsys_ray.runtime import RayConfig

log = logging.getLogger(__name__)

STAGE_VERSION = 1           # raise it when the same inputs would give other trees
STOP_FOLDS = 5              # of queries without a time, one of so many stops
EXPLAINED = 2000            # candidates whose contributions are computed


class TrainGbdtConfig(Config):
    """Which candidates, what is known of them, and how trees grow."""

    index: Path                                     # artefact root of the index that was searched
    fit: Path                                       # candidates of the period that is learned from
    test: Path | None = None                        # candidates of a later one, to measure on
    prepared: Path | None = None                    # the shop whose reviews the queries are; None: queries without time
    judgments: JudgmentSource = CandidateJudgments(format="candidates")
    events: Path | None = None                      # logged impressions and clicks instead: a .parquet file or a folder
    relevant_gain: float = Field(default=1.0, gt=0)
    fit_share: float = Field(default=0.8, gt=0, lt=1)       # T2: the earliest queries of `fit`; the others are T3
    without_cross: float = Field(default=0.1, ge=0, lt=1)   # queries fitted to as if the cross-encoder had been late
    rerank: RerankConfig = RerankConfig()           # cross-encoder and depths, without trees
    gbdt: GbdtConfig = GbdtConfig()
    output: Path
    samples: int = Field(default=2000, ge=100)      # of the bootstrap
    workers: TreeWorkers = TreeWorkers()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _without_trees(self) -> Self:
        if self.rerank.gbdt is not None:
            raise ValueError("rerank.gbdt: the trees are what is made here; leave it out")
        return self


def train_gbdt(config: TrainGbdtConfig) -> Artifact:
    """The "gbdt" artefact: model.txt (LightGBM), explanation.json and .html (importance, SHAP), metrics.json.

    Facts: features, families left out, cross_encoder and concern_model (identities), trained_with (depth, cross_top),
    label_gain, rounds, stop_ndcg, queries (of each period), metrics (test, unconditional). Errors: a `ValueError` that
    names what does not fit.
    """
    index = open_index(config.index)
    candidates = {name: open_artifact(path, "candidates") for name, path in (("fit", config.fit), ("test", config.test))
                  if path is not None}
    prepared = None if config.prepared is None else open_artifact(config.prepared, "prepared")
    cross = config.rerank.cross_encoder
    identity = None if cross is None or "cross" in config.gbdt.without else cross_encoder_identity(cross)
    away = {"index", "fit", "test", "prepared", "output", "workers", "ray"}
    parents = {"index": index.artifact.manifest, **{name: one.manifest for name, one in candidates.items()},
               **({} if prepared is None else {"prepared": prepared.manifest})}
    key = fingerprint({
        "stage": STAGE_VERSION, "features": FEATURES, "cross_encoder": identity, "workers": config.workers.count,
        "parents": {name: one.fingerprint for name, one in parents.items()},
        "events": None if config.events is None else _state(config.events),
        "config": config.model_dump(mode="json", exclude=away)})
    output = config.output.resolve()
    if (done := find_artifact(output, KIND, key)) is not None:
        return done
    with stage(output, KIND, key) as staging:
        period = _Period(config, index, prepared, Reranker(config.rerank))
        files, facts = _made(config, period, candidates, identity, staging)
        return staging.commit(files, config=config, parents=parents, facts=facts)


def _state(path: Path) -> list[Any]:
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    return [[one.name, one.stat().st_size, one.stat().st_mtime_ns] for one in files]


def _made(config: TrainGbdtConfig, period: _Period, candidates: Mapping[str, Artifact],
          identity: dict[str, Any] | None, staging: Staging) -> tuple[list[Any], dict[str, Any]]:
    known = labelled_events(read_events(config.events)) if config.events is not None else \
        Labelled.of(read_judgments(config.judgments, candidates["fit"])[0])
    asked = period.asked(candidates["fit"])
    lists, label_gain, names = as_lists(asked, known, config.gbdt.label_gain, config.without_cross, config.gbdt.seed)
    earlier = fitting_part(names, period.times(candidates["fit"]), config.fit_share, config.gbdt.seed)
    fit, stop = lists.take(earlier), lists.take(~earlier)
    log.info("%d queries to fit to, %d to stop by; %d of them with their product", earlier.sum(), (~earlier).sum(),
             int(lists.telling().sum()))
    grown = grow(fit, stop, config.gbdt, label_gain, config.workers, config.ray, staging.path)
    concern_model = None if "concerns" in config.gbdt.without else concern_model_of(period.index.artifact.manifest)
    ranker = GbdtRanker.of(grown.text, identity, period.trained_with, config.gbdt.start, concern_model)
    write_text(staging.path / MODEL, grown.text)
    document = _explained(ranker, stop)
    write_text(staging.path / "explanation.json", json.dumps(document) + "\n")
    write_text(staging.path / "explanation.html", explanation_page("What the trees read", document))
    measured = _measured(config, period, candidates["test"], ranker) if "test" in candidates else None
    write_text(staging.path / "metrics.json", json.dumps({"test": measured, "stop": grown.stop_ndcg}) + "\n")
    files = [staging.entry(name) for name in (MODEL, "explanation.json", "explanation.html", "metrics.json")]
    return files, {
        "features": list(FEATURES), "without": list(config.gbdt.without), "cross_encoder": identity,
        "concern_model": concern_model,
        "trained_with": period.trained_with, "start": config.gbdt.start, "label_gain": list(label_gain),
        "rounds": grown.rounds, "stop_ndcg": grown.stop_ndcg, "importance": ranker.importance(),
        "queries": {"fit": int(earlier.sum()), "stop": int((~earlier).sum()),
                    "fit, with their product": int(fit.telling().sum())},
        "metrics": None if measured is None else _short(measured)}


@dataclass(frozen=True)
class _Period:
    """How the queries of a candidates artefact become lists."""

    config: TrainGbdtConfig
    index: Index
    prepared: Artifact | None
    reranker: Reranker

    @property
    def trained_with(self) -> dict[str, int]:
        return {"depth": self.config.rerank.depth, "cross_top": self.config.rerank.cross_top}

    def times(self, candidates: Artifact) -> dict[str, int] | None:
        """When each query was asked; None for queries without a time."""
        return None if self.prepared is None else query_times(self.prepared, list(queries_of(candidates)))

    def asked(self, candidates: Artifact) -> list[Asked]:
        """All lists with the scores of the cross-encoder."""
        rows = pa.concat_tables(candidates.tables("candidates-"))
        lists = asked_lists(rows, queries_of(candidates), self.index, self.config.rerank.depth, self.prepared,
                            self.times(candidates))
        return list(with_cross(lists, self.reranker))


def fitting_part(query_ids: Sequence[str], times: Mapping[str, int] | None, share: float, seed: int
                 ) -> npt.NDArray[np.bool_]:
    """Which queries are fitted to, (Q,): the earliest `share` of them by time, equal times on one side.

    Without times four of five, by a hash of their ids.
    """
    if times is None:
        folds = query_folds(query_ids, STOP_FOLDS, seed)
        return np.array([folds[one] != 0 for one in query_ids], dtype=bool)
    moments = np.array([times[one] for one in query_ids], dtype=np.int64)
    cut = np.sort(moments)[min(len(moments) - 1, int(share * len(moments)))]
    return np.asarray(moments < cut)


def _explained(ranker: GbdtRanker, lists: Lists) -> dict[str, Any]:
    rows = np.unique(np.linspace(0, len(lists.features) - 1, min(EXPLAINED, len(lists.features))).astype(int))
    table = lists.features[rows]
    return explanation(FEATURES, FAMILIES, ranker.importance(), table, ranker.contributions(table))


def _measured(config: TrainGbdtConfig, period: _Period, candidates: Artifact, ranker: GbdtRanker) -> dict[str, Any]:
    """Retrieval, cross-encoder alone and trees on the test period, over all of its queries."""
    asked = period.asked(candidates)
    answers = {"retrieval": [retrieved(one) for one in asked]}
    if config.rerank.cross_encoder is not None:
        answers["cross_encoder"] = [reranked(one, period.reranker) for one in asked]
    trees = Reranker(config.rerank, ranker)
    answers["gbdt"] = [reranked(one, trees) for one in asked]
    queries = candidates.table("queries.parquet")
    ids = [str(one) for one in queries["query_id"].to_pylist()]
    judgments = read_judgments(config.judgments, candidates)[0]
    measured = reranking_values(judgments, answers, ids, config.relevant_gain)
    units = Units.of([unit or one for unit, one in zip(queries["unit_id"].to_pylist(), ids, strict=True)])
    return reranking_figures(measured, "retrieval", units, Resampling(samples=config.samples, seed=config.gbdt.seed))


def _short(measured: Mapping[str, Any]) -> dict[str, float]:
    """Means of all queries by system and metric."""
    return {f"{row['system']}, {row['metric']}": round(row["mean"], 6) for row in measured["systems"]
            if row["scope"] == "unconditional"}

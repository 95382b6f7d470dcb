"""Users whose next items are known -> the lists that `/v1/recommend` would rerank: what its trees learn from.

Each list is made by the service's own steps, so `train_gbdt` sees candidates, scores and the words for a history as
the reranker behind a recommender sees them. With times the query of a user is the review of the first item that was
found: product statistics are then those of the moment before it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from recsys_ray.artifacts import Artifact, Staging, find_artifact, stage
from recsys_ray.config import Config, fingerprint
from recsys_ray.ranking.histories import Asked, Histories, HistorySource, PreparedHistories, read_histories
from recsys_ray.ranking.recommenders import RecommenderError
from recsys_ray.retrieval.batch import CANDIDATES, KIND
from recsys_ray.retrieval.filters import Filters
from recsys_ray.retrieval.segments import Index, open_index
from recsys_ray.schema import CANDIDATE, JUDGMENT, QUERY, conform
from recsys_ray.serving.first_stage import FirstStage, open_first_stage, open_recommender_artifact
from recsys_ray.serving.recommender import context_of, first_list

log = logging.getLogger(__name__)

STAGE_VERSION = 1       # raise it when the same inputs would give other candidates
Rows = list[dict[str, Any]]


class RecommendCandidatesConfig(Config):
    """Which recommender is asked for whom."""

    index: Path                         # artefact root of the index that is served
    recommender: Path                   # of train_recommenders or finetune_sequence, fitted to these histories
    name: str = "ease"                  # which of the recommenders; a sequence model is alone in its artefact
    histories: HistorySource
    split: Literal["valid", "test"] = "valid"
    depth: int = Field(default=100, ge=1)       # items of a list: the `rerank.depth` of the service
    max_users: int = Field(default=3000, ge=1)
    seed: int = 7
    output: Path


def recommend_candidates(config: RecommendCandidatesConfig) -> Artifact:
    """The `candidates` artefact: candidates-00000.parquet (CANDIDATE), queries.parquet (QUERY), judgments.parquet.

    Facts: name, queries, unknown (users of whom the recommender knows nothing: their list is never reranked),
    candidates. Errors: `RecommenderError` for a recommender that was fitted to other histories or knows nobody.
    """
    index = open_index(config.index)
    fitted = open_recommender_artifact(config.recommender)
    histories, source = read_histories(config.histories)
    if (known := fitted.manifest.parents.get("histories")) != source.manifest.reference:
        raise RecommenderError(f"{config.recommender}: fitted to {known}, but histories: {source.manifest.reference}, "
                               "whose held-out items it may know; fit it to these histories")
    parents = {"index": index.artifact.manifest, "recommender": fitted.manifest, "histories": source.manifest}
    key = fingerprint({
        "stage": STAGE_VERSION, "parents": {name: one.fingerprint for name, one in parents.items()},
        "histories": config.histories.model_dump(mode="json", exclude={"path"}),
        "config": config.model_dump(mode="json", exclude={"index", "recommender", "histories", "output"})})
    output = config.output.resolve()
    if (done := find_artifact(output, KIND, key)) is not None:
        return done
    with stage(output, KIND, key) as staging:
        asked = histories.asked[config.split].drawn(config.max_users, config.seed)
        ids = (_first_finds(config.histories, source, config.split, asked, histories)
               if isinstance(config.histories, PreparedHistories) else {one: one for one in asked.known.users})
        first = open_first_stage(config.recommender, config.name)
        found = _lists(index, first, asked, histories, ids, config.depth)
        return _publish(config, staging, found, parents, len(asked.known))


def _first_finds(source: PreparedHistories, prepared: Artifact, split: str, asked: Asked, histories: Histories
                 ) -> dict[str, str]:
    """The review by which each user first found one of their items."""
    wanted = {user: {histories.items[item] for item in items}
              for user, items in zip(asked.known.users, asked.relevant, strict=True)}
    found: dict[str, tuple[int, str]] = {}
    columns = ["user_id", "product_id", "rating", "timestamp_ms", "review_id"]
    for table in prepared.tables(f"reviews/{split}/", columns):
        for user, product, rating, time, review in zip(*(table[name].to_pylist() for name in columns), strict=True):
            if product in wanted.get(user, ()) and rating is not None and rating >= source.min_rating:
                found[user] = min(found.get(user, (time, review)), (time, review))
    return {user: review for user, (_, review) in found.items()}


def _lists(index: Index, first: FirstStage, asked: Asked, histories: Histories, ids: Mapping[str, str], depth: int
           ) -> tuple[Rows, Rows, Rows]:
    """Rows of QUERY, CANDIDATE and JUDGMENT."""
    queries: Rows = []
    candidates: Rows = []
    judgments: Rows = []
    for row, user in enumerate(asked.known.users):
        history = [histories.items[item] for item in asked.known.of(row).tolist()]
        suggestion, found = first_list(index, first, history, [], Filters(), depth)
        if not suggestion.known:
            continue
        fused = found.scores["fused"]
        assert fused is not None
        queries.append({"query_id": ids[user], "query": context_of(index, history), "unit_id": user})
        candidates += [{"query_id": ids[user], "row_id": card["row_id"], "product_id": card["product_id"],
                        "rank": rank, "score": score}
                       for rank, (card, score) in enumerate(zip(found.cards, fused.tolist(), strict=True), 1)]
        judgments += [{"query_id": ids[user], "product_id": histories.items[item], "gain": 1.0}
                      for item in asked.relevant[row].tolist()]
    return queries, candidates, judgments


def _publish(config: RecommendCandidatesConfig, staging: Staging, found: tuple[Rows, Rows, Rows],
             parents: Mapping[str, Any], users: int) -> Artifact:
    queries, candidates, judgments = found
    if not candidates:
        raise RecommenderError(f"{config.recommender}: nothing to list for any of {users} users: it knows none of "
                               "their items, or the index has none of its own")
    log.info("%d histories, %d of them unknown to the recommender; %d candidates", users, users - len(queries),
             len(candidates))
    files = [staging.write_table(name, conform(pa.Table.from_pylist(rows), schema, name)) for name, rows, schema in (
        (f"{CANDIDATES}-00000.parquet", candidates, CANDIDATE), ("queries.parquet", queries, QUERY),
        ("judgments.parquet", judgments, JUDGMENT))]
    return staging.commit(files, config=config, parents=parents, facts={
        "name": config.name, "queries": len(queries), "unknown": users - len(queries), "candidates": len(candidates)})

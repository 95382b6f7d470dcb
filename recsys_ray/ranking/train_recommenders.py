"""Histories -> fitted recommenders: each is tried in several settings, the best by validation users is kept.

Publishes a "recommenders" artefact: <name>/items.parquet and weights.npz of each recommender, scores.parquet (test
users: what is to be found and the head of every list, a column of scores per recommender, for
`evaluate_ranking`), and candidates/<name>.parquet (lists for all users, for mined negatives).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, field_validator

from recsys_ray.artifacts import Artifact, FileEntry, Staging, find_artifact, stage
from recsys_ray.config import Config, fingerprint
from recsys_ray.evaluation.metrics import RankedJudgments, score_all
from recsys_ray.evaluation.ranking import SPECS, whole_ranking
from recsys_ray.evaluation.retrieval import SYSTEM_NAME
from recsys_ray.ranking.histories import Asked, Histories, HistorySource, Sequences, read_histories
from recsys_ray.ranking.recommenders import (
    FILES,
    EaseConfig,
    Floats,
    ItemKnnConfig,
    PopularityConfig,
    Recommender,
    RecommenderConfig,
    UserItems,
    fit_recommender,
)

log = logging.getLogger(__name__)

KIND = "recommenders"
CANDIDATES = "candidates"   # folder of lists, beside those of the recommenders
STAGE_VERSION = 1           # raise it when the same inputs would give other recommenders
USERS_PER_CHUNK = 512
NDCG10 = [spec.name for spec in SPECS].index("nDCG@10")

DEFAULTS: dict[str, tuple[RecommenderConfig, ...]] = {
    "popularity": (PopularityConfig(),),
    "item_knn": tuple(ItemKnnConfig(neighbours=n, shrinkage=s) for n in (20, 50, 100, 200) for s in (0.0, 10.0, 50.0)),
    "ease": tuple(EaseConfig(regularisation=one) for one in (50.0, 100.0, 200.0, 400.0, 800.0)),
}


class TrainRecommendersConfig(Config):
    """Which histories, which recommenders in which settings."""

    histories: HistorySource
    output: Path
    recommenders: dict[str, tuple[RecommenderConfig, ...]] = Field(default_factory=lambda: dict(DEFAULTS))
    max_users: int = Field(default=3000, ge=1)          # asked of each split
    listed: int = Field(default=100, ge=1)              # items of a list in scores.parquet and in candidates
    candidates: tuple[str, ...] = ()                    # recommenders that write lists for all users
    seed: int = 7

    @field_validator("recommenders")
    @classmethod
    def _named(cls, given: dict[str, tuple[RecommenderConfig, ...]]) -> dict[str, tuple[RecommenderConfig, ...]]:
        wrong = [name for name, settings in given.items()
                 if not SYSTEM_NAME.fullmatch(name) or name == CANDIDATES or not settings]
        if wrong or not given:
            raise ValueError(f"{wrong}: give each recommender a name of letters, digits, - and _, and settings to try")
        return given


def train_recommenders(config: TrainRecommendersConfig) -> Artifact:
    """The `recommenders` artefact. Facts: chosen (name -> settings), validation (every setting tried with its
    nDCG@10 over all items), test (name -> metrics), users."""
    histories, source = read_histories(config.histories)
    settings = config.model_dump(mode="json", exclude={"output", "histories"})
    key = fingerprint({"stage": STAGE_VERSION, "source": source.manifest.fingerprint, "config": settings,
                       "histories": config.histories.model_dump(mode="json", exclude={"path"})})
    if (done := find_artifact(config.output, KIND, key)) is not None:
        return done
    with stage(config.output, KIND, key) as staging:
        fitted, facts = fit_all(histories, config)
        files = [staging.entry(f"{name}/{file}") for name, one in fitted.items()
                 for file in one.save(staging.path / name)]
        asked = histories.asked["test"].drawn(config.max_users, config.seed)
        files.append(staging.write_table("scores.parquet", head_table(asked, histories, fitted, config.listed)))
        files += [_write_candidates(staging, name, fitted[name], histories, config.listed)
                  for name in config.candidates]
        return staging.commit(files, config=config, parents={"histories": source.manifest}, facts=facts)


def open_recommender(artifact: Artifact, name: str) -> Recommender:
    """One recommender of the artefact, its files checked."""
    if name not in artifact.manifest.facts["chosen"]:
        raise ValueError(f"{artifact.path}: no recommender {name!r}; there are "
                         f"{', '.join(sorted(artifact.manifest.facts['chosen']))}")
    paths = [artifact.file(f"{name}/{file}") for file in FILES]
    return Recommender.load(paths[0].parent)


# --- fitting --------------------------------------------------------------------------------------
def fit_all(histories: Histories, config: TrainRecommendersConfig) -> tuple[dict[str, Recommender], dict[str, Any]]:
    """Each recommender in its best setting, and what was found on the way."""
    train = UserItems(histories.train.users, histories.items, histories.train.matrix(len(histories.items)))
    valid, test = (histories.asked[split].drawn(config.max_users, config.seed) for split in ("valid", "test"))
    fitted: dict[str, Recommender] = {}
    tried, chosen, reached = [], {}, {}
    for name, settings in config.recommenders.items():
        values = []
        for setting in settings:
            model = fit_recommender(train, setting)
            values.append(float(whole_values(model, valid, histories)[:, NDCG10].mean()))
            tried.append({"name": name, **setting.model_dump(mode="json"), "ndcg10": values[-1]})
            if values[-1] == max(values):
                fitted[name] = model
        chosen[name] = settings[int(np.argmax(values))].model_dump(mode="json")
        means = whole_values(fitted[name], test, histories).mean(axis=0)
        reached[name] = {spec.name: float(mean) for spec, mean in zip(SPECS, means, strict=True)}
        log.info("%s: nDCG@10 %.4f (valid), %.4f (test) with %s", name, max(values), reached[name]["nDCG@10"],
                 chosen[name])
    users = {"train": len(train.users), "valid": len(valid.known), "test": len(test.known)}
    return fitted, {"chosen": chosen, "validation": tried, "test": reached, "users": users, "timed": histories.timed}


def whole_values(model: Recommender, asked: Asked, histories: Histories) -> npt.NDArray[np.float64]:
    """`SPECS` of each asked user over all items that may be shown, (U, M)."""
    parts = []
    for chunk, scores in scored_chunks(model, asked.known):
        part = Asked(asked.known.take(range(len(asked.known))[chunk]), asked.relevant[chunk], asked.seen[chunk])
        ranked: RankedJudgments = whole_ranking(part.known.users, scores, [one.tolist() for one in part.relevant],
                                                part.allowed(histories.eligible))
        parts.append(score_all(ranked, SPECS))
    return np.concatenate(parts)


def scored_chunks(model: Recommender, known: Sequences) -> Iterator[tuple[slice, Floats]]:
    """(which users, a score of every item for each of them), some hundred users at a time."""
    matrix = known.matrix(len(model.items))
    for start in range(0, len(known), USERS_PER_CHUNK):
        chunk = slice(start, min(start + USERS_PER_CHUNK, len(known)))
        yield chunk, model.score(matrix[chunk])


# --- lists ----------------------------------------------------------------------------------------
def head_table(asked: Asked, histories: Histories, fitted: Mapping[str, Recommender], listed: int) -> pa.Table:
    """(query_id, product_id, label, a score per recommender) of what is to be found and the head of every list."""
    allowed = asked.allowed(histories.eligible)
    parts: dict[str, list[Any]] = {name: [] for name in ("query_id", "product_id", "label", *fitted)}
    for found in zip(*(scored_chunks(model, asked.known) for model in fitted.values()), strict=True):
        chunk = found[0][0]
        of_model = [heads(scores, allowed[chunk], model.popularity, listed)
                    for (_, scores), model in zip(found, fitted.values(), strict=True)]
        for row, user in enumerate(range(chunk.start, chunk.stop)):
            items = np.union1d(asked.relevant[user], np.concatenate([lists[row] for lists in of_model]))
            parts["query_id"] += [asked.known.users[user]] * len(items)
            parts["product_id"] += [histories.items[item] for item in items]
            parts["label"] += np.isin(items, asked.relevant[user]).astype(np.int64).tolist()
            for name, (_, scores) in zip(fitted, found, strict=True):
                parts[name].append(scores[row, items])
    columns: dict[str, Any] = {name: parts[name] for name in ("query_id", "product_id", "label")}
    return pa.table({**columns, **{name: np.concatenate(parts[name]) for name in fitted}})


def heads(scores_UI: Floats, allowed_UI: npt.NDArray[np.bool_], popularity: Floats, listed: int
          ) -> list[npt.NDArray[np.int64]]:
    """The best `listed` allowed items of each user, best first; ties by popularity, then by place."""
    masked = np.where(allowed_UI, scores_UI, -np.inf)
    count = min(listed, masked.shape[1])
    best_UL = np.argpartition(-masked, count - 1, axis=1)[:, :count]
    found_UL = np.take_along_axis(masked, best_UL, axis=1)
    order_UL = np.lexsort((best_UL, -popularity[best_UL], -found_UL))
    best_UL, found_UL = (np.take_along_axis(one, order_UL, axis=1) for one in (best_UL, found_UL))
    return [best[np.isfinite(found)] for best, found in zip(best_UL, found_UL, strict=True)]


def _write_candidates(staging: Staging, name: str, model: Recommender, histories: Histories, listed: int) -> FileEntry:
    """(query_id, product_id, rank) of all users, from what is known of them."""
    users: list[Sequences] = [histories.train, *(asked.known for asked in histories.asked.values())]
    table = pa.concat_tables([candidate_table(model, known, histories, listed) for known in users])
    return staging.write_table(f"{CANDIDATES}/{name}.parquet", table)


def candidate_table(model: Recommender, known: Sequences, histories: Histories, listed: int) -> pa.Table:
    """(query_id, product_id, rank): the head of the list of each user, without what is known."""
    eligible = np.flatnonzero(histories.eligible)
    column = np.full(len(histories.items), -1)
    column[eligible] = np.arange(len(eligible))
    query, product, rank = [], [], []
    for chunk, scores in scored_chunks(model, known):
        allowed = np.ones((len(scores), len(eligible)), dtype=bool)
        for row in range(len(scores)):
            mine = column[known.of(chunk.start + row)]
            allowed[row, mine[mine >= 0]] = False
        for row, best in enumerate(heads(scores[:, eligible], allowed, model.popularity[eligible], listed)):
            query.append(np.full(len(best), chunk.start + row))
            product.append(eligible[best])
            rank.append(np.arange(1, len(best) + 1))
    users, ids = pa.array(known.users, pa.string()), pa.array(histories.items, pa.string())
    return pa.table({"query_id": users.take(pa.array(_cat(query))), "product_id": ids.take(pa.array(_cat(product))),
                     "rank": pa.array(_cat(rank), pa.int32())})


def _cat(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.int64]:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

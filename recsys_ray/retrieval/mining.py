"""Training pairs + the current model's index -> the same pairs with hard negatives, on Ray, resumable at any moment.

Actors hold the index and the encoder; each unit of pairs becomes one file of the result, written whole
with a sidecar. A rerun skips the units that are there. Only products known before the train cut can be
found, so a model never learns from what appeared later.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from pydantic import Field

from recsys_ray import runtime
from recsys_ray.artifacts import (
    Artifact,
    FileEntry,
    Staging,
    check_file,
    find_artifact,
    open_artifact,
    stage,
    write_table,
    write_text,
)
from recsys_ray.config import fingerprint
from recsys_ray.data.negatives import (
    Candidates,
    MiningCounts,
    NegativesConfig,
    PairedGroups,
    choose_mined,
    choose_random,
    query_hashes,
    with_negatives,
)
from recsys_ray.data.pairs import PairError, known_before
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.models.text_encoder import TextEncoderConfig, encoder_identity
from recsys_ray.retrieval.segments import Index, SegmentHits, open_index
from recsys_ray.runtime import RayConfig

log = logging.getLogger(__name__)

KIND = "pairs"
STAGE_VERSION = 1       # raise it when the same inputs would give other negatives
ACTOR_CPUS = 0.9        # below 1, so that a pool as large as the machine leaves room for other tasks
ACTOR_RESTARTS = 3      # a pair that kills its process must end the run one day
CHUNK = 256             # pairs searched at once
CATALOGUE, PAIRED = "scratch/catalogue.parquet", "scratch/paired.parquet"
Ints = npt.NDArray[np.int64]


class MineNegativesConfig(NegativesConfig):
    """Which pairs, which model, and how its mistakes become negatives."""

    pairs: Path                                         # artefact root of the pairs
    prepared: Path                                      # that the pairs and the index were made from
    index: Path                                         # of the current model's vectors
    output: Path                                        # artefact root of the pairs with negatives
    encoder: TextEncoderConfig = TextEncoderConfig()    # must be the index's own
    # pair_text: the positive as it is trained on, without the query's own words; index: as it was indexed
    positive_score: Literal["pair_text", "index"] = "pair_text"
    keep_earlier: bool = True                           # negatives the pairs have already, e.g. judged ones
    rows_per_unit: int = Field(default=1024, ge=1)      # pairs a file: one unit must end within the progress timeout
    workers: int | None = Field(default=None, ge=1)     # None: one a core
    ray: RayConfig = RayConfig()


@dataclass(frozen=True)
class _Job:
    """What every worker needs to know; paths, never data."""

    pairs: str
    pairs_version: str
    index: str
    index_version: str
    identity: dict[str, Any]
    staging: str
    config: dict[str, Any]


@dataclass(frozen=True)
class _Unit:
    source: str         # file of the pairs artefact
    start: int
    rows: int
    target: str


def mine_negatives(config: MineNegativesConfig) -> Artifact:
    """The `pairs` artefact of `config.pairs` with the negatives of every train pair filled; valid stays as it is.

    Facts: those of the pairs, and `negatives`: counts, shares and what other score fractions would keep.
    Errors: `PairError` when pairs, index and products were not made from one another; `IndexMismatch` for
    an index of another encoder.
    """
    output = config.output.resolve()
    pairs = open_artifact(config.pairs.resolve(), KIND)
    if "teacher" in pairs.manifest.facts:
        raise PairError(f"{config.pairs}: a teacher scored these pairs with the negatives they have; mine for the "
                        "pairs that it scored, then score the mined ones")
    index = open_artifact(config.index.resolve(), "index")
    identity = encoder_identity(config.encoder)
    open_index(config.index.resolve(), index.manifest.version, identity, segments=())    # refuses another encoder
    prepared = _prepared(config, pairs, index)
    options = config.model_dump(mode="json", exclude={"pairs", "prepared", "index", "output", "encoder", "workers",
                                                      "ray"})
    key = fingerprint({"stage": STAGE_VERSION, "pairs": pairs.manifest.fingerprint, "encoder": identity,
                       "index": index.manifest.fingerprint, "options": options})
    if (done := find_artifact(output, KIND, key)) is not None:
        return done
    with stage(output, KIND, key) as staging, runtime.connected(config.ray):
        return _run(config, pairs, index, prepared, identity, staging)


def _prepared(config: MineNegativesConfig, pairs: Artifact, index: Artifact) -> Artifact:
    wanted, found = pairs.manifest.parents["prepared"], index.manifest.parents["prepared"]
    if wanted != found:
        raise PairError(f"{config.pairs} was made from {wanted}, but {config.index} from {found}: negatives would "
                        "have other texts than positives; make both from the same products")
    return open_artifact(config.prepared.resolve(), "prepared", wanted.partition("/")[2])


def _run(config: MineNegativesConfig, pairs: Artifact, index: Artifact, prepared: Artifact, identity: dict[str, Any],
         staging: Staging) -> Artifact:
    shared = _write_shared(pairs, prepared, staging.path)
    encoder = config.encoder
    if Path(encoder.model).is_dir():    # workers start in other directories
        encoder = encoder.replace(model=str(Path(encoder.model).resolve()))
    job = _Job(str(config.pairs.resolve()), pairs.manifest.version, str(config.index.resolve()),
               index.manifest.version, identity, str(staging.path),
               config.replace(encoder=encoder).model_dump(mode="json"))
    units = _units(pairs, config.rows_per_unit)
    todo = [unit for unit in units if _finished(staging.path, unit.target) is None]
    log.info("%d products known before the cut; %d pairs in %d files, %d of them found finished", shared,
             sum(unit.rows for unit in units), len(units), len(units) - len(todo))
    _mine(config, job, todo)
    counts, files = MiningCounts(), [_copied(pairs, name, staging) for name in pairs.names("pairs/valid/")]
    for unit in units:
        values = _sidecar(staging.path, unit.target)
        files.append(FileEntry.model_validate(values["entry"]))
        counts.add(MiningCounts(**values["counts"]))
    facts = {**pairs.manifest.facts, "form": "triplet", "negatives": counts.summary(), "encoder": identity}
    log.info("%d mined and %d random negatives for %d pairs; %.0f %% of the candidates were too close to the positive",
             counts.mined, counts.random, counts.pairs, 100 * counts.too_close / max(1, counts.in_window))
    parents = {"pairs": pairs.manifest, "index": index.manifest, "prepared": prepared.manifest}
    return staging.commit(files, config=config, parents=parents, facts=facts)


def _write_shared(pairs: Artifact, prepared: Artifact, staging: Path) -> int:
    """Write what every worker looks up: the known products with their groups, and queries paired more than once."""
    facts = prepared.manifest.facts
    train_end = facts["cuts"]["train_end_ms"] if facts["cuts"] else None
    known = []
    for table in prepared.tables("products/", ["row_id", "group_id", "cold", "released_ms"]):
        known.append(table.filter(pa.array(known_before(table, train_end))).select(["row_id", "group_id"]))
    catalogue = pa.concat_tables(known).sort_by("row_id")
    hashes, groups = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for table in pairs.tables("pairs/train/", ["query", "group_id"]):
        hashes.append(query_hashes(table["query"]))
        groups.append(table["group_id"].to_numpy())
    write_table(staging, CATALOGUE, catalogue)
    write_table(staging, PAIRED, PairedGroups.of(np.concatenate(hashes), np.concatenate(groups)).table())
    return int(catalogue.num_rows)


def _units(pairs: Artifact, rows_per_unit: int) -> list[_Unit]:
    rows = {entry.path: entry.rows or 0 for entry in pairs.manifest.files}
    return [_Unit(name, start, min(rows_per_unit, rows[name] - start),
                  f"pairs/train/{Path(name).stem}-{start // rows_per_unit:05d}.parquet")
            for name in pairs.names("pairs/train/") for start in range(0, rows[name], rows_per_unit)]


def _copied(pairs: Artifact, name: str, staging: Staging) -> FileEntry:
    return staging.write_table(name, pairs.table(name))


def _sidecar(staging: Path, target: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((staging / target).with_suffix(".json").read_bytes())
    return values


def _finished(staging: Path, target: str) -> FileEntry | None:
    """The entry of a file that is whole and as it was written, else None."""
    try:
        entry = FileEntry.model_validate(_sidecar(staging, target)["entry"])
        check_file(staging / entry.path, entry)
    except (OSError, ValueError, KeyError):
        return None
    return entry


# --- work -----------------------------------------------------------------------------------------
def _mine(config: MineNegativesConfig, job: _Job, units: Sequence[_Unit]) -> None:
    if not units:
        return
    ray.data.DataContext.get_current().max_consecutive_actor_init_deaths = ACTOR_RESTARTS
    workers = min(config.workers or _cores(), len(units))
    rows = [{"unit": json.dumps(asdict(unit))} for unit in units]
    finished = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Miner, fn_constructor_args=(job,), batch_size=1, batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=workers), num_cpus=ACTOR_CPUS,
        max_restarts=ACTOR_RESTARTS, max_task_retries=ACTOR_RESTARTS)
    for done, _ in enumerate(finished.iter_rows(), start=1):
        if done % max(1, len(units) // 10) == 0:
            log.info("mined %d of %d files", done, len(units))


def _cores() -> int:
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())  # type: ignore[no-untyped-call]
    if nodes > 1:
        return max(1, int(ray.cluster_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]
    return os.cpu_count() or 1  # a local Ray declares more logical CPUs than there are cores


class _Miner:
    """The actor: an open index that finds known products alone, and its encoder."""

    def __init__(self, job: _Job) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import torch

        torch.set_num_threads(1)    # workers are the parallelism
        self.job = job
        self.config = MineNegativesConfig.model_validate(job.config)
        staging = Path(job.staging)
        catalogue, paired = pq.read_table(staging / CATALOGUE), pq.read_table(staging / PAIRED)
        self.index = open_index(job.index, job.index_version, job.identity)
        for segment in self.index.segments:     # what was not known before the cut cannot be found
            segment.alive = segment.alive & np.isin(segment.row_ids, catalogue["row_id"].to_numpy())
        self.miner = PairMiner(self.index, build_text_encoder(self.config.encoder), catalogue,
                               PairedGroups(paired["query_hash"].to_numpy(), paired["group_id"].to_numpy()),
                               self.config)
        self.pairs = open_artifact(job.pairs, KIND, job.pairs_version)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for text in batch["unit"]:
            self._mine(_Unit(**json.loads(text)))
        return {"unit": np.asarray(batch["unit"])}

    def _mine(self, unit: _Unit) -> None:
        staging = Path(self.job.staging)
        if _finished(staging, unit.target) is not None:     # finished by an actor that died before it could say so
            return
        rows = self.pairs.table(unit.source).slice(unit.start, unit.rows)
        counts = MiningCounts()
        parts = [self.miner.fill(rows.slice(start, CHUNK), counts) for start in range(0, unit.rows, CHUNK)]
        entry = write_table(staging, unit.target, pa.concat_tables(parts))
        write_text((staging / entry.path).with_suffix(".json"), json.dumps(
            {"entry": entry.model_dump(), "counts": asdict(counts)}))


class PairMiner:
    """Fills the negatives of TRAINING_PAIR rows from an index whose findable products are `catalogue`'s."""

    def __init__(self, index: Index, encoder: Any, catalogue: pa.Table, paired: PairedGroups,
                 config: MineNegativesConfig) -> None:
        self.index, self.encoder, self.paired, self.config = index, encoder, paired, config
        self._rows: Ints = catalogue["row_id"].to_numpy()
        self._groups: Ints = catalogue["group_id"].to_numpy()
        live = [segment.row_ids[segment.alive] for segment in index.segments]
        self._pool = np.intersect1d(np.concatenate([np.zeros(0, np.int64), *live]), self._rows)

    def groups_of(self, row_ids: Ints) -> Ints:
        """The near-duplicate groups of known products."""
        groups: Ints = self._groups[np.searchsorted(self._rows, row_ids)]
        return groups

    def fill(self, pairs: pa.Table, counts: MiningCounts) -> pa.Table:
        """The rows with their negatives; `counts` takes in what happened."""
        config = self.config
        queries = pairs["query"].to_pylist()
        vectors = self.encoder.encode_queries(queries)
        answers = self.index.search(vectors, queries if config.lexical else None, config.depth)
        scores = self._positive_scores(pairs, vectors)
        pool_groups = self.groups_of(self._pool)
        chosen: list[Ints] = []
        for number, row in enumerate(pairs.select(["pair_id", "group_id", "negative_group_ids"]).to_pylist()):
            wrong = {row["group_id"], *self.paired.of_query(int(query_hashes(pairs["query"].slice(number, 1))[0]))}
            if config.keep_earlier:
                wrong |= set(row["negative_group_ids"])
            found = self._candidates(answers[number])
            mined = found.row_ids[choose_mined(found, float(scores[number]), wrong, config, row["pair_id"], counts)]
            wrong |= set(self.groups_of(mined).tolist())
            random = self._pool[choose_random(self._pool, pool_groups, wrong, config.random, row["pair_id"],
                                              config.seed)]
            counts.random += len(random)
            chosen.append(np.concatenate([mined, random]))
        return with_negatives(pairs, self._described(chosen), config.keep_earlier)

    def _candidates(self, hits: SegmentHits) -> Candidates:
        return Candidates(hits.row_ids, self.groups_of(hits.row_ids), hits.dense_scores, hits.lexical_scores)

    def _positive_scores(self, pairs: pa.Table, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if self.config.positive_score == "pair_text":
            positives = self.encoder.encode_documents(pairs["text"].to_pylist())
            return np.asarray(np.einsum("nd,nd->n", vectors, positives), dtype=np.float32)
        scores = np.full(len(vectors), np.nan, np.float32)
        for number, row in enumerate(pairs["row_id"].to_numpy()):
            for segment in self.index.segments:
                places = segment.places(np.array([row], np.int64))
                if len(places):
                    scores[number] = segment.vectors.scores(vectors[number], places)[0]
        if np.isnan(scores).any():
            lost = pairs["product_id"][int(np.flatnonzero(np.isnan(scores))[0])].as_py()
            raise PairError(f"{self.config.index}: has no vector of {lost!r}; set positive_score to pair_text")
        return scores

    def _described(self, chosen: Sequence[Ints]) -> list[tuple[list[int], list[str], list[int]]]:
        ids = np.unique(np.concatenate([np.zeros(0, np.int64), *chosen]))
        texts = {row["row_id"]: row["text"] for row in self.index.products(ids, ["row_id", "text"])}
        return [(one.tolist(), [texts[row] for row in one.tolist()], self.groups_of(one).tolist()) for one in chosen]

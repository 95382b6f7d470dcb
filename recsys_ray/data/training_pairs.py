"""Prepared products and reviews -> (query, positive text) pairs to train a retriever on, bucket by bucket on Ray.

Each bucket is one task that writes its own files and a sidecar with their checksums; a rerun skips the
buckets whose files are whole, so a killed run continues where it was.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from recsys_ray import runtime
from recsys_ray.artifacts import (
    Artifact,
    FileEntry,
    Staging,
    check_file,
    find_artifact,
    open_artifact,
    stage,
    write_text,
)
from recsys_ray.config import fingerprint
from recsys_ray.data.judged_pairs import JudgedQueries, JudgedQuery, digest, judged_queries
from recsys_ray.data.pair_buckets import (
    BucketPairs,
    PairJob,
    audit_rows,
    copied_shares,
    copy_warning,
    make_bucket,
    make_judged,
)
from recsys_ray.data.pairs import PairError, PairsConfig
from recsys_ray.runtime import RayConfig
from recsys_ray.schema import AUDIT

log = logging.getLogger(__name__)

KIND = "pairs"
STAGE_VERSION = 1       # raise it when the same inputs would give other pairs
TASK_CPUS = 0.9
JUDGED_QUERIES = 2000  # of one file


class MakePairsConfig(PairsConfig):
    """Which prepared shop, which pairs, where to."""

    prepared: Path          # artefact of the prepare job
    output: Path            # artefact root of the pairs
    judged: JudgedQueries | None = None     # pairs that people judged, beside those of reviews and products
    ray: RayConfig = RayConfig()

    def options(self) -> PairsConfig:
        """What decides the pairs, without paths."""
        return PairsConfig.model_validate(self.model_dump(include=set(PairsConfig.model_fields)))


def make_pairs(config: MakePairsConfig) -> Artifact:
    """The `pairs` artefact: pairs/<split>/*.parquet (TRAINING_PAIR) for train and valid, audit/audit.parquet (AUDIT)
    and, with judged queries, judged_queries.parquet (query_id, query, split).

    Facts: query_type, positive_text, template, num_buckets, counts, copied_token_share (per split),
    copied_token_gap. Errors: `PairError` when there is nothing to make pairs from.
    """
    prepared_root, output = config.prepared.resolve(), config.output.resolve()
    prepared = open_artifact(prepared_root, "prepared")
    options = config.options()
    judged = judged_queries(config.judged) if config.judged is not None else []
    key = fingerprint({"stage": STAGE_VERSION, "prepared": prepared.manifest.fingerprint,
                       "options": options.model_dump(mode="json"), "judged": digest(judged),
                       "judged_options": config.judged.model_dump(mode="json") if config.judged else None})
    if (done := find_artifact(output, KIND, key)) is not None:
        return done
    with stage(output, KIND, key) as staging, runtime.connected(config.ray):
        job = PairJob(str(prepared_root), prepared.manifest.version, str(staging.path), options)
        parts: dict[str, list[JudgedQuery] | None] = {
            Path(name).stem: None for name in prepared.names("products/")}
        parts |= {f"judged-{start // JUDGED_QUERIES:05d}": judged[start:start + JUDGED_QUERIES]
                  for start in range(0, len(judged), JUDGED_QUERIES)}
        _make(job, config.judged, parts)
        return _publish(config, prepared, staging, [_described(staging.path, part) for part in parts], judged)


def _make(job: PairJob, judged: JudgedQueries | None, parts: Mapping[str, list[JudgedQuery] | None]) -> None:
    staging = Path(job.staging)
    todo = [part for part in parts if not _finished(staging, part)]
    log.info("%d parts, %d of them found finished", len(parts), len(parts) - len(todo))
    task, shared = ray.remote(num_cpus=TASK_CPUS, max_retries=3)(_make_part), ray.put(job)
    pending = [task.remote(shared, part, judged, parts[part]) for part in todo]
    while pending:
        done, pending = ray.wait(pending)
        ray.get(done)
        finished = len(todo) - len(pending)
        if finished % max(1, len(todo) // 4) == 0:
            log.info("pairs of %d of %d parts", finished, len(todo))


def _make_part(job: PairJob, part: str, judged: JudgedQueries | None, queries: list[JudgedQuery] | None) -> None:
    result = make_bucket(job, part) if judged is None or queries is None else make_judged(job, part, judged, queries)
    write_text(Path(job.staging) / "done" / f"{part}.json", json.dumps(
        {"files": [entry.model_dump() for entry in result.files], "counts": result.counts, "copied": result.copied}))


def _described(staging: Path, part: str) -> BucketPairs:
    values = json.loads((staging / "done" / f"{part}.json").read_bytes())
    return BucketPairs([FileEntry.model_validate(one) for one in values["files"]], Counter(values["counts"]),
                       values["copied"])


def _finished(staging: Path, part: str) -> bool:
    """Whether the files of a part are whole and as they were written."""
    try:
        for entry in _described(staging, part).files:
            check_file(staging / entry.path, entry)
    except (OSError, ValueError, KeyError):
        return False
    return True


def _publish(config: MakePairsConfig, prepared: Artifact, staging: Staging, results: Sequence[BucketPairs],
             judged: Sequence[JudgedQuery]) -> Artifact:
    total = BucketPairs()
    for one in results:
        total.add(one)
    rows = {split: sum(entry.rows or 0 for entry in total.files if entry.path.startswith(f"pairs/{split}/"))
            for split in ("train", "valid")}
    total.counts.update({f"{split} pairs": count for split, count in rows.items()})
    if not rows["train"]:
        raise PairError(f"{config.prepared}: gave no training pair; a shop without reviews needs product_queries "
                        "or judged queries")
    shares, gap = copied_shares(total)
    if gap is not None and gap > config.max_copied_gap:
        log.warning(copy_warning(shares))
    audit = pa.Table.from_pylist(audit_rows(total, config.max_copied_gap), schema=AUDIT)
    facts: dict[str, Any] = {
        "query_type": config.query_type, "positive_text": config.positive_text, "form": config.form,
        "template": prepared.manifest.facts["template"], "num_buckets": prepared.manifest.facts["num_buckets"],
        "counts": dict(sorted(total.counts.items())), "copied_token_share": shares,
        "copied_token_gap": gap}
    log.info("%d train and %d valid pairs; words copied from the positive: %s", rows["train"], rows["valid"],
             ", ".join(f"{split} {share:.1%}" for split, share in shares.items()) or "not measured")
    files = [*total.files, staging.write_table("audit/audit.parquet", audit)]
    if judged:      # which queries the model may know: an evaluation must not report them
        files.append(staging.write_table("judged_queries.parquet", pa.table({
            "query_id": [one.query_id for one in judged], "query": [one.query for one in judged],
            "split": [one.split for one in judged]})))
    return staging.commit(files, config=config, parents={"prepared": prepared.manifest}, facts=facts)

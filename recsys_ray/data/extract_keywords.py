"""Train and later reviews -> keywords, long descriptions -> summaries, by a language model, resumable on Ray.

A first pass, bucket by bucket, finds what has to be asked: answers of an earlier version are kept by the
hash of text, prompt and model, and what says nothing is not asked. Ray Data then hands units of texts to
workers, each of which asks the server and writes its own file; a rerun skips the units that are there.
A finished extraction in which the server gave no answer to some texts is continued by the same command.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import ray
from pydantic import Field

from recsys_ray import runtime
from recsys_ray.artifacts import (
    Artifact,
    FileEntry,
    Staging,
    check_file,
    current_version,
    find_artifact,
    open_artifact,
    stage,
    write_table,
    write_text,
)
from recsys_ray.config import Config, fingerprint
from recsys_ray.data.extraction import Plan, Unit, answer_unit, asked_file, merge_bucket, plan_bucket
from recsys_ray.data.keyword_store import KIND
from recsys_ray.data.llm_client import LlmClient, LlmConfig, LlmError
from recsys_ray.data.llm_keywords import PROMPT_VERSION
from recsys_ray.data.splits import SPLITS
from recsys_ray.runtime import RayConfig

log = logging.getLogger(__name__)

STAGE_VERSION = 1       # raise it when the same inputs would give other keywords
TASK_CPUS = 0.9
ACTOR_CPUS = 0.1        # a worker waits for the server
ACTOR_RESTARTS = 3      # a text that kills its process must end the run one day
FEW = 3                 # so many texts without an answer are no sign that the server is down


class ExtractKeywordsConfig(Config):
    """Which texts of a prepared shop are read by whom."""

    prepared: Path          # artefact of the prepare job
    output: Path            # artefact root of the keywords
    llm: LlmConfig | None = None                            # None: the offline extractor, which summarises nothing
    splits: tuple[Literal["train", "valid", "test"], ...] = SPLITS  # type: ignore[assignment]
    max_reviews_per_product: int | None = Field(default=None, ge=1)     # of a split, those that would feed a text first
    min_words: int = Field(default=2, ge=1)                 # different words that say something; else nothing is asked
    summaries_over: int = Field(default=300, ge=0)          # characters; longer descriptions are summarised
    summary_chars: int = Field(default=300, ge=50)          # of a summary
    unit_rows: int = Field(default=256, ge=1)               # texts a file: a unit must end within the progress timeout
    max_failed_share: float = Field(default=0.5, ge=0, le=1)    # of a unit without an answer: above it the run ends
    workers: int = Field(default=1, ge=1)                   # processes that ask, each `llm.concurrency` at once
    ray: RayConfig = RayConfig()


@dataclass(frozen=True)
class _Job:
    """What every worker needs to know; paths, never data."""

    plan: Plan
    config: dict[str, Any]


def extract_keywords(config: ExtractKeywordsConfig) -> Artifact:
    """The `keywords` artefact: keywords/, summaries/ and quarantine/bucket-*.parquet (see `keyword_store`).

    Facts: extractor, model, prompt_version, num_buckets, counts. Errors: `LlmError` for a server that cannot
    be used, or that answers less than half of a unit; what was finished is kept, the same command goes on.
    """
    prepared_root, output = config.prepared.resolve(), config.output.resolve()
    prepared = open_artifact(prepared_root, "prepared")
    options = config.model_dump(mode="json", include={"splits", "max_reviews_per_product", "min_words",
                                                      "summaries_over", "summary_chars"})
    key = fingerprint({"stage": STAGE_VERSION, "prepared": prepared.manifest.fingerprint, "options": options,
                       "prompt": PROMPT_VERSION, "llm": config.llm.asked() if config.llm else "offline"})
    done = find_artifact(output, KIND, key)
    if done is not None and not done.manifest.facts["counts"].get("without an answer"):
        return done
    with stage(output, KIND, key) as staging, runtime.connected(config.ray):
        plan = Plan(prepared=str(prepared_root), version=prepared.manifest.version, staging=str(staging.path),
                    earlier=_earlier(output, prepared), llm=config.llm, splits=config.splits,
                    max_reviews_per_product=config.max_reviews_per_product, min_words=config.min_words,
                    summaries_over=config.summaries_over, summary_chars=config.summary_chars)
        return _run(config, prepared, staging, plan)


def _earlier(output: Path, prepared: Artifact) -> tuple[str, str] | None:
    """Root and version whose answers may be kept: same buckets."""
    version = current_version(output)
    if version is None:
        return None
    facts = open_artifact(output, KIND, version).manifest.facts
    return (str(output), version) if facts["num_buckets"] == prepared.manifest.facts["num_buckets"] else None


def _run(config: ExtractKeywordsConfig, prepared: Artifact, staging: Staging, plan: Plan) -> Artifact:
    buckets = [Path(name).stem for name in prepared.names("products/")]
    remote = ray.remote(num_cpus=TASK_CPUS, max_retries=3)
    plans: list[Counter[str]] = ray.get([remote(plan_bucket).remote(plan, bucket) for bucket in buckets])
    counts: Counter[str] = sum(plans, Counter())
    units = [unit for bucket in buckets for unit in _units(staging.path, bucket, config.unit_rows)]
    todo = [unit for unit in units if not _finished(staging.path, unit)]
    log.info("%s; %d texts in %d units, %d of them found finished", ", ".join(
        f"{name}: {count}" for name, count in sorted(counts.items())), sum(unit.rows for unit in units), len(units),
        len(units) - len(todo))
    _ask(config, plan, todo)
    merged: list[tuple[list[FileEntry], Counter[str]]] = ray.get([
        remote(merge_bucket).remote(plan, bucket, [unit.name for unit in units if unit.bucket == bucket])
        for bucket in buckets])
    files = [entry for entries, _ in merged for entry in entries]
    counts.update(sum((found for _, found in merged), Counter()))
    facts = {"extractor": "offline" if config.llm is None else "llm", "model": config.llm and config.llm.model,
             "prompt_version": PROMPT_VERSION, "num_buckets": prepared.manifest.facts["num_buckets"],
             "counts": dict(sorted(counts.items()))}
    log.info("%s", ", ".join(f"{name}: {count}" for name, count in sorted(counts.items())))
    return staging.commit(files, config=config, parents={"prepared": prepared.manifest}, facts=facts)


def _units(staging: Path, bucket: str, unit_rows: int) -> Iterable[Unit]:
    """Units of the texts of one bucket; the name tells the content, so a resumed plan finds what it means."""
    keys = pq.read_table(staging / asked_file(bucket), columns=["content_key"])["content_key"].to_pylist()
    for start in range(0, len(keys), unit_rows):
        some = keys[start:start + unit_rows]
        digest = hashlib.sha256("".join(some).encode()).hexdigest()[:16]
        yield Unit(bucket, f"{bucket}-{digest}", start, len(some))


# --- asking ---------------------------------------------------------------------------------------
def _ask(config: ExtractKeywordsConfig, plan: Plan, units: Sequence[Unit]) -> None:
    if not units:
        return
    ray.data.DataContext.get_current().max_consecutive_actor_init_deaths = ACTOR_RESTARTS
    rows = [{"unit": json.dumps(asdict(unit))} for unit in units]
    job = _Job(plan, config.model_dump(mode="json"))
    answered = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _UnitAsker, fn_constructor_args=(job,), batch_size=1, batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=min(config.workers, len(units))), num_cpus=ACTOR_CPUS,
        max_restarts=ACTOR_RESTARTS, max_task_retries=ACTOR_RESTARTS)
    total, done = sum(unit.rows for unit in units), 0
    for row in answered.iter_rows():
        if row["problem"]:      # as a value: Ray Data would wrap an error beyond recognition
            raise LlmError(row["problem"])
        done += int(row["rows"])
        log.info("answered %d of %d texts", done, total)


class _UnitAsker:
    """The actor: a connection to the server, or the offline extractor."""

    def __init__(self, job: _Job) -> None:
        self.plan, self.config = job.plan, ExtractKeywordsConfig.model_validate(job.config)
        self.client = None if self.config.llm is None else LlmClient(self.config.llm)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        units = [Unit(**json.loads(text)) for text in batch["unit"]]
        problems = [self._answer(unit) for unit in units]
        return {"rows": np.array([unit.rows for unit in units]), "problem": np.array(problems)}

    def _answer(self, unit: Unit) -> str:
        """Write the unit's answers; returns why the run must end, or nothing."""
        staging = Path(self.plan.staging)
        if _finished(staging, unit):    # finished by an actor that died before it could say so
            return ""
        asked = pq.read_table(staging / asked_file(unit.bucket)).slice(unit.start, unit.rows)
        try:
            table = answer_unit(asked, self.plan, None if self.client is None else self.client.ask)
        except LlmError as error:
            return str(error)
        silent = sum(table["unavailable"].to_pylist())
        if silent > max(FEW, self.config.max_failed_share * unit.rows) and self.config.llm is not None:
            return (f"{self.config.llm.base_url}: no answer to {silent} of {unit.rows} texts; what is finished is "
                    "kept: run the job again when the server is well")
        entry = write_table(staging, unit.file, table)
        write_text((staging / unit.file).with_suffix(".json"), entry.model_dump_json())
        return ""


def _finished(staging: Path, unit: Unit) -> bool:
    """Whether the unit's file is whole and as it was written."""
    try:
        entry = FileEntry.model_validate_json((staging / unit.file).with_suffix(".json").read_bytes())
        check_file(staging / entry.path, entry)
    except (OSError, ValueError):
        return False
    return True

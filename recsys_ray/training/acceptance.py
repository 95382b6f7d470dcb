"""The gate of a fine-tuned encoder: only one that was shown to be better than what it replaces becomes the latest.

Both encoders embed the same catalogue and answer the same queries, which neither early stopping nor a
sweep has seen; the pairs of answers are compared query by query. An encoder that did not pass comes with
the likely reasons, each a figure that was measured.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from recsys_ray.artifacts import Artifact, FileEntry, Staging, find_artifact, open_artifact, stage
from recsys_ray.config import Config, fingerprint
from recsys_ray.evaluation.gate import GateConfig, GateError
from recsys_ray.evaluation.judgments import JudgmentSource
from recsys_ray.evaluation.metrics import MetricSpec
from recsys_ray.evaluation.retrieval import EvaluateConfig, evaluate, read_evaluation
from recsys_ray.models.text_encoder import TextEncoderConfig
from recsys_ray.retrieval.batch import RetrieveConfig, retrieve_candidates
from recsys_ray.retrieval.embed import EmbedConfig, embed_products
from recsys_ray.retrieval.index_build import BuildIndexConfig, build_index
from recsys_ray.retrieval.query_sets import QuerySource, ReviewQueries
from recsys_ray.retrieval.retriever import RetrieverConfig
from recsys_ray.runtime import RayConfig, connected

log = logging.getLogger(__name__)

KIND = "encoder"
FOLDER = "encoder"              # of the artefact: what sentence-transformers loads
TOP_K = 100
BASE, TUNED = "base", "tuned"
COPIED_GAP = 0.10               # train queries copy so much more of their positives than later queries do
MASKED_SHARE = 0.02             # of the candidates in a batch were the same product, or its duplicate
GENERIC_SHARE = 0.3             # of the queries name nothing to find a product by
PAST_BEST = 0.5                 # of the steps came after the best one


class AcceptConfig(Config):
    """Which encoder has to beat which one, on what, and where it goes then."""

    candidate: Path                                 # artefact root of the fine-tuned encoder
    latest: Path                                    # artefact root of the encoders that passed
    base: TextEncoderConfig                         # what it replaces
    prepared: Path                                  # the catalogue
    queries: QuerySource                            # seen by no early stopping and no sweep
    judgments: JudgmentSource
    work_dir: Path                                  # vectors, indexes and answers of both
    primary: MetricSpec = MetricSpec.parse("Recall@100")
    metrics: tuple[MetricSpec, ...] = (MetricSpec.parse("Recall@10"), MetricSpec.parse("MRR"))
    unit: str = "query"
    gate: GateConfig = GateConfig(min_units=200)
    force: bool = False                             # let it pass whatever the outcome; the outcome is recorded
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _unseen(self) -> Self:
        if isinstance(self.queries, ReviewQueries) and self.queries.split != "test":
            raise ValueError(f"queries.split: {self.queries.split} reviews took part in the training or stopped it; "
                             "a gate needs the test split")
        return self


def accept(config: AcceptConfig) -> Artifact:
    """The "encoder" artefact below `latest`, when the candidate is an improvement.

    Facts: those of the candidate, and outcome, reason, likely_reasons. Errors: `GateError` with the
    outcome and the likely reasons when it is not and `force` is not set; `latest` stays as it was.
    """
    candidate = open_artifact(config.candidate, KIND)
    tuned = config.base.replace(model=str(candidate.path / FOLDER))
    with connected(config.ray):
        systems = {name: _answers(config, name, encoder) for name, encoder in ((BASE, config.base), (TUNED, tuned))}
    evaluation = evaluate(EvaluateConfig.model_validate({
        "name": "gate", "output": config.work_dir / "evaluation", "systems": systems, "baseline": BASE,
        "judgments": config.judgments.model_dump(), "metrics": config.metrics, "primary": config.primary,
        "unit": config.unit, "gate": config.gate.model_dump(),
        "prepared": config.prepared if config.unit == "product_and_user" else None}))
    document = read_evaluation(evaluation)
    verdict = next(row for row in document["comparisons"] if row["slice"] == "all" and row["primary"])
    log.info("%s against %s by %s: %s: %s", TUNED, BASE, config.primary.name, verdict["outcome"], verdict["reason"])
    reasons = [] if verdict["outcome"] == "improved" else likely_reasons(candidate.manifest.facts, document)
    for reason in reasons:
        log.info("likely: %s", reason)
    if verdict["outcome"] != "improved" and not config.force:
        raise GateError(f"{config.candidate}: {verdict['outcome']} by {config.primary.name}: {verdict['reason']}. "
                        f"{config.latest} stays as it is; set force=true to publish it nevertheless. Likely: "
                        f"{'; '.join(reasons) or 'nothing that was measured stands out'}")
    return _publish(config, candidate, {"outcome": verdict["outcome"], "reason": verdict["reason"],
                                        "forced": verdict["outcome"] != "improved", "likely_reasons": reasons})


def _answers(config: AcceptConfig, name: str, encoder: TextEncoderConfig) -> Path:
    """The root of one encoder's answers to the queries, by exact search."""
    work = config.work_dir / name
    embed_products(EmbedConfig(prepared=config.prepared, output=work / "embeddings", encoder=encoder, ray=config.ray))
    build_index(BuildIndexConfig(prepared=config.prepared, embeddings=work / "embeddings", output=work / "index",
                                 ray=config.ray))
    retrieve_candidates(RetrieveConfig(
        index=work / "index", output=work / "candidates", queries=config.queries, encoder=encoder, top_k=TOP_K,
        retriever=RetrieverConfig(mode="dense"), ray=config.ray))
    return work / "candidates"


def likely_reasons(facts: Mapping[str, Any], document: Mapping[str, Any]) -> list[str]:
    """Why an encoder may not have improved, from what its training and the comparison measured."""
    reasons = []
    if (gap := facts.get("copied_token_gap")) is not None and gap > COPIED_GAP:
        reasons.append(f"copied words: train queries share {gap:.0%} more of their words with their positives than "
                       "later queries do (make_pairs: positive_text=leave_one_out)")
    share = facts.get("false_negative_share")
    if share is not None and share > MASKED_SHARE and not facts.get("mask_same_product", True):
        reasons.append(f"false negatives: {share:.1%} of the in-batch negatives were the query's own product or its "
                       "duplicate (contrastive.mask_same_product=true)")
    if facts.get("steps") and facts.get("best_step") is not None:
        past = 1 - facts["best_step"] / facts["steps"]
        if past > PAST_BEST:
            reasons.append(f"overfitting, or too high a learning rate ({facts.get('learning_rate')}): the best of "
                           f"{facts['steps']} steps was the {facts['best_step']}th")
    if facts.get("base_value") is not None and facts.get("best_value", 0) <= facts["base_value"]:
        reasons.append(f"the validation never rose above the start ({facts['base_value']:.4f}): the learning rate "
                       f"({facts.get('learning_rate')}) or the pairs do not fit")
    counted = {row["slice"]: row["rows"] for row in document["comparisons"] if row["primary"]}
    if counted.get("generic") and counted["generic"] / counted["all"] > GENERIC_SHARE:
        reasons.append(f"{counted['generic'] / counted['all']:.0%} of the queries are generic: nothing in them names "
                       "a product, and no encoder can learn to")
    return reasons


def _publish(config: AcceptConfig, candidate: Artifact, outcome: Mapping[str, Any]) -> Artifact:
    key = fingerprint({"candidate": candidate.manifest.fingerprint, "outcome": dict(outcome)})
    if (done := find_artifact(config.latest, KIND, key)) is not None:
        return done
    with stage(config.latest, KIND, key) as staging:
        files = [_link(candidate, entry, staging) for entry in candidate.manifest.files]
        facts = {**candidate.manifest.facts, **outcome}
        log.info("%s is the latest now (%s)", candidate.manifest.reference, json.dumps(outcome["outcome"]))
        return staging.commit(files, config=config, parents={"candidate": candidate.manifest}, facts=facts)


def _link(candidate: Artifact, entry: FileEntry, staging: Staging) -> FileEntry:
    """The candidate's file under the new version: a hard link where the file system has them."""
    target = staging.path / entry.path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(candidate.file(entry.path), target)
    except OSError:
        shutil.copyfile(candidate.file(entry.path), target)
    return entry

"""The two steps of the grounding audit: a sample for a reviewer, then the analysis of what the reviewer wrote.

Without `completed` the artefact holds the sample: review.csv and instructions.txt. With it, the analysis:
grounding.json and grounding.html.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import Field

from recsys_ray.artifacts import Artifact, find_artifact, stage, write_text
from recsys_ray.config import Config, fingerprint
from recsys_ray.data.attribute_data import LabelAttributesConfig, open_attributes
from recsys_ray.data.grounding import INSTRUCTIONS, GroundingError, analyse, grounding_page, read_review, review_csv

log = logging.getLogger(__name__)

KIND = "grounding"
STAGE_VERSION = 1       # raise it when the same inputs would give another sample or other figures
MAX_REVIEW_BYTES = 32 << 20
Row = dict[str, Any]


class GroundAttributesConfig(Config):
    """Which attributes are audited, and the review when it is done."""

    attributes: Path                            # artefact of label_attributes; its products are read again for texts
    sample: int = Field(default=200, ge=1)
    completed: Path | None = None               # the filled-in review.csv; None: draw the sample
    seed: int = 7
    output: Path


def ground_attributes(config: GroundAttributesConfig) -> Artifact:
    """The `grounding` artefact; facts: step (sample or analysis), attributes, and of an analysis its figures.

    Errors: `GroundingError` for a review that cannot be read or is of other attributes.
    """
    attributes, rows = open_attributes(config.attributes)
    completed = _review(config.completed)
    key = fingerprint({"stage": STAGE_VERSION, "attributes": attributes.manifest.fingerprint, "sample": config.sample,
                       "seed": config.seed, "completed": completed})
    if (done := find_artifact(config.output, KIND, key)) is not None:
        return done
    facts: Row = {"step": "sample", "sample": min(config.sample, rows.num_rows)}
    if completed is None:
        products = _products(LabelAttributesConfig.model_validate(attributes.manifest.config), rows)
        texts = {"review.csv": review_csv(rows, products, config.sample, config.seed), "instructions.txt": INSTRUCTIONS}
    else:
        found = analyse(read_review(completed, rows), attributes.manifest.facts["values"])
        facts = {"step": "analysis", "attributes": found["attributes"], "advice": found["advice"]}
        texts = {"grounding.html": grounding_page(found),
                 "grounding.json": json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"}
        for line in found["advice"]:
            log.info("%s", line)
    with stage(config.output.resolve(), KIND, key) as staging:
        for name, text in texts.items():
            write_text(staging.path / name, text)
        return staging.commit([staging.entry(name) for name in texts], config=config,
                              parents={"attributes": attributes.manifest}, facts=facts)


def _review(path: Path | None) -> str | None:
    if path is None:
        return None
    if not path.is_file():
        raise GroundingError(f"{path}: no such file; it is the review.csv of a sample, filled in")
    if path.stat().st_size > MAX_REVIEW_BYTES:
        raise GroundingError(f"{path}: larger than {MAX_REVIEW_BYTES} bytes, not a review")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise GroundingError(f"{path}: not UTF-8 ({error.reason}); save it as CSV UTF-8") from None


def _products(config: LabelAttributesConfig, rows: pa.Table) -> dict[str, Row]:
    """Title, text and first picture of each product, read from where the attributes were read."""
    wanted = set(rows["product_id"].to_pylist())
    found: dict[str, Row] = {}
    for _, table in config.products.tables():
        for row in table.to_pylist():
            if row["product_id"] in wanted and row["product_id"] not in found:
                parts = [f"{name}: {value}" for name, value in row.get("attributes") or ()]
                parts += [*(row.get("features") or ()), row.get("description") or ""]
                found[row["product_id"]] = {"title": row.get("title"), "text": " | ".join(filter(None, parts)),
                                            "picture": next(iter(row.get("image_urls") or ()), None)}
    return found

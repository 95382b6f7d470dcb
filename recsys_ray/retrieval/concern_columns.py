"""What is known of products' concerns, as columns of the index's rows: probabilities, which it addresses, and why.

Both artefacts are of one concern model, and the probabilities are of the very products that are indexed; anything else
is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recsys_ray.artifacts import Artifact, Manifest, open_artifact
from recsys_ray.ids import row_ids
from recsys_ray.retrieval.segments import IndexMismatch, refuse_other_concerns
from recsys_ray.schema import CONCERN_PROBABILITIES, CONCERN_REASONS, TEXTS

Ints = npt.NDArray[np.int64]
SCORES_KIND, REASONS_KIND = "concern_scores", "concern_explanations"
REASONS_TABLE = "explanations.parquet"
METHOD = "occlusion"    # the way of explaining that finds most of what really acts
NAMED = 3               # ingredients that an answer rests on
COLUMNS = {"concerns": CONCERN_PROBABILITIES, "addresses": TEXTS, "because": CONCERN_REASONS}
Reasons = Mapping[int, Mapping[str, list[str]]]     # row id -> concern -> ingredients, the weightiest first


def open_concerns(scores: Path, reasons: Path | None, prepared: Manifest) -> tuple[Artifact, Artifact | None]:
    """The artefacts of score_concerns and, where there is one, explain_concerns, that fit these products.

    Errors: `IndexMismatch` for scores of a plain table or of another version of the products, and for explanations by
    another model than the scores.
    """
    scored = open_artifact(scores, SCORES_KIND)
    if scored.manifest.parents.get("prepared") != prepared.reference:
        found = scored.manifest.parents.get("prepared", "a plain table")
        raise IndexMismatch(f"{scored.path}: concern scores of {found}, but what is indexed is {prepared.reference}; "
                            "run score_concerns with products.path at the prepared artefact")
    if words := scored.manifest.facts.get("queries"):
        raise IndexMismatch(f"{scored.path}: concerns were asked for in other words ({', '.join(words)}); run "
                            "score_concerns without queries")
    if reasons is None:
        return scored, None
    told = open_artifact(reasons, REASONS_KIND)
    refuse_other_concerns(scored.manifest.facts["model"], told.manifest.facts["model"],
                          f"{told.path}: explanations by")
    return scored, told


def concern_facts(scores: Artifact | None) -> dict[str, Any] | None:
    """What an index says of its concerns: their names, and the identity of the model; None without scores."""
    if scores is None:
        return None
    return {"names": scores.manifest.facts["concerns"], "model": scores.manifest.facts["model"]}


def read_reasons(reasons: Artifact | None) -> Reasons:
    """The weightiest ingredients of each explained answer; those that speak against it are left out."""
    if reasons is None:
        return {}
    rows = reasons.table(REASONS_TABLE, ["product_id", "concern", "method", "rank", "ingredient", "weight"])
    kept = rows.filter((pc.field("method") == METHOD) & (pc.field("rank") <= NAMED) & (pc.field("weight") > 0))
    kept = kept.sort_by([("product_id", "ascending"), ("concern", "ascending"), ("rank", "ascending")])
    found: dict[int, dict[str, list[str]]] = {}
    ids = row_ids(kept["product_id"].to_pylist()).tolist()
    for row_id, concern, ingredient in zip(ids, kept["concern"].to_pylist(), kept["ingredient"].to_pylist(),
                                           strict=True):
        found.setdefault(row_id, {}).setdefault(concern, []).append(ingredient)
    return found


def concern_columns(wanted: Ints, scores: pa.Table | None, reasons: Reasons) -> dict[str, pa.Array]:
    """COLUMNS for the rows `wanted`, null where there is no score or the model has read no ingredients.

    `scores` are rows of score_concerns of one bucket.
    """
    if scores is None or not scores.num_rows:
        return {name: pa.nulls(len(wanted), kind) for name, kind in COLUMNS.items()}
    scores = scores.filter(pc.field("has_ingredients"))
    names = [field.name for field in scores.schema if field.type == pa.float32()]
    rows = {row["row_id"]: row for row in scores.to_pylist()}
    found = [rows.get(one) for one in wanted.tolist()]
    told = [None if row is None else [(name, row[name]) for name in names] for row in found]
    because = [None if row is None else [one for one in reasons.get(row["row_id"], {}).items()
                                         if one[0] in row["addresses"]] or None for row in found]
    return {"concerns": pa.array(told, CONCERN_PROBABILITIES), "because": pa.array(because, CONCERN_REASONS),
            "addresses": pa.array([None if row is None else row["addresses"] for row in found], TEXTS)}

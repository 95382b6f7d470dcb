"""Queries with what was found for them, as pictures: hits and misses framed, the weakest slices first."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from recsys_ray.artifacts import Artifact
from recsys_ray.data.attribute_schema import NAMES
from recsys_ray.data.attributes import value_of
from recsys_ray.data.image_files import ImageTable, chosen_images
from recsys_ray.evaluation.attribute_tasks import EvaluateAttributesConfig, Task
from recsys_ray.pages import render_page

SIDE = 112          # of a picture on the page
Row = dict[str, Any]


def gallery(config: EvaluateAttributesConfig, tasks: Sequence[Task], figures: Mapping[str, Mapping[str, Any]],
            document: Mapping[str, Any], vectors: Artifact) -> list[Row]:
    """The weakest slices of each task: slice, its figures, and some queries with the first products of each system.

    A picture that cannot be had is None there.
    """
    slices = [one for task, board in zip(tasks, document["tasks"], strict=True)
              for one in _slices(task, board, figures[task.name], config)]
    wanted = {one["product_id"] for part in slices for query in part["queries"]
              for one in (query["asked"], *(found for row in query["answers"] for found in row["found"]))}
    table = config.images or ImageTable.model_validate(vectors.manifest.config["images"])
    pictures = thumbnails(table, picture_ids(vectors, wanted)) if wanted else {}
    for part in slices:
        for query in part["queries"]:
            for one in (query["asked"], *(found for row in query["answers"] for found in row["found"])):
                one["picture"] = pictures.get(one["product_id"])
    return slices


def _slices(task: Task, board: Mapping[str, Any], figures: Mapping[str, Any], config: EvaluateAttributesConfig
            ) -> list[Row]:
    """The weakest value slices: decidably worse ones first, then the lowest figures, those of too few units last."""
    last = board["systems"][-1]
    key = "trained" if len(board["systems"]) == 2 else "frozen"
    rows = [row for row in board["rows"] if "=" in row["slice"] and row["rows"] and row[key]["mean"] is not None]
    rows.sort(key=lambda row: (not (row["verdict"] and row["verdict"]["outcome"] == "worse"),
                               row["units"] < config.min_units, row[key]["mean"]))
    read = task.queries.to_pylist()
    found = []
    for row in rows[: config.shown_slices]:
        attribute, _, condition = row["slice"].partition(" of ")
        name, _, value = (condition or attribute).partition("=")
        shown_for = name if not condition else attribute
        inside = np.array([at for at, one in enumerate(read) if value_of(one, name) == value], dtype=np.int64)
        order = inside[np.argsort(np.nan_to_num(figures[last][shown_for][inside], nan=2.0), kind="stable")]
        chosen = order[: config.shown_queries]      # where least was found
        found.append({"task": task.name, "slice": row["slice"], "attribute": shown_for, "row": row, "key": key,
                      "queries": _queries(task, chosen, shown_for, figures, config.depth)})
    return found


def _queries(task: Task, places: npt.NDArray[np.int64], name: str, figures: Mapping[str, Any], depth: int) -> list[Row]:
    tops = {system: task.top(system, places, depth) for system in task.query_vectors}
    asked = task.queries.take(pa.array(places)).to_pylist()
    found = []
    for at, query in enumerate(asked):
        answers = []
        for system, top in tops.items():
            rows = task.catalogue.take(pa.array(top[at][top[at] >= 0])).to_pylist()
            share = figures[system][name][places[at]]
            answers.append({"system": system, "share": None if np.isnan(share) else float(share),
                            "found": [_shown(one, name, query) for one in rows]})
        found.append({"asked": _shown(query, name, query), "answers": answers})
    return found


def _shown(row: Row, name: str, query: Row) -> Row:
    value = value_of(row, name)
    return {"product_id": row["product_id"], "value": value or "not known", "known": value is not None,
            "hit": value is not None and value == value_of(query, name),
            "looks": ", ".join(row[one] for one in NAMES if row[one]), "picture": None}


# --- pictures -------------------------------------------------------------------------------------
def picture_ids(vectors: Artifact, product_ids: set[str]) -> dict[str, str]:
    """image_id -> product_id of one picture of each product."""
    found: dict[str, str] = {}
    for table in vectors.tables("vectors/", ["image_id", "product_id"]):
        products = pc.coalesce(table["product_id"], table["image_id"]).to_pylist()
        for image, product in zip(table["image_id"].to_pylist(), products, strict=True):
            if product in product_ids:
                found.setdefault(product, image)
    return {image: product for product, image in found.items()}


def thumbnails(table: ImageTable, wanted: Mapping[str, str]) -> dict[str, str]:
    """product_id -> a data URI of its picture, made small; those that cannot be had are left out."""
    found: dict[str, str] = {}
    for usable, small, _ in chosen_images(table, pa.array(list(wanted), pa.string()), _small):
        found |= {wanted[one]: uri for one, uri in zip(usable["image_id"].to_pylist(), small, strict=True)}
    return found


def _small(picture: Image.Image) -> str:
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=78)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def attribute_page(document: Mapping[str, Any], shown: Sequence[Row]) -> str:
    """The metrics.json of an attribute evaluation with its gallery, as one HTML page that needs nothing else."""
    return render_page(__name__, "attribute_evaluation.html", document=document, gallery=shown)

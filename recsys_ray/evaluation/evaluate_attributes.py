"""Frozen vectors of pictures, and an adapter of them, on held-out pictures: figures by slice, the gate, one page.

Pictures are searched by pictures, and by their products' texts where the adapter reads texts. Chance and the frozen
model stand beside every figure; where no frozen model reads texts in the pictures' space, chance alone does.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recsys_ray.artifacts import Artifact, find_artifact, open_artifact, stage, write_text
from recsys_ray.config import fingerprint
from recsys_ray.data.attribute_data import IMAGES_KIND
from recsys_ray.data.attribute_data import KIND as ATTRIBUTES_KIND
from recsys_ray.data.attribute_items import Items, matrix, read_items, split_places
from recsys_ray.data.attribute_pair_data import TEXTS_KIND, GroupSplit
from recsys_ray.evaluation.attribute_gallery import attribute_page, gallery
from recsys_ray.evaluation.attribute_tasks import EvaluateAttributesConfig, Task
from recsys_ray.evaluation.attributes import (
    AttributeMetricError,
    Vectors,
    aligned,
    attribute_figures,
    average_precisions,
    chance_level,
    chance_precision,
)
from recsys_ray.evaluation.slice_gate import scoreboard

KIND = "attribute_evaluation"
ADAPTER_KIND = "attribute_adapter"  # of the finetune_attribute_adapter job
CODE_VERSION = 1                    # raise it when the figures of an unchanged input change
FEWEST = 200                        # pictures from which shuffled rows can be told from rows that say little
PRECISION = "category2 mAP"
Floats = npt.NDArray[np.float64]


def evaluate_attributes(config: EvaluateAttributesConfig) -> Artifact:
    """The `attribute_evaluation` artefact: metrics.json, per_query.parquet and index.html (with the gallery).

    Facts: name, systems, gate (of pictures by pictures), targets, counts. Errors: `AttributeMetricError` for rows that
    do not belong to their vectors, `SliceError` for a declared slice that no query is in.
    """
    kinds = {"vectors": IMAGES_KIND, "attributes": ATTRIBUTES_KIND, "adapter": ADAPTER_KIND, "texts": TEXTS_KIND,
             "trained": IMAGES_KIND}
    inputs = {name: open_artifact(path, kind) for name, kind in kinds.items()
              if (path := getattr(config, name)) is not None}
    key = fingerprint({"code": CODE_VERSION, "config": config.model_dump(mode="json", exclude={"output", "task"}),
                       "parents": {name: f"{one.manifest.fingerprint} {one.manifest.version}"
                                   for name, one in inputs.items()}})
    if (done := find_artifact(config.output, KIND, key)) is not None:
        return done
    items = _items(config, inputs)
    tasks = _tasks(config, inputs, items)
    figures = {task.name: _figures(task, config) for task in tasks}
    document = _document(config, tasks, figures, items)
    with stage(config.output.resolve(), KIND, key) as staging:
        shown = gallery(config, tasks, figures, document, inputs["vectors"])
        entry = staging.write_table("per_query.parquet", _per_query(tasks, figures))
        write_text(staging.path / "metrics.json", json.dumps(document, indent=1, allow_nan=False) + "\n")
        write_text(staging.path / "index.html", attribute_page(document, shown))
        first = document["tasks"][0]
        facts = {"name": config.name, "systems": first["systems"], "gate": first["gate"], "targets": first["targets"],
                 "counts": document["counts"]}
        return staging.commit([entry, staging.entry("metrics.json"), staging.entry("index.html")], config=config,
                              parents={name: one.manifest for name, one in inputs.items()}, facts=facts)


# --- what is compared -----------------------------------------------------------------------------
def _items(config: EvaluateAttributesConfig, inputs: Mapping[str, Artifact]) -> Items:
    """The pictures of the part that is asked for."""
    items = read_items(inputs["vectors"], inputs.get("attributes"), inputs.get("texts"))
    found = aligned(items.vectors, items.rows, config.seed)
    if not found and len(items) >= FEWEST:
        raise AttributeMetricError(f"{config.vectors}: {found.reason}")
    places = np.arange(len(items))
    if config.part != "all":
        places = split_places(items, _split(config, inputs.get("adapter")))[config.part]
    if config.most_pictures is not None and len(places) > config.most_pictures:
        places = np.sort(np.random.default_rng(config.seed).permutation(places)[: config.most_pictures])
    if len(places) < 2:
        raise AttributeMetricError(f"{config.vectors}: {len(places)} pictures in part {config.part}: nothing to search")
    return items.take(places)


def _split(config: EvaluateAttributesConfig, adapter: Artifact | None) -> GroupSplit:
    """The split that the adapter was trained with, unless another is given: its test part is what it never saw."""
    if config.split is not None or adapter is None:
        return config.split or GroupSplit()
    trained = adapter.manifest.config
    if trained.get("pairs") is not None:
        return GroupSplit.model_validate(open_artifact(trained["pairs"], "attribute_pairs").manifest.facts["split"])
    return GroupSplit.model_validate(trained["split"])


def _tasks(config: EvaluateAttributesConfig, inputs: Mapping[str, Artifact], items: Items) -> list[Task]:
    random = np.random.default_rng([config.seed, 1])
    asked = np.sort(random.permutation(len(items))[: config.most_queries])
    vectors = {"frozen": items.vectors}
    if config.adapter is None:
        return [_task("image -> image", asked, vectors, vectors, items)]
    from recsys_ray.models.attribute_adapter import AttributeAdapter

    adapter, own = AttributeAdapter.load(str(config.adapter)), inputs.get("trained", inputs["vectors"])
    if adapter.card.image != own.manifest.facts["encoder"]:
        raise AttributeMetricError(f"{config.adapter}: is an adapter of another network than that of {own.path}" + (
            "" if adapter.card.base is None else f"; it was trained with its network: embed the pictures with "
            f"encoder.pretrained={config.adapter}, too, and give those vectors as `trained`"))
    vectors["adapted"] = adapter.adapt(items.vectors if "trained" not in inputs else _same_pictures(items, own))
    tasks = [_task("image -> image", asked, vectors, vectors, items)]
    if items.texts is not None:
        with_text = asked[np.abs(items.texts[asked]).sum(axis=1) > 0]
        queries = {"adapted": adapter.adapt(items.texts, "text")}
        if adapter.card.shares_space:
            queries = {"frozen": items.texts, **queries}
        tasks.append(_task("text -> image", with_text, queries, vectors, items))
    return tasks


def _same_pictures(items: Items, trained: Artifact) -> npt.NDArray[np.float32]:
    """The vectors of the items' pictures in another artefact, (N, D), in the items' order."""
    table = pa.concat_tables(trained.tables("vectors/", ["image_id", "vector"]))
    places = pc.index_in(items.image_ids, value_set=table["image_id"].combine_chunks())
    if places.null_count:
        raise AttributeMetricError(f"{trained.path}: lacks {places.null_count} of the pictures; embed the same ones")
    return matrix(table["vector"].take(places))


def _task(name: str, asked: npt.NDArray[np.int64], queries: Mapping[str, Vectors], vectors: Mapping[str, Vectors],
          items: Items) -> Task:
    return Task(name, items.rows.take(pa.array(asked)), {system: one[asked] for system, one in queries.items()},
                items.rows, {system: vectors[system] for system in queries})


def _figures(task: Task, config: EvaluateAttributesConfig) -> dict[str, dict[str, Floats]]:
    """System (and "chance") -> figure -> (N_q,)."""
    found = {}
    for system, vectors in task.query_vectors.items():
        own = (vectors, task.queries, task.catalogue_vectors[system], task.catalogue)
        found[system] = attribute_figures(*own, depth=config.depth) | {
            PRECISION: average_precisions(*own, seed=config.seed)}
    chance = chance_level(task.queries, task.catalogue) | {
        PRECISION: chance_precision(task.queries, task.catalogue)}
    return {"chance": chance, **found}


# --- what is written ------------------------------------------------------------------------------
def _document(config: EvaluateAttributesConfig, tasks: list[Task], figures: Mapping[str, Mapping[str, Any]],
              items: Items) -> dict[str, Any]:
    boards = []
    for task in tasks:
        own, units = figures[task.name], pc.coalesce(task.queries["group_key"], task.queries["product_id"]).to_pylist()
        told = {name: {key: values for key, values in one.items() if np.isfinite(own["chance"][key]).any()}
                for name, one in own.items()}
        systems = [name for name in told if name != "chance"]
        both = len(systems) == 2
        board = scoreboard(told[systems[0]], told[systems[1]] if both else None, told["chance"], task.queries, units,
                           _declared(config, told["chance"]), margin=config.margin, min_units=config.min_units,
                           alpha=config.alpha)
        boards.append({"task": task.name, "systems": systems, "queries": task.queries.num_rows, **board})
    return {"name": config.name, "part": config.part, "depth": config.depth, "tasks": boards,
            "intervals": "95 % percentile bootstrap over groups; differences have bounds that hold for all slices of "
                         f"the table at once (level {1 - config.alpha:g})",
            "counts": {"pictures": len(items), "groups": len(np.unique(items.groups)),
                       "queries": tasks[0].queries.num_rows}}


def _declared(config: EvaluateAttributesConfig, figures: Mapping[str, Any]) -> list[str] | None:
    """The declared slices with the overall figures before them, so that the page always has those."""
    return None if config.slices is None else list(dict.fromkeys([*figures, *config.slices]))


def _per_query(tasks: list[Task], figures: Mapping[str, Mapping[str, Mapping[str, Floats]]]) -> pa.Table:
    """One row for each task and query: product_id, and each system's figures."""
    tables = []
    for task in tasks:
        columns: dict[str, Any] = {"task": [task.name] * task.queries.num_rows,
                                   "product_id": task.queries["product_id"], "group_key": task.queries["group_key"]}
        for system, own in figures[task.name].items():
            columns |= {f"{system} {key}": values for key, values in own.items()}
        tables.append(pa.table(columns))
    return pa.concat_tables(tables, promote_options="default")


# --- for a terminal -------------------------------------------------------------------------------
def attribute_summary(document: Mapping[str, Any], width: int = 150) -> str:
    """The figures of a metrics.json as plain text: overall figures, slices the gate names, targets."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    for board in document["tasks"]:
        table = Table("figure", "queries", "chance", *board["systems"], "difference", title_justify="left",
                      title=f"{document['name']}, {board['task']}, first {document['depth']}")
        for row in board["rows"]:
            if "=" not in row["slice"]:
                cells = [row["chance"], *(row[one] for one in ("frozen", "trained") if one in row)]
                table.add_row(row["slice"], str(row["rows"]), *map(_cell, cells),
                              row["verdict"]["reason"] if row["verdict"] else "")
        console.print(table)
        if board["gate"]:
            for outcome in ("worse", "undecidable"):
                if board["gate"][outcome]:
                    console.print(f"{outcome}: {', '.join(board['gate'][outcome])}", markup=False)
        for one in board["targets"]:
            gain = "" if one["gain"] is None else f" ({one['gain']:+.3f})"
            console.print(f"target {one['slice']} {one['wanted']:+.2f}: {one['outcome']}{gain}", markup=False)
    console.print(f"[..] {document['intervals']}", markup=False)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def _cell(interval: Mapping[str, float | None]) -> str:
    return "-" if interval["mean"] is None else \
        f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"

"""Photographs of garments that find others of their class: a frozen ImageNet network, and the adapter trained on it.

    python benchmarks/clothing.py --config configs/bench_clothing/full.yaml

Senders are dealt to folds. The photographs of a fold are asked and searched by an adapter trained on the other folds,
so no sender is on both sides; and a photograph is never compared with others of its own sender, who may have taken
the same garment twice. Every photograph is a query once a seed. The pictures are embedded once; a cell (fold, seed) is
a file of its own below `cells`, and a rerun makes only the missing ones.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cells import is_current, make_missing, merged, read_cell, write_cell

from recsys_ray.artifacts import Artifact, open_artifact, write_table
from recsys_ray.config import Config, fingerprint, main
from recsys_ray.data.attribute_items import Items, label_pairs, read_items
from recsys_ray.data.image_files import ImageTable
from recsys_ray.evaluation.attributes import attribute_figures, average_precisions, chance_level
from recsys_ray.evaluation.results import write_result
from recsys_ray.evaluation.significance import Units, compare, mean_intervals
from recsys_ray.models.attribute_adapter import KIND as ADAPTER
from recsys_ray.models.attribute_adapter import AttributeAdapter
from recsys_ray.models.image_encoder import ImageEncoderConfig
from recsys_ray.retrieval.embed_images import KIND as VECTORS
from recsys_ray.retrieval.embed_images import EmbedImagesConfig, embed_images
from recsys_ray.training.attribute_adapter import AdapterData, FinetuneAttributeAdapterConfig
from recsys_ray.training.attribute_adapter_run import train_worker

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class JobConfig(Config):
    """Which photographs, which network, which training."""

    images: ImageTable = ImageTable(path="../shared/data/clothing/images.parquet",
                                    columns={"data": "jpeg", "group_id": "sender_id"})
    pictures: int | None = Field(default=None, ge=100)  # of the table; None: all
    encoder: ImageEncoderConfig = ImageEncoderConfig(device="cpu", dtype="float32")
    finetune: dict[str, Any] = Field(default_factory=dict)      # keys of FinetuneAttributeAdapterConfig
    folds: int = Field(default=5, ge=2)
    seeds: tuple[int, ...] = (1, 2, 3)
    valid_share: float = Field(default=0.15, gt=0, lt=1)        # of the training senders: they choose the step
    work: Path = Path("runs/bench_clothing")
    cells: Path = Path("benchmarks/results/clothing")
    result: Path = Path("benchmarks/results/clothing.json")
    parallel: int = Field(default=2, ge=1)
    cell: str | None = None                             # "fold/seed": this one only (what a worker process gets)


def run(config: JobConfig) -> Path | None:
    """Make every missing cell, then the table; returns the path of the result file."""
    if config.cell is not None:
        fold, seed = config.cell.split("/")
        _make_cell(config, int(fold), int(seed))
        return None
    vectors = _embed(config)
    names = [f"{fold}/{seed}" for seed in config.seeds for fold in range(config.folds)]
    make_missing(__file__, names, lambda name: is_current(cell_file(config, name), _identity(config, vectors, name)),
                 config.work / "logs", config.parallel)
    cells = {name: read_cell(cell_file(config, name)) for name in names}
    headline, tables = summary(config, read_items(vectors, None, None), cells)
    tables["setting"] = config.model_dump(mode="json", exclude={"cell"}) | {
        "encoder identity": vectors.manifest.facts["encoder"]}
    return write_result(config.result, command=f"python benchmarks/clothing.py {' '.join(sys.argv[1:])}",
                        headline=headline, tables=tables, seeds=config.seeds)


def cell_file(config: JobConfig, name: str) -> Path:
    """Where the cell is written."""
    return config.cells / f"{name.replace('/', '-')}.json"


def _identity(config: JobConfig, vectors: Artifact, name: str) -> dict[str, Any]:
    return {"vectors": vectors.manifest.fingerprint, "cell": name, "folds": config.folds,
            "valid_share": config.valid_share, "finetune": config.finetune}


def _embed(config: JobConfig) -> Artifact:
    images = config.images
    if config.pictures is not None:
        write_table(config.work, "images.parquet", pq.read_table(images.path).slice(0, config.pictures))
        images = images.replace(path=str(config.work / "images.parquet"))
    return embed_images(EmbedImagesConfig(images=images, output=config.work / "vectors", encoder=config.encoder,
                                          workers=1))


# --- one cell -------------------------------------------------------------------------------------
def folds_of(groups: Ints, folds: int) -> Ints:
    """The fold of each photograph, (N,): senders in random order are dealt out, each to the fold with the fewest."""
    found, sizes = np.zeros(len(groups), dtype=np.int64), np.zeros(folds, dtype=np.int64)
    for sender in np.random.default_rng(7).permutation(np.unique(groups)):
        own = groups == sender
        found[own] = fold = int(sizes.argmin())
        sizes[fold] += own.sum()
    return found


def _make_cell(config: JobConfig, fold: int, seed: int) -> None:
    import torch

    torch.set_num_threads(1)
    vectors = open_artifact(config.work / "vectors", VECTORS)
    items = read_items(vectors, None, None)
    held_out, train, valid = _places(config, items, fold, seed)
    name = f"{fold}/{seed}"
    settings = FinetuneAttributeAdapterConfig.model_validate(merged(config.finetune, {
        "vectors": config.work / "vectors", "seed": seed,    # a folder of its own: no run goes on with another's state
        "output": config.work / "adapters" / fingerprint(_identity(config, vectors, name))}))
    data = AdapterData(items, train, valid, label_pairs(items, seed).within(train, len(items)),
                       vectors.manifest.facts["encoder"])
    directory = settings.output.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    train_worker(settings, data, directory, name)
    adapter = AttributeAdapter.load(str(directory / ADAPTER))
    asked = items.take(held_out)
    found: dict[str, Any] = {"places": held_out.tolist()}
    for system, one in (("frozen", asked.vectors), ("adapted", adapter.adapt(asked.vectors))):     # by other senders
        average = average_precisions(one, asked.rows, one, asked.rows)
        share = attribute_figures(one, asked.rows, one, asked.rows)["category2"]
        found[system] = {"ap": [_plain(value) for value in average], "share": [_plain(value) for value in share]}
    chance = float(np.nanmean(chance_level(asked.rows, asked.rows)["category2"]))
    write_cell(cell_file(config, name), _identity(config, vectors, name), {
        "cell": name, "chance": chance, "training": _outcome(directory), **found})


def _places(config: JobConfig, items: Items, fold: int, seed: int) -> tuple[Ints, Ints, Ints]:
    """(held out, train, valid): senders are never on two sides."""
    fold_N = folds_of(items.groups, config.folds)
    inside = np.unique(items.groups[fold_N != fold])
    count = max(1, round(config.valid_share * len(inside)))
    judges = np.random.default_rng([seed, fold]).permutation(inside)[:count]
    valid = (fold_N != fold) & np.isin(items.groups, judges)
    return np.flatnonzero(fold_N == fold), np.flatnonzero((fold_N != fold) & ~valid), np.flatnonzero(valid)


def _plain(value: float) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None


def _outcome(directory: Path) -> dict[str, Any]:
    values = read_cell(directory / "result.json")
    return {name: values[name] for name in ("step", "best_step", "best_value", "base_value", "cpu_seconds")}


# --- the table ------------------------------------------------------------------------------------
def summary(config: JobConfig, items: Items, cells: dict[str, dict[str, Any]]
            ) -> tuple[dict[str, float], dict[str, Any]]:
    """(headline, tables): both systems over all photographs, each by the adapter that knew nothing of its sender."""
    table = {(system, metric): np.full((len(config.seeds), len(items)), np.nan)
             for system in ("frozen", "adapted") for metric in ("ap", "share")}
    for name, cell in cells.items():
        seed = config.seeds.index(int(name.split("/")[1]))
        for system, metric in table:
            table[system, metric][seed, cell["places"]] = np.array(cell[system][metric], dtype=np.float64)
    units = Units.of(items.groups)
    gain = {metric: compare(table["adapted", metric], table["frozen", metric], units) for metric in ("ap", "share")}
    mean = {key: float(np.nanmean(values)) for key, values in table.items()}
    headline = {
        "map_frozen": mean["frozen", "ap"], "map_adapted": mean["adapted", "ap"],
        "gain_ci_low": gain["ap"].difference.low, "category10_frozen": mean["frozen", "share"],
        "category10_adapted": mean["adapted", "share"], "category10_gain_ci_low": gain["share"].difference.low,
        "chance": float(np.mean([cell["chance"] for cell in cells.values()]))}
    classes = items.values["category2"]
    return headline, {
        "gain": {metric: one.as_dict() for metric, one in gain.items()},
        "intervals": {f"{system} {metric}": vars(mean_intervals(values[:, :, None], units)[0])
                      for (system, metric), values in table.items()},
        "classes": [_class_row(table, items, code, name) for code, name in enumerate(classes)],
        "trainings": {name: cell["training"] for name, cell in cells.items()}}


def _class_row(table: dict[tuple[str, str], Floats], items: Items, code: int, name: str) -> dict[str, Any]:
    own = items.codes[:, 0] == code
    found = {f"{system} {metric}": _mean(values[:, own]) for (system, metric), values in table.items()}
    return {"class": name, "photographs": int(own.sum()), **found}


def _mean(values: Floats) -> float | None:
    return float(np.nanmean(values)) if np.isfinite(values).any() else None


if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))

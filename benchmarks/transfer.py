"""The same ladder of methods on the demo shop and on real data: which levers keep their sign.

    python benchmarks/transfer.py --config configs/bench_transfer/full.yaml

Reads finished cells and trains nothing: those of `retriever_ablation.py` for the demo shop (a query is a
review), those of `finetuned_labels.py` for ESCI and Icecat (a shopper's query, human labels) and goodbooks
(the name of a readers' shelf). The recipes there know no judgment; all hybrids have the default fusion weight.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import finetuned_labels
import retriever_ablation
from cells import read_cell
from judged_answers import METRICS
from transfer_table import Measured, Values, rank_figures, transfer

from recsys_ray.config import Config, load_config, main
from recsys_ray.evaluation.results import write_result
from recsys_ray.evaluation.significance import Units
from recsys_ray.retrieval.fusion import FusionConfig


class TransferError(ValueError):
    """Cells that are not there; the message is the command that makes them."""


class JobConfig(Config):
    """Where the cells are: the configurations of the benchmarks that made them."""

    ablation: Path                          # of retriever_ablation.py
    shop: str                               # of its shops
    home: str = "demo shop"                 # the name of that column
    labels: dict[str, Path]                 # column -> configuration of finetuned_labels.py
    rows: tuple[str, ...] = ("source", "leave_one_out", "large_batch", "mined")     # that all of them have
    result: Path = Path("benchmarks/results/transfer.json")


def run(config: JobConfig) -> Path:
    """Write the table; returns its path."""
    shop = load_config(retriever_ablation.JobConfig, config.ablation)
    data = {config.home: shop_measured(shop, config)}
    for name, path in config.labels.items():
        data[name] = labels_measured(load_config(finetuned_labels.JobConfig, path), path, config.rows)
    headline, tables = transfer(data, config.home, list(METRICS))
    tables["setting"] = config.model_dump(mode="json")
    return write_result(config.result, command=f"python benchmarks/transfer.py {' '.join(sys.argv[1:])}",
                        headline=headline, tables=tables, seeds=shop.seeds)


def shop_measured(shop: retriever_ablation.JobConfig, config: JobConfig) -> Measured:
    """The demo shop: every seed of the ablation, resampled by product and user."""
    runs = {"base": ["0"], **{row: [str(seed) for seed in shop.seeds] for row in config.rows}}
    missing = [f"{row}/{seed}" for row, seeds in runs.items() for seed in seeds
               if not retriever_ablation.is_made(shop, config.shop, row, seed)]
    _refuse(missing, f"python benchmarks/retriever_ablation.py --config {config.ablation}")
    cells = {row: [read_cell(retriever_ablation.cell_file(shop, config.shop, row, seed)) for seed in seeds]
             for row, seeds in runs.items()}
    base = cells["base"][0]
    systems = {"bm25": rank_figures([base["ranks"]["bm25"]])}
    for row, made in cells.items():
        for kind in ("dense", "hybrid"):
            systems[f"{row} {kind}"] = rank_figures([one["ranks"][kind] for one in made])
    return Measured(systems, Units.of(base["asked"]["product"], base["asked"]["user"]))


def labels_measured(labels: finetuned_labels.JobConfig, path: Path, rows: Sequence[str]) -> Measured:
    """A judged catalogue: all its queries, each a unit of its own."""
    whole = finetuned_labels.WHOLE
    names = {"base": f"{whole}/{finetuned_labels.BASE}/0", **{row: f"{whole}/{row}/1" for row in rows}}
    _refuse([name for name in names.values() if not finetuned_labels.is_made(labels, name)],
            f"python benchmarks/finetuned_labels.py --config {path}")
    cells = {row: read_cell(finetuned_labels.cell_file(labels, name)) for row, name in names.items()}
    at = labels.weights.index(FusionConfig().dense_weight)
    systems = {"bm25": _columns(cells["base"]["bm25"])}
    for row, cell in cells.items():
        systems |= {f"{row} dense": _columns(cell["dense"]), f"{row} hybrid": _columns(cell["hybrid"][at])}
    return Measured(systems, Units.rows(len(cells["base"]["query_ids"])))


def _columns(values: Sequence[Sequence[float]]) -> Mapping[str, Values]:
    table = np.array(values, float)
    return {metric: table[None, :, number] for number, metric in enumerate(METRICS)}


def _refuse(missing: Sequence[str], command: str) -> None:
    if missing:
        raise TransferError(f"{len(missing)} cells are missing or out of date ({', '.join(missing[:3])}...); "
                            f"make them: {command}")


if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))

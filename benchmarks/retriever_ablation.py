"""Which lever of retriever training helps: every row of the table trained in the same time, on several seeds.

    python benchmarks/retriever_ablation.py --config configs/bench_retriever_ablation/full.yaml

A cell (shop, row, seed) is one training run and the rank of every test query's own product in the whole
catalogue. Each cell writes a file of its own under `cells`; a rerun makes only the missing ones. Every row
gets the same CPU seconds and tunes its learning rate by the validation pairs alone. The test reviews are
read once a cell, after training.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parent))
from ablation_table import summary
from cells import is_current, make_missing, merged, read_cell, write_cell
from retriever_ranks import (
    Asked,
    Catalogue,
    bm25_ranks,
    encoder_ranks,
    oracle_ranks,
    popularity_ranks,
    read_catalogue,
    read_queries,
)
from signal_ranks import SignalsConfig, signal_ranks

from recsys_ray.artifacts import open_artifact
from recsys_ray.config import Config, fingerprint, main
from recsys_ray.data.demo_shop import DemoShopConfig, make_demo_shop
from recsys_ray.data.demo_shop.identity import GENERATOR_VERSION, generator_hash
from recsys_ray.data.negatives import NegativesConfig
from recsys_ray.data.pairs import PairsConfig
from recsys_ray.data.training_pairs import MakePairsConfig, make_pairs
from recsys_ray.evaluation.results import write_result
from recsys_ray.flow import FlowConfig, ensure_index
from recsys_ray.models.bge_m3 import BgeM3Encoder
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.models.text_encoder import TextEncoderConfig
from recsys_ray.retrieval.fusion import FusionConfig
from recsys_ray.retrieval.mining import MineNegativesConfig, mine_negatives
from recsys_ray.training.bge import FinetuneBgeConfig
from recsys_ray.training.launch import finetune_bge

log = logging.getLogger(__name__)

BASE = "base"


class Row(Config):
    """One recipe: how its pairs are made and what it changes in the training."""

    pairs: PairsConfig = PairsConfig()
    negatives: NegativesConfig | None = None                    # mined with the base model
    finetune: dict[str, Any] = Field(default_factory=dict)      # keys of FinetuneBgeConfig, nested
    signals: SignalsConfig | None = None                        # trains BGE-M3's heads too, and also ranks by them


class JobConfig(Config):
    """Shops, rows and seeds of the table."""

    shops: dict[str, DemoShopConfig]
    rows: dict[str, Row]
    source: str                                     # the row the others are compared with
    ours: str                                       # the row that is to beat it
    null_shop: str | None = None                    # where no row may win: source and ours, one seed
    work: Path = Path("runs/retriever_ablation")
    cells: Path = Path("benchmarks/results/retriever_ablation")
    result: Path = Path("benchmarks/results/retriever_ablation.json")
    encoder: TextEncoderConfig = TextEncoderConfig(device="cpu", max_tokens=64)
    num_buckets: int = 16
    queries: int = Field(default=2000, ge=10)       # test reviews asked
    finetune: dict[str, Any] = Field(default_factory=dict)      # of every row
    cpu_seconds: float = Field(default=170, gt=0)   # of one training run
    rate_cpu_seconds: float = Field(default=60, gt=0)           # of one trial of a learning rate
    rates: tuple[float, ...] = (2e-5, 5e-5, 1e-4)
    seeds: tuple[int, ...] = (1, 2, 3)
    parallel: int = Field(default=2, ge=1)          # cells trained at once, one thread each
    cell: str | None = None                         # "shop/row/seed": this one only (what a worker process gets)


def run(config: JobConfig) -> Path | None:
    """Make every missing cell, then the table; returns the path of the result file."""
    if config.cell is not None:
        _make_cell(config, *config.cell.split("/"))
        return None
    for shop in config.shops:
        _ready(config, shop)
    _in_processes(config, [f"{shop}/{row}/rate-{rate:g}" for shop in config.shops for row in _rows(config, shop)
                           for rate in config.rates if len(config.rates) > 1])
    _in_processes(config, [f"{shop}/{BASE}/0" for shop in config.shops])
    names = {shop: [f"{row}/{seed}" for seed in _seeds(config, shop) for row in _rows(config, shop)]
             for shop in config.shops}
    _in_processes(config, [f"{shop}/{name}" for shop, of_shop in names.items() for name in of_shop])
    cells = {shop: {name: read_cell(cell_file(config, shop, *name.split("/")))
                    for name in [f"{BASE}/0", *of_shop]} for shop, of_shop in names.items()}
    headline, tables = summary(cells, config.source, config.ours, config.null_shop)
    command = f"python benchmarks/retriever_ablation.py {' '.join(sys.argv[1:])}"
    tables["setting"] = config.model_dump(mode="json", exclude={"cell"})
    return write_result(config.result, command=command, headline=headline, tables=tables, seeds=config.seeds)


def _rows(config: JobConfig, shop: str) -> list[str]:
    return [config.source, config.ours] if shop == config.null_shop else list(config.rows)


def _seeds(config: JobConfig, shop: str) -> tuple[int, ...]:
    return config.seeds[:1] if shop == config.null_shop else config.seeds


def cell_file(config: JobConfig, shop: str, row: str, seed: str) -> Path:
    """Where the cell is written."""
    return config.cells / f"{shop}-{row}-{seed}.json"


def _in_processes(config: JobConfig, names: Sequence[str]) -> None:
    """Run the missing cells, `parallel` at a time, each in a process of one thread."""
    make_missing(__file__, names, lambda name: is_made(config, *name.split("/")), config.work / "logs",
                 config.parallel)


# --- what all cells of a shop share ---------------------------------------------------------------
def _flow(config: JobConfig, shop: str) -> FlowConfig:
    work = config.work / shop
    public = work / "shop" / "public"
    return FlowConfig.model_validate({
        "work_dir": work, "shop": config.shops[shop].replace(output=work / "shop"),
        "prepare": {"source": {"format": "amazon_reviews", "products": str(public / "meta_Demo_Shop.jsonl.gz"),
                               "reviews": str(public / "Demo_Shop.jsonl.gz")}, "num_buckets": config.num_buckets},
        "embed": {"encoder": config.encoder.model_dump()}, "index": {}})


def _ready(config: JobConfig, shop: str) -> None:
    """The shop, its base index and the pairs of every row."""
    flow = _flow(config, shop)
    assert flow.shop is not None
    make_demo_shop(flow.shop)
    ensure_index(flow)
    for name in _rows(config, shop):
        row = config.rows[name]
        make_pairs(MakePairsConfig.model_validate({**row.pairs.model_dump(), "prepared": flow.prepare.output,
                                                   "output": _pairs(config, shop, row)}))
        if row.negatives is not None:
            log.info("%s: negatives of %s", shop, name)
            mine_negatives(MineNegativesConfig.model_validate({
                **row.negatives.model_dump(), "pairs": _pairs(config, shop, row), "prepared": flow.prepare.output,
                "index": flow.index.output, "output": _training_pairs(config, shop, row),
                "encoder": config.encoder.model_dump()}))


def _pairs(config: JobConfig, shop: str, row: Row) -> Path:
    return config.work / shop / "pairs" / row.pairs.digest()[:12]


def _training_pairs(config: JobConfig, shop: str, row: Row) -> Path:
    if row.negatives is None:
        return _pairs(config, shop, row)
    return config.work / shop / "mined" / fingerprint([row.pairs.digest(), row.negatives.digest()])[:12]


# --- one cell -------------------------------------------------------------------------------------
def _identity(config: JobConfig, shop: str, row: str, seed: str) -> dict[str, Any]:
    """What a cell's figures depend on; a file with another one is made again."""
    settings = None if row == BASE else _row_identity(config.rows[row])
    return {"shop": config.shops[shop].identity(), "generator": [GENERATOR_VERSION, generator_hash()], "row": settings,
            "common": config.finetune, "encoder": config.encoder.model_dump(mode="json"), "queries": config.queries,
            "cpu_seconds": config.rate_cpu_seconds if seed.startswith("rate") else config.cpu_seconds,
            "rates": list(config.rates), "seed": seed}


def _row_identity(row: Row) -> dict[str, Any]:
    """The row's settings; signals only where there are any, so that cells of other rows stay what they are."""
    return row.model_dump(mode="json", exclude={"signals"} if row.signals is None else None)


def is_made(config: JobConfig, shop: str, row: str, seed: str) -> bool:
    """Whether the cell is there and current."""
    return is_current(cell_file(config, shop, row, seed), _identity(config, shop, row, seed))


def _make_cell(config: JobConfig, shop: str, row: str, seed: str) -> None:
    import torch

    torch.set_num_threads(1)
    flow = _flow(config, shop)
    document: dict[str, Any] = {"cell": [shop, row, seed], "generator": [GENERATOR_VERSION, generator_hash()]}
    if seed.startswith("rate-"):
        _, facts = _train(config, shop, row, float(seed.removeprefix("rate-")), 0, config.rate_cpu_seconds)
        document |= {"training": facts}
    else:
        model = config.encoder.model
        if row != BASE:
            rate = _best_rate(config, shop, row)
            model, facts = _train(config, shop, row, rate, int(seed), config.cpu_seconds)
            document |= {"training": facts, "learning_rate": rate}
        catalogue = read_catalogue(flow.prepare.output)
        asked = read_queries(flow.prepare.output, config.work / shop / "shop" / "truth", "test", config.queries, 7,
                             catalogue)
        document |= {"products": len(catalogue.texts), "ranks": _ranks(config, row, model, catalogue, asked)}
        if row == BASE:
            document |= {"asked": asked.as_table(), "ranks": document["ranks"] | _untrained(catalogue, asked)}
    write_cell(cell_file(config, shop, row, seed), _identity(config, shop, row, seed), document)


def _ranks(config: JobConfig, row: str, model: str, catalogue: Catalogue, asked: Asked) -> dict[str, list[int]]:
    signals = None if row == BASE else config.rows[row].signals
    if signals is None:
        encoder = build_text_encoder(config.encoder.replace(model=model))
        return encoder_ranks(encoder, catalogue, asked, FusionConfig())
    whole = BgeM3Encoder(config.encoder.replace(model=model, sparse=True, multi_vector=True))
    return signal_ranks(whole, catalogue, asked, FusionConfig(), signals)


def _untrained(catalogue: Catalogue, asked: Asked) -> dict[str, list[int]]:
    return {"bm25": bm25_ranks(catalogue, asked), "popularity": popularity_ranks(catalogue, asked),
            "oracle": oracle_ranks(catalogue, asked)}


def _best_rate(config: JobConfig, shop: str, row: str) -> float:
    """The rate with the best validation figure among the trials."""
    if len(config.rates) == 1:
        return config.rates[0]
    found = {rate: read_cell(cell_file(config, shop, row, f"rate-{rate:g}"))["training"]["best_value"]
             for rate in config.rates}
    return max(found, key=lambda rate: found[rate])


def _train(config: JobConfig, shop: str, row: str, rate: float, seed: int, cpu_seconds: float
           ) -> tuple[str, dict[str, Any]]:
    """(the folder of the trained encoder, what the training found)."""
    settings = config.rows[row]
    output = config.work / shop / "encoders" / row / f"{seed}-{rate:g}-{cpu_seconds:g}"
    recipe = merged(config.finetune, settings.finetune)
    heads = settings.signals is not None
    encoder = config.encoder.replace(sparse=heads, multi_vector=heads)
    artifact = finetune_bge(FinetuneBgeConfig.model_validate(merged(recipe, {
        "pairs": _training_pairs(config, shop, settings), "output": output, "seed": seed,
        "encoder": encoder.model_dump(), "optim": {"learning_rate": rate}, "max_cpu_seconds": cpu_seconds})))
    return str(open_artifact(output, "encoder").path / "encoder"), dict(artifact.manifest.facts)


if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))

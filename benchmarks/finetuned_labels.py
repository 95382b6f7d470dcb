"""Does fine-tuning help on human labels? Nested cross-validation over the queries of a judged catalogue.

    python benchmarks/finetuned_labels.py --config configs/bench_finetuned_labels/esci.yaml

Every query is reported once, by an encoder that was neither trained nor chosen with it: of the queries of the
other folds one part chooses (learning rate, how far from the base weights, weight of the fusion),
the rest are trained on beside pairs made from the products themselves. Recipes without judged pairs know no
query, so one training reports all of them; they are the rows of `transfer.py`.

A cell (fold, recipe, run) is a process and a file of its own below `cells`; a rerun makes only the missing ones.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cells import is_current, make_missing, merged, read_cell, write_cell
from finetuned_table import summary
from judged_answers import (
    Fold,
    Problem,
    document_vectors,
    near_the_top,
    nested_folds,
    pool_figure,
    pooled,
    stored_vectors,
    system_values,
)
from pair_mix import MixConfig, Part, mix_pairs
from retriever_ranks import Catalogue, read_catalogue
from shelves import ShelvesConfig, write_shelves
from weight_average import averaged_encoder

from recsys_ray.artifacts import open_artifact
from recsys_ray.config import Config, fingerprint, main
from recsys_ray.data.judged_pairs import JudgedQueries
from recsys_ray.data.negatives import NegativesConfig
from recsys_ray.data.pairs import PairsConfig
from recsys_ray.data.training_pairs import MakePairsConfig, make_pairs
from recsys_ray.evaluation.judgments import TableJudgments, read_judgments
from recsys_ray.evaluation.results import write_result
from recsys_ray.flow import FlowConfig, ensure_index
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.retrieval.fusion import FusionConfig
from recsys_ray.retrieval.mining import MineNegativesConfig, mine_negatives
from recsys_ray.retrieval.query_sets import TableQueries, table_query_set
from recsys_ray.runtime import RayConfig, connected
from recsys_ray.training.bge import FinetuneBgeConfig
from recsys_ray.training.launch import finetune_bge

log = logging.getLogger(__name__)

BASE, WHOLE = "base", "all"     # the recipe without training, the fold of recipes that know no query


class Judged(Config):
    """Which judged products become pairs: keys of `JudgedQueries`."""

    min_gain: float
    negative_gain: float | None = None
    max_positives: int = Field(default=20, ge=1)
    max_negatives: int = Field(default=4, ge=1)


class Recipe(Config):
    """One way of training."""

    pairs: PairsConfig                              # of the products themselves
    most_pairs: int = Field(default=1500, ge=1)     # of those; a thousand CPU seconds see few more
    judged: Judged | None = None                    # None: no judgment is trained on, nor chosen by
    negatives: NegativesConfig | None = None        # mined with the base model for the products' pairs
    finetune: dict[str, Any] = Field(default_factory=dict)      # keys of FinetuneBgeConfig, nested
    rates: tuple[float, ...]                        # learning rates to choose from
    shares: tuple[float, ...] = (1.0,)              # of the way from the base weights to the trained ones, likewise
    cpu_seconds: float = Field(default=45, gt=0)    # of one training

    @property
    def has_choice(self) -> bool:
        """Whether there are trials to choose among."""
        return len(self.rates) * len(self.shares) > 1

    @model_validator(mode="after")
    def _can_choose(self) -> Self:
        if self.judged is None and self.has_choice:
            raise ValueError("rates, shares: without judged pairs no query may choose; give one of each")
        return self


class JobConfig(Config):
    """Which catalogue and labels, which recipes."""

    flow: FlowConfig                                # how the catalogue is prepared and which encoder is the base
    shelves: ShelvesConfig | None = None            # goodbooks: make the tables that the flow reads
    queries: TableQueries
    judgments: TableJudgments
    relevant_gain: float = Field(default=1.0, gt=0)
    recipes: dict[str, Recipe]
    ours: str | None = None                         # the recipe of the result file; None: cells alone
    work: Path
    cells: Path
    result: Path | None = None
    finetune: dict[str, Any] = Field(default_factory=dict)      # of every recipe
    folds: int = Field(default=3, ge=2)             # reported once each
    inner_folds: int = Field(default=3, ge=2)       # of the other queries; one of these chooses
    weight_step: float = Field(default=0.05, gt=0, le=0.5)      # of the fusion weights tried
    seed: int = 7
    parallel: int = Field(default=2, ge=1)          # cells at once, one thread each
    cell: str | None = None                         # "fold/recipe/run": this one only (what a worker process gets)

    @model_validator(mode="after")
    def _ours_is_folded(self) -> Self:
        if self.ours is not None and (self.ours not in self.recipes or self.recipes[self.ours].judged is None):
            raise ValueError(f"ours: {self.ours!r} is no recipe with judged pairs")
        if (self.ours is None) != (self.result is None):
            raise ValueError("ours and result belong together")
        return self

    @property
    def weights(self) -> list[float]:
        """The dense weights tried, 0 to 1, the default among them."""
        steps = np.round(np.arange(0, 1 + self.weight_step / 2, self.weight_step), 4)
        return sorted({*(float(one) for one in steps), FusionConfig().dense_weight})


def run(config: JobConfig) -> Path | None:
    """Make every missing cell, then the table; returns the path of the result file."""
    if config.cell is not None:
        _make_cell(config, *config.cell.split("/"))
        return None
    names = final_cells(config)
    if not all(is_made(config, name) for name in names):
        _ready(config)
    for some in ([f"{WHOLE}/{BASE}/0"], _trials(config), names):
        make_missing(__file__, some, lambda name: is_made(config, name), config.work / "logs", config.parallel)
    if config.ours is None or config.result is None:
        return None
    base = read_cell(cell_file(config, f"{WHOLE}/{BASE}/0"))
    trained = [read_cell(cell_file(config, f"{fold}/{config.ours}/1")) for fold in range(config.folds)]
    headline, tables = summary(base, trained, _folds_of(config, base["query_ids"]), config.weights,
                               config.relevant_gain)
    tables["setting"] = config.model_dump(mode="json", exclude={"cell"})
    return write_result(config.result, command=f"python benchmarks/finetuned_labels.py {' '.join(sys.argv[1:])}",
                        headline=headline, tables=tables, seeds=[config.seed])


def final_cells(config: JobConfig) -> list[str]:
    """The cells with figures: the base model and every recipe on every fold it is trained for."""
    return [f"{WHOLE}/{BASE}/0", *(f"{fold}/{name}/1" for name in config.recipes for fold in _fold_names(config, name))]


def _trials(config: JobConfig) -> list[str]:
    return [f"{fold}/{name}/rate-{rate:g}" for name, recipe in config.recipes.items() if recipe.has_choice
            for fold in _fold_names(config, name) for rate in recipe.rates]


def _fold_names(config: JobConfig, recipe: str) -> list[str]:
    return [WHOLE] if config.recipes[recipe].judged is None else [str(fold) for fold in range(config.folds)]


def _folds_of(config: JobConfig, query_ids: list[str]) -> list[Fold]:
    return nested_folds(query_ids, config.folds, config.inner_folds, config.seed)


def cell_file(config: JobConfig, name: str) -> Path:
    """Where the cell is written."""
    return config.cells / f"{name.replace('/', '-')}.json"


def is_made(config: JobConfig, name: str) -> bool:
    """Whether the cell is there and current."""
    return is_current(cell_file(config, name), _identity(config, name))


def _identity(config: JobConfig, name: str) -> dict[str, Any]:
    """What a cell's figures depend on; a file with another one is made again."""
    fold, recipe, _ = name.split("/")
    known = config.model_dump(mode="json", include={"queries", "judgments", "relevant_gain", "weight_step", "shelves"})
    known |= {"source": config.flow.prepare.model_dump(mode="json", exclude={"output", "ray"}), "cell": name,
              "shop": config.flow.shop and config.flow.shop.identity(),
              "encoder": config.flow.embed.encoder.model_dump(mode="json")}
    if recipe != BASE:
        known |= {"recipe": config.recipes[recipe].model_dump(mode="json"), "common": config.finetune}
    if fold != WHOLE:
        known |= {"folds": [config.folds, config.inner_folds, config.seed]}
    return known


# --- what cells share -----------------------------------------------------------------------------
def _ready(config: JobConfig) -> None:
    """The catalogue with the base index, and the pairs of every recipe."""
    if config.shelves is not None:
        write_shelves(config.shelves)
    with connected(RayConfig()):
        ensure_index(config.flow)
        folds = _folds_of(config, _problem(config).query_ids)
        for name, recipe in config.recipes.items():
            own = _product_pairs(config, recipe)
            for fold in _fold_names(config, name):
                if recipe.judged is not None:
                    _with_judged(config, recipe, recipe.judged, own, fold, folds[int(fold)])


def _pairs(config: JobConfig, recipe: Recipe, fold: str) -> Path:
    """The artefact that the recipe is trained on: products' pairs, and in a fold the judged ones too."""
    asked = [recipe.pairs.digest(), recipe.most_pairs, recipe.negatives and recipe.negatives.digest()]
    if fold == WHOLE:
        return config.work / "pairs" / fingerprint(asked)[:12]
    assert recipe.judged is not None
    return config.work / "pairs" / f"{fingerprint([*asked, recipe.judged.digest()])[:12]}-{fold}"


def _product_pairs(config: JobConfig, recipe: Recipe) -> Path:
    prepared, target = config.flow.prepare.output, _pairs(config, recipe, WHOLE)
    every = config.work / "pairs" / f"every-{recipe.pairs.digest()[:12]}"
    make_pairs(MakePairsConfig.model_validate({**recipe.pairs.model_dump(), "prepared": prepared, "output": every}))
    few = target if recipe.negatives is None else target.with_name(f"{target.name}-few")
    mix_pairs(MixConfig(prepared=prepared, parts=(Part(pairs=every, most=recipe.most_pairs),), output=few))
    if recipe.negatives is not None:
        mine_negatives(MineNegativesConfig.model_validate({
            **recipe.negatives.model_dump(), "pairs": few, "prepared": prepared, "index": config.flow.index.output,
            "output": target, "encoder": config.flow.embed.encoder.model_dump()}))
    return target


def _with_judged(config: JobConfig, recipe: Recipe, judged: Judged, own: Path, fold: str, queries: Fold) -> None:
    prepared, target = config.flow.prepare.output, _pairs(config, recipe, fold)
    asked = JudgedQueries.model_validate({
        **judged.model_dump(), "queries": config.queries.path, "query_columns": config.queries.columns,
        "judgments": str(config.judgments.path), "judgment_columns": config.judgments.columns,
        "gain_of_label": config.judgments.gain_of_label, "query_ids": queries.inner, "folds": config.inner_folds,
        "valid_folds": (0,), "seed": config.seed})
    some = target.with_name(f"{target.name}-judged")
    make_pairs(MakePairsConfig(prepared=prepared, output=some, judged=asked, max_train_reviews=1, max_valid_reviews=0))
    mix_pairs(MixConfig(prepared=prepared, parts=(Part(pairs=own), Part(pairs=some)), output=target))


def _problem(config: JobConfig) -> Problem:
    asked = table_query_set(config.queries).queries
    judged, _ = read_judgments(config.judgments, open_artifact(config.flow.prepare.output, "prepared"))
    return Problem.of(asked, judged, config.relevant_gain)


# --- one cell -------------------------------------------------------------------------------------
def _make_cell(config: JobConfig, fold: str, recipe: str, kind: str) -> None:
    import torch

    torch.set_num_threads(1)
    name = f"{fold}/{recipe}/{kind}"
    catalogue, problem = read_catalogue(config.flow.prepare.output), _problem(config)
    queries = None if fold == WHOLE else _folds_of(config, problem.query_ids)[int(fold)]
    document: dict[str, Any] = {"cell": name, "products": len(catalogue.texts)}
    if recipe == BASE:
        encoder = build_text_encoder(config.flow.embed.encoder)
        vectors = stored_vectors(config.flow.embed.output, catalogue)
        document |= {"query_ids": problem.query_ids, "pool": near_the_top(encoder, vectors, catalogue, problem),
                     **system_values(encoder, vectors, catalogue, problem, config.weights)}
    elif kind.startswith("rate-"):
        assert queries is not None
        document |= _trial(config, fold, recipe, float(kind.removeprefix("rate-")), catalogue,
                           problem.only(queries.choose))
    else:
        rate, share = _chosen(config, fold, recipe)
        folder, facts = _train(config, fold, recipe, rate)
        told = problem if queries is None else problem.only((*queries.choose, *queries.report))
        encoder = _encoder(config, folder, share)
        document |= {"training": facts, "learning_rate": rate, "share": share, "query_ids": told.query_ids,
                     **system_values(encoder, document_vectors(encoder, catalogue), catalogue, told, config.weights)}
    write_cell(cell_file(config, name), _identity(config, name), document)


def _trial(config: JobConfig, fold: str, recipe: str, rate: float, catalogue: Catalogue, problem: Problem
           ) -> dict[str, Any]:
    """A training at one rate, and the figure of the choosing queries at every share of the way."""
    folder, facts = _train(config, fold, recipe, rate)
    pool = read_cell(cell_file(config, f"{WHOLE}/{BASE}/0"))["pool"]
    places = pooled(catalogue, problem, pool)
    figures = {f"{share:g}": pool_figure(_encoder(config, folder, share), catalogue, problem, places, FusionConfig())
               for share in config.recipes[recipe].shares}
    return {"training": facts, "choosing": figures, "pool_products": len(places)}


def _chosen(config: JobConfig, fold: str, recipe: str) -> tuple[float, float]:
    """(learning rate, share of the way) of the best trial; of equal ones the first."""
    settings = config.recipes[recipe]
    if not settings.has_choice:
        return settings.rates[0], settings.shares[0]
    found = {(rate, share): figure for rate in settings.rates for share in settings.shares
             for figure in [read_cell(cell_file(config, f"{fold}/{recipe}/rate-{rate:g}"))["choosing"][f"{share:g}"]]}
    return max(found, key=lambda one: found[one])


def _train(config: JobConfig, fold: str, recipe: str, rate: float) -> tuple[Path, dict[str, Any]]:
    """(the folder of the trained encoder, what the training found); trained once, whoever asks."""
    settings = config.recipes[recipe]
    output = config.work / "encoders" / f"{recipe}-{fold}-{rate:g}"
    artifact = finetune_bge(FinetuneBgeConfig.model_validate(merged(merged(config.finetune, settings.finetune), {
        "pairs": _pairs(config, settings, fold), "output": output, "encoder": config.flow.embed.encoder.model_dump(),
        "optim": {"learning_rate": rate}, "max_cpu_seconds": settings.cpu_seconds, "seed": config.seed,
        "workers": {"threads": 1}})))
    return open_artifact(output, "encoder").path / "encoder", dict(artifact.manifest.facts)


def _encoder(config: JobConfig, trained: Path, share: float) -> Any:
    base = config.flow.embed.encoder
    folder = averaged_encoder(base.model, trained, share, config.work / "averaged" / f"{trained.parent.name}-{share:g}")
    return build_text_encoder(base.replace(model=str(folder)))


if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))

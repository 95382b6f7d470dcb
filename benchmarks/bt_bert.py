"""BT-BERT on the demo shop's beauty department, scored on what was planted there and never on the labels it learned.

    python benchmarks/bt_bert.py --config configs/bench_bt_bert/full.yaml

Trained on the labels of a careless annotator, as the shop plants them; the rule hold-out is trained on the packaged
rules. A cell is a process and a file of its own below `cells`; a rerun makes only the missing ones.

    model/<row>/<seed>      a recipe: the figures of every logit, of the second input, of the explicit model
    low/<row>/<share>       the same from a share of the products
    new/base                a model of all concerns but a few
    new/<replay|forget>     those few added to it in one epoch, with and without a replay of the others
    rules/<row>/1           trained on rules of which some are withheld; scored on what only those say
    why/<row>/1             explanations against the planted actives
    robust/<row>/1          other words for the concerns, lists shuffled and cut short
    speed/<row>/1           pairs scored a CPU-second beside plain Transformers, alone on the machine
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bt_bert_speed import speed
from bt_bert_table import summary
from cells import is_current, make_missing, merged, read_cell, write_cell

from recsys_ray.artifacts import Artifact, current_version, open_artifact, write_table
from recsys_ray.config import Config, main
from recsys_ray.data.concern_data import STAGE_VERSION as LABELS_VERSION
from recsys_ray.data.concern_data import LabelConcernsConfig, label_concerns
from recsys_ray.data.concern_rulebook import load_rules
from recsys_ray.data.concern_splits import ConcernSplitConfig
from recsys_ray.data.demo_shop import DemoShopConfig, make_demo_shop
from recsys_ray.data.demo_shop.identity import GENERATOR_VERSION, generator_hash
from recsys_ray.data.ingredients import parse_ingredients
from recsys_ray.data.pipeline import PrepareConfig, prepare
from recsys_ray.evaluation.explain import (
    AttentionReader,
    Listed,
    chance_weights,
    deletion_insertion,
    occlusion,
    order_of,
    precision,
    ranked_attention,
)
from recsys_ray.evaluation.results import write_result
from recsys_ray.models.bt_bert import KIND as MODEL_KIND
from recsys_ray.models.bt_bert import Concern
from recsys_ray.models.bt_bert_scorer import BtBertConfig, BtBertScorer
from recsys_ray.models.sentence_layout import EncoderError, find_model
from recsys_ray.runtime import RayConfig, connected
from recsys_ray.training.bt_bert import STAGE_VERSION as TRAINING_VERSION
from recsys_ray.training.bt_bert import FinetuneBtBertConfig
from recsys_ray.training.bt_bert_run import finetune_here

log = logging.getLogger(__name__)
WAYS = ("base", "replay", "forget")     # of the cells new/<way>; the others begin from the first
BASE = f"new/{WAYS[0]}"


class JobConfig(Config):
    """Which shop, which recipes."""

    shop: DemoShopConfig
    rows: dict[str, dict[str, Any]]                     # recipe -> keys of FinetuneBtBertConfig beside `finetune`
    seeds: dict[str, tuple[int, ...]]                   # of each recipe
    finetune: dict[str, Any] = Field(default_factory=dict)      # of every recipe
    cpu_seconds: float = Field(gt=0)                    # of one training on all products
    row_cpu_seconds: dict[str, float] = Field(default_factory=dict)     # of recipes that need more, or less
    low_shares: tuple[float, ...] = (0.5, 0.25, 0.125)
    low_rows: tuple[str, ...] = ("presoftmax", "explicit")
    new_concerns: tuple[str, ...] = ("eyebag", "age")
    extension: dict[str, Any] = Field(default_factory=dict)     # keys of FinetuneBtBertConfig where those are added
    rule_rows: tuple[str, ...] = ("presoftmax", "explicit")
    withheld_rules: tuple[str, ...]
    explained: int = Field(default=60, ge=1)            # answers
    changed: int = Field(default=150, ge=1)             # test products whose input is changed
    timed_products: int = Field(default=150, ge=2)
    timed_rounds: int = Field(default=3, ge=1)
    split: ConcernSplitConfig = ConcernSplitConfig(train=0.6, valid=0.1)
    num_buckets: int = 4
    work: Path = Path("runs/bench_bt_bert")
    cells: Path = Path("benchmarks/results/bt_bert")
    result: Path = Path("benchmarks/results/bt_bert.json")
    parallel: int = Field(default=2, ge=1)              # cells at once, one thread each
    cell: str | None = None                             # this one only (what a worker process gets)


def run(config: JobConfig) -> Path | None:
    """Make every missing cell, then the table; returns the path of the result file."""
    if config.cell is not None:
        _make_cell(config, config.cell)
        return None
    if not all(is_made(config, name) for name in names(config)):
        _ready(config)
    every = names(config)
    needed, alone = list(dependants(config)), every[-1:]    # others begin from models of the first ones
    for some, parallel in ((needed, config.parallel), (every[:-1], config.parallel), (alone, 1)):
        make_missing(__file__, some, lambda name: is_made(config, name), config.work / "logs", parallel)
    cells = {name: read_cell(cell_file(config, name)) for name in every}
    planted = pq.read_table(config.work / "shop" / "truth" / "concerns.parquet")
    headline, tables = summary(cells, _labels(config), _labels(config, "rules"), planted, config.new_concerns,
                               load_rules())
    tables["setting"] = config.model_dump(mode="json", exclude={"cell"})
    return write_result(config.result, command=f"python benchmarks/bt_bert.py {' '.join(sys.argv[1:])}",
                        headline=headline, tables=tables,
                        seeds=sorted({seed for some in config.seeds.values() for seed in some}))


def names(config: JobConfig) -> list[str]:
    """All cells, the most wanted first."""
    rows = [f"model/{row}/{seed}" for turn in range(max(map(len, config.seeds.values())))
            for row, seeds in config.seeds.items() for seed in seeds[turn:turn + 1]]
    return [*rows, *(f"{kind}/{config.low_rows[0]}/1" for kind in ("why", "robust")), *(f"new/{way}" for way in WAYS),
            *(f"rules/{row}/1" for row in config.rule_rows),
            *(f"low/{row}/{share:g}" for row in config.low_rows for share in config.low_shares),
            f"speed/{config.low_rows[0]}/1"]


def dependants(config: JobConfig) -> dict[str, list[str]]:
    """The cells that begin from the model of another one, by that one."""
    row = config.low_rows[0]
    return {f"model/{row}/1": [f"{kind}/{row}/1" for kind in ("why", "robust", "speed")],
            BASE: [f"new/{way}" for way in WAYS[1:]]}


def cell_file(config: JobConfig, name: str) -> Path:
    """Where the cell is written."""
    return config.cells / f"{name.replace('/', '-')}.json"


def is_made(config: JobConfig, name: str) -> bool:
    """Whether the cell is there and current, and its model, too, where a missing cell needs that."""
    if not is_current(cell_file(config, name), _identity(config, name)):
        return False
    waiting = [one for one in dependants(config).get(name, ()) if not is_made(config, one)]
    return not waiting or current_version(config.work / "models" / name) is not None


def budget(config: JobConfig, row: str) -> float:
    """The CPU seconds of one training of a recipe on all products."""
    return config.row_cpu_seconds.get(row, config.cpu_seconds)


def _identity(config: JobConfig, name: str) -> dict[str, Any]:
    kind, row, *_ = name.split("/")
    known = {"code": [TRAINING_VERSION, LABELS_VERSION], "shop": config.shop.identity(),
             "generator": [GENERATOR_VERSION, generator_hash()], "cell": name,
             "split": config.split.model_dump(mode="json"), "common": config.finetune,
             "cpu_seconds": budget(config, config.low_rows[0] if kind == "new" else row),
             "row": config.rows[config.low_rows[0] if kind == "new" else row]}
    if kind == "new":
        known["new"] = list(config.new_concerns)
        if row != WAYS[0]:
            known["extension"] = config.extension
    if kind in ("rules", "why", "robust"):
        known["rules"] = load_rules().digest
    return known | {"rules": {"withheld": list(config.withheld_rules)}, "why": {"explained": config.explained},
                    "robust": {"changed": config.changed},
                    "speed": {"products": config.timed_products, "rounds": config.timed_rounds}}.get(kind, {})


# --- what cells share -----------------------------------------------------------------------------
def _ready(config: JobConfig) -> None:
    """The shop, its products, and both sets of labels."""
    with connected(RayConfig()):
        make_demo_shop(config.shop.replace(output=config.work / "shop"))
        public = config.work / "shop" / "public"
        prepare(PrepareConfig.model_validate({
            "source": {"format": "amazon_reviews", "products": str(public / "meta_Demo_Shop.jsonl.gz"),
                       "reviews": str(public / "Demo_Shop.jsonl.gz")},
            "output": config.work / "prepared", "num_buckets": config.num_buckets}))
    planted = pq.read_table(config.work / "shop" / "truth" / "concerns.parquet",
                            columns=["product_id", "concern", "label"])
    planted = planted.set_column(2, "label", pc.cast(planted["label"], pa.int8()))
    write_table(config.work, "annotated.parquet", planted)
    common = {"products": {"prepared": config.work / "prepared"}, "split": config.split}
    label_concerns(LabelConcernsConfig.model_validate({
        **common, "labels": {"path": str(config.work / "annotated.parquet")}, "output": config.work / "annotated"}))
    label_concerns(LabelConcernsConfig.model_validate({
        **common, "withheld_rules": config.withheld_rules, "output": config.work / "rules"}))


def _labels(config: JobConfig, name: str = "annotated") -> Artifact:
    return open_artifact(config.work / name, "concern_labels")


def truth(config: JobConfig) -> dict[tuple[str, str], dict[str, Any]]:
    """What was planted for each product and concern: helps, strength, actives."""
    rows = pq.read_table(config.work / "shop" / "truth" / "concerns.parquet",
                         columns=["product_id", "concern", "helps", "strength", "actives"]).to_pylist()
    return {(row["product_id"], row["concern"]): row for row in rows}


def _tested(labels: Artifact) -> pa.Table:
    products = labels.table("products.parquet")
    return products.filter(pc.equal(products["split"], "test")).sort_by("product_id")


def _train(config: JobConfig, folder: str, labels: str, row: str, seed: int, cpu_seconds: float | None = None,
           **changes: Any) -> tuple[Path, dict[str, Any]]:
    """(the artefact root of the trained model, what the training found)."""
    output = config.work / "models" / folder
    settings = merged(merged(config.finetune, config.rows[row]), {
        "labels": {"path": config.work / labels}, "output": output, "seed": seed, "workers": {"threads": 1},
        "max_cpu_seconds": cpu_seconds, **changes})
    return output, dict(finetune_here(FinetuneBtBertConfig.model_validate(settings)).manifest.facts)


# --- one cell -------------------------------------------------------------------------------------
def _make_cell(config: JobConfig, name: str) -> None:
    import torch

    torch.set_num_threads(1)
    kind, row, *rest = name.split("/")
    if name == BASE:
        model, facts = _base(config)
        document = {"training": facts, **_probabilities(model, _tested(_labels(config)))}
    elif kind == "why":
        document = _explained(config, row)
    elif kind == "new":
        document = _extended(config, row)
    elif kind == "robust":
        document = _changed(config, row)
    elif kind == "speed":
        document = _timed(config, row)
    else:
        labels = "rules" if kind == "rules" else "annotated"
        share = float(rest[0]) if kind == "low" else 1.0
        seed = 1 if kind == "low" else int(rest[0])
        model, facts = _train(config, name, labels, row, seed, budget(config, row) * share, train_share=share)
        document = {"training": facts, **_probabilities(model, _tested(_labels(config, labels)))}
    write_cell(cell_file(config, name), _identity(config, name), {"cell": name, "cpu_seconds": time.process_time(),
                                                                  **document})


def _changed(config: JobConfig, row: str) -> dict[str, Any]:
    """Probabilities for the test products when the input changes and the truth does not (order aside)."""
    model, book = config.work / "models" / "model" / row / "1", load_rules()
    products = _tested(_labels(config))
    products = products.take(np.sort(np.random.default_rng(1).permutation(products.num_rows)[:config.changed]))
    lists = [[one.written for one in parse_ingredients(text, book.synonyms)]
             for text in products["ingredients"].to_pylist()]
    random = np.random.default_rng(1)
    shuffled = [random.permutation(np.array(one, dtype=object)).tolist() for one in lists]
    scorer = BtBertScorer(BtBertConfig(model=str(model), device="cpu"))
    others = [one.replace(query=next(words for words in book.concerns[one.name].paraphrases if _fits(scorer, words)))
              for one in scorer.card.concerns]
    ways: dict[str, tuple[list[list[str]], Sequence[Concern] | None]] = {
        "as listed": (lists, None), "shuffled": (shuffled, None), "first 10": ([one[:10] for one in lists], None),
        "first 5": ([one[:5] for one in lists], None), "paraphrased": (lists, others)}
    return {"ways": {way: _probabilities(model, _with_lists(products, some), asked)
                     for way, (some, asked) in ways.items()},
            "paraphrases": {one.name: one.query for one in others}}


def _fits(scorer: BtBertScorer, words: str) -> bool:
    try:
        return len(scorer.tokenizer.query(words)) > 0
    except EncoderError:        # more tokens than the layout has room for
        return False


def _with_lists(products: pa.Table, lists: Sequence[Sequence[str]]) -> pa.Table:
    return products.set_column(products.column_names.index("ingredients"), "ingredients",
                               pa.array([", ".join(one) for one in lists]))


def _probabilities(model: Path, products: pa.Table, concerns: Sequence[Concern] | None = None) -> dict[str, Any]:
    scorer = BtBertScorer(BtBertConfig(model=str(model), device="cpu"))
    found_NC = scorer.score(products["ingredients"].to_pylist(), products["title"].to_pylist(), concerns)
    return {"product_ids": products["product_id"].to_pylist(), "thresholds": scorer.card.calibration.thresholds,
            "probabilities": {name: [round(float(one), 6) for one in found_NC[:, column]]
                              for column, name in enumerate(scorer.card.names())}}


def _base(config: JobConfig) -> tuple[Path, dict[str, Any]]:
    """A model of the old concerns alone."""
    old = [name for name in _labels(config).manifest.facts["concerns"] if name not in config.new_concerns]
    row = config.low_rows[0]
    return _train(config, BASE, "annotated", row, 1, budget(config, row), concerns=tuple(old))


def _extended(config: JobConfig, way: str) -> dict[str, Any]:
    """One epoch on all concerns from the model of the old ones, or on the new ones alone."""
    model, added = _train(config, f"new/{way}", "annotated", config.low_rows[0], 1,
                          **{**config.extension, "model": str(config.work / "models" / BASE), "epochs": 1,
                             "replay": float(way == "replay")})
    return {"training": added, **_probabilities(model, _tested(_labels(config)))}


def _timed(config: JobConfig, row: str) -> dict[str, Any]:
    model, planted = config.work / "models" / "model" / row / "1", truth(config)
    products = _tested(_labels(config)).slice(0, config.timed_products).to_pylist()
    concerns = BtBertScorer(BtBertConfig(model=str(model), device="cpu")).card.names()
    labels = np.array([[planted[one["product_id"], name]["helps"] for name in concerns] for one in products])
    return speed(model, [one["ingredients"] for one in products], [one["title"] for one in products], labels,
                 config.timed_rounds)


def _explained(config: JobConfig, row: str) -> dict[str, Any]:
    """The figures of each explained answer: products that help, as planted, explained by the model of seed 1."""
    model = config.work / "models" / "model" / row / "1"
    scorer = BtBertScorer(BtBertConfig(model=str(model), device="cpu"))
    reader = AttentionReader(find_model(str(model), MODEL_KIND), scorer.tokenizer)
    book, planted = load_rules(), truth(config)
    products = {one["product_id"]: one for one in _tested(_labels(config)).to_pylist()}
    asked = [(name, concern) for name in products for concern in scorer.card.concerns
             if planted[name, concern.name]["helps"]]
    chosen = np.sort(np.random.default_rng(1).permutation(len(asked))[:config.explained])
    figures = []
    for name, concern in (asked[place] for place in chosen):
        parsed = parse_ingredients(products[name]["ingredients"], book.synonyms)
        listed = Listed(tuple(one.written for one in parsed), products[name]["title"])
        acting = _places(listed.ingredients, planted[name, concern.name]["actives"])
        pair, owners = reader.pair(concern, listed)
        weights = {"attention": ranked_attention(reader.attention(pair.ids), pair, owners, len(listed.ingredients)),
                   "occlusion": occlusion(scorer, concern, listed), "chance": chance_weights(listed, len(figures))}
        figures.append({"product_id": name, "concern": concern.name, "actives": len(acting), **{
            method: [precision(found, acting), len(acting) and sum(
                place in acting for place in order_of(found)[:3].tolist()) / 3,
                     *deletion_insertion(scorer, concern, listed, found)]
            for method, found in weights.items()}})
    return {"answers": figures}


def _places(ingredients: Sequence[str], actives: Sequence[str]) -> set[int]:
    wanted = {one.casefold() for one in actives}
    return {place for place, one in enumerate(ingredients) if one.casefold() in wanted}


if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))

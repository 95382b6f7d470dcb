"""The cells of the concern benchmark: which there are, which begin from others' models, and what is made again."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recsys_ray.artifacts import stage
from recsys_ray.config import Config, load_config
from recsys_ray.data.concern_data import LabelConcernsConfig, label_concerns
from recsys_ray.data.concern_rulebook import load_rules

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return import_module("bt_bert")


def config_of(benchmark: ModuleType, tmp_path: Path, *overrides: str) -> Any:
    return load_config(benchmark.JobConfig, REPO / "configs/bench_bt_bert/full.yaml", [
        f"work={tmp_path}/work", f"cells={tmp_path}/cells", *overrides])


def make(benchmark: ModuleType, config: Any, name: str) -> None:
    benchmark.write_cell(benchmark.cell_file(config, name), benchmark._identity(config, name), {"cell": name})


def test_every_cell_has_a_model_to_begin_from_before_it(benchmark: ModuleType, tmp_path: Path) -> None:
    config = config_of(benchmark, tmp_path)
    names = benchmark.names(config)
    assert len(names) == len(set(names))
    assert names[-1].startswith("speed/")       # alone on the machine
    for first, others in benchmark.dependants(config).items():
        assert all(names.index(first) < names.index(other) for other in others)


def test_a_cell_is_made_again_for_other_settings_and_for_a_model_that_others_still_need(
        benchmark: ModuleType, tmp_path: Path) -> None:
    config = config_of(benchmark, tmp_path)
    assert not benchmark.is_made(config, "new/base")
    make(benchmark, config, "new/base")
    assert not benchmark.is_made(config, "new/base")        # its model is gone, and two cells begin from it
    with stage(config.work / "models/new/base", "bt_bert", "x") as staging:
        staging.commit([], config=Config())
    assert benchmark.is_made(config, "new/base")
    other = config_of(benchmark, tmp_path, "finetune.optim.learning_rate=1.0e-5")
    assert not benchmark.is_made(other, "new/base")
    for name in ("new/replay", "new/forget"):
        make(benchmark, config, name)
    elsewhere = config.replace(work=tmp_path / "elsewhere")
    assert benchmark.is_made(elsewhere, "new/base")         # nothing begins from it any more


def test_a_recipe_may_have_a_budget_of_its_own(benchmark: ModuleType, tmp_path: Path) -> None:
    config = config_of(benchmark, tmp_path)
    for name in ("model/affine16/1", "model/logodds/1"):
        make(benchmark, config, name)
    other = config_of(benchmark, tmp_path, "row_cpu_seconds.affine16=7")
    assert (benchmark.budget(other, "affine16"), benchmark.budget(other, "explicit")) == (7, config.cpu_seconds)
    assert not benchmark.is_made(other, "model/affine16/1")
    assert benchmark.is_made(other, "model/logodds/1")


# --- the tables -----------------------------------------------------------------------------------
ACTIVES = {"acne": "Salicylic Acid", "moisture": "Sodium Hyaluronate"}
NAMES = [f"p{number:03d}" for number in range(120)]


def helps(number: int, concern: str) -> bool:
    return number % (2 if concern == "acne" else 3) == 0


@pytest.fixture(scope="module")
def summed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, float], dict[str, Any]]:
    """The summary of cells that know what is planted, but for the literal logit and the forgetful model."""
    root = tmp_path_factory.mktemp("cells")
    lists = [", ".join(["Aqua", *(active for concern, active in ACTIVES.items() if helps(number, concern)),
                        *(f"Plant{number}{one}" for one in "abcdefgh"), "Parfum"]) for number in range(120)]
    pq.write_table(pa.table({"product_id": NAMES, "title": [f"serum {number}" for number in range(120)],
                             "ingredients": lists}), root / "products.parquet")
    rows = [(name, concern, helps(number, concern)) for number, name in enumerate(NAMES) for concern in ACTIVES]
    truth = pa.table({"product_id": [row[0] for row in rows], "concern": [row[1] for row in rows],
                      "label": [int(row[2]) for row in rows], "helps": [row[2] for row in rows],
                      "strength": [float(row[2]) for row in rows]})
    pq.write_table(truth, root / "truth.parquet")
    common = {"products": {"path": str(root / "products.parquet")}, "concerns": list(ACTIVES)}
    annotated = label_concerns(LabelConcernsConfig.model_validate(
        {**common, "labels": {"path": str(root / "truth.parquet")}, "output": root / "annotated"}))
    ruled = label_concerns(LabelConcernsConfig.model_validate(
        {**common, "mode": "seed", "withheld_rules": ["ingredient/hyaluronates"], "output": root / "ruled"}))
    answers = [{method: [right, right, 0.2, 0.8] for method, right in (("occlusion", 1.0), ("attention", 0.5),
                                                                      ("chance", 0.25))} | {"actives": 1}]
    cells = {name: cell(0.0) for name in ("model/presoftmax/1", "model/explicit/1", "rules/presoftmax/1",
                                          "rules/explicit/1", "low/presoftmax/0.5", "low/explicit/0.5", "new/base",
                                          "new/replay")}
    cells |= {"model/literal_softmax16/1": cell(0.5), "new/forget": cell(0.9), "low/presoftmax/0.125": cell(0.9),
              "why/presoftmax/1": {"answers": answers, "cpu_seconds": 1.0},
              "robust/presoftmax/1": {"ways": {"as listed": cell(0.0), "paraphrased": cell(0.9)}, "cpu_seconds": 1.0,
                                      "paraphrases": {"acne": "spots"}},
              "speed/presoftmax/1": {"ratio_fp32": 3.0, "ratio_bf16": 2.0, "auc_difference": {"fp32": 0.0}, "rounds": 1,
                                     "pairs": 2, "pairs_per_cpu_second": {}, "cpu_seconds": 1.0}}
    summary = import_module("bt_bert_table").summary
    found: tuple[dict[str, float], dict[str, Any]] = summary(cells, annotated, ruled, truth, ["moisture"], load_rules())
    return found


def cell(noise: float) -> dict[str, Any]:
    """Probabilities that are right but for `noise`, and never below it."""
    random = np.random.default_rng(1)
    right = {concern: np.array([float(helps(number, concern)) for number in range(120)]) for concern in ACTIVES}
    return {"product_ids": NAMES, "thresholds": {}, "cpu_seconds": 1.0, "probabilities": {
        concern: (noise * (0.6 + 0.4 * random.random(120)) + (1 - noise) * one).clip(noise).tolist()
        for concern, one in right.items()}}


def test_every_figure_of_the_readme_has_a_number(summed: tuple[dict[str, float], dict[str, Any]]) -> None:
    headline, tables = summed
    layout = yaml.safe_load((REPO / "benchmarks/tables.yaml").read_text("utf-8"))["bt_bert"]
    assert {key for _, key, _ in layout["rows"]} <= set(headline)
    assert np.isfinite(list(headline.values())).all()
    for records in layout["records"]:
        assert {key for _, key, _ in records["columns"]} <= set(tables[records["at"]][0])


def test_the_figures_mean_what_they_say(summed: tuple[dict[str, float], dict[str, Any]]) -> None:
    headline, tables = summed
    assert headline["macro_ap_presoftmax"] == headline["macro_ap_oracle"] == headline["share_of_oracle"] == 1.0
    assert headline["literal_min_probability"] >= 0.5
    assert (headline["explanation_precision3"], headline["explanation_vs_random"]) == (1.0, 4.0)
    assert headline["new_concern_ap_gap"] == headline["old_concern_ap_loss"] == 0.0
    assert headline["old_concern_ap_loss_without_replay"] > 0.1
    assert headline["low_data_ap_drop"] > 0.1
    assert [row["share"] for row in tables["macro AP by share of products"]] == [1.0, 0.5, 0.125]
    assert headline["presoftmax_over_bag_ci_low"] >= 0
    # what withheld rules say the remaining ones cannot know; who learned the truth can
    assert headline["rule_holdout_ap_lift_rules"] == pytest.approx(1.0)
    assert headline["rule_holdout_ap_lift"] > 2
    assert (headline["scoring_speed_ratio"], headline["scoring_speed_ratio_bf16"]) == (3.0, 2.0)

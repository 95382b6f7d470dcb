"""The transfer table on worked examples: signs, verdicts, orders."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from recsys_ray.config import load_config
from recsys_ray.evaluation.significance import Units

REPO = Path(__file__).resolve().parents[2]


table = import_module("transfer_table")


def gain(difference: float, half: float) -> dict[str, float]:
    """A gain with the interval difference +- half."""
    low, high = difference - half, difference + half
    return {"difference": difference, "sign": int(np.sign(difference)),
            "shown": 1 if low > 0 else -1 if high < 0 else 0}


@pytest.mark.parametrize(("home", "others", "same", "verdict"), [
    (gain(0.1, 0.02), [gain(0.05, 0.01), gain(0.02, 0.05), gain(-0.01, 0.05)], 0.6667, "agrees"),
    (gain(0.1, 0.02), [gain(0.05, 0.01), gain(-0.06, 0.05)], 0.5, "disagrees"),     # a loss is shown
    (gain(0.1, 0.02), [gain(0.05, 0.06), gain(0.01, 0.05)], 1.0, "undecided"),      # no gain is shown elsewhere
    (gain(-0.1, 0.02), [gain(0.05, 0.01)], 0.0, "disagrees"),
    (gain(0.0, 0.02), [gain(0.05, 0.01)], 0.0, "undecided")])
def test_agreement(home: dict[str, float], others: list[dict[str, float]], same: float, verdict: str) -> None:
    gains = {"home": home, **{str(number): one for number, one in enumerate(others)}}
    assert table.agreement(gains, "home") == {"same_sign": same, "verdict": verdict}


def test_kendalls_tau_counts_pairs_of_methods_in_the_same_order() -> None:
    # of the 6 pairs of 4 methods one is turned round: (5 - 1) / 6
    found = table.order_agreement({"a": [1, 2, 3, 4], "b": [10, 20, 40, 30], "c": [4, 3, 2, 1]})
    assert found == {"a / b": 0.6667, "a / c": -1.0, "b / c": -0.6667}


def test_ranks_give_the_figures_of_one_relevant_product() -> None:
    found = table.rank_figures([[1, 3, 10, 11, 100, 101]])
    assert found["ndcg10"][0].tolist() == pytest.approx([1, 0.5, 1 / np.log2(11), 0, 0, 0])
    assert found["recall100"][0].tolist() == [1, 1, 1, 1, 1, 0]


def measured(shift: float, seeds: int) -> object:
    """Base systems and two trainings, the source recipe better than base by `shift` on every query."""
    level = np.linspace(0.2, 0.6, 30)
    systems = {"bm25": [level], "base dense": [level - 0.1], "base hybrid": [level + 0.05],
               "source dense": [level - 0.1 + shift] * seeds, "source hybrid": [level + 0.05 + shift] * seeds}
    return table.Measured({name: {"ndcg10": np.array(values)} for name, values in systems.items()}, Units.rows(30))


def test_the_table_of_two_data_sets_that_disagree_on_one_lever() -> None:
    headline, tables = table.transfer({"home": measured(0.02, 3), "away": measured(-0.02, 1)}, "home", ["ndcg10"])
    levers = {one["lever"]: one for one in tables["levers"]}
    assert levers["fine-tuning, source recipe (dense)"]["verdict"] == "disagrees"
    assert levers["fine-tuning, source recipe (dense)"]["gains"]["home"]["difference"] == 0.02
    assert levers["BM25 beside the vectors"]["verdict"] == "agrees"
    assert len(levers) == 3                 # levers whose rows are not there are left out
    # home: dense < source dense < bm25 < hybrid < source hybrid; away turns both pairs of base and source round
    assert tables["kendall_tau"]["ndcg10"] == {"home / away": pytest.approx((8 - 2) / 10)}
    assert headline["sign_agreement_ndcg10"] == pytest.approx(1 / 3, abs=1e-4)
    assert headline["levers_disagrees_ndcg10"] == 2


def test_missing_cells_name_the_command_that_makes_them(tmp_path: Path) -> None:
    module = import_module("transfer")
    config = load_config(module.JobConfig, REPO / "configs/bench_transfer/full.yaml")
    path = REPO / "configs/bench_finetuned_labels/esci.yaml"
    labels = load_config(sys.modules["finetuned_labels"].JobConfig, path).model_copy(update={"cells": tmp_path})
    with pytest.raises(module.TransferError, match=r"5 cells.*finetuned_labels\.py --config .*esci\.yaml"):
        module.labels_measured(labels, path, config.rows)
    shop = load_config(sys.modules["retriever_ablation"].JobConfig,
                       REPO / config.ablation).model_copy(update={"cells": tmp_path})
    with pytest.raises(module.TransferError, match=r"13 cells.*retriever_ablation\.py --config"):
        module.shop_measured(shop, config)


def test_all_data_sets_have_the_rows_of_the_ladder() -> None:
    module = import_module("transfer")
    config = load_config(module.JobConfig, REPO / "configs/bench_transfer/full.yaml")
    shop = load_config(sys.modules["retriever_ablation"].JobConfig, REPO / config.ablation)
    assert set(config.rows) <= set(shop.rows)
    for path in config.labels.values():
        recipes = load_config(sys.modules["finetuned_labels"].JobConfig, REPO / path).recipes
        assert all(recipes[row].judged is None for row in config.rows)

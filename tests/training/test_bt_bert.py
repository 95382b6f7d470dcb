"""Fine-tuning of BT-BERT from labels to a published folder: modes, weights, replay, resuming, workers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pytest
from curves import assert_same_curve, curve

from recsys_ray.artifacts import Artifact, open_artifact, stage
from recsys_ray.config import Config, ConfigError, load_config
from recsys_ray.models.bt_bert import read_card
from recsys_ray.models.bt_bert_scorer import BtBertConfig, BtBertScorer
from recsys_ray.schema import CONCERN_LABEL, CONCERN_PRODUCT
from recsys_ray.training.bt_bert import FinetuneBtBertConfig, average_precisions, class_weights, replayed, units_of
from recsys_ray.training.bt_bert_run import finetune_bt_bert, finetune_here
from recsys_ray.training.calibration import best_threshold, calibrate
from recsys_ray.training.concern_pairs import ConcernPairs, concerns_of, read_pairs

REPO = Path(__file__).resolve().parents[2]
ACTIVE = {"ac": "s", "re": "n", "ag": "r"}     # the letter among the ingredients that helps against each concern
TinyModel = Callable[..., Path]


def product_rows(count: int, split: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    random = np.random.default_rng(len(split))
    products, labels = [], []
    for number in range(count):
        own = {name for name in ACTIVE if random.random() < 0.4}
        letters = [*(ACTIVE[name] for name in sorted(own)), *random.choice(list("abcdefg"), 3)]
        random.shuffle(letters)
        name = f"{split}{number:03d}"
        products.append({"product_id": name, "row_id": number, "title": "gel", "ingredients": ", ".join(letters),
                         "category": "skin", "group_id": number, "split": split})
        labels += [{"product_id": name, "concern": concern, "label": int(concern in own), "rules": [],
                    "conflict": False, "held_out": False, "split": split} for concern in ACTIVE]
    labels[0]["label"] = None
    labels[4]["held_out"] = True
    labels[7] |= {"conflict": True, "label": None}
    return products, labels


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("labels")
    made = [product_rows(count, split) for split, count in (("train", 120), ("valid", 40), ("test", 20))]
    with stage(root, "concern_labels", "f") as staging:
        files = [staging.write_table(name, pa.Table.from_pylist([row for one in made for row in one[part]], schema))
                 for part, (name, schema) in enumerate((("products.parquet", CONCERN_PRODUCT),
                                                        ("labels.parquet", CONCERN_LABEL)))]
        staging.commit(files, config=Config(), facts={"mode": "seed",
                                                      "concerns": {name: {"query": name} for name in ACTIVE}})
    return root


@pytest.fixture(scope="module")
def model(tiny_text_model: TinyModel) -> Path:
    return tiny_text_model()


def settings_of(labels: Path, model: Path, output: Path, **changes: Any) -> FinetuneBtBertConfig:
    return FinetuneBtBertConfig.model_validate({
        "labels": {"path": str(labels)}, "output": str(output), "model": str(model), "device": "cpu",
        "dtype": "float32", "workers": {"threads": 1},
        "max_tokens": 48, "max_steps": 12, "epochs": 9, "evaluate_every": 4, "checkpoint_every": 3,
        "sampler": {"batch_size": 16}, "optim": {"learning_rate": 2e-3, "betas": [0.9, 0.95]}, **changes})


@pytest.fixture(scope="module")
def uninterrupted(labels: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return finetune_bt_bert(settings_of(labels, model, tmp_path_factory.mktemp("whole") / "model"))


def test_the_artefact_holds_a_model_that_scores(uninterrupted: Artifact) -> None:
    facts = uninterrupted.manifest.facts
    assert (facts["steps"], facts["mode"], facts["products"]) == (12, "presoftmax", {"train": 120, "valid": 40})
    assert facts["pairs"] == 3 * 120 - 2        # all but one that only withheld rules labelled and a contradiction
    folder = uninterrupted.path / "bt_bert"
    card = read_card(folder)
    assert card.names() == sorted(ACTIVE)
    assert set(card.calibration.thresholds) == set(ACTIVE)
    assert "120 products, 358 examples, 12 steps of 16" in (folder / "README.md").read_text()
    found = BtBertScorer(BtBertConfig(model=str(uninterrupted.path.parents[1]))).score(["a, s", None], ["gel", "gel"])
    assert found.shape == (2, 3)
    assert np.isfinite(found).all()


@pytest.mark.parametrize(("mode", "layout"), [("presoftmax", "paper"), ("presoftmax", "shared"), ("logodds", "paper"),
                                              ("affine16", "paper"), ("explicit", "paper")])
def test_every_mode_learns(labels: Path, model: Path, tmp_path: Path, mode: str, layout: str) -> None:
    settings = settings_of(labels, model, tmp_path / "model", mode=mode, layout=layout, max_steps=400, epochs=99,
                           evaluate_every=100, checkpoint_every=500, head_rate=5,
                           optim={"learning_rate": 4e-3, "betas": [0.9, 0.95]})
    facts = finetune_here(settings).manifest.facts
    assert facts["best_value"] > max(0.8, facts["base_value"] + 0.1)


def test_the_first_loss_is_that_of_the_prior(labels: Path, model: Path, tmp_path: Path) -> None:
    """Before it learns, an explicit model says the prior of each concern, whose loss is its entropy."""
    settings = settings_of(labels, model, tmp_path / "model", mode="explicit", max_steps=1,
                           sampler={"batch_size": 120})
    first = next(line["loss"] for line in curve(finetune_here(settings)) if "loss" in line)
    artifact = open_artifact(labels, "concern_labels")
    train = read_pairs(artifact, "train", concerns_of(artifact, None), 1.0)
    share = train.positive_share().astype(np.float64)
    entropy = -(share * np.log(share) + (1 - share) * np.log(1 - share))
    assert first == pytest.approx(float((entropy * train.weights.sum(axis=0)).sum()) / train.weights.size, rel=1e-4)


def test_a_killed_run_goes_on_and_ends_the_same(labels: Path, model: Path, tmp_path: Path, uninterrupted: Artifact
                                                ) -> None:
    settings = settings_of(labels, model, tmp_path / "model")
    script = ("import sys; from recsys_ray.training.bt_bert_run import finetune_here; "
              "from recsys_ray.training.bt_bert import FinetuneBtBertConfig; "
              "finetune_here(FinetuneBtBertConfig.model_validate_json(sys.argv[1]))")
    killed = subprocess.run([sys.executable, "-c", script, settings.model_dump_json()], cwd=REPO, timeout=240,
                            env={**os.environ, "RECSYS_CRASH_AT": "step_7"}, capture_output=True, text=True)
    assert killed.returncode != 0, killed.stderr[-2000:]
    assert_same_curve(curve(finetune_here(settings)), curve(uninterrupted))


def test_unlabelled_pairs_count_as_much_as_asked(labels: Path) -> None:
    artifact = open_artifact(labels, "concern_labels")
    concerns = concerns_of(artifact, ("ac", "re"))
    for weight in (1.0, 0.25, 0.0):
        train = read_pairs(artifact, "train", concerns, weight)
        assert train.weights[0].tolist() == [weight, 1.0]       # the first product's first label is null
        assert train.weights[1].tolist() == [1.0, 0.0]          # and one of the second is held out
    assert read_pairs(artifact, "train", concerns, None).weights[0].tolist() == [1.0, 1.0]     # as mode seed says
    assert read_pairs(artifact, "train", concerns, 1.0).weights[2].tolist() == [1.0, 0.0]       # rules contradicted
    with pytest.raises(ConfigError, match="no labels of dandruff; it has ac, ag, re"):
        concerns_of(artifact, ("dandruff",))


def test_a_concern_without_a_positive_is_refused(labels: Path, model: Path, tmp_path: Path) -> None:
    artifact = open_artifact(labels, "concern_labels")
    products, rows = artifact.table("products.parquet"), artifact.table("labels.parquet").to_pylist()
    with stage(tmp_path / "none", "concern_labels", "f") as staging:
        none = [{**row, "label": 0 if row["concern"] == "ag" else row["label"]} for row in rows]
        files = [staging.write_table("products.parquet", products),
                 staging.write_table("labels.parquet", pa.Table.from_pylist(none, CONCERN_LABEL))]
        staging.commit(files, config=Config(), facts=artifact.manifest.facts)
    with pytest.raises(ConfigError, match="no training product is labelled positive for ag"):
        finetune_here(settings_of(tmp_path / "none", model, tmp_path / "model"))


def test_a_table_of_labels_is_enough(model: Path, tmp_path: Path) -> None:
    products, labels = product_rows(60, "train")
    pa_csv.write_csv(pa.table({"sku": [row["product_id"] for row in products], "title": ["gel"] * 60,
                               "inci": [f"aqua, glycerin, {row['ingredients']}" for row in products]}),
                     tmp_path / "products.csv")
    words = {"ac": "acne", "re": "redness", "ag": "dandruff"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/concerns.yaml").write_text("concerns: {dandruff: {query: dandruff}}\n")
    known = [row for row in labels if row["label"] is not None]
    told = pa.table({"product_id": [row["product_id"] for row in known], "label": [row["label"] for row in known],
                     "concern": [words[row["concern"]] for row in known]})
    pa_csv.write_csv(told, tmp_path / "labels.csv")
    own = settings_of(tmp_path / "labels.csv", model, tmp_path / "model", max_steps=2, layout="seed")
    with pytest.raises(ConfigError, match=r"labels.products.path=FILE"):
        finetune_here(own)
    whole = own.replace(labels={
        "path": tmp_path / "labels.csv", "rules": ["packaged", str(tmp_path / "mine")],
        "products": {"path": str(tmp_path / "products.csv"), "columns": {"product_id": "sku", "ingredients": "inci"}}})
    facts = finetune_here(whole).manifest.facts
    assert sorted(one["name"] for one in facts["bt_bert"]["card"]["concerns"]) == ["acne", "dandruff", "redness"]
    assert facts["products"]["train"] > 30


def test_training_on_labels_of_ones_own_is_one_key() -> None:
    demo = REPO / "configs/finetune_bt_bert/demo.yaml"
    of_the_demo = load_config(FinetuneBtBertConfig, demo, ["labels.path=labels.csv"]).labels
    assert of_the_demo.products is not None
    assert of_the_demo.products.prepared == Path("runs/demo/prepared")
    own = load_config(FinetuneBtBertConfig, demo, ["labels.path=labels.csv", "labels.products={path: products.csv}"])
    assert own.labels.products is not None
    assert (own.labels.products.path, own.labels.products.prepared) == ("products.csv", None)


def pairs_of(targets: list[list[float]], weights: list[list[float]]) -> ConcernPairs:
    names = [str(number) for number in range(len(targets))]
    return ConcernPairs(names, [*names], names, np.array(targets, np.float32), np.array(weights, np.float32))


def test_weights_balance_the_classes_and_keep_their_sum() -> None:
    pairs = pairs_of([[1, 0], [0, 0], [0, 1], [0, 1]], [[1, 1], [1, 1], [1, 1], [1, 0]])
    found = class_weights(pairs)
    for column in range(2):
        positive = pairs.targets[:, column] > 0
        assert found[positive, column].sum() == pytest.approx(found[~positive, column].sum())
    assert found.sum() == pytest.approx(pairs.weights.sum())


def test_replay_keeps_a_share_of_the_known_concerns_pairs() -> None:
    pairs = pairs_of([[1, 0]] * 40, [[1, 1]] * 40)
    for share in (0.0, 0.25, 1.0):
        assert replayed(pairs, [True, False], share, 7).weights.sum(axis=0).tolist() == [40 * share, 40]
    assert len(units_of(replayed(pairs, [True, False], 0.25, 7).weights, whole=False)) == 50


@pytest.mark.parametrize("changes", [{}, {"body": {"lora": {"rank": 4}}}], ids=["whole", "lora"])
def test_a_new_concern_is_learned_by_a_model_that_knows_others(labels: Path, model: Path, tmp_path: Path,
                                                               changes: dict[str, Any]) -> None:
    old = finetune_here(settings_of(labels, model, tmp_path / "old", concerns=("ac", "re"), max_steps=100, epochs=90))
    both = finetune_here(settings_of(labels, tmp_path / "old", tmp_path / "both", max_steps=40, replay=0.5, **changes))
    assert old.manifest.facts["pairs"] == 238
    assert both.manifest.facts["pairs"] < 358 - 100
    assert read_card(both.path / "bt_bert").names() == ["ac", "ag", "re"]
    best = next(line for line in curve(old) if line["step"] == old.manifest.facts["best_step"] and "ap_ac" in line)
    assert curve(both)[0]["ap_ac"] == pytest.approx(best["ap_ac"], abs=1e-6)    # before its first step it knows them
    told = both.manifest.facts["old_and_new"]
    assert told["old"]["before"] == pytest.approx((best["ap_ac"] + best["ap_re"]) / 2, abs=1e-6)
    assert 0 < told["new"]["before"] <= 1
    assert "new ones: 0." in (both.path / "bt_bert/README.md").read_text() or told["new"]["before"] == 1
    assert old.manifest.facts["old_and_new"] == {}
    scorer = BtBertScorer(BtBertConfig(model=str(both.path / "bt_bert"), device="cpu", dtype="float32"))
    assert np.isfinite(scorer.score(["a, s"], ["gel"])).all()
    alone = finetune_here(settings_of(labels, tmp_path / "old", tmp_path / "alone", max_steps=2, replay=0.0, **changes))
    judged = [line for line in curve(alone) if "ap_ag" in line]
    assert judged
    assert all(line["macro_ap"] == line["ap_ag"] for line in judged)    # what is not learned has no say in the best


def test_calibration_finds_a_known_temperature_and_the_best_threshold() -> None:
    random = np.random.default_rng(0)
    truth = random.normal(size=(4000, 1)) * 2
    targets = (random.random((4000, 1)) < 1 / (1 + np.exp(-truth))).astype(np.float32)
    found = calibrate(["a"], 3 * truth, targets, np.ones_like(targets))
    assert found.temperature == pytest.approx(3, rel=0.1)
    # said yes to the best one: precision 1, recall 1/2, F1 2/3; to three: 2/3, 1, 4/5; to all four: 1/2, 1, 2/3
    assert best_threshold(np.array([0.9, 0.7, 0.5, 0.1]), np.array([1, 0, 1, 0])) == pytest.approx(0.3)
    few = calibrate(["a"], truth[:6], np.array([[1, 0, 0, 0, 0, 0]], np.float32).T, np.ones((6, 1), np.float32))
    assert few.thresholds == {}


def test_average_precision_is_left_out_where_there_is_none() -> None:
    found = average_precisions(np.array([[0.9, 1], [0.1, 1], [0.5, 1]]), np.array([[1, 0], [0, 0], [1, 0]]),
                               np.ones((3, 2), np.float32))
    assert found[0] == 1.0
    assert np.isnan(found[1])


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_two_workers_end_with_the_loss_curve_of_one(labels: Path, model: Path, tmp_path: Path, local_ray: object
                                                    ) -> None:
    settings = settings_of(labels, model, tmp_path / "model", layout="shared", ingredient_dropout=0.2)
    both = finetune_bt_bert(settings.replace(workers={"count": 2, "cpus": 0.5, "threads": 1}))
    ours, theirs = curve(both), curve(finetune_here(settings.replace(output=tmp_path / "alone")))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name in {"loss", "macro_ap"} & other.keys():
            assert mine[name] == pytest.approx(other[name], rel=2e-3)

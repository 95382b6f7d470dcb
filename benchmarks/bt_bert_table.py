"""The tables of `bt_bert.py`: every system on planted truth, low data, new concerns, withheld rules, explanations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_ray.artifacts import Artifact
from recsys_ray.data.concern_rulebook import Rulebook
from recsys_ray.data.concerns import Labeller
from recsys_ray.evaluation.concern_baselines import (
    Part,
    bag_of_ingredients,
    fuzzy_search,
    majority,
    planted_oracle,
    rules,
)
from recsys_ray.evaluation.concerns import (
    MACRO,
    ConcernScores,
    ConcernSheet,
    compare_macro,
    held_out_sheet,
    measure,
    sheet_of_labels,
    sheet_of_table,
)

OURS, EXPLICIT, SHOWN = "presoftmax", "explicit", ("AP", "AP lift", "ROC AUC", "F1", "MCC", "accuracy", "Brier", "ECE")
METHODS = ("occlusion", "attention", "chance")
Cells = Mapping[str, Mapping[str, Any]]


def summary(cells: Cells, annotated: Artifact, ruled: Artifact, truth: pa.Table, new_concerns: Sequence[str],
            book: Rulebook) -> tuple[dict[str, float], dict[str, Any]]:
    """(headline, tables) of all cells; `truth` is the shop's concerns.parquet."""
    names = list(cells[f"model/{OURS}/1"]["probabilities"])
    book = book.select(names)
    products = _split(annotated, "test")
    planted = truth.set_column(truth.column_names.index("label"), "label", pc.cast(truth["helps"], pa.int8()))
    sheet = sheet_of_table(products, planted, names)
    systems = _baselines(annotated, book, names, products) | {
        "planted oracle": planted_oracle(truth, sheet.product_ids, names)}
    trained = {name.removeprefix("model/"): scores_of(cell, sheet) for name, cell in cells.items()
               if name.startswith("model/")}
    rows = measure(sheet, systems | trained)
    macro = {(row["system"], row["metric"]): row for row in rows if row["concern"] == MACRO}
    headline, tables = _modes(macro, trained, sheet, systems["bag of ingredients"])
    tables["concerns"] = [row for row in rows if row["metric"] in SHOWN]
    for more in (_low(cells, macro, sheet), _new(cells, sheet, trained[f"{OURS}/1"], new_concerns),
                 _rules(cells, ruled, book), _explanations(cells), _robust(cells, sheet),
                 _speed(cells)):
        headline |= more[0]
        tables |= more[1]
    tables["cost"] = {"CPU seconds of all cells": round(sum(cell["cpu_seconds"] for cell in cells.values())),
                      "by cell": {name: round(cell["cpu_seconds"]) for name, cell in cells.items()}}
    lowest = min(min(some) for some in cells["model/literal_softmax16/1"]["probabilities"].values())
    return headline | {"literal_min_probability": lowest}, tables


def _split(labels: Artifact, split: str) -> pa.Table:
    products = labels.table("products.parquet")
    return products.filter(pc.equal(products["split"], split)).sort_by("product_id")


def scores_of(cell: Mapping[str, Any], sheet: ConcernSheet) -> ConcernScores:
    """A cell's probabilities for the products and concerns of `sheet`, decided at its own thresholds."""
    place = {name: number for number, name in enumerate(cell["product_ids"])}
    rows = [place[name] for name in sheet.product_ids]
    found = np.stack([np.array(cell["probabilities"][name])[rows] for name in sheet.concerns], axis=1)
    return ConcernScores(found, np.array([cell["thresholds"].get(name, 0.5) for name in sheet.concerns]))


def _baselines(labels: Artifact, book: Rulebook, names: Sequence[str], asked: pa.Table) -> dict[str, ConcernScores]:
    """What a model has to beat; of the rules those that were not withheld from the labels."""
    table = labels.table("labels.parquet")
    parts = {}
    for split in ("train", "valid"):
        products = _split(labels, split)
        parts[split] = Part(products, sheet_of_labels(products, table, names, labels.manifest.facts["mode"]))
    words = {name: (book.concerns[name].query, *book.concerns[name].paraphrases) for name in names}
    return {"majority": majority(parts["train"], asked), "fuzzy search": fuzzy_search(words, parts["valid"], asked),
            "rules": rules(Labeller(book), asked, labels.manifest.facts["withheld_rules"]),
            "bag of ingredients": bag_of_ingredients(parts["train"], parts["valid"], asked, book.synonyms)}


def _modes(macro: Mapping[Any, Any], trained: Mapping[str, ConcernScores], sheet: ConcernSheet, bag: ConcernScores
           ) -> tuple[dict[str, float], dict[str, Any]]:
    """Macro figures of every system, and the implicit model against the explicit one and the bag, seed by seed."""
    seeds = sorted(name.partition("/")[2] for name in trained if name.startswith(f"{OURS}/"))
    shared = [seed for seed in seeds if f"{EXPLICIT}/{seed}" in trained]
    against = {seed: compare_macro(sheet, trained[f"{OURS}/{seed}"], trained[f"{EXPLICIT}/{seed}"])["AP"]
               for seed in shared}
    over_bag = {seed: compare_macro(sheet, trained[f"{OURS}/{seed}"], bag)["AP"] for seed in seeds}
    mean = {row: float(np.mean([macro[f"{row}/{seed}", "AP"]["mean"] for seed in shared])) for row in (OURS, EXPLICIT)}
    f1 = float(np.mean([macro[f"{OURS}/{seed}", "F1"]["mean"] for seed in seeds]))
    headline = {
        "macro_ap_presoftmax": mean[OURS], "macro_ap_explicit": mean[EXPLICIT],
        "macro_ap_oracle": macro["planted oracle", "AP"]["mean"],
        "share_of_oracle": mean[OURS] / macro["planted oracle", "AP"]["mean"],
        "macro_ap_bag_of_ingredients": macro["bag of ingredients", "AP"]["mean"],
        "macro_ap_rules": macro["rules", "AP"]["mean"],
        "presoftmax_over_explicit_ci_low": min(one["low"] for one in against.values()),
        "presoftmax_over_bag_ci_low": min(one["low"] for one in over_bag.values()),
        "f1_over_fuzzy_points": 100 * (f1 - macro["fuzzy search", "F1"]["mean"])}
    table = [{"system": system, **{metric: macro[system, metric]["mean"] for metric in SHOWN},
              "AP low": macro[system, "AP"]["low"], "AP high": macro[system, "AP"]["high"]}
             for system in dict.fromkeys(name for name, _ in macro)]
    return headline, {"systems": table, "presoftmax against explicit, AP by seed": against,
                      "presoftmax against bag of ingredients, AP by seed": over_bag}


def _low(cells: Cells, macro: Mapping[Any, Any], sheet: ConcernSheet) -> tuple[dict[str, float], dict[str, Any]]:
    """Macro AP by the share of the products that was trained on."""
    found: dict[str, dict[str, float]] = {}
    for name, cell in cells.items():
        if name.startswith("low/"):
            _, row, share = name.split("/")
            one = measure(sheet, {name: scores_of(cell, sheet)})
            found.setdefault(row, {"1": macro[f"{row}/1", "AP"]["mean"]})[share] = next(
                line["mean"] for line in one if line["concern"] == MACRO and line["metric"] == "AP")
    shares = sorted(found[OURS], key=float, reverse=True)
    curve = [{"share": float(share), **{row: some.get(share) for row, some in found.items()}} for share in shares]
    return {"low_data_ap_drop": curve[0][OURS] - curve[-1][OURS]}, {"macro AP by share of products": curve}


def _new(cells: Cells, sheet: ConcernSheet, joint: ConcernScores, new: Sequence[str]
         ) -> tuple[dict[str, float], dict[str, Any]]:
    """AP of new and old concerns: trained jointly, before, after one epoch with replay, and without."""
    old = [name for name in sheet.concerns if name not in new]
    found: dict[str, dict[str, float]] = {}
    for part, names in (("new", list(new)), ("old", old)):
        columns = [sheet.concerns.index(name) for name in names]
        own = ConcernSheet(sheet.product_ids, sheet.group_ids, tuple(names), sheet.target[:, columns])
        systems = {"joint": ConcernScores(joint.probability[:, columns], joint.threshold[columns]),
                   "replay": scores_of(cells["new/replay"], own), "forget": scores_of(cells["new/forget"], own)}
        if part == "old":
            systems["before"] = scores_of(cells["new/base"], own)
        found[part] = {row["system"]: row["mean"] for row in measure(own, systems)
                       if row["concern"] == MACRO and row["metric"] == "AP"}
    return ({"new_concern_ap_gap": found["new"]["joint"] - found["new"]["replay"],
             "old_concern_ap_loss": found["old"]["before"] - found["old"]["replay"],
             "old_concern_ap_loss_without_replay": found["old"]["before"] - found["old"]["forget"]},
            {"macro AP of a new concern in one epoch": found})


def _rules(cells: Cells, labels: Artifact, book: Rulebook) -> tuple[dict[str, float], dict[str, Any]]:
    """AP lift on what withheld rules alone say."""
    mode, names = labels.manifest.facts["mode"], list(book.concerns)
    products, table = _split(labels, "test"), labels.table("labels.parquet")
    sheet = held_out_sheet(products, table, names, mode)
    trained = {name.split("/")[1]: scores_of(cell, sheet) for name, cell in cells.items() if name.startswith("rules/")}
    rows = measure(sheet, _baselines(labels, book, names, products) | trained)
    lift = {row["system"]: row for row in rows if row["concern"] == MACRO and row["metric"] == "AP lift"}
    return ({"rule_holdout_ap_lift": lift[OURS]["mean"], "rule_holdout_ap_lift_ci_low": lift[OURS]["low"],
             "rule_holdout_ap_lift_explicit": lift[EXPLICIT]["mean"],
             "rule_holdout_ap_lift_fuzzy": lift["fuzzy search"]["mean"],
             "rule_holdout_ap_lift_rules": lift["rules"]["mean"]},
            {"withheld rules": [row for row in rows if row["metric"] in ("AP", "AP lift")]})


def _explanations(cells: Cells) -> tuple[dict[str, float], dict[str, Any]]:
    """Precision and the areas of deletion and insertion of each way to explain, means over answers.

    precision@3 divides by min(3, actives), so that a product with one active can reach 1; `of three` divides by 3, and
    `of three, at best` is what a perfect explanation reaches there.
    """
    cell = next(cell for name, cell in cells.items() if name.startswith("why/"))
    found = {method: dict(zip(("precision@3", "of three", "deletion", "insertion"), np.nanmean(
        [one[method] for one in cell["answers"]], axis=0).round(4).tolist(), strict=True)) for method in METHODS}
    best, chance = found["occlusion"]["precision@3"], found["chance"]["precision@3"]
    return ({"explanation_precision3": best, "explanation_vs_random": best / max(chance, 1e-9)},
            {"explanations": {"answers": len(cell["answers"]), **found, "of three, at best": float(np.mean(
                [min(3, one["actives"]) / 3 for one in cell["answers"]]))}})


def _robust(cells: Cells, sheet: ConcernSheet) -> tuple[dict[str, float], dict[str, Any]]:
    """Macro AP when the input changes; a shuffled list is another product, since order says how much is in it."""
    cell = next(cell for name, cell in cells.items() if name.startswith("robust/"))
    kept = np.isin(sheet.product_ids, next(iter(cell["ways"].values()))["product_ids"])
    sheet = ConcernSheet(tuple(np.array(sheet.product_ids, dtype=object)[kept]), sheet.group_ids[kept], sheet.concerns,
                         sheet.target[kept])
    rows = measure(sheet, {way: scores_of(found, sheet) for way, found in cell["ways"].items()})
    return {}, {"changed inputs": {"products": len(sheet.product_ids), "paraphrases": cell["paraphrases"], "macro AP": {
        row["system"]: row["mean"] for row in rows if row["concern"] == MACRO and row["metric"] == "AP"}}}


def _speed(cells: Cells) -> tuple[dict[str, float], dict[str, Any]]:
    cell = next(cell for name, cell in cells.items() if name.startswith("speed/"))
    return ({"scoring_speed_ratio": cell["ratio_fp32"], "scoring_speed_ratio_bf16": cell["ratio_bf16"],
             "scoring_auc_difference": max(cell["auc_difference"].values())},
            {"scoring": {key: cell[key] for key in ("rounds", "pairs", "auc_difference", "pairs_per_cpu_second")}})

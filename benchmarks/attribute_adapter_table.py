"""The tables of `attribute_adapter.py`: gains over the frozen network by attribute and slice, gates and faults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys_ray.evaluation.significance import Comparison, Units, compare
from recsys_ray.evaluation.slice_gate import slice_gate
from recsys_ray.training.attribute_gate import SliceGateConfig

OURS, FROZEN = "ours", "frozen/0"
Cells = Mapping[str, Mapping[str, Any]]
Floats = npt.NDArray[np.float64]


def summary(cells: Cells, seeds: Sequence[int], weak: Sequence[str], rare: Sequence[str], gate: SliceGateConfig
            ) -> tuple[dict[str, float], dict[str, Any]]:
    """(headline, tables); gains are differences of shares of the first ten, means over seeds."""
    frozen, recipes = cells[FROZEN], list(dict.fromkeys(
        name.split("/")[0] for name in cells if name.split("/")[0] not in ("frozen", "faults")))
    units = Units.of(frozen["groups"])
    slices = _slices(frozen, weak, rare)
    gains = {row: {name: _gain(cells, row, seeds, attribute, mask, units) for name, (attribute, mask) in slices.items()}
             for row in recipes}
    ours, below = gains[OURS], {row: [_below(cells[f"{row}/{seed}"], frozen, slices, gate) for seed in seeds]
                                for row in recipes}
    faults = [cells[f"faults/{seed}"] for seed in seeds]
    caught = [one for cell in faults for one in cell["caught"].values()]
    headline = {
        "neckline10_gain": ours["neckline"].difference.mean, "neckline10_gain_ci_low": ours["neckline"].difference.low,
        "weak_class_gain_min": min(ours[f"category2={one}"].difference.mean for one in weak),
        "rare_material_gain_min": min(ours[f"material={one}"].difference.mean for one in rare),
        "slices_decidably_below_frozen": float(max(len(one["worse"]) for one in below[OURS])),
        "injected_collapse_caught": float(np.mean(caught)),
        "shuffled_metadata_caught": float(np.mean([cell["shuffled_metadata_caught"] for cell in faults])),
        "gate_passes_ours": float(np.mean([not cells[f"{OURS}/{seed}"]["refused"] for seed in seeds]))}
    for row in recipes:
        if row != OURS:
            headline |= {f"neckline10_gain_{row}": gains[row]["neckline"].difference.mean,
                         f"slices_below_frozen_{row}": float(max(len(one["worse"]) for one in below[row])),
                         f"gate_refuses_{row}": float(np.mean([cells[f"{row}/{seed}"]["refused"] for seed in seeds]))}
    tables = {
        "slices": [_line(name, slices, frozen, {row: gains[row][name] for row in recipes}) for name in slices],
        "chance": frozen["chance"], "declared slices beside the frozen network, planted truth": below,
        "gate, what words say": {name: cell["gate"] for name, cell in cells.items() if "gate" in cell},
        "faults": {name: {key: cell[key] for key in ("caught", "nothing_to_lose", "shuffled_metadata_caught")}
                   for name, cell in cells.items() if "caught" in cell},
        "texts finding pictures": {name: cell["text"] for name, cell in cells.items() if "text" in cell},
        "trainings": {name: cell["training"] for name, cell in cells.items() if "training" in cell}}
    return headline, tables


def hits(cell: Mapping[str, Any], attribute: str) -> Floats:
    """The share of the first ten with the query's value, (N,), NaN where it has none."""
    return np.array(cell["hits"][attribute], dtype=np.float64)


def _slices(frozen: Mapping[str, Any], weak: Sequence[str], rare: Sequence[str]
            ) -> dict[str, tuple[str, npt.NDArray[np.bool_]]]:
    """What is declared: every attribute, the weak classes and the rare materials."""
    count = len(frozen["groups"])
    found = {name: (name, np.ones(count, dtype=bool)) for name in frozen["hits"]}
    for attribute, values in (("category2", weak), ("material", rare)):
        planted = np.array(frozen["planted"][attribute], dtype=object)
        found |= {f"{attribute}={one}": (attribute, planted == one) for one in values}
    return found


def _below(cell: Mapping[str, Any], frozen: Mapping[str, Any],
           slices: Mapping[str, tuple[str, npt.NDArray[np.bool_]]], gate: SliceGateConfig) -> dict[str, Any]:
    """The declared slices beside the frozen network, by outcome."""
    names = list(frozen["hits"])
    values = {system: np.concatenate([hits(one, name) for name in names])
              for system, one in (("frozen", frozen), ("trained", cell))}
    masks = {}
    for name, (attribute, mask) in slices.items():
        masks[name] = np.zeros((len(names), len(mask)), dtype=bool)
        masks[name][names.index(attribute)] = mask
        masks[name] = masks[name].reshape(-1)
    groups = np.tile(np.array(frozen["groups"], dtype=object), len(names))
    found = slice_gate(values["frozen"], values["trained"], groups, masks, margin=gate.margin, min_units=gate.min_units,
                       alpha=gate.alpha)
    return {outcome: [one.slice for one in found if one.outcome == outcome]
            for outcome in ("worse", "undecidable", "kept", "improved")}


def _gain(cells: Cells, row: str, seeds: Sequence[int], attribute: str, mask: npt.NDArray[np.bool_], units: Units
          ) -> Comparison:
    trained = np.stack([hits(cells[f"{row}/{seed}"], attribute)[mask] for seed in seeds])
    return compare(trained, np.broadcast_to(hits(cells[FROZEN], attribute)[mask], trained.shape), units.take(mask))


def _line(name: str, slices: Mapping[str, tuple[str, npt.NDArray[np.bool_]]], frozen: Mapping[str, Any],
          gains: Mapping[str, Comparison]) -> dict[str, Any]:
    attribute, mask = slices[name]
    base = float(np.nanmean(hits(frozen, attribute)[mask]))
    return {"slice": name, "queries": next(iter(gains.values())).difference.rows, "frozen": base,
            **{row: base + one.difference.mean for row, one in gains.items()},
            **{f"{row} gain": [one.difference.mean, one.difference.low, one.difference.high]
               for row, one in gains.items()}}

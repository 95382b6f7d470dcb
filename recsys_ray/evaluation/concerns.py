"""How well probabilities of concerns fit labels: per concern and macro, with intervals over near-duplicate groups.

    ConcernSheet    what is right for P products and C concerns; NaN: not counted
    ConcernScores   what one system says, and from which probability it says yes

Average precision and its lift over prevalence come first: at a prevalence of a tenth, "no" to everything is 90 %
accurate. Point values are scikit-learn's; the bootstrap draws groups of products, all systems with the same draws.
A figure that is undefined, such as the AP of a concern without a positive, is None and never NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys_ray.data.concerns import Mode, targets
from recsys_ray.evaluation.metrics import average_precision, roc_auc
from recsys_ray.evaluation.significance import Resampling, Units

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
METRICS = {
    "AP": "average precision: precision at each positive's place in the order of probability, averaged",
    "AP lift": "AP divided by the prevalence, which is what any order by chance reaches",
    "ROC AUC": "chance that a positive has a higher probability than a negative, ties half",
    "precision": "share of positives among the products that get a yes",
    "recall": "share of the positives that get a yes",
    "F1": "harmonic mean of precision and recall",
    "MCC": "correlation of yes and no with the labels (Matthews); 0 for a constant answer",
    "accuracy": "share of right answers",
    "Brier": "mean squared distance of probability and label; lower is better",
    "ECE": "calibration error: distance of probability and share of positives over 10 bins, weighted; lower is better",
}
MACRO = "macro"
BINS = 10
DRAWS = Resampling(samples=1000)
CELLS = 1 << 22         # of one block of resampling weights


class ConcernMetricError(ValueError):
    """Labels and probabilities that do not belong together; the message names the concern or product."""


@dataclass(frozen=True)
class ConcernSheet:
    """What is right: P products, C concerns."""

    product_ids: tuple[str, ...]
    group_ids: Ints             # (P,): the units of every interval
    concerns: tuple[str, ...]
    target: Floats              # (P, C): 1, 0, or NaN = not counted

    def column(self, concern: int) -> tuple[Bools, Ints]:
        """(which products count, (P,); their labels)."""
        counted = np.isfinite(self.target[:, concern])
        return counted, self.target[counted, concern].astype(np.int64)


@dataclass(frozen=True)
class ConcernScores:
    """What one system says about the products of a sheet."""

    probability: Floats         # (P, C)
    threshold: Floats           # (C,): a yes from here on


def sheet_of_labels(products: pa.Table, labels: pa.Table, concerns: Sequence[str], mode: Mode) -> ConcernSheet:
    """The sheet of some products (CONCERN_PRODUCT) by their labels (CONCERN_LABEL, more may be in it)."""
    return _sheet(products, labels, targets(labels, mode), concerns)


def held_out_sheet(products: pa.Table, labels: pa.Table, concerns: Sequence[str], mode: Mode) -> ConcernSheet:
    """The sheet of what withheld rules alone say yes to, against the negatives; other positives are not counted."""
    target, held_out = targets(labels, mode), labels["held_out"].to_numpy(zero_copy_only=False).astype(bool)
    return _sheet(products, labels, np.where((target == 1) & ~held_out, np.nan, target), concerns)


def sheet_of_table(products: pa.Table, table: pa.Table, concerns: Sequence[str]) -> ConcernSheet:
    """The sheet of some products by a table of product_id, concern and label (1, 0 or null), planted or an expert's."""
    return _sheet(products, table, table["label"].cast(pa.float64()).to_numpy(zero_copy_only=False), concerns)


def _sheet(products: pa.Table, rows: pa.Table, target_N: npt.NDArray[Any], concerns: Sequence[str]) -> ConcernSheet:
    ids = products["product_id"].to_pylist()
    return ConcernSheet(tuple(ids), products["group_id"].to_numpy().astype(np.int64), tuple(concerns),
                        _matrix(ids, rows, target_N, concerns))


def scores_of_table(sheet: ConcernSheet, table: pa.Table, system: str) -> ConcernScores:
    """The scores of a table of product_id, concern, probability and, optionally, threshold (else one half).

    Errors: `ConcernMetricError` for a counted product without a probability, and one outside 0 to 1.
    """
    probability = _matrix(sheet.product_ids, table, table["probability"].cast(pa.float64()).to_numpy(
        zero_copy_only=False), sheet.concerns)
    threshold = np.full(len(sheet.concerns), 0.5)
    if "threshold" in table.column_names:
        pairs = zip(table["concern"].to_pylist(), table["threshold"].to_pylist(), strict=True)
        known = {concern: value for concern, value in pairs if value is not None}
        threshold = np.array([known.get(one, 0.5) for one in sheet.concerns])
    return checked(sheet, ConcernScores(probability, threshold), system)


def checked(sheet: ConcernSheet, scores: ConcernScores, system: str) -> ConcernScores:
    """`scores`; raises `ConcernMetricError` where a counted pair has no probability, or none between 0 and 1."""
    if scores.probability.shape != sheet.target.shape:
        raise ConcernMetricError(f"{system}: probabilities of shape {scores.probability.shape} for "
                                 f"{sheet.target.shape[0]} products and {sheet.target.shape[1]} concerns")
    counted = np.isfinite(sheet.target)
    bad = counted & ~((scores.probability >= 0) & (scores.probability <= 1))
    if bad.any():
        product, concern = np.argwhere(bad)[0]
        value = scores.probability[product, concern]
        raise ConcernMetricError(
            f"{system}: {'no probability' if np.isnan(value) else f'probability {value}'} for product "
            f"{sheet.product_ids[product]!r} and {sheet.concerns[concern]!r} ({int(bad.sum())} such pairs); every "
            "product of the sheet needs one between 0 and 1")
    return scores


def _matrix(ids: Sequence[str], rows: pa.Table, values: npt.NDArray[Any], concerns: Sequence[str]) -> Floats:
    """Values of (product_id, concern) rows as (P, C); NaN where there is no row."""
    at, column_of = {one: place for place, one in enumerate(ids)}, {one: place for place, one in enumerate(concerns)}
    matrix = np.full((len(ids), len(concerns)), np.nan)
    for product, concern, value in zip(rows["product_id"].to_pylist(), rows["concern"].to_pylist(), values.tolist(),
                                       strict=True):
        if product in at and concern in column_of:
            matrix[at[product], column_of[concern]] = value
    return matrix


# --- figures --------------------------------------------------------------------------------------
def measure(sheet: ConcernSheet, systems: Mapping[str, ConcernScores],
            config: Resampling = DRAWS) -> list[dict[str, Any]]:
    """One row per system, concern (and macro) and metric: mean, low, high (None: undefined), rows, positives, units.

    Macro is the mean over the concerns where the metric is defined; `concerns` says how many those are.
    """
    drawn = {name: _resampled(sheet, checked(sheet, scores, name), config) for name, scores in systems.items()}
    rows = []
    for name, scores in systems.items():
        points = _points(sheet, scores)
        for place, concern in enumerate(sheet.concerns):
            counted, label = sheet.column(place)
            facts = {"rows": int(counted.sum()), "positives": int(label.sum()), "concerns": 1,
                     "units": len(np.unique(sheet.group_ids[counted]))}
            for number, metric in enumerate(METRICS):
                rows.append({"system": name, "concern": concern, "metric": metric, **facts,
                             **_interval(points[place, number], drawn[name][:, place, number], config)})
        facts = {"rows": int(np.isfinite(sheet.target).sum()), "positives": int(np.nansum(sheet.target)),
                 "units": len(np.unique(sheet.group_ids))}
        for number, metric in enumerate(METRICS):
            rows.append({"system": name, "concern": MACRO, "metric": metric, **facts,
                         "concerns": int(np.isfinite(points[:, number]).sum()),
                         **_interval(_mean(points[:, number]), _mean(drawn[name][:, :, number]), config)})
    return rows


def compare_macro(sheet: ConcernSheet, candidate: ConcernScores, baseline: ConcernScores,
                  config: Resampling = DRAWS) -> dict[str, dict[str, float | None]]:
    """Per metric the macro difference, candidate minus baseline, with its interval: the draws are shared, so paired."""
    ours, theirs = (_resampled(sheet, scores, config) for scores in (candidate, baseline))
    points = _points(sheet, candidate) - _points(sheet, baseline)
    return {metric: _interval(_mean(points[:, number]), _mean(ours[:, :, number] - theirs[:, :, number]), config)
            for number, metric in enumerate(METRICS)}


def _mean(values: Floats) -> Any:
    """Mean over the last axis of what is defined; NaN where nothing is."""
    defined = np.isfinite(values)
    total = np.where(defined, values, 0.0).sum(axis=-1)
    count = defined.sum(axis=-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _interval(point: Any, drawn_B: Floats, config: Resampling) -> dict[str, float | None]:
    if not np.isfinite(point):
        return {"mean": None, "low": None, "high": None}
    tail = (1 - config.level) / 2
    low, high = np.nanquantile(drawn_B, [tail, 1 - tail])
    return {"mean": float(point), "low": float(low), "high": float(high)}


def _points(sheet: ConcernSheet, scores: ConcernScores) -> Floats:
    """(C, metrics) by scikit-learn; NaN where undefined."""
    from sklearn.metrics import accuracy_score, matthews_corrcoef, precision_recall_fscore_support

    points = np.full((len(sheet.concerns), len(METRICS)), np.nan)
    for place in range(len(sheet.concerns)):
        counted, label = sheet.column(place)
        if not len(label):
            continue
        probability = scores.probability[counted, place]
        said = (probability >= scores.threshold[place]).astype(np.int64)
        if 0 < label.sum() < len(label):
            points[place, 0] = average_precision(label, probability)
            points[place, 1] = points[place, 0] / label.mean()
            points[place, 2] = roc_auc(label, probability)
        if label.any():
            points[place, 3:6] = precision_recall_fscore_support(label, said, average="binary", zero_division=0)[:3]
            points[place, 6] = matthews_corrcoef(label, said)
        points[place, 7] = accuracy_score(label, said)
        points[place, 8] = float(((probability - label) ** 2).mean())
        points[place, 9] = calibration_error(label, probability)
    return points


def calibration_error(label: npt.NDArray[Any], probability: Floats) -> float:
    """Expected calibration error over 10 equal bins (Naeini, Cooper and Hauskrecht, AAAI 2015)."""
    return float(_calibration_errors(label.astype(np.float64), probability, np.ones((1, len(label))))[0])


def _calibration_errors(label: Floats, probability: Floats, weight_BN: Floats) -> Floats:
    bins = np.minimum((probability * BINS).astype(np.int64), BINS - 1)
    one_hot = (bins[:, None] == np.arange(BINS)).astype(np.float64)
    gap_BK = np.abs((weight_BN * (label - probability)) @ one_hot)
    return np.asarray(gap_BK.sum(axis=1) / np.maximum(weight_BN.sum(axis=1), 1e-12))


# --- bootstrap ------------------------------------------------------------------------------------
def _resampled(sheet: ConcernSheet, scores: ConcernScores, config: Resampling) -> Floats:
    """(samples, C, metrics) of resampled groups; a draw in which a figure is undefined has NaN there."""
    code = Units.of(sheet.group_ids).codes[0]
    units = int(code.max(initial=-1)) + 1
    rng = np.random.default_rng(config.seed)
    found = np.full((config.samples, len(sheet.concerns), len(METRICS)), np.nan)
    chunk = max(1, CELLS // max(1, len(code)))
    for first in range(0, config.samples, chunk):
        count = min(chunk, config.samples - first)
        drawn = rng.integers(0, max(1, units), size=(count, units)) + np.arange(count)[:, None] * units
        times = np.bincount(drawn.reshape(-1), minlength=count * units).reshape(count, units)
        weight_BP = times[:, code].astype(np.float64)
        for place in range(len(sheet.concerns)):
            counted, label = sheet.column(place)
            if len(label):
                found[first : first + count, place] = weighted_metrics(
                    label, scores.probability[counted, place], float(scores.threshold[place]), weight_BP[:, counted])
    return found


def weighted_metrics(label: Ints, probability: Floats, threshold: float, weight_BN: Floats) -> Floats:
    """All metrics under B weightings of N products at once, shape (B, metrics); NaN where undefined.

    Weight 2 is the product twice: the same numbers as scikit-learn's on repeated rows.
    """
    order = np.argsort(-probability, kind="stable")
    weight_BN, probability = weight_BN[:, order], probability[order]
    right: Floats = label[order].astype(np.float64)
    ends = np.flatnonzero(np.append(np.diff(probability) != 0, True))       # equal probabilities are one step
    with np.errstate(invalid="ignore", divide="ignore"):
        hits_BK = np.cumsum(weight_BN * right, axis=1)[:, ends]
        seen_BK = np.cumsum(weight_BN, axis=1)[:, ends]
        positives, total = hits_BK[:, -1], seen_BK[:, -1]
        recall_BK = hits_BK / positives[:, None]
        precision_BK = np.where(seen_BK > 0, hits_BK / seen_BK, 0.0)
        ap = (np.diff(recall_BK, axis=1, prepend=0.0) * precision_BK).sum(axis=1)
        false_BK = (seen_BK - hits_BK) / (total - positives)[:, None]
        before = np.concatenate([np.zeros((len(weight_BN), 1)), recall_BK[:, :-1]], axis=1)
        auc = (np.diff(false_BK, axis=1, prepend=0.0) * (recall_BK + before) / 2).sum(axis=1)
        both = (positives > 0) & (positives < total)
        said = (probability >= threshold).astype(np.float64)
        tp, yes = weight_BN @ (said * right), weight_BN @ said
        columns = [np.where(both, ap, np.nan), np.where(both, ap * total / positives, np.nan),
                   np.where(both, auc, np.nan), *_decisions(tp, yes, positives, total),
                   weight_BN @ ((probability - right) ** 2) / total,
                   np.where(total > 0, _calibration_errors(right, probability, weight_BN), np.nan)]
    return np.stack(columns, axis=1)


def _decisions(tp: Floats, yes: Floats, positives: Floats, total: Floats) -> list[Floats]:
    """Precision, recall, F1, MCC and accuracy of counts; the first four are NaN without a positive."""
    fp, fn = yes - tp, positives - tp
    tn = total - tp - fp - fn
    some = positives > 0
    precision = np.where(yes > 0, tp / np.maximum(yes, 1e-12), 0.0)
    recall = tp / np.maximum(positives, 1e-12)
    f1 = 2 * tp / np.maximum(yes + positives, 1e-12)
    spread = np.sqrt(yes * (total - yes) * positives * (total - positives))
    mcc = np.where(spread > 0, (tp * tn - fp * fn) / np.where(spread > 0, spread, 1.0), 0.0)
    return [*(np.where(some, one, np.nan) for one in (precision, recall, f1, mcc)), (tp + tn) / total]


def confusion(sheet: ConcernSheet, scores: ConcernScores) -> dict[str, dict[str, int]]:
    """Counts per concern: yes and right, yes and wrong, no and wrong, no and right."""
    found = {}
    for place, concern in enumerate(sheet.concerns):
        counted, label = sheet.column(place)
        said = scores.probability[counted, place] >= scores.threshold[place]
        found[concern] = {"true_yes": int((said & (label == 1)).sum()), "false_yes": int((said & (label == 0)).sum()),
                          "false_no": int((~said & (label == 1)).sum()), "true_no": int((~said & (label == 0)).sum())}
    return found

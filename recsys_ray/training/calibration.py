"""From logits to probabilities and decisions: a temperature, and one threshold a concern, found on validation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from recsys_ray.models.bt_bert import Calibration, probabilities

Floats = npt.NDArray[np.floating]
HIGHEST = 20.0      # temperature: what a model that knows nothing would want to be divided by
FEWEST = 5          # positives and negatives from which a threshold of one's own is worth more than one half


def calibrate(names: list[str], logits_PC: Floats, targets_PC: Floats, weights_PC: Floats) -> Calibration:
    """The temperature with the least cross-entropy (Guo et al., arXiv 1706.04599), and thresholds of best F1.

    Pairs of weight 0 are not looked at; a concern with fewer than 5 positives or negatives keeps one half.
    """
    seen = weights_PC > 0
    if not seen.any() or len(np.unique(targets_PC[seen])) < 2:
        return Calibration()
    temperature = _temperature(logits_PC[seen].astype(np.float64), targets_PC[seen], weights_PC[seen])
    found = probabilities(np.asarray(logits_PC), temperature)
    thresholds = {}
    for column, name in enumerate(names):
        own = seen[:, column]
        target = targets_PC[own, column]
        if min(target.sum(), len(target) - target.sum()) >= FEWEST:
            thresholds[name] = best_threshold(found[own, column], target)
    return Calibration(temperature=temperature, thresholds=thresholds)


def _temperature(logits: Floats, targets: Floats, weights: Floats) -> float:
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        return float((weights * (np.logaddexp(0, scaled) - targets * scaled)).sum() / weights.sum())

    found = minimize_scalar(loss, bounds=(-np.log(HIGHEST), np.log(HIGHEST)), method="bounded")
    return round(float(np.exp(found.x)), 6)


def best_threshold(probability: Floats, target: Floats) -> float:
    """The threshold with the best F1 when `probability >= threshold` means yes: midway between two neighbours."""
    order = np.argsort(-probability, kind="stable")
    ranked, hits = probability[order], np.cumsum(target[order])
    said = np.arange(1, len(ranked) + 1)
    f1 = 2 * hits / (said + target.sum())
    f1[:-1][ranked[:-1] == ranked[1:]] = -1.0       # equal probabilities are not divided
    last = int(np.argmax(f1))
    after = ranked[last + 1] if last + 1 < len(ranked) else 0.0
    return round(float((ranked[last] + after) / 2), 6)

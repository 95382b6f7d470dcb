"""The ranked lists of products that two scores recommend for a concern, side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from recsys_ray.evaluation.concerns import Bools, ConcernSheet, Floats, Ints


def ranked(score: Floats, k: int) -> Ints:
    """The places of the k highest of P scores, best first; products without a score (NaN) are never listed."""
    order = np.argsort(np.where(np.isfinite(score), -score, np.inf), kind="stable")
    return np.asarray(order[: min(k, int(np.isfinite(score).sum()))], dtype=np.int64)


def duplicate_rate(group_ids: Ints, listed: Ints) -> float | None:
    """The share of a list that shows a group (near-duplicates, one formula) that stands above it already."""
    return None if not len(listed) else 1 - len(np.unique(group_ids[listed])) / len(listed)


def compare_lists(sheet: ConcernSheet, ours: Floats, theirs: Floats, k: int,
                  names: tuple[str, str] = ("model", "rules")) -> list[dict[str, Any]]:
    """One row per concern: precision and duplicate rate of both lists of k products, and their overlap.

    `ours` and `theirs` are scores (P, C). Relevant is what the sheet says yes to (`held_out_sheet`: what withheld rules
    alone say); what it does not count is left out of both lists. `best` is the precision that a perfect list reaches.
    """
    rows = []
    for place, concern in enumerate(sheet.concerns):
        counted = np.isfinite(sheet.target[:, place])
        relevant: Bools = sheet.target[:, place] == 1
        lists = [ranked(np.where(counted, score[:, place], np.nan), k) for score in (ours, theirs)]
        length = min(k, int(counted.sum()))
        row: dict[str, Any] = {"concern": concern, "k": length, "relevant": int(relevant.sum()),
                               "best": min(1.0, int(relevant.sum()) / length) if length else None,
                               "overlap": _share(np.isin(lists[0], lists[1]))}
        for name, listed in zip(names, lists, strict=True):
            row[f"precision {name}"] = _share(relevant[listed])
            row[f"duplicates {name}"] = duplicate_rate(sheet.group_ids, listed)
        rows.append(row)
    return rows


def _share(flags: npt.NDArray[np.bool_]) -> float | None:
    return float(flags.mean()) if len(flags) else None

"""A gate over slices: no declared slice may be decidably below the frozen model.

Bounds hold for all slices at once: the largest absolute t over slices, of bootstrap draws of units, gives one critical
value (the "max-t" band; Montiel Olea and Plagborg-Moller, J. Appl. Econometrics 2019;34:1-17). A slice with too few
units, or whose bounds leave the question open, is undecidable: it is listed, never passed in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys_ray.data.attribute_schema import NAMES
from recsys_ray.data.attributes import value_of
from recsys_ray.evaluation.significance import Interval, Resampling, Units, mean_intervals, resampled_means

Floats = npt.NDArray[np.float64]
Masks = Mapping[str, npt.NDArray[np.bool_]]
Outcome = Literal["improved", "kept", "worse", "undecidable"]
DRAWS = Resampling(samples=1000)


class SliceError(ValueError):
    """A slice that there is not, or figures that do not belong together."""


@dataclass(frozen=True)
class SliceVerdict:
    """One slice: trained minus frozen, with bounds that hold for all slices at once."""

    slice: str
    rows: int                   # queries that are counted
    units: int
    frozen: float
    trained: float
    difference: float
    low: float
    high: float
    outcome: Outcome
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """As plain values for JSON; None for what is not defined."""
        return {name: None if isinstance(value, float) and not np.isfinite(value) else value
                for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Stacked:
    """Figures of several attributes below one another, so that slices of each are judged together."""

    values: dict[str, Floats]       # system -> (N,), or (seeds, N)
    units: npt.NDArray[Any]         # (N,)
    masks: Masks


def slice_gate(frozen: Floats, trained: Floats, units: Sequence[Any] | npt.NDArray[Any], slices: Masks, *,
               margin: float = 0.03, min_units: int = 30, alpha: float = 0.05, draws: Resampling = DRAWS
               ) -> list[SliceVerdict]:
    """The verdict on each slice of paired figures (N,), NaN where undefined; (seeds, N) for several trainings.

    `worse`: the whole interval lies below -margin. `kept`: it lies above -margin; `improved`: above 0. Everything else
    is `undecidable`, and so is a slice of fewer than `min_units` units, which does not widen the bounds of the others.
    """
    base, candidate = np.atleast_2d(np.asarray(frozen, np.float64)), np.atleast_2d(np.asarray(trained, np.float64))
    if base.shape[-1] != candidate.shape[-1] or base.shape[-1] != len(units):
        raise SliceError(f"figures of {base.shape[-1]} and {candidate.shape[-1]} rows for {len(units)} units")
    if not slices:
        raise SliceError("no slice is declared, so nothing would be judged")
    drawn = Units.of(units)
    difference = candidate - base                                       # (seeds, N)
    cube = np.stack([np.where(mask, difference, np.nan) for mask in slices.values()], axis=2)
    counts = [drawn.count(np.isfinite(cube[:, :, at]).any(axis=0)) for at in range(cube.shape[2])]
    large = np.array(counts) >= min_units
    bounds = _bounds(cube[:, :, large], drawn, alpha, draws) if large.any() else np.zeros((0, 3))
    verdicts = []
    at_large = iter(bounds)
    for at, (name, count) in enumerate(zip(slices, counts, strict=True)):
        mean, low, high = next(at_large) if large[at] else (_mean(cube[:, :, at]), np.nan, np.nan)
        counted = np.isfinite(cube[:, :, at])
        outcome, reason = _outcome(count, mean, low, high, margin, min_units)
        before, after = (_mean(np.where(counted, one, np.nan)) for one in (base, candidate))
        verdicts.append(SliceVerdict(name, int(counted.any(axis=0).sum()), count, before, after, float(mean),
                                     float(low), float(high), outcome, reason))
    return verdicts


def _mean(values: Floats) -> float:
    counted = values[np.isfinite(values)]
    return float(counted.mean()) if len(counted) else float("nan")


def _bounds(cube: Floats, units: Units, alpha: float, draws: Resampling) -> Floats:
    """(mean, low, high) of each slice, (S, 3), of differences (seeds, N, S)."""
    means = np.array([_mean(cube[:, :, at]) for at in range(cube.shape[2])])
    drawn_BS = resampled_means(cube, units, draws)
    error = np.nanstd(drawn_BS, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        t_BS = np.where(error > 0, np.abs(drawn_BS - means) / error, 0.0)
    critical = float(np.quantile(np.nanmax(t_BS, axis=1), 1 - alpha))
    return np.stack([means, means - critical * error, means + critical * error], axis=1)


def _outcome(units: int, mean: float, low: float, high: float, margin: float, min_units: int) -> tuple[Outcome, str]:
    if units < min_units:
        return "undecidable", f"{units} units, at least {min_units} are needed"
    figures = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}], {units} units"
    if high < -margin:
        return "worse", f"{figures}: below the margin of {margin:g}"
    if low > 0:
        return "improved", figures
    if low >= -margin:
        return "kept", figures
    return "undecidable", f"{figures}: a loss of more than {margin:g} is not ruled out"


# --- slices ---------------------------------------------------------------------------------------
def stack(figures: Mapping[str, Mapping[str, Floats]], rows: pa.Table, units: Sequence[Any] | npt.NDArray[Any],
          slices: Sequence[str] | None = None) -> Stacked:
    """The figures of each system (system -> attribute -> (N_q,) or (seeds, N_q)) as one column, with the slices' masks.

    A slice is "neckline" (neckline@10 of all queries), "material=denim" (material@10 of denim queries) or "neckline of
    category2=dress". None: each attribute, and each of its values that a query has. Errors: `SliceError` for a slice
    that no query is in.
    """
    names = list(next(iter(figures.values())))
    read = rows.to_pylist()
    values = {name: np.array([value_of(row, name) or "" for row in read], dtype=object)
              for name in NAMES}
    declared = list(slices) if slices is not None else _all_slices(names, values)
    masks: dict[str, npt.NDArray[np.bool_]] = {}
    for one in declared:
        attribute, mask = _slice(one, names, values)
        whole = np.zeros(len(names) * len(read), dtype=bool)
        first = names.index(attribute) * len(read)
        whole[first : first + len(read)] = mask
        masks[one] = whole
    stacked = {system: np.concatenate([np.asarray(own[name], np.float64) for name in names], axis=-1)
               for system, own in figures.items()}
    return Stacked(stacked, np.tile(np.asarray(units), len(names)), masks)


def _all_slices(names: Sequence[str], values: Mapping[str, npt.NDArray[Any]]) -> list[str]:
    told = [name for name in names if name in values]
    return [*names, *(f"{name}={value}" for name in told for value in sorted(set(values[name]) - {""}))]


def _slice(one: str, names: Sequence[str], values: Mapping[str, npt.NDArray[Any]]
           ) -> tuple[str, npt.NDArray[np.bool_]]:
    attribute, found, condition = one.partition(" of ")
    name, equals, value = (condition if found else one).partition("=")
    if not found:
        attribute = name
    if attribute not in names or (equals and name not in values) or (found and not equals):
        raise SliceError(f"slice {one!r}: a slice is an attribute ({', '.join(names)}), attribute=value, or "
                         "attribute of attribute=value")
    count = len(next(iter(values.values())))
    mask = values[name] == value if equals else np.ones(count, dtype=bool)
    if not mask.any():
        raise SliceError(f"slice {one!r}: no query has this value; {name} has "
                         f"{', '.join(sorted(set(values[name]) - {''}))}")
    return attribute, mask


# --- the scoreboard -------------------------------------------------------------------------------
@dataclass(frozen=True)
class Target:
    """A gain that was set as a goal, in the figure's own units."""

    slice: str
    gain: float


SOURCE_TARGETS = (      # of the attribute-aware source system, whose own run reached none of them
    Target("neckline", 0.05), Target("category2=cardigan", 0.10), Target("category2=shorts", 0.10),
    Target("material=denim", 0.10), Target("material=leather", 0.10),
)


def scoreboard(frozen: Mapping[str, Floats], trained: Mapping[str, Floats] | None, chance: Mapping[str, Floats],
               rows: pa.Table, units: Sequence[Any] | npt.NDArray[Any], slices: Sequence[str] | None = None, *,
               margin: float = 0.03, min_units: int = 30, alpha: float = 0.05,
               targets: Sequence[Target] = SOURCE_TARGETS, draws: Resampling = DRAWS) -> dict[str, Any]:
    """Chance, frozen and trained side by side with intervals for each slice, verdicts and targets, as plain values.

    rows: a row a slice with `chance`, `frozen` and `trained` (mean, low, high), `verdict` (None without `trained`).
    targets: slice, gain wanted, gain found, and "reached" or "missed" ("undecidable" with too few units, "not measured"
    without any). gate: worse, undecidable, passed.
    """
    systems = {"chance": chance, "frozen": frozen, **({"trained": trained} if trained is not None else {})}
    stacked = stack({name: {key: own[key] for key in frozen} for name, own in systems.items()}, rows, units, slices)
    drawn = Units.of(stacked.units)
    figures = {system: mean_intervals(_columns(values, stacked.masks), drawn, draws)
               for system, values in stacked.values.items()}
    verdicts = {} if trained is None else {one.slice: one for one in slice_gate(
        stacked.values["frozen"], stacked.values["trained"], stacked.units, stacked.masks, margin=margin,
        min_units=min_units, alpha=alpha, draws=draws)}
    table = [{"slice": name, "rows": figures["frozen"][at].rows, "units": figures["frozen"][at].units,
              **{system: _plain(own[at]) for system, own in figures.items()},
              "verdict": verdicts[name].as_dict() if name in verdicts else None}
             for at, name in enumerate(stacked.masks)]
    return {"rows": table, "targets": [_target(one, verdicts) for one in targets] if verdicts else [],
            "gate": gate_outcome(list(verdicts.values())) if verdicts else None,
            "margin": margin, "min_units": min_units, "alpha": alpha}


def _columns(values: Floats, masks: Masks) -> Floats:
    return np.stack([np.where(mask, np.atleast_2d(values), np.nan) for mask in masks.values()], axis=2)


def _plain(found: Interval) -> dict[str, float | None]:
    return {name: None if np.isnan(value) else float(value)
            for name, value in (("mean", found.mean), ("low", found.low), ("high", found.high))}


def gate_outcome(verdicts: Sequence[SliceVerdict]) -> dict[str, Any]:
    """{passed, worse, undecidable}: passed only where no slice is worse; the undecidable ones are named beside it."""
    worse = [one.slice for one in verdicts if one.outcome == "worse"]
    return {"passed": not worse, "worse": worse,
            "undecidable": [one.slice for one in verdicts if one.outcome == "undecidable"]}


def _target(target: Target, verdicts: Mapping[str, SliceVerdict]) -> dict[str, Any]:
    found = verdicts.get(target.slice)
    if found is None or not found.rows:
        return {"slice": target.slice, "wanted": target.gain, "gain": None, "outcome": "not measured"}
    outcome = "reached" if found.difference >= target.gain else "missed"
    return {"slice": target.slice, "wanted": target.gain, "gain": found.difference, "interval": found.reason,
            "outcome": outcome if np.isfinite(found.low) else "undecidable"}

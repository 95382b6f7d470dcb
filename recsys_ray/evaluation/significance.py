"""How sure a mean or a difference is: intervals, p-values and the smallest effect the data could show.

Values are per row (a query, a review, a photograph); NaN means the metric is undefined there. What is
resampled is the *unit* the rows came from, not the row: queries of a query set, near-duplicate groups
of products, senders of photographs, or two crossed units at once (the product and the user of a
review). Runs with several training seeds resample the seeds outermost.

All columns of one call share their draws, so differences between columns are paired by construction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
EXACT_UNITS = 12            # up to 4,096 sign patterns: enumerate them instead of drawing
CELLS_PER_CHUNK = 1 << 22   # floats of one block of resampling weights (32 MB)
TIE = 1e-9                  # a smaller difference between two metric values is rounding


class SignificanceError(ValueError):
    """Values and units that do not belong together."""


@dataclass(frozen=True)
class Resampling:
    """How intervals and p-values are drawn."""

    samples: int = 2000
    permutations: int = 10_000
    level: float = 0.95
    power: float = 0.8          # of the smallest detectable effect
    seed: int = 7


@dataclass(frozen=True)
class Interval:
    """A mean with its percentile-bootstrap interval; `rows` counted, from `units` independent units."""

    mean: float
    low: float
    high: float
    rows: int
    units: int


@dataclass(frozen=True)
class Comparison:
    """A candidate against a baseline on the same rows; differences are candidate minus baseline."""

    difference: Interval
    p_value: float              # sign-flip permutation test, two-sided
    detectable: float           # smallest true difference found with the wanted power
    wins: int
    ties: int
    losses: int
    worst_decile: float         # mean difference over the tenth of the rows where the candidate loses most

    def as_dict(self) -> dict[str, Any]:
        """The comparison as plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Units:
    """What the bootstrap resamples: one code per row and way; one way = cluster, two ways = crossed."""

    codes: tuple[Ints, ...]

    @classmethod
    def of(cls, *columns: Sequence[Any] | npt.NDArray[Any]) -> Units:
        """Units from one or two columns of ids, one id per row; equal ids are one unit."""
        if len(columns) not in (1, 2):
            raise SignificanceError(f"{len(columns)} columns of units; one or two can be resampled")
        codes = tuple(np.unique(np.asarray(column), return_inverse=True)[1].reshape(-1).astype(np.int64)
                      for column in columns)
        if len({len(code) for code in codes}) > 1:
            raise SignificanceError(f"columns of units of different length: {[len(code) for code in codes]}")
        return cls(codes)

    @classmethod
    def rows(cls, count: int) -> Units:
        """Every row a unit of its own."""
        return cls((np.arange(count),))

    def take(self, mask: npt.NDArray[np.bool_]) -> Units:
        """The units of the masked rows."""
        return Units.of(*(code[mask] for code in self.codes))

    def count(self, mask: npt.NDArray[np.bool_]) -> int:
        """Units among the masked rows; of crossed units, those of the way with fewer."""
        return min(len(np.unique(code[mask])) for code in self.codes)


def resampled_means(values: Floats, units: Units, config: Resampling) -> Floats:
    """Means of resampled data, shape (samples, M), of `values` (N,), (N, M) or (seeds, N, M).

    One way: units are drawn with replacement with all their rows. Two ways: both are drawn
    independently and a row counts as often as the product of its two draws (the pigeonhole
    bootstrap, Owen 2007, which errs on the wide side). Seeds are drawn outermost; all drawn seeds
    meet the same units, because all were tested on the same rows. A column without any defined
    value in a draw is NaN there.
    """
    values_SNM = _three_axes(values, units)
    counted_SNM = np.isfinite(values_SNM)
    filled_SNM = np.where(counted_SNM, values_SNM, 0.0)
    columns = np.concatenate([filled_SNM, counted_SNM.astype(np.float64)], axis=2)  # sums and counts in one product
    seeds, _, width = values_SNM.shape
    if len(units.codes) == 1:
        columns = np.stack([_by_unit(units.codes[0], columns[seed]) for seed in range(seeds)])
    rng = np.random.default_rng(config.seed)
    chunk = max(1, CELLS_PER_CHUNK // max(1, columns.shape[1]))
    means = np.empty((config.samples, width))
    for first in range(0, config.samples, chunk):
        count = min(chunk, config.samples - first)
        weight_BU = _draw_weights(rng, units, count)
        seed_BS = _multiplicities(rng, count, seeds) if seeds > 1 else np.ones((count, 1))
        totals = sum(seed_BS[:, [seed]] * (weight_BU @ columns[seed]) for seed in range(seeds))
        with np.errstate(invalid="ignore", divide="ignore"):
            means[first : first + count] = totals[:, :width] / totals[:, width:]
    return means


def _three_axes(values: Floats, units: Units) -> Floats:
    values = np.asarray(values, dtype=np.float64)
    values = values[None, :, None] if values.ndim == 1 else values[None] if values.ndim == 2 else values
    if values.ndim != 3 or values.shape[1] != len(units.codes[0]):
        raise SignificanceError(f"values of shape {values.shape} for {len(units.codes[0])} rows of units")
    return values


def _by_unit(code: Ints, rows_NM: Floats) -> Floats:
    """Sums over the rows of each unit, shape (U, M)."""
    order = np.argsort(code, kind="stable")
    starts = np.flatnonzero(np.diff(code[order], prepend=-1))
    return np.add.reduceat(rows_NM[order], starts, axis=0) if len(code) else rows_NM


def _multiplicities(rng: np.random.Generator, draws: int, units: int) -> Floats:
    """How often each unit comes up when `units` are drawn with replacement, shape (draws, units)."""
    drawn = rng.integers(0, max(1, units), size=(draws, units)) + np.arange(draws)[:, None] * units
    return np.bincount(drawn.reshape(-1), minlength=draws * units).reshape(draws, units).astype(np.float64)


def _draw_weights(rng: np.random.Generator, units: Units, draws: int) -> Floats:
    counts = [_multiplicities(rng, draws, int(code.max(initial=-1)) + 1) for code in units.codes]
    if len(counts) == 1:
        return counts[0]
    product: Floats = counts[0][:, units.codes[0]] * counts[1][:, units.codes[1]]
    return product


def mean_intervals(values_NM: Floats, units: Units, config: Resampling = Resampling()) -> list[Interval]:
    """One interval per column of (N, M) values (or of (seeds, N, M)); NaN rows are left out of mean and count."""
    cube = _three_axes(values_NM, units)
    means_BM = resampled_means(cube, units, config)
    return [_interval(cube[:, :, column], means_BM[:, column], units, config) for column in range(cube.shape[2])]


def _interval(values_SN: Floats, resampled: Floats, units: Units, config: Resampling) -> Interval:
    counted = np.isfinite(values_SN)
    rows: npt.NDArray[np.bool_] = np.any(counted, axis=0)
    if not rows.any():
        return Interval(float("nan"), float("nan"), float("nan"), 0, 0)
    tail = (1 - config.level) / 2
    low, high = np.nanquantile(resampled, [tail, 1 - tail])
    return Interval(float(values_SN[counted].mean()), float(low), float(high), int(rows.sum()), units.count(rows))


def compare(candidate: Floats, baseline: Floats, units: Units,
            config: Resampling = Resampling()) -> Comparison:
    """The paired comparison of two systems on the same rows: arrays (N,), or (seeds, N) for several trainings."""
    return compare_columns(np.atleast_2d(candidate)[:, :, None], np.atleast_2d(baseline)[:, :, None], units, config)[0]


def compare_columns(candidate: Floats, baseline: Floats, units: Units,
                    config: Resampling = Resampling()) -> list[Comparison]:
    """One comparison per column of (N, M) or (seeds, N, M) values: a column is a metric, the draws are shared.

    Rows where either is NaN are left out. With several seeds, wins, the permutation test and the
    worst decile look at the mean over the seeds.
    """
    difference_SNM = _three_axes(np.asarray(candidate, np.float64) - np.asarray(baseline, np.float64), units)
    means_BM = resampled_means(difference_SNM, units, config)
    row_NM = difference_SNM.mean(axis=0)
    p_values = sign_flip_p(row_NM, units, config)
    return [_comparison(_interval(difference_SNM[:, :, column], means_BM[:, column], units, config),
                        row_NM[:, column], float(p_values[column]), _detectable(means_BM[:, column], config))
            for column in range(row_NM.shape[1])]


def _comparison(interval: Interval, row_N: Floats, p_value: float, detectable: float) -> Comparison:
    wins, losses = int((row_N > TIE).sum()), int((row_N < -TIE).sum())
    ties = int(np.isfinite(row_N).sum()) - wins - losses
    return Comparison(interval, p_value, detectable, wins, ties, losses, worst_decile(row_N))


def _detectable(resampled: Floats, config: Resampling) -> float:
    """(z of the level + z of the power) standard errors: the usual formula for a two-sided test."""
    from scipy.stats import norm

    return float((norm.ppf((1 + config.level) / 2) + norm.ppf(config.power)) * np.nanstd(resampled))


def worst_decile(values: Floats) -> float:
    """Mean of the lowest tenth of the defined values (at least one value); NaN when there is none."""
    defined = np.sort(values[np.isfinite(values)])
    return float(defined[: max(1, -(-len(defined) // 10))].mean()) if len(defined) else float("nan")


def sign_flip_p(difference: Floats, units: Units, config: Resampling = Resampling()) -> Floats:
    """Two-sided p-values, shape (M,), of "no difference" when each unit's sign is flipped at random; (N,) or (N, M).

    Exact for up to 12 units, else (1 + as extreme) / (1 + permutations). Crossed units are flipped
    one way at a time and the larger p-value counts.
    """
    filled = np.nan_to_num(_three_axes(difference, units)[0])
    p_values = np.stack([_flip_one_way(_by_unit(code, filled), config) for code in units.codes])
    return np.asarray(p_values.max(axis=0))


def _flip_one_way(sums_UM: Floats, config: Resampling) -> Floats:
    units, width = sums_UM.shape
    total = sums_UM.sum(axis=0)
    observed = np.abs(total) * (1 - 1e-12)  # what equals it up to rounding counts as equally extreme
    if units <= EXACT_UNITS:
        patterns = (np.arange(1 << units)[:, None] >> np.arange(units)) & 1
        return np.asarray((np.abs(2 * (patterns @ sums_UM) - total) >= observed - TIE * 1e-3).mean(axis=0))
    rng = np.random.default_rng(config.seed)
    chunk = max(1, CELLS_PER_CHUNK // units)
    extreme = np.zeros(width)
    for first in range(0, config.permutations, chunk):
        count = min(chunk, config.permutations - first)
        drawn = rng.integers(0, 256, size=(count, -(-units // 8)), dtype=np.uint8)
        bits = np.unpackbits(drawn, axis=1, count=units).astype(np.float64)
        extreme += (np.abs(2 * (bits @ sums_UM) - total) >= observed - TIE * 1e-3).sum(axis=0)
    return np.asarray((1 + extreme) / (1 + config.permutations))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values (Holm 1979): step-down Bonferroni, valid under any dependence; keys stay as they are."""
    adjusted: dict[str, float] = {}
    floor = 0.0
    for position, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        floor = max(floor, min(1.0, (len(p_values) - position) * p))
        adjusted[name] = floor
    return {name: adjusted[name] for name in p_values}

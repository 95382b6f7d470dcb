"""The time split: train, valid and test reviews by timestamp, and the check that nothing leaks back.

Cut-offs are given (a paper's own) or found from a histogram of hours, which merges over any number of
files without holding the timestamps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Set

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, model_validator

from recsys_ray.config import Config

HOUR_MS = 3_600_000
SPLITS = ("train", "valid", "test")
Ints = npt.NDArray[np.int64]


class SplitConfig(Config):
    """Where train and valid end: absolute times, or shares of the reviews."""

    train_end_ms: int | None = None     # last millisecond of train
    valid_end_ms: int | None = None
    train_share: float = Field(default=0.8, gt=0, lt=1)
    valid_share: float = Field(default=0.1, gt=0, lt=1)

    @model_validator(mode="after")
    def _consistent(self) -> SplitConfig:
        if (self.train_end_ms is None) != (self.valid_end_ms is None):
            raise ValueError("give both train_end_ms and valid_end_ms, or neither")
        if self.train_end_ms is not None and self.valid_end_ms is not None and self.train_end_ms >= self.valid_end_ms:
            raise ValueError(f"train_end_ms {self.train_end_ms} is not before valid_end_ms {self.valid_end_ms}")
        if self.train_share + self.valid_share >= 1:
            raise ValueError("train_share and valid_share leave nothing for test")
        return self


class LeakError(ValueError):
    """Text, or a statistic, made from what must not be known yet."""


def hour_histogram(timestamps_ms: Ints) -> dict[int, int]:
    """Reviews per hour since 1970."""
    hours, counts = np.unique(timestamps_ms // HOUR_MS, return_counts=True)
    return dict(zip(hours.tolist(), counts.tolist(), strict=True))


def find_cuts(histograms: Iterable[Mapping[int, int]], config: SplitConfig) -> tuple[int, int] | None:
    """(last ms of train, last ms of valid): the given ones, or the ends of the hours in which the shares are reached.

    None when there are no reviews.
    """
    if config.train_end_ms is not None and config.valid_end_ms is not None:
        return config.train_end_ms, config.valid_end_ms
    total: Counter[int] = Counter()
    for histogram in histograms:
        total.update(histogram)
    if not total:
        return None
    hours = sorted(total)
    reached = np.cumsum([total[hour] for hour in hours]) / sum(total.values())
    ends = [hours[int(np.searchsorted(reached, share - 1e-12))]
            for share in (config.train_share, config.train_share + config.valid_share)]
    return (ends[0] + 1) * HOUR_MS - 1, (ends[1] + 1) * HOUR_MS - 1


def split_names(timestamps_ms: Ints, cuts: tuple[int, int]) -> pa.Array:
    """"train", "valid" or "test" for each timestamp."""
    codes = np.searchsorted(np.array(cuts), timestamps_ms, side="left")
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int8()), pa.array(SPLITS)).cast(pa.string())


def check_no_leak(fed_review_ids: Iterable[str], later_review_ids: Set[str], where: str) -> None:
    """Raise `LeakError` naming the first reviews of valid or test that have fed item text."""
    leaked = sorted(set(fed_review_ids) & later_review_ids)
    if leaked:
        raise LeakError(f"{where}: {len(leaked)} valid or test review(s) have fed item text, e.g. "
                        f"{', '.join(leaked[:3])}; item text may come from train reviews only")

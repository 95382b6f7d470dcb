"""Which pairs make a batch: a pure function of (seed, epoch, step), the same for any number of workers.

Nothing is remembered between steps, so a resumed run needs two numbers to go on exactly where it was.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt
from pydantic import Field

from recsys_ray.config import Config, ConfigError

Ints = npt.NDArray[np.int64]
WINDOWS_HELD = 2


class SamplerConfig(Config):
    """How pairs are put into batches."""

    batch_size: int = Field(default=128, ge=1)      # pairs of all workers together
    length_grouped: bool = False        # pairs of like length together; packed passes gain little by it
    distinct_groups: bool = True        # no two pairs of one near-duplicate group in a batch, as far as they go
    distinct_queries: bool = True       # and none with the same query
    window_batches: int = Field(default=32, ge=1)   # that are drawn up together: how far a pair may move


class BatchSampler:
    """The batches of every epoch over N pairs."""

    def __init__(self, config: SamplerConfig, seed: int, lengths: Ints, groups: Ints, queries: Ints) -> None:
        if len(lengths) < config.batch_size:
            raise ConfigError(f"sampler.batch_size: {config.batch_size} pairs make a batch, and there are only "
                              f"{len(lengths)} to train on")
        self.config, self.seed = config, seed
        self._lengths, self._groups, self._queries = lengths, groups, queries
        self._order: tuple[int, Ints] | None = None
        self._windows: OrderedDict[tuple[int, int], list[Ints]] = OrderedDict()

    @property
    def steps_per_epoch(self) -> int:
        """Full batches of an epoch; the pairs left over, others in each epoch, are not used in it."""
        return len(self._lengths) // self.config.batch_size

    def batch(self, step: int) -> Ints:
        """The numbers of the pairs of a step, (batch_size,), steps counted from 0 over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        window, inside = divmod(place, self.config.window_batches)
        return self._window(epoch, window)[inside]

    def share(self, step: int, rank: int, workers: int) -> Ints:
        """One worker's pairs of a step: as many as every other's, give or take one, and about as many tokens."""
        batch = self.batch(step)
        by_length = batch[np.argsort(-self._lengths[batch], kind="stable")]
        rows = np.arange(len(batch))
        turn, seat = np.divmod(rows, workers)
        seat = np.where(turn % 2, workers - 1 - seat, seat)     # there and back again, as teams are picked
        share: Ints = by_length[seat == rank]
        return share

    def _window(self, epoch: int, window: int) -> list[Ints]:
        key = (epoch, window)
        if key not in self._windows:
            self._windows[key] = self._draw(epoch, window)
            while len(self._windows) > WINDOWS_HELD:
                self._windows.popitem(last=False)
        return self._windows[key]

    def _draw(self, epoch: int, window: int) -> list[Ints]:
        if self._order is None or self._order[0] != epoch:
            shuffled = np.random.default_rng([self.seed, epoch]).permutation(len(self._lengths))
            self._order = epoch, shuffled[:self.steps_per_epoch * self.config.batch_size].astype(np.int64)
        size = self.config.batch_size
        pairs = self._order[1][window * self.config.window_batches * size:][:self.config.window_batches * size]
        if self.config.length_grouped:
            pairs = pairs[np.argsort(self._lengths[pairs], kind="stable")]
        keys = [column[pairs] for column, wanted in ((self._groups, self.config.distinct_groups),
                                                     (self._queries, self.config.distinct_queries)) if wanted]
        batches = [pairs[places] for places in spread(keys, len(pairs) // size, size)]
        order = np.random.default_rng([self.seed, epoch, window]).permutation(len(batches))
        return [batches[place] for place in order]


def spread(keys: list[Ints], batches: int, size: int) -> list[Ints]:
    """The places 0 to batches x size - 1 in batches where no key comes twice, as far as that goes.

    Places keep their order as nearly as they can: one that would repeat a key waits for the next batch.
    At the end, when only repetitions are left to choose from, they are taken.
    """
    waiting: list[int] = []
    coming, found = iter(range(batches * size)), []
    for _ in range(batches):
        seen: list[set[int]] = [set() for _ in keys]
        chosen: list[int] = []
        held: list[int] = []

        def take(place: int, seen: list[set[int]] = seen, chosen: list[int] = chosen, held: list[int] = held) -> None:
            values = [int(column[place]) for column in keys]
            if any(value in taken for value, taken in zip(values, seen, strict=True)):
                held.append(place)
                return
            for value, taken in zip(values, seen, strict=True):
                taken.add(value)
            chosen.append(place)

        for place in waiting:
            if len(chosen) < size:
                take(place)
            else:
                held.append(place)
        while len(chosen) < size and (following := next(coming, None)) is not None:
            take(following)
        missing = size - len(chosen)
        found.append(np.array(chosen + held[:missing], dtype=np.int64))
        waiting = held[missing:]
    return found

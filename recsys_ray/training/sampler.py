"""Which pairs make a batch: a pure function of (seed, epoch, step), the same for any number of workers.

Nothing is remembered between steps, so a resumed run needs two numbers to go on exactly where it was.
"""

from __future__ import annotations

from collections import Counter, OrderedDict

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
    min_information: float = Field(default=0.0, ge=0)   # queries that say less are left out: `query_information`


class BatchSampler:
    """The batches of every epoch over N pairs, or over those of them whose numbers are `only`."""

    def __init__(self, config: SamplerConfig, seed: int, lengths: Ints, groups: Ints, queries: Ints,
                 only: Ints | None = None) -> None:
        self._only = np.arange(len(lengths), dtype=np.int64) if only is None else only
        if len(self._only) < config.batch_size:
            raise ConfigError(f"sampler.batch_size: {config.batch_size} pairs make a batch, and there are only "
                              f"{len(self._only)} to train on, of {len(lengths)}")
        self.config, self.seed = config, seed
        self._lengths, self._groups, self._queries = lengths, groups, queries
        self._order: tuple[int, Ints] | None = None
        self._windows: OrderedDict[tuple[int, int], list[Ints]] = OrderedDict()

    @property
    def steps_per_epoch(self) -> int:
        """Full batches of an epoch; the pairs left over, others in each epoch, are not used in it."""
        return len(self._only) // self.config.batch_size

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
            shuffled = self._only[np.random.default_rng([self.seed, epoch]).permutation(len(self._only))]
            self._order = epoch, shuffled[:self.steps_per_epoch * self.config.batch_size]
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

    A place stays in the batch of its turn unless it repeats a key there; then it changes with one of the
    nearest batch where neither repeats any. A key that comes more often than there are batches repeats.
    """
    found = [list(range(batch * size, (batch + 1) * size)) for batch in range(batches)]
    values = [column.tolist() for column in keys]
    held = [[Counter(column[place] for place in batch) for column in values] for batch in found]
    for batch in range(batches):
        for seat in range(size):
            place = found[batch][seat]
            if any(counts[column[place]] > 1 for counts, column in zip(held[batch], values, strict=True)):
                _change(batch, seat, found, values, held)
    return [np.array(batch, dtype=np.int64) for batch in found]


def _change(batch: int, seat: int, found: list[list[int]], values: list[list[int]], held: list[list[Counter[int]]]
            ) -> None:
    """Exchange the place at a seat with one of another batch, if both then repeat nothing."""
    place = found[batch][seat]
    for other in sorted(range(len(found)), key=lambda one: abs(one - batch)):
        if other == batch or any(counts[column[place]] for counts, column in zip(held[other], values, strict=True)):
            continue
        for other_seat, candidate in enumerate(found[other]):
            if not any(counts[column[candidate]] for counts, column in zip(held[batch], values, strict=True)):
                found[batch][seat], found[other][other_seat] = candidate, place
                for here, there, column in zip(held[batch], held[other], values, strict=True):
                    here.subtract([column[place]])
                    here.update([column[candidate]])
                    there.subtract([column[candidate]])
                    there.update([column[place]])
                return

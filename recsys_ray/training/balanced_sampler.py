"""Which pairs make a batch when some kinds of things are to be seen more often than they occur, and others less.

A pair is drawn by the weight of its anchor: the product of the boosts of its values. No value with a cap takes more
than its share of a batch, and no group comes twice in one, as far as there are others. A batch is a function of
(seed, epoch, step), the same for any number of workers, so a resumed run goes on exactly where it was.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from recsys_ray.config import Config, ConfigError

log = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
KNOWN = "*"             # any value that is known
ROUNDS = 8              # of drawing before caps and groups give way

Shares = dict[str, dict[str, float]]    # attribute -> value -> number


class BalancedConfig(Config):
    """How pairs are drawn."""

    batch_size: int = Field(default=64, ge=1)       # pairs of all workers together
    negatives: int = Field(default=2, ge=0)         # known ones of each anchor in a step, as columns of their own
    # how many times as often an anchor with the value is drawn; "*": any known value
    boosts: Shares = Field(default_factory=dict)
    caps: Shares = Field(default_factory=dict)      # largest share of a batch whose anchors have the value
    distinct_groups: bool = True

    @model_validator(mode="after")
    def _numbers(self) -> BalancedConfig:
        for name, most in (("boosts", 1000.0), ("caps", 1.0)):
            for attribute, values in getattr(self, name).items():
                for value, number in values.items():
                    if not 0 < number <= most:
                        raise ValueError(f"{name}.{attribute}.{value}: {number:g} is not above 0 and up to {most:g}")
        return self


def pair_weights(boosts: Mapping[str, Mapping[str, float]], values: Mapping[str, Sequence[str]], codes_PA: Ints
                 ) -> Floats:
    """How often each pair is drawn, relatively, (P,), by the codes of its anchor.

    `values` are the values of each attribute by their code. Errors: `ConfigError` for an attribute that is not known;
    a value that no anchor has is told in the log.
    """
    found = np.ones(len(codes_PA))
    for attribute, factors in boosts.items():
        for value, factor in factors.items():
            found[_having(attribute, value, values, codes_PA)] *= factor
    return found


def _having(attribute: str, value: str, values: Mapping[str, Sequence[str]], codes_PA: Ints) -> npt.NDArray[np.bool_]:
    if attribute not in values:
        raise ConfigError(f"sampler: {attribute!r} is no attribute; there are {', '.join(values)}")
    codes = codes_PA[:, list(values).index(attribute)]
    if value == KNOWN:
        return np.asarray(codes >= 0)
    if value not in values[attribute]:
        log.warning("sampler: no picture has %s %s; there are %s", attribute, value, ", ".join(values[attribute]))
        return np.zeros(len(codes), dtype=bool)
    return np.asarray(codes == list(values[attribute]).index(value))


class BalancedSampler:
    """The batches of every epoch over P pairs, by the attributes and groups of their anchors."""

    def __init__(self, config: BalancedConfig, seed: int, values: Mapping[str, Sequence[str]], codes_PA: Ints,
                 groups_P: Ints) -> None:
        if len(codes_PA) < config.batch_size:
            raise ConfigError(f"sampler.batch_size: {config.batch_size} pairs make a batch, and there are only "
                              f"{len(codes_PA)} to train on")
        self.config, self.seed = config, seed
        self._groups, self._count = groups_P, len(codes_PA)
        weights = pair_weights(config.boosts, values, codes_PA)
        self._cumulative = np.cumsum(weights) / weights.sum()
        self._watched = {f"{attribute}={value}": _having(attribute, value, values, codes_PA)
                         for shares in (config.boosts, config.caps) for attribute, of in shares.items() for value in of}
        self._capped = [(self._watched[f"{attribute}={value}"], int(share * config.batch_size))
                        for attribute, of in config.caps.items() for value, share in of.items()]

    @property
    def steps_per_epoch(self) -> int:
        """As many batches as hold every pair once on average."""
        return self._count // self.config.batch_size

    def batch(self, step: int) -> Ints:
        """The numbers of the pairs of a step, (batch_size,), steps counted from 0 over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        random = np.random.default_rng([self.seed, epoch, place])
        size, taken, groups = self.config.batch_size, dict[int, None](), set[int]()
        room = [most for _, most in self._capped]
        for turn in range(ROUNDS):
            for pair in np.searchsorted(self._cumulative, random.random(4 * size), side="right").tolist():
                if len(taken) == size:
                    break
                held = [number for number, (has, _) in enumerate(self._capped) if has[pair]]
                group = int(self._groups[pair])
                if pair in taken or (turn < ROUNDS // 2 and self.config.distinct_groups and group in groups) or any(
                        not room[number] for number in held):
                    continue
                taken[pair] = None
                groups.add(group)
                for number in held:
                    room[number] -= 1
        if len(taken) < size:       # caps and weights leave too few: whatever is there
            rest = np.setdiff1d(np.arange(self._count), np.array([*taken], dtype=np.int64))
            taken |= dict.fromkeys(random.permutation(rest)[:size - len(taken)].tolist())
        return np.array([*taken], dtype=np.int64)

    def shares(self, batch: Ints) -> dict[str, float]:
        """The share of a batch that has each value with a boost or a cap."""
        return {f"share {name}": float(has[batch].mean()) for name, has in self._watched.items()}

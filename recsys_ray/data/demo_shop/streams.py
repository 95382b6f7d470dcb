"""Random numbers by address: (seed, stream, row, column) gives the same bits whatever was drawn before.

The mixing function is splitmix64 (Steele, Lea, Flood 2014), applied to a counter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
T = TypeVar("T")

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ID_BITS = 41               # 2^41 < 36^8: the ids that fit into eight characters
_ID_MASK = np.uint64((1 << _ID_BITS) - 1)
_BASE36 = np.frombuffer(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", dtype=np.uint8)


def stream_key(seed: int, stream: str) -> int:
    """64 bits that name a stream of a shop."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest(), "little")


def bits(seed: int, stream: str, rows: npt.ArrayLike, width: int) -> Words:
    """Random uint64, shape (len(rows), width); row r always gets the same ones."""
    columns: Words = np.arange(width, dtype=np.uint64)
    counter: Words = np.asarray(rows, dtype=np.uint64)[:, None] * np.uint64(width) + columns
    return _mix(_mix(counter) + np.uint64(stream_key(seed, stream)))


def uniforms(seed: int, stream: str, rows: npt.ArrayLike, width: int) -> Floats:
    """Uniform numbers in (0, 1), shape (len(rows), width)."""
    return ((bits(seed, stream, rows, width) >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53


def _mix(value: Words) -> Words:
    value = value + _GOLDEN
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def shop_ids(seed: int, numbers: npt.ArrayLike) -> list[str]:
    """Ten characters that look random, e.g. `B0K3W81QZ7`, one for each number below 2^41, never two alike."""
    value = np.asarray(numbers, np.uint64)
    for turn in range(3):       # each step can be undone, so different numbers stay different
        key = np.uint64(stream_key(seed, f"ids/{turn}"))
        value = (value * (key | np.uint64(1)) + (key >> np.uint64(7))) & _ID_MASK
        value = value ^ (value >> np.uint64(21))
    places = np.uint64(36) ** np.arange(7, -1, -1, dtype=np.uint64)
    letters = _BASE36[((value[:, None] // places) % np.uint64(36)).astype(np.intp)]
    return ["B0" + row.tobytes().decode() for row in letters]


def user_ids(seed: int, numbers: npt.ArrayLike) -> list[str]:
    """28 characters like those of Amazon Reviews 2023, e.g. `AEYORY2AVPMCPDV57CE337YU5LXA`."""
    letters = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", dtype=np.uint8)
    drawn = bits(seed, "user ids", numbers, 3)      # nine letters from each 64 bits
    picked = [(drawn[:, word] >> np.uint64(5 * place)) & np.uint64(31) for word in range(3) for place in range(9)]
    return ["A" + row.tobytes().decode() for row in letters[np.stack(picked, axis=1).astype(np.intp)]]


def permuted(seed: int, stream: str, numbers: npt.ArrayLike, size: int) -> Integers:
    """A fixed random permutation of 0 to `size` - 1 at `numbers`, without storing it (cycle-walking Feistel net)."""
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    value = np.asarray(numbers, np.uint64).copy()
    pending = np.ones(len(value), bool)
    while pending.any():
        value[pending] = _feistel(value[pending], np.uint64(half), seed, stream)
        pending = value >= np.uint64(size)
    return value.astype(np.int64)


def _feistel(value: Words, half: np.uint64, seed: int, stream: str) -> Words:
    mask = np.uint64((1 << int(half)) - 1)
    left, right = value >> half, value & mask
    for turn in range(4):
        key = np.uint64(stream_key(seed, f"{stream}/{turn}"))
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << half) | right


class Dice:
    """The random numbers of one row, handed out one by one while its text is written."""

    __slots__ = ("_at", "_numbers")

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = numbers     # at least 16 bits used of each
        self._at = 0

    def _next(self) -> int:
        at = self._at
        self._at = at + 1
        size = len(self._numbers)
        number = self._numbers[at % size]
        return number if at < size else (number >> (at // size)) * 2654435761 % 4294967291

    def pick(self, choices: Sequence[T]) -> T:
        """One of the choices, each as likely."""
        return choices[self._next() % len(choices)]

    def chance(self, probability: float) -> bool:
        """True this often."""
        return self._next() % 1_048_576 < probability * 1_048_576

    def below(self, size: int) -> int:
        """A whole number from 0 to `size` - 1."""
        return self._next() % size

    def mostly_first(self, choices: Sequence[T]) -> T:
        """The first choice about half of the time, else one of the others."""
        return choices[0] if len(choices) == 1 or self.chance(0.45) else choices[1 + self._next() % (len(choices) - 1)]


def dice(seed: int, stream: str, rows: npt.ArrayLike, width: int = 48) -> list[Dice]:
    """Dice for each row."""
    numbers = (bits(seed, stream, rows, width) >> np.uint64(16)).tolist()
    return [Dice(row) for row in numbers]


def weighted(cumulative: Floats, uniform: Floats) -> Integers:
    """Positions drawn in proportion to weights, given their running sum, for uniform numbers of any shape."""
    places = np.searchsorted(cumulative, uniform * cumulative[-1], side="right")
    return np.asarray(np.minimum(places, len(cumulative) - 1), np.int64)


def shares(weights: Mapping[str, float]) -> Floats:
    """The running sum of weights, for `weighted`."""
    return np.cumsum(np.array(list(weights.values()), np.float64))

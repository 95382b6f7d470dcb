"""Text and picture of a product as one vector, in which the weights are those of the two similarities.

Each half is brought to unit length and multiplied by the square root of its weight, and the halves stand side by side.
So the inner product of two such vectors is

    alpha * cosine of the texts + beta * cosine of the pictures + gamma * (category and behaviour alike)

exactly, whatever the dimensions of the halves: no half is padded, cut or averaged with another. A half can be centred:
the mean of the catalogue's unit vectors is taken away, and what is left is brought to unit length again. Features of
convolutional networks are all positive, so without it every pair of pictures is alike and the weight of the picture
buys little. Texts of a text tower lie elsewhere than pictures do: they ask for plain cosines, of a half not centred.

What is not there is zero: a product without a picture is neither near to nor far from any picture, since 0 is the
cosine of unrelated vectors, the average once a half is centred. A query without a half leaves that half out for every
product, so its order is that of the other halves alone.

An index holds the products' vectors under one set of weights and can be asked under another: a query's part is
multiplied by w' / sqrt(w) instead of sqrt(w), which makes w' the weight of the similarity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from recsys_ray.config import Config

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Name = Literal["text", "image", "category", "behaviour"]

NAMES: tuple[Name, ...] = ("text", "image", "category", "behaviour")
SMALLEST = 1e-6             # a shorter vector has no direction
RIDGES = (0.1, 1.0, 10.0, 100.0)
HELD_OUT = 5                # every fifth product judges the ridge


class HybridError(ValueError):
    """Halves, weights or queries that do not go together; the message names the half and the mend."""


class Weights(Config):
    """What each similarity counts; alpha is `text`, beta `image`, gamma the other two."""

    text: float = Field(default=0.7, ge=0)
    image: float = Field(default=0.3, ge=0)
    category: float = Field(default=0.0, ge=0)
    behaviour: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _one_counts(self) -> Self:
        if not any(self.of(name) for name in NAMES):
            raise ValueError("every weight is 0; at least one half has to count")
        return self

    def of(self, name: Name) -> float:
        """The weight of one half."""
        return float(getattr(self, name))


@dataclass(frozen=True)
class Half:
    """Unit vectors (N, D) of one kind, and which of the N rows have one; an unknown row may hold anything."""

    vectors: Floats
    known: Mask

    @classmethod
    def of(cls, vectors: npt.NDArray[np.floating[Any]]) -> Half:
        """The vectors at unit length; known but for those without a direction or with a value that is not finite."""
        vectors = np.asarray(vectors, dtype=np.float32)
        lengths = np.linalg.norm(vectors, axis=1)
        known = np.isfinite(lengths) & (lengths > SMALLEST)
        unit = np.where(known[:, None], vectors / np.where(known, lengths, 1)[:, None], 0)
        return cls(unit.astype(np.float32), known)

    @classmethod
    def missing(cls, rows: int, dimension: int) -> Half:
        """No row known."""
        return cls(np.zeros((rows, dimension), np.float32), np.zeros(rows, bool))


@dataclass(frozen=True)
class Part:
    """One half of the hybrid vectors of an index."""

    name: Name
    weight: float
    dimension: int
    mean: Floats | None     # (D,), taken away before the vector is brought to unit length; None: not centred

    def directions(self, half: Half) -> Half:
        """Unit vectors (N, D) of a half, zero where it is unknown; `HybridError` for another dimension."""
        if half.vectors.shape[1] != self.dimension:
            raise HybridError(f"{self.name}: vectors of {half.vectors.shape[1]} dimensions where the index has "
                              f"{self.dimension}; use the encoder that it was built with")
        return _centred(half, self.mean)


def _centred(half: Half, mean: Floats | None) -> Half:
    """Unit vectors of what is left when the mean is taken away, zero where nothing is known."""
    moved = half.vectors if mean is None else half.vectors - mean
    lengths = np.linalg.norm(moved, axis=1, keepdims=True)
    known = half.known & (lengths[:, 0] > SMALLEST) & np.isfinite(lengths[:, 0])
    unit = np.where(known[:, None], moved / np.where(lengths > SMALLEST, lengths, 1), 0)
    return Half(unit.astype(np.float32), known)


@dataclass(frozen=True)
class HybridSpace:
    """How halves become vectors: the parts side by side."""

    parts: tuple[Part, ...]

    def part(self, name: Name) -> Part | None:
        """One part, or None when the index has none of that name."""
        return next((part for part in self.parts if part.name == name), None)

    def directions(self, halves: Mapping[Name, Half]) -> dict[Name, Half]:
        """Unit vectors of every part, shape (N, D_part); a half that is not given is unknown for every row."""
        rows = {len(half.vectors) for half in halves.values()}
        if len(rows) != 1:
            raise HybridError(f"halves of {sorted(rows)} rows; each needs one for every product or query")
        count = rows.pop()
        return {part.name: part.directions(halves[part.name]) if part.name in halves
                else Half.missing(count, part.dimension) for part in self.parts}

    def items(self, directions: Mapping[Name, Half]) -> Floats:
        """Vectors (N, D) of products: sqrt(weight) times each direction, 0 where it is not known."""
        return np.concatenate([directions[part.name].vectors * np.float32(part.weight ** 0.5) for part in self.parts],
                              axis=1)

    def questions(self, directions: Mapping[Name, Half], weights: Weights | None = None) -> Floats:
        """Vectors (Q, D) of queries, for inner products with `items`; `weights` in place of the index's own.

        Errors: `HybridError` when a similarity shall count that has no weight in the index.
        """
        if weights is None:
            return self.items(directions)
        for name in NAMES:
            if weights.of(name) and self.part(name) is None:
                raise HybridError(f"{name}: has no weight in the index, so a query cannot give it {weights.of(name):g};"
                                  f" build the index with weights.{name} above 0")
        return np.concatenate([directions[part.name].vectors * np.float32(weights.of(part.name) / part.weight ** 0.5)
                               for part in self.parts], axis=1)

    def split(self, vectors: Floats) -> dict[Name, Half]:
        """The directions (N, D_part) that `items` put together."""
        ends = np.cumsum([part.dimension for part in self.parts])[:-1]
        return {part.name: Half.of(found / np.float32(part.weight ** 0.5))
                for part, found in zip(self.parts, np.split(vectors, ends, axis=1), strict=True)}


def fit_space(halves: Mapping[Name, Half], weights: Weights, centred: Sequence[Name] = ("image",)) -> HybridSpace:
    """The space of a catalogue's halves: those with a weight, each with the mean of its known rows if it is centred.

    Errors: `HybridError` when a half that has a weight is not there or known of no product.
    """
    parts = []
    for name in NAMES:
        if not weights.of(name):
            continue
        if name not in halves or not halves[name].known.any():
            raise HybridError(f"weights.{name} is {weights.of(name):g}, but no product has a {name} vector; give the "
                              "artefact that holds them, or the weight 0")
        half = halves[name]
        mean = half.vectors[half.known].mean(axis=0, dtype=np.float64).astype(np.float32) if name in centred else None
        parts.append(Part(name, weights.of(name), half.vectors.shape[1], mean))
    return HybridSpace(tuple(parts))


# --- from one half to the other -------------------------------------------------------------------
@dataclass(frozen=True)
class Projection:
    """A linear guess of one half's direction from another's, learned from products that have both.

    Both are centred for it, whether the index centres them or not: uncentred, the guess would be the catalogue's mean
    and little else, and tell no product from another.
    """

    matrix: Floats      # (source dimension + 1, target dimension); the last row is the intercept
    mean: Floats        # of the source's unit vectors
    ridge: float
    held_out_cosine: float      # between guess and truth, both centred, of products that were not learned from

    def guess(self, source: Half) -> Half:
        """Unit vectors of the target half; unknown where the source is."""
        centred = _centred(source, self.mean)
        found = centred.vectors @ self.matrix[:-1] + self.matrix[-1]
        lengths = np.linalg.norm(found, axis=1, keepdims=True)
        return Half(np.where(centred.known[:, None], found / np.maximum(lengths, SMALLEST), 0).astype(np.float32),
                    centred.known)


def fit_projection(source: Half, target: Half, ridges: Sequence[float] = RIDGES) -> Projection:
    """Ridge regression of the target on the source, halves of the same products; the ridge that guesses best.

    It is judged on held-out products. Errors: `HybridError` for too few products with both.
    """
    both = np.flatnonzero(source.known & target.known)
    if len(both) < 4 * HELD_OUT:
        raise HybridError(f"{len(both)} products have both halves; {4 * HELD_OUT} are needed to learn one from the "
                          "other")
    means = [half.vectors[both].mean(axis=0, dtype=np.float64).astype(np.float32) for half in (source, target)]
    x, y = (_centred(half, mean).vectors for half, mean in zip((source, target), means, strict=True))
    judged = np.arange(len(both)) % HELD_OUT == 0
    learned, held = both[~judged], both[judged]
    cosines = []
    for ridge in ridges:
        found = Projection(_ridge(x[learned], y[learned], ridge), means[0], ridge, 0.0).guess(
            Half(source.vectors[held], np.ones(len(held), bool)))
        cosines.append(float((found.vectors * y[held]).sum(axis=1).mean()))
    best = int(np.argmax(cosines))
    return Projection(_ridge(x[both], y[both], ridges[best]), means[0], ridges[best], cosines[best])


def _ridge(source: Floats, target: Floats, ridge: float) -> Floats:
    x, y = source.astype(np.float64), target.astype(np.float64)
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    x, y = x - x_mean, y - y_mean
    slope = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ y)
    return np.vstack([slope, y_mean - x_mean @ slope]).astype(np.float32)


# --- other halves ---------------------------------------------------------------------------------
def category_half(categories: Sequence[str | None], known: Sequence[str]) -> Half:
    """One-hot vectors (N, C): the cosine of two products is 1 in the same category and 0 in different ones."""
    place = {name: number for number, name in enumerate(known)}
    vectors = np.zeros((len(categories), len(known)), np.float32)
    for row, name in enumerate(categories):
        if name in place:
            vectors[row, place[name]] = 1
    return Half.of(vectors)


def behaviour_half(users: npt.NDArray[np.int64], items: npt.NDArray[np.int64], count: int, dimension: int,
                   seed: int = 7) -> Half:
    """Vectors (count, dimension) of products that the same people bought: singular vectors of users x products.

    `users` and `items` are the numbers of who and what of each interaction. Popularity is taken out by dividing each
    product's column by the square root of its buyers. A product without any is unknown.
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.linalg import svds

    pairs = np.unique(np.stack([users, items]), axis=1)
    people, codes = np.unique(pairs[0], return_inverse=True)
    dimension = min(dimension, len(people) - 1, count - 1)
    if dimension < 1:
        raise HybridError(f"{len(people)} users and {count} products are too few for behaviour vectors")
    buyers = np.bincount(pairs[1], minlength=count).astype(np.float64)
    table = csr_matrix((1 / np.sqrt(buyers[pairs[1]]), (codes, pairs[1])), shape=(len(people), count))
    start = np.random.default_rng(seed).standard_normal(min(table.shape))
    _, values, right = svds(table, k=dimension, v0=start)
    return Half.of((right * values[:, None]).T[:, ::-1])


# --- on disk --------------------------------------------------------------------------------------
def save_space(space: HybridSpace, projections: Mapping[tuple[Name, Name], Projection], path: Path) -> None:
    """Write means and projections (.npz); names, weights and dimensions go into the artefact's facts."""
    arrays: dict[str, Any] = {f"mean {part.name}": part.mean for part in space.parts if part.mean is not None}
    for (source, target), one in projections.items():
        arrays |= {f"{source} to {target}": one.matrix, f"mean of {source} to {target}": one.mean}
    np.savez(path, **arrays)


def space_facts(space: HybridSpace, projections: Mapping[tuple[Name, Name], Projection]) -> dict[str, Any]:
    """What a manifest says of a space; `load_space` reads it back."""
    return {"parts": [{"name": part.name, "weight": part.weight, "dimension": part.dimension,
                       "centred": part.mean is not None} for part in space.parts],
            "projections": [{"source": source, "target": target, "ridge": one.ridge,
                             "held_out_cosine": one.held_out_cosine}
                            for (source, target), one in projections.items()]}


def load_space(facts: Mapping[str, Any], path: Path) -> tuple[HybridSpace, dict[tuple[Name, Name], Projection]]:
    """The space and projections that `save_space` and `space_facts` described, from a verified file."""
    with np.load(path, allow_pickle=False) as arrays:
        parts = tuple(Part(one["name"], one["weight"], one["dimension"],
                           arrays[f"mean {one['name']}"] if one["centred"] else None) for one in facts["parts"])
        projections = {(one["source"], one["target"]): Projection(
            arrays[f"{one['source']} to {one['target']}"], arrays[f"mean of {one['source']} to {one['target']}"],
            one["ridge"], one["held_out_cosine"])
            for one in facts["projections"]}
    return HybridSpace(parts), projections

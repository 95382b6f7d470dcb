"""First-stage recommenders over a user-item matrix: popularity, ItemKNN and EASE; a history in, scores out.

All three are one thing: a user's score of an item is the sum, over the items of the history, of a weight
between the two; popularity, without weights, is also what a user without any known item gets. They are
closed forms of a few lines: `implicit` has no shrinkage and no EASE, `rectools` has EASE behind pandas frames
and saves with pickle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from recsys_ray.config import Config

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Matrix = Any                # scipy.sparse.csr_array of float32, (users, items), 1 where a user has an item

MAX_EASE_ITEMS = 30_000     # its matrix is dense: 3.6 GB in float32, three times that while it is inverted
FILES = ("items.parquet", "weights.npz")


class RecommenderError(ValueError):
    """Histories or files that do not fit a recommender; the message names what and the mend."""


class PopularityConfig(Config):
    """The items most users have, the same for everybody."""

    kind: Literal["popularity"] = "popularity"


class ItemKnnConfig(Config):
    """Items whose users are those of the history's items."""

    kind: Literal["item_knn"] = "item_knn"
    neighbours: int = Field(default=200, ge=1)          # kept for each item
    shrinkage: float = Field(default=20.0, ge=0)        # pulls similarities that rest on few users towards 0


class EaseConfig(Config):
    """A linear model of each item by all others."""

    kind: Literal["ease"] = "ease"
    regularisation: float = Field(default=200.0, gt=0)  # of squared weights, in users
    min_users: int = Field(default=1, ge=1)             # items of fewer users are left out: the cost is items cubed


RecommenderConfig = Annotated[PopularityConfig | ItemKnnConfig | EaseConfig, Field(discriminator="kind")]


@dataclass(frozen=True)
class UserItems:
    """Which user has which item: (U, I), with the ids of rows and columns."""

    users: tuple[str, ...]
    items: tuple[str, ...]
    matrix: Matrix


def user_items(user_ids: Sequence[str] | pa.ChunkedArray[Any], item_ids: Sequence[str] | pa.ChunkedArray[Any],
               items: Sequence[str] | None = None, users: Sequence[str] | None = None) -> UserItems:
    """The matrix of (user, item) rows, each pair once; ids sorted unless given.

    With `items` or `users` given, rows of others are left out and a user without any row is empty.
    """
    from scipy.sparse import csr_array

    rows, user_names = _codes(user_ids, users)
    columns, item_names = _codes(item_ids, items)
    known = (rows >= 0) & (columns >= 0)
    matrix = csr_array((np.ones(int(known.sum()), np.float32), (rows[known], columns[known])),
                       shape=(len(user_names), len(item_names)))
    matrix.sum_duplicates()
    matrix.data[:] = 1.0
    return UserItems(user_names, item_names, matrix)


def _codes(ids: Sequence[str] | pa.ChunkedArray[Any], names: Sequence[str] | None) -> tuple[Ints, tuple[str, ...]]:
    import pyarrow.compute as pc

    column = ids if isinstance(ids, pa.ChunkedArray) else pa.chunked_array([pa.array(list(ids), pa.string())])
    found = tuple(sorted(column.unique().to_pylist()) if names is None else names)
    codes: Any = pc.index_in(column, value_set=pa.array(found, pa.string()))
    return np.asarray(codes.fill_null(-1).to_numpy(), dtype=np.int64), found


@dataclass(frozen=True)
class Recommender:
    """A fitted recommender; weights are None (popularity), sparse or dense, (I, I) from history to item."""

    items: tuple[str, ...]
    popularity: Floats          # (I,): share of the histories that each item was in
    weights: Any

    def score(self, histories: Matrix) -> Floats:
        """A score of every item for each history, (U, I); of popularity where a history has no known item."""
        if histories.shape[1] != len(self.items):
            raise RecommenderError(f"histories over {histories.shape[1]} items for a recommender of {len(self.items)}")
        popularity = np.broadcast_to(self.popularity, histories.shape)
        if self.weights is None:
            return popularity.copy()
        found = histories @ self.weights
        scores = np.asarray(found if isinstance(found, np.ndarray) else found.todense(), dtype=np.float32)
        empty = np.diff(histories.indptr) == 0
        scores[empty] = popularity[empty]
        return scores

    def recommend(self, history: Sequence[str], k: int, exclude_seen: bool = True) -> tuple[list[str], Floats]:
        """The k best items for a history of item ids and their scores, best first; ties by popularity, then by id.

        Ids it does not know are passed over. Fewer than k items come back when fewer are left.
        """
        row = user_items([""] * len(history), list(history), items=self.items, users=[""]).matrix
        scores = self.score(row)[0]
        order = best_first(scores, self.popularity, row.indices if exclude_seen else (), k)
        return [self.items[one] for one in order], scores[order]

    def save(self, directory: Path) -> tuple[str, ...]:
        """Write the two files of `FILES` into `directory` (nothing pickled); returns their names."""
        directory.mkdir(parents=True, exist_ok=True)
        table = pa.table({"product_id": pa.array(self.items, pa.string()), "popularity": pa.array(self.popularity)})
        pq.write_table(table, directory / FILES[0], compression="zstd", write_page_checksum=True)
        arrays: dict[str, Any] = {}
        if isinstance(self.weights, np.ndarray):
            arrays = {"dense": self.weights}
        elif self.weights is not None:
            arrays = {"data": self.weights.data, "indices": self.weights.indices, "indptr": self.weights.indptr}
        with (directory / FILES[1]).open("wb") as stream:
            np.savez(stream, **arrays)
        return FILES

    @classmethod
    def load(cls, directory: Path) -> Recommender:
        """What `save` wrote; `RecommenderError` when the files do not fit together."""
        table = pq.ParquetFile(directory / FILES[0], page_checksum_verification=True).read()
        items = tuple(table["product_id"].to_pylist())
        weights = _read_weights(directory / FILES[1], len(items))
        return cls(items, np.asarray(table["popularity"].to_numpy(), dtype=np.float32), weights)


def best_first(scores_I: Floats, popularity_I: Floats, left_out: Sequence[int] | Ints, k: int) -> Ints:
    """The places of the k best items that are not left out, best first; ties by popularity, then by place."""
    order = np.lexsort((np.arange(len(scores_I)), -popularity_I, -scores_I))
    return np.asarray(order[~np.isin(order, np.asarray(left_out, dtype=np.int64))][: max(0, k)])


def _read_weights(path: Path, items: int) -> Any:
    from scipy.sparse import csr_array

    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = dict(stored)
        if not arrays:
            return None
        if "dense" in arrays:
            if arrays["dense"].shape != (items, items):
                raise ValueError(f"weights of shape {arrays['dense'].shape}")
            return arrays["dense"]
        return csr_array((arrays["data"], arrays["indices"], arrays["indptr"]), shape=(items, items))
    except (BadZipFile, KeyError, ValueError) as error:
        raise RecommenderError(f"{path}: not the weights of {items} items ({error}); "
                               "fit the recommender again") from None


def fit_recommender(histories: UserItems, config: RecommenderConfig) -> Recommender:
    """The recommender of these histories. Errors: `RecommenderError` without any history."""
    if not histories.matrix.nnz:
        raise RecommenderError("no user has any item; nothing to fit")
    popularity = np.asarray(histories.matrix.mean(axis=0), dtype=np.float32).reshape(-1)
    weights: Any = None
    if isinstance(config, ItemKnnConfig):
        weights = item_knn_weights(histories.matrix, config.neighbours, config.shrinkage)
    elif isinstance(config, EaseConfig):
        weights = ease_weights(histories.matrix, config.regularisation, config.min_users)
    return Recommender(histories.items, popularity, weights)


def item_knn_weights(matrix: Matrix, neighbours: int, shrinkage: float) -> Matrix:
    """Similarities (I, I), sparse: users of both / (sqrt(users of one x users of other) + shrinkage).

    Cosine of binary columns (Sarwar et al., WWW 2001; Deshpande and Karypis, TOIS 2004) with the shrink
    term as in Ferrari Dacrema et al., RecSys 2019. Each column keeps its `neighbours` largest.
    """
    from scipy.sparse import coo_array, csr_array

    both = csr_array(matrix.T @ matrix).tocoo()
    counts = np.asarray(matrix.sum(axis=0)).reshape(-1)
    apart = both.row != both.col
    row, column = both.row[apart], both.col[apart]
    values = both.data[apart] / (np.sqrt(counts[row] * counts[column]) + shrinkage)
    order = np.lexsort((row, -values, column))      # the best of each column first
    row, column, values = row[order], column[order], values[order]
    place = np.arange(len(column)) - np.searchsorted(column, column)
    kept = place < neighbours
    return csr_array(coo_array((values[kept].astype(np.float32), (row[kept], column[kept])), shape=both.shape))


def ease_weights(matrix: Matrix, regularisation: float, min_users: int = 1) -> Floats:
    """Weights (I, I), dense, diagonal 0: B = I - P / diag(P) by columns, P = (X'X + regularisation I)^-1.

    The closed form of least squares with a zero diagonal (Steck, WWW 2019, algorithm 1), in float64, over the items of
    at least `min_users` users; the weights of all others are 0.
    """
    items = matrix.shape[1]
    if items > MAX_EASE_ITEMS:
        raise RecommenderError(f"EASE keeps a dense matrix of {items} x {items}; at most {MAX_EASE_ITEMS} items: leave "
                               "rare items out, or take item_knn")
    kept = np.flatnonzero(np.asarray(matrix.sum(axis=0)).reshape(-1) >= min_users)
    columns = matrix[:, kept]
    gram = np.asarray((columns.T @ columns).todense(), dtype=np.float64)
    gram[np.diag_indices(len(kept))] += regularisation
    inverse = np.linalg.inv(gram)
    solved = -inverse / np.diag(inverse)
    np.fill_diagonal(solved, 0.0)
    weights = np.zeros((items, items), np.float32)
    weights[np.ix_(kept, kept)] = solved
    return weights

"""Candidate lists of several retrievers as one list a query: what mined negatives are drawn from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recsys_ray.data.sources.tables import load_table
from recsys_ray.schema import CANDIDATE

Ints = npt.NDArray[np.int64]
_LISTED = pa.schema([CANDIDATE.field(name) for name in ("query_id", "product_id", "rank")])


@dataclass(frozen=True)
class CandidateLists:
    """Products by query, the best rank first; arrays, because users have millions of candidates."""

    places: dict[str, int]      # of a query
    offsets: Ints               # (Q + 1,)
    listed: Ints                # numbers of products
    products: tuple[str, ...]

    @classmethod
    def of_table(cls, table: pa.Table) -> Self:
        """From rows of query_id, product_id and rank; a product that is listed twice has its better rank."""
        queries, products = (table[name].combine_chunks().dictionary_encode() for name in ("query_id", "product_id"))
        query, product = (np.asarray(one.indices, dtype=np.int64) for one in (queries, products))
        order = np.lexsort((np.arange(len(query)), table["rank"].to_numpy(), query))
        names: list[str] = products.dictionary.to_pylist()
        _, first = np.unique(query[order] * max(1, len(names)) + product[order], return_index=True)
        order = order[np.sort(first)]
        sizes = np.bincount(query[order], minlength=len(queries.dictionary))
        return cls({name: place for place, name in enumerate(queries.dictionary.to_pylist())},
                   np.append(0, np.cumsum(sizes)).astype(np.int64), product[order], tuple(names))

    def of(self, query_id: str) -> list[str]:
        """The products of one query; none for one that has no list."""
        place = self.places.get(query_id)
        if place is None:
            return []
        return [self.products[one] for one in self.listed[self.offsets[place]:self.offsets[place + 1]].tolist()]

    def digest(self) -> str:
        """32 hex digits of the lists."""
        parts = (repr(sorted(self.places.items())).encode(), self.offsets.tobytes(), self.listed.tobytes(),
                 repr(self.products).encode())
        return hashlib.sha256(b"|".join(parts)).hexdigest()[:32]


def candidate_lists(paths: Sequence[str], first_rank: int, last_rank: int) -> CandidateLists:
    """The lists of all tables together, of the ranks in the window; equal ranks: the first table first.

    A table is a file, a folder or a glob: `runs/x/candidates/versions/*/candidates-*.parquet`.
    """
    tables = []
    for path in paths:
        table = load_table(path, {}, _LISTED)
        inside = pc.and_(pc.greater_equal(table["rank"], first_rank), pc.less_equal(table["rank"], last_rank))
        tables.append(table.filter(inside))
    return CandidateLists.of_table(pa.concat_tables(tables) if tables else _LISTED.empty_table())

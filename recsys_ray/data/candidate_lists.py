"""Candidate lists of several retrievers as one list a query: what mined negatives are drawn from."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from recsys_ray.data.sources.tables import load_table
from recsys_ray.schema import CANDIDATE

_LISTED = pa.schema([CANDIDATE.field(name) for name in ("query_id", "product_id", "rank")])


def candidate_lists(paths: Sequence[str], first_rank: int, last_rank: int) -> dict[str, list[str]]:
    """query id -> products that any of the tables ranks in the window, the best rank first, then the first table.

    A table is a file, a folder or a glob: `runs/x/candidates/versions/*/candidates-*.parquet`.
    """
    best: dict[str, dict[str, tuple[int, int]]] = {}
    for number, path in enumerate(paths):
        table = load_table(path, {}, _LISTED)
        for query, product, rank in zip(*(table[name].to_pylist() for name in _LISTED.names), strict=True):
            if first_rank <= rank <= last_rank:
                found = best.setdefault(query, {})
                found[product] = min(found.get(product, (rank, number)), (rank, number))
    return {query: sorted(found, key=lambda one, found=found: (*found[one], one))  # type: ignore[misc]
            for query, found in best.items()}

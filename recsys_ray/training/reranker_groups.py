"""The rows of a `reranker_pairs` artefact as groups: the candidates of one query, to be ranked together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys_ray.artifacts import Artifact

Ints = npt.NDArray[np.int64]
KIND = "reranker_pairs"
COLUMNS = ["query_id", "query", "text", "label"]
CHARS_PER_TOKEN = 4     # about: lengths only balance the work


@dataclass(frozen=True)
class Group:
    """One query and its candidates."""

    query_id: str
    query: str
    texts: list[str]
    labels: list[float]


class RerankerGroups:
    """The groups of one split by number, 0 to G - 1: rows that follow one another with one query."""

    def __init__(self, rows: pa.Table) -> None:
        """`rows` hold COLUMNS; texts may be dictionary encoded, which keeps a text of many rows once."""
        self._rows = rows.select(COLUMNS).combine_chunks()
        self._starts, self.sizes = _runs(self._rows)
        self.labels = self._rows["label"].to_numpy()

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def num_rows(self) -> int:
        """Pairs of all groups."""
        return int(self._rows.num_rows)

    @property
    def lengths(self) -> Ints:
        """About how many tokens each group has, (G,)."""
        chars = sum(_lengths(self._rows[name]) for name in ("query", "text"))
        found: Ints = np.add.reduceat(chars, self._starts) // CHARS_PER_TOKEN if len(self) else np.zeros(0, np.int64)
        return found

    def group(self, number: int) -> Group:
        """The group of a number."""
        rows = self._rows.slice(int(self._starts[number]), int(self.sizes[number]))
        return Group(rows["query_id"][0].as_py(), rows["query"][0].as_py(), rows["text"].to_pylist(),
                     rows["label"].to_pylist())

    def groups(self, numbers: Iterable[int]) -> list[Group]:
        """The groups of these numbers."""
        return [self.group(int(number)) for number in numbers]


def _runs(rows: pa.Table) -> tuple[Ints, Ints]:
    """(first row, number of rows) of each run of rows with one query of one user."""
    if not rows.num_rows:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    codes = [_codes(rows[name]) for name in ("query_id", "query")]
    changed = np.any([np.diff(one, prepend=-1) != 0 for one in codes], axis=0)
    starts = np.flatnonzero(changed).astype(np.int64)
    return starts, np.diff(starts, append=rows.num_rows)


def _codes(column: pa.ChunkedArray) -> Ints:
    encoded = column.combine_chunks()
    if not pa.types.is_dictionary(encoded.type):
        encoded = encoded.dictionary_encode()
    return np.asarray(encoded.indices.to_numpy(zero_copy_only=False), dtype=np.int64)


def _lengths(column: pa.ChunkedArray) -> Ints:
    encoded = column.combine_chunks()
    if not pa.types.is_dictionary(encoded.type):
        encoded = encoded.dictionary_encode()
    sizes = pc.binary_length(encoded.dictionary).to_numpy(zero_copy_only=False)
    return np.asarray(sizes[_codes(column)], dtype=np.int64)


def read_groups(pairs: Artifact, split: str) -> RerankerGroups:
    """The groups of one split, every file checked; the same order wherever it is read."""
    tables = []
    for name in pairs.names(f"pairs/{split}/"):
        with pq.ParquetFile(pairs.file(name), read_dictionary=["query_id", "query", "text"],
                            page_checksum_verification=True) as file:
            tables.append(file.read(columns=COLUMNS))
    if not tables:
        tables = [pa.table({name: pa.array([], pa.float32() if name == "label" else pa.string()) for name in COLUMNS})]
    return RerankerGroups(pa.concat_tables(tables).unify_dictionaries())


def rows_of(groups: Sequence[Group]) -> tuple[list[str], list[str]]:
    """(query, text) of every candidate, groups end to end."""
    return [one.query for one in groups for _ in one.texts], [text for one in groups for text in one.texts]

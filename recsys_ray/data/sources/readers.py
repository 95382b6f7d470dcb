"""[ray] Streams of raw tables: each function gives a Ray dataset whose blocks have a declared schema.

Every block carries two further columns: `_error`, null for a usable row and else the reason why all
its other columns are null, and `_source`, the file and line. The driver lists files and reads Parquet
footers and the first lines; every row is read in a task, in blocks of bounded size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import pyarrow as pa
import ray
from ray.data import Dataset
from ray.data.block import BlockMetadata
from ray.data.context import DataContext
from ray.data.datasource import Datasource, ReadTask

from recsys_ray.data.sources.blocks import Piece, Recipe, block_schema, pieces_of, read_piece
from recsys_ray.data.sources.config import SourceConfig, SourceError
from recsys_ray.data.sources.files import SPLIT_BYTES
from recsys_ray.data.sources.plan import recipes

IN_MEMORY = {"jsonl": 1, "csv": 1, "parquet": 3}    # bytes in memory for a byte on disk, roughly
GZIPPED = 4


def read_products(source: SourceConfig, *, split_bytes: int = SPLIT_BYTES) -> Dataset:
    """RAW_PRODUCT rows, not cleaned; `split_bytes` bounds what one task reads of a file that can be divided."""
    return _read(source, "products", split_bytes)


def read_reviews(source: SourceConfig, *, split_bytes: int = SPLIT_BYTES) -> Dataset:
    """RAW_REVIEW rows; a review without an id of its own has a hash of what it says."""
    return _read(source, "reviews", split_bytes)


def read_queries(source: SourceConfig) -> Dataset:
    """QUERY rows: every query, also those whose labels are withheld."""
    return _read(source, "queries")


def read_judgments(source: SourceConfig) -> Dataset:
    """JUDGMENT rows: gain and label of judged (query, product) pairs."""
    return _read(source, "judgments")


def read_interactions(source: SourceConfig, *, split_bytes: int = SPLIT_BYTES) -> Dataset:
    """INTERACTION rows, of every kind the source has."""
    return _read(source, "interactions", split_bytes)


def read_images(source: SourceConfig, *, split_bytes: int = SPLIT_BYTES) -> Dataset:
    """IMAGE rows with the encoded bytes, not decoded (`recsys_ray.data.images` does that)."""
    return _read(source, "images", split_bytes)


def read_tags(source: SourceConfig, *, split_bytes: int = SPLIT_BYTES) -> Dataset:
    """TAG rows: shelf names with their counts, joined to product ids."""
    return _read(source, "tags", split_bytes)


def read_texts(source: SourceConfig, *, split_bytes: int = SPLIT_BYTES) -> Dataset:
    """PRODUCT_WORDS rows: texts of products that the source wrote itself."""
    return _read(source, "texts", split_bytes)


def read_events(source: SourceConfig, *, split_bytes: int = SPLIT_BYTES) -> Dataset:
    """EVENT rows with the right types; `recsys_ray.data.events.clean_events` checks what they say."""
    return _read(source, "events", split_bytes)


def _read(source: SourceConfig, table: str, split_bytes: int = SPLIT_BYTES) -> Dataset:
    datasource = PieceDatasource(recipes(source, table), split_bytes)
    # As many blocks as tasks: Ray would cut the output of few tasks into many tiny blocks.
    dataset: Dataset = ray.data.read_datasource(datasource, override_num_blocks=len(datasource.work))
    return dataset


class PieceDatasource(Datasource):
    """One read task for each piece of each file of some recipes."""

    def __init__(self, recipes: Iterable[Recipe], split_bytes: int = SPLIT_BYTES) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work = [(piece, recipe) for recipe in recipes for file in recipe.files
                     for piece in pieces_of(file, split_bytes)]
        if not self.work:
            raise SourceError(f"{', '.join(file.path for recipe in recipes for file in recipe.files)}: no rows")

    def get_name(self) -> str:
        """The name in Ray's progress bars."""
        return self.work[0][1].table.capitalize()

    def estimate_inmemory_data_size(self) -> int | None:
        """Bytes of all blocks together, roughly."""
        return sum(_size(piece) for piece, _ in self.work)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        """One task a piece, whatever `parallelism` says: pieces already have a good size."""
        return [self._task(piece, recipe, per_task_row_limit) for piece, recipe in self.work]

    @staticmethod
    def _task(piece: Piece, recipe: Recipe, row_limit: int | None) -> ReadTask:
        files = (piece.file.path,)
        metadata = BlockMetadata(num_rows=None, size_bytes=_size(piece), input_files=files, exec_stats=None)
        read: Callable[[], Iterable[pa.Table]] = partial(read_piece, piece, recipe)
        return ReadTask(read, metadata, schema=block_schema(recipe.schema), per_task_row_limit=row_limit)


def _size(piece: Piece) -> int:
    factor = GZIPPED if piece.file.gzipped else IN_MEMORY[piece.file.kind]
    divided = piece.file.kind == "jsonl" and piece.stop is not None
    return ((piece.stop or 0) - piece.start if divided else piece.file.size) * factor

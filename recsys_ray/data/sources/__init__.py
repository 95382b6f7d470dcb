"""Sources: files of known families or of any shape -> streams of raw tables with declared schemas.

`config` says where the data lies, `plan` checks it before any work, `files`, `lines`, `values`,
`adapters` and `blocks` are the pure parts, `tables` reads a small table at once, and `readers` (the
only module with Ray, loaded when one of its functions is asked for) streams them.
"""

from typing import TYPE_CHECKING, Any

from recsys_ray.data.sources.config import (
    AmazonReviewsSource,
    ClothingSource,
    EsciSource,
    GoodbooksSource,
    GoodreadsSource,
    IcecatSource,
    SourceConfig,
    SourceError,
    TableSource,
)
from recsys_ray.data.sources.plan import file_states, tables_of
from recsys_ray.data.sources.tables import load_rows, load_table, table_states

if TYPE_CHECKING:
    from recsys_ray.data.sources.readers import (
        read_events,
        read_images,
        read_interactions,
        read_judgments,
        read_products,
        read_queries,
        read_reviews,
        read_tags,
        read_texts,
    )

__all__ = [
    "AmazonReviewsSource", "ClothingSource", "EsciSource", "GoodbooksSource", "GoodreadsSource", "IcecatSource",
    "SourceConfig", "SourceError", "TableSource", "file_states", "load_rows", "load_table", "read_events",
    "read_images", "read_interactions", "read_judgments", "read_products", "read_queries", "read_reviews", "read_tags",
    "read_texts", "table_states", "tables_of",
]


def __getattr__(name: str) -> Any:
    """The streaming readers, imported on first use so that configurations load without Ray."""
    if name in __all__:
        from recsys_ray.data.sources import readers

        return getattr(readers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

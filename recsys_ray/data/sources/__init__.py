"""Sources: files of known families or of any shape -> streams of raw tables with declared schemas.

`config` says where the data lies, `plan` checks it before any work, `files`, `lines`, `values`,
`adapters` and `blocks` are the pure parts, `tables` reads a small table at once, and `readers` (the
only module with Ray) streams them.
"""

from recsys_ray.data.sources.config import (
    AmazonReviewsSource,
    ClothingSource,
    EsciSource,
    GoodbooksSource,
    IcecatSource,
    SourceConfig,
    SourceError,
    TableSource,
)

__all__ = ["AmazonReviewsSource", "ClothingSource", "EsciSource", "GoodbooksSource", "IcecatSource", "SourceConfig",
           "SourceError", "TableSource"]

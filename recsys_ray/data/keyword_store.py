"""Keywords and summaries that were extracted beforehand, looked up by the bucket they belong to.

Layout of a "keywords" artefact: keywords/bucket-*.parquet (REVIEW_KEYWORDS), summaries/bucket-*.parquet
(PRODUCT_SUMMARY), quarantine/bucket-*.parquet; buckets are those of the prepared shop they were made from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from recsys_ray.artifacts import Artifact, ArtifactError, open_artifact
from recsys_ray.config import fingerprint
from recsys_ray.schema import REVIEW_KEYWORDS, TEXTS

KIND = "keywords"


def open_keywords(root: str | Path, num_buckets: int, version: str | None = None) -> Artifact:
    """The artefact; `ArtifactError` when its buckets are not those of a shop with `num_buckets`."""
    artifact = open_artifact(root, KIND, version)
    found = artifact.manifest.facts["num_buckets"]
    if found != num_buckets:
        raise ArtifactError(f"{artifact.path}: has {found} buckets where the shop has {num_buckets}; extract the "
                            "keywords from a preparation with the same num_buckets")
    return artifact


def content_of(artifact: Artifact) -> str:
    """16 hex digits of what is stored: equal for two extractions that say the same."""
    return fingerprint([(entry.path, entry.sha256) for entry in artifact.manifest.files
                        if not entry.path.startswith("quarantine/")])


class StoredKeywords:
    """What is stored of one bucket."""

    def __init__(self, artifact: Artifact, bucket: str) -> None:
        name = f"keywords/{bucket}.parquet"
        here = artifact.names("keywords/")
        table = artifact.table(name, ["review_id", "keywords"]) if name in here else REVIEW_KEYWORDS.empty_table()
        self._ids = table["review_id"].combine_chunks()
        self._keywords = table["keywords"]
        self._summaries: dict[int, str] = {}
        if (name := f"summaries/{bucket}.parquet") in artifact.names("summaries/"):
            rows = artifact.table(name, ["row_id", "summary"])
            self._summaries = dict(zip(rows["row_id"].to_pylist(), rows["summary"].to_pylist(), strict=True))

    def of_reviews(self, review_ids: pa.ChunkedArray) -> tuple[pa.ChunkedArray, int]:
        """(the keywords of each review, empty where none are stored; how many reviews have none stored)."""
        places = pc.index_in(review_ids, value_set=self._ids)
        found = self._keywords.cast(TEXTS).take(places)
        empty = pa.scalar([], TEXTS)
        return pc.if_else(found.is_valid(), found, empty), places.null_count

    def summaries(self, row_ids: Sequence[int]) -> list[str | None]:
        """The summary of each product's description; None where there is none."""
        return [self._summaries.get(row) for row in row_ids]

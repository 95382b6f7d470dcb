"""The vectors of an index -> a collection of a vector store, batch by batch; run again, a killed run continues.

What was written is noted after the store has acknowledged it, under the digest of the batch, so a rerun sends what is
new or changed and nothing else. Ids that may be in the store are noted before the first of them is sent; those that
the index no longer has are deleted at the end. The notes belong to one store: another store or collection begins anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from recsys_ray.artifacts import write_text
from recsys_ray.config import Config, fingerprint
from recsys_ray.retrieval.stores import FaissStore, StoreConfig, collection_schema, open_store
from recsys_ray.retrieval.vector_tables import ROWS, vector_parts

log = logging.getLogger(__name__)


class WriteStoreConfig(Config):
    """Which vectors go into which store."""

    index: Path     # a text index or a hybrid index; embeddings and image_vectors too, without anything to filter by
    store: StoreConfig
    notes: Path                         # what was written; keep it beside the store
    batch_rows: int = Field(default=1000, ge=1)


def write_store(config: WriteStoreConfig) -> dict[str, int]:
    """How many products are in the collection, were written now, were there already, and were deleted."""
    store = open_store(config.store)
    notes = config.notes / fingerprint({"store": config.store.model_dump(mode="json"), "rows": config.batch_rows})
    ids = [one for rows in _batches(config) for one in rows["product_id"].to_pylist()]
    before = _read(notes / "ids.json", [])
    write_text(notes / "ids.json", json.dumps(sorted({*before, *ids})))
    counts = {"products": len(ids), "written": 0, "unchanged": 0, "deleted": 0}
    for number, rows in enumerate(_batches(config)):
        note, digest = notes / f"batch-{number:06d}.json", _digest(rows)
        if _read(note, None) == digest:
            counts["unchanged"] += len(rows)
            continue
        store.upsert(rows)
        write_text(note, json.dumps(digest))
        counts["written"] += len(rows)
        log.info("%d of %d products", counts["written"] + counts["unchanged"], len(ids))
    gone = sorted({*before} - {*ids})
    store.delete(gone)
    counts["deleted"] = len(gone)
    write_text(notes / "ids.json", json.dumps(sorted(ids)))
    if isinstance(store, FaissStore):
        store.compact()
    log.info("%s", ", ".join(f"{name} {number}" for name, number in counts.items()))
    return counts


def _batches(config: WriteStoreConfig) -> Iterator[pa.Table]:
    """COLLECTION rows, the same batches in every run over the same index."""
    for rows, vectors in vector_parts(config.index):
        schema = collection_schema(vectors.shape[1])
        for start in range(0, len(rows), config.batch_rows):
            some = np.asarray(vectors[start:start + config.batch_rows], np.float32)
            column = pa.FixedSizeListArray.from_arrays(pa.array(some.reshape(-1)), vectors.shape[1])
            part = rows.slice(start, config.batch_rows)
            yield pa.table({**{name: part[name] for name in ROWS.names}, "vector": column}, schema=schema)


def _digest(rows: pa.Table) -> str:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows.combine_chunks())
    return hashlib.sha256(sink.getvalue()).hexdigest()[:32]


def _read(path: Path, default: Any) -> Any:
    return json.loads(path.read_bytes()) if path.is_file() else default

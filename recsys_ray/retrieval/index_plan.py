"""What one index version becomes: which rows of which buckets are read, what changed, what goes where.

Prepared tables and embeddings are read bucket by bucket and must be of the very same rows. The
difference to the current index is found per group of buckets, and only segments that hold rows of
those buckets are looked at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recsys_ray.artifacts import Artifact, open_artifact
from recsys_ray.config import fingerprint
from recsys_ray.ids import bucket_of, row_ids
from recsys_ray.models.token_signals import Encoding, concat_encodings, signals_of
from recsys_ray.retrieval.catalogue_rows import catalogue_rows
from recsys_ray.retrieval.concern_columns import REASONS_KIND, SCORES_KIND, Reasons, concern_columns, read_reasons
from recsys_ray.retrieval.segments import IndexMismatch, card_file, live_mask, segment_files

Ints = npt.NDArray[np.int64]
Group = tuple[str, ...]
ConcernsOf = Callable[[str], Callable[[Ints], Mapping[str, pa.Array]]]      # bucket -> row ids -> columns


@dataclass(frozen=True)
class Inputs:
    """Where the tasks of one build read; plain values, so that they travel to any node."""

    prepared: str
    prepared_version: str
    embeddings: str
    embeddings_version: str
    concerns: tuple[str, str] | None = None     # root and version of the scores, and of the reasons for them
    reasons: tuple[str, str] | None = None

    def open(self) -> tuple[Artifact, Artifact]:
        """The prepared and the embeddings artefact."""
        return (open_artifact(self.prepared, "prepared", self.prepared_version),
                open_artifact(self.embeddings, "embeddings", self.embeddings_version))


    def concerns_of(self) -> ConcernsOf:
        """Row ids of a bucket -> the columns of their concerns."""
        scores = None if self.concerns is None else open_artifact(self.concerns[0], SCORES_KIND, self.concerns[1])
        reasons = read_reasons(None if self.reasons is None else
                               open_artifact(self.reasons[0], REASONS_KIND, self.reasons[1]))
        return lambda bucket: partial(_bucket_concerns, scores, reasons, bucket)


def _bucket_concerns(scores: Artifact | None, reasons: Reasons, bucket: str, wanted: Ints) -> dict[str, pa.Array]:
    return concern_columns(wanted, None if scores is None else scores.table(f"scores/{bucket}.parquet"), reasons)


@dataclass(frozen=True)
class Change:
    """How one group of buckets differs from the current index."""

    group: Group
    changed: Ints               # row ids to index: new, or different from the live row
    dead: dict[str, Ints]       # segment -> positions that are no longer right
    rows: int                   # of the group in the catalogue
    touched: int                # different rows that are changed, new or gone


@dataclass(frozen=True)
class Part:
    """What one segment is built from: rows of neighbouring buckets, all of them or the wanted ones."""

    group: Group
    num_buckets: int
    wanted: Ints | None = None

    def card(self) -> dict[str, Any]:
        """What the segment says about itself; `made_of` is equal exactly for equal parts."""
        wanted = None if self.wanted is None else np.sort(self.wanted).tolist()
        return {"buckets": bucket_numbers(self.group).tolist(), "num_buckets": self.num_buckets,
                "made_of": fingerprint({"group": self.group, "wanted": wanted})}


def bucket_numbers(group: Sequence[str]) -> npt.NDArray[np.int32]:
    """The numbers of buckets by name: 3 of "bucket-00003"."""
    return np.array([int(bucket.rpartition("-")[2]) for bucket in group], dtype=np.int32)


def bucket_groups(prepared: Artifact, rows_per_segment: int) -> list[Group]:
    """Neighbouring buckets put together until a segment is full, e.g. [("bucket-00000", "bucket-00001"), ...]."""
    groups: list[Group] = []
    taken: list[str] = []
    rows = 0
    for name in prepared.names("product_text/"):
        size = prepared.manifest.rows(name)
        if taken and rows + size > rows_per_segment:
            groups.append(tuple(taken))
            taken, rows = [], 0
        taken.append(Path(name).stem)
        rows += size
    return [*groups, tuple(taken)] if taken else groups


def read_bucket(prepared: Artifact, embeddings: Artifact, bucket: str, set_aside: Ints, concerns_of: ConcernsOf
                ) -> tuple[pa.Table, Encoding]:
    """ROWS of one bucket and their vectors, shape (N, D), and signals, all by row id.

    `set_aside` are the rows whose text could not be embedded, `concerns_of` is `Inputs.concerns_of()`. Errors:
    `IndexMismatch` naming the bucket when a vector belongs to no row or to another text, comes twice or is not
    finite, and when a row that was not set aside has no vector.
    """
    where = f"bucket {bucket!r} of {embeddings.path}"
    texts = prepared.table(f"product_text/{bucket}.parquet").sort_by("row_id")
    vectors = embeddings.table(f"vectors/{bucket}.parquet").sort_by("row_id")
    known, embedded = texts["row_id"].to_numpy(), vectors["row_id"].to_numpy()
    for ids, holder in ((known, f"bucket {bucket!r} of {prepared.path}"), (embedded, where)):
        if len(twice := ids[1:][ids[1:] == ids[:-1]]):
            raise IndexMismatch(f"{holder}: holds row {twice[0]} twice; run its job again")
    _refuse_other_rows(known, embedded, set_aside, where)
    texts = texts.filter(pc.is_in(texts["row_id"], value_set=vectors["row_id"].combine_chunks()))
    same = pc.equal(texts["text_hash"].combine_chunks(), vectors["text_hash"].combine_chunks())
    if not pc.all(same).as_py() and len(embedded):
        row = embedded[np.flatnonzero(~same.to_numpy(zero_copy_only=False))[0]]
        raise IndexMismatch(f"{where}: row {row} is of another text than the prepared products; "
                            "run the embed job again")
    kept = vectors["row_id"].combine_chunks()
    whole = [prepared.table(f"{kind}/{bucket}.parquet") for kind in ("products", "product_stats")]
    products, stats = (table.filter(pc.is_in(table["row_id"], value_set=kept)) for table in whole)
    rows = catalogue_rows(products, texts, stats, concerns_of(bucket))
    if not np.array_equal(rows["row_id"].to_numpy(), embedded):
        raise IndexMismatch(f"bucket {bucket!r} of {prepared.path}: {products.num_rows} products for "
                            f"{len(embedded)} embedded texts; run the prepare job again")
    dimension = vectors.schema.field("vector").type.list_size
    flat = vectors["vector"].combine_chunks().flatten().to_numpy().astype(np.float32).reshape(-1, dimension)
    bad = np.flatnonzero(~np.isfinite(flat).all(axis=1))
    if len(bad) or len(flat) != len(embedded):
        what = f"the vector of row {embedded[bad[0]]} is not finite" if len(bad) else "a row has no vector"
        raise IndexMismatch(f"{where}: {what}; run the embed job again")
    return rows, Encoding(flat, signals_of(vectors))


def _refuse_other_rows(known: Ints, embedded: Ints, set_aside: Ints, where: str) -> None:
    strange = np.setdiff1d(embedded, known)
    if len(strange):
        raise IndexMismatch(f"{where}: {len(strange)} rows that the prepared products do not have, the first is "
                            f"{strange[0]}; run the embed job again")
    missing = np.setdiff1d(np.setdiff1d(known, embedded), set_aside)
    if len(missing):
        raise IndexMismatch(f"{where}: lacks {len(missing)} rows of the prepared products, the first is {missing[0]}; "
                            "run the embed job again")


def rows_set_aside(embeddings: Artifact) -> Ints:
    """Row ids of the products in the quarantine of the embeddings."""
    keys: list[str] = []
    for table in embeddings.tables("quarantine", ["key"]):
        keys += [key for key in table["key"].to_pylist() if key is not None]
    return row_ids(keys)


def read_part(inputs: Inputs, part: Part) -> tuple[pa.Table, Encoding]:
    """ROWS of a part and their vectors and signals, by row id."""
    prepared, embeddings = inputs.open()
    aside, concerns_of = rows_set_aside(embeddings), inputs.concerns_of()
    tables, blocks = [], []
    for bucket in part.group:
        rows, encoded = read_bucket(prepared, embeddings, bucket, aside, concerns_of)
        if part.wanted is not None:
            mask = np.isin(rows["row_id"].to_numpy(), part.wanted)
            rows, encoded = rows.filter(pa.array(mask)), encoded.take(np.flatnonzero(mask))
        tables.append(rows)
        blocks.append(encoded)
    return sorted_rows(pa.concat_tables(tables), concat_encodings(blocks))


def sorted_rows(rows: pa.Table, encoded: Encoding) -> tuple[pa.Table, Encoding]:
    """Rows and what the encoder gave for them by row id."""
    order = np.argsort(rows["row_id"].to_numpy(), kind="stable")
    return rows.take(pa.array(order)), encoded.take(order)


# --- what changed ---------------------------------------------------------------------------------
def segments_of(index: Artifact, buckets: npt.NDArray[np.int32], num_buckets: int) -> list[str]:
    """The segments that may hold rows of these buckets."""
    found = []
    for name in index.manifest.facts["segments"]:
        card = json.loads(index.file(card_file(name)).read_bytes())
        if card.get("num_buckets") != num_buckets or np.isin(card["buckets"], buckets).any():
            found.append(name)
    return found


def group_change(inputs: Inputs, root: str, version: str, group: Group, num_buckets: int) -> Change:
    """How the catalogue's rows in these buckets differ from the live rows of an index version."""
    prepared, embeddings = inputs.open()
    aside, concerns_of = rows_set_aside(embeddings), inputs.concerns_of()
    tables = [read_bucket(prepared, embeddings, bucket, aside, concerns_of)[0].select(["row_id", "row_hash"])
              for bucket in group]
    rows = pa.concat_tables(tables).sort_by("row_id")
    wanted, hashes = rows["row_id"].to_numpy(), rows["row_hash"].combine_chunks()
    index, numbers = open_artifact(root, "index", version), bucket_numbers(group)
    unchanged, gone, dead = [], [], {}
    for name in segments_of(index, numbers, num_buckets):
        held = index.table(segment_files(name)[0], ["row_id", "row_hash"])
        ids = held["row_id"].to_numpy()
        places = np.flatnonzero(np.isin(bucket_of(ids, num_buckets), numbers) & live_mask(index, name))
        ids, old = ids[places], held["row_hash"].take(pa.array(places)).combine_chunks()
        right = _same(wanted, hashes, ids, old)
        unchanged.append(ids[right])
        if not right.all():
            gone.append(ids[~right])
            dead[name] = places[~right].astype(np.int64)
    changed = np.setdiff1d(wanted, np.concatenate([np.zeros(0, np.int64), *unchanged]))
    touched = len(np.union1d(changed, np.concatenate([np.zeros(0, np.int64), *gone])))
    return Change(group, changed, dead, rows.num_rows, touched)


def _same(wanted: Ints, hashes: pa.Array[Any], ids: Ints, old: pa.Array[Any]) -> npt.NDArray[np.bool_]:
    """Which held rows are in the catalogue with the same hash; `wanted` ascends."""
    if not len(wanted):
        return np.zeros(len(ids), dtype=np.bool_)
    places = np.minimum(np.searchsorted(wanted, ids), len(wanted) - 1)
    equal = pc.equal(hashes.take(pa.array(places)), old).to_numpy(zero_copy_only=False).astype(np.bool_)
    return np.asarray((wanted[places] == ids) & equal)


def appended_parts(changes: Sequence[Change], num_buckets: int, rows_per_segment: int) -> list[Part]:
    """Changed rows of neighbouring groups put together until a segment is full."""
    parts: list[Part] = []
    for change in changes:
        if not len(change.changed):
            continue
        last = parts[-1].wanted if parts else None
        if last is not None and len(last) + len(change.changed) <= rows_per_segment:
            together = np.concatenate([last, change.changed])
            parts[-1] = Part(parts[-1].group + change.group, num_buckets, together)
        else:
            parts.append(Part(change.group, num_buckets, change.changed))
    return parts

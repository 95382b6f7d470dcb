"""Segments of an index: immutable rows with their vectors and postings, searched alone or together.

An index is a list of segments under one manifest. Deleted or replaced rows stay in their segment and
are named by its tombstones. Each segment answers with its best candidates by either retriever and both
scores of each; merged and cut (`merge_hits`), the answers of any division of the rows are those of one
big segment.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recsys_ray.artifacts import Artifact, FileEntry, Manifest, file_entry, open_artifact, write_table, write_text
from recsys_ray.ids import row_id as row_id_of
from recsys_ray.models.token_signals import Encoding, Signals, SparseRows
from recsys_ray.retrieval.filters import FilterColumns, Filters, refuse_unknown_concerns
from recsys_ray.retrieval.late_interaction import max_sim
from recsys_ray.retrieval.learned_sparse import SparsePostings
from recsys_ray.retrieval.lexical import (
    Bm25Segment,
    LexicalConfig,
    LexicalStatistics,
    Postings,
    best_positions,
    build_postings,
)
from recsys_ray.retrieval.segment_signals import SegmentSignals, save_signals
from recsys_ray.retrieval.vector_index import VectorIndex, VectorIndexConfig
from recsys_ray.schema import CONCERN_PROBABILITIES, CONCERN_REASONS, TEXTS

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

LEXICON = "lexicon.npz"
ROWS = pa.schema([
    pa.field("row_id", pa.int64(), nullable=False), pa.field("product_id", pa.string(), nullable=False),
    pa.field("title", pa.string()), pa.field("brand", pa.string()), pa.field("color", pa.string()),
    pa.field("category", pa.string()), pa.field("price_cents", pa.int64()),
    pa.field("num_reviews", pa.int64()), pa.field("rating_mean", pa.float32()), pa.field("rating_std", pa.float32()),
    pa.field("verified_share", pa.float32()), pa.field("mean_review_chars", pa.float32()),
    pa.field("last_review_ms", pa.int64()),                 # these six as of the cut of the prepared data
    pa.field("image_url", pa.string()), pa.field("text", pa.string()), pa.field("lexical_text", pa.string()),
    pa.field("concerns", CONCERN_PROBABILITIES),            # null: not scored, or without ingredients
    pa.field("addresses", TEXTS), pa.field("because", CONCERN_REASONS),     # the ingredients, where they are known
    pa.field("row_hash", pa.string(), nullable=False),      # of everything above: decides whether a row is replaced
])


STATISTICS = ("num_reviews", "rating_mean", "rating_std", "verified_share", "mean_review_chars", "last_review_ms")


class IndexMismatch(ValueError):  # noqa: N818 - says what is wrong
    """An index that cannot be used here: another encoder, a damaged file, a segment that is not there."""


@dataclass(frozen=True)
class SegmentHits:
    """The candidates of one query: C rows with both scores; NaN dense scores when no vector was asked.

    The scores by learned token weights and by late interaction are None unless they were asked for.
    """

    row_ids: Ints
    product_ids: list[str]
    dense_scores: Floats
    lexical_scores: Floats
    sparse_scores: Floats | None = None
    multi_scores: Floats | None = None


def indexed_concerns(index: Manifest) -> tuple[str, ...]:
    """The concerns that the products of an index were scored for; none without scores."""
    return tuple((index.facts.get("concerns") or {}).get("names", ()))


def concern_model_of(index: Manifest) -> dict[str, Any] | None:
    """The identity of the model that gave an index its probabilities of concerns; None without them."""
    found: dict[str, Any] | None = (index.facts.get("concerns") or {}).get("model")
    return found


def refuse_other_concerns(wanted: Mapping[str, Any] | None, found: Mapping[str, Any] | None, what: str) -> None:
    """Nothing when both are one concern model; else `IndexMismatch`. `what` begins its message."""
    if wanted != found:
        one, other = wanted or {}, found or {}
        different = sorted(key for key in {*one, *other} if one.get(key) != other.get(key))
        raise IndexMismatch(f"{what} another concern model than the scores of the index; different: "
                            f"{', '.join(different)}")


def segment_files(name: str) -> tuple[str, str, str, str]:
    """Where a segment keeps its rows, postings, vectors and (unless flat) its FAISS index."""
    base = f"segments/{name}"
    return f"{base}/rows.parquet", f"{base}/postings.npz", f"{base}/vectors.npy", f"{base}/vectors.faiss"


def tombstones_file(name: str) -> str:
    """Where the dead positions of a segment stand."""
    return f"tombstones/{name}.npy"


def card_file(name: str) -> str:
    """Where a segment says what it was made of; it is written last, so who finds it finds the whole segment."""
    return f"segments/{name}/segment.json"


def write_segment(directory: Path, name: str, rows: pa.Table, encoded: Floats | Encoding, vector: VectorIndexConfig,
                  lexical: LexicalConfig, about: Mapping[str, Any] | None = None) -> list[FileEntry]:
    """Write the segment of N rows (ROWS, by row id) and their vectors (N, D) below `directory`; returns its files.

    `encoded` are the vectors, or vectors and signals. The segment's directory appears whole or not at all
    and takes the place of an earlier one. `about` goes into segment.json.
    """
    row_ids = rows["row_id"].to_numpy()
    vectors, signals = _parts(encoded)
    if not len(rows) == len(vectors) == len(np.unique(row_ids)) or not (np.diff(row_ids) > 0).all():
        raise IndexMismatch(f"segment {name}: {len(rows)} rows, {len(vectors)} vectors, {len(np.unique(row_ids))} "
                            "different row ids; each row is needed once, in order, with its vector")
    files = [Path(one).name for one in segment_files(name)]
    target = directory / "segments" / name
    partial = target.with_name(f".{name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    write_table(partial, files[0], rows)
    build_postings(rows["lexical_text"].fill_null("").to_pylist(), lexical).save(partial / files[1])
    VectorIndex.build(vectors, vector).save(partial / files[2], partial / files[3])
    save_signals(signals, partial)
    card = {"rows": rows.num_rows, "dimension": int(vectors.shape[1]), "vector": vector.model_dump(mode="json"),
            "lexical": lexical.model_dump(mode="json"), **(about or {})}
    write_text(partial / Path(card_file(name)).name, json.dumps(card, indent=1, sort_keys=True))
    shutil.rmtree(target, ignore_errors=True)
    os.rename(partial, target)
    return segment_entries(directory, name)


def _parts(encoded: Floats | Encoding) -> tuple[Floats, Signals]:
    if not isinstance(encoded, Encoding):
        return encoded, Signals()
    if encoded.dense is None:
        raise IndexMismatch("an index needs a vector for each row; this encoding has none")
    return encoded.dense, encoded.signals


def segment_entries(directory: Path, name: str) -> list[FileEntry]:
    """The manifest entries of a segment that lies whole below `directory`."""
    card = json.loads((directory / card_file(name)).read_bytes())
    paths = sorted((directory / "segments" / name).iterdir())
    return [file_entry(directory, f"segments/{name}/{path.name}", card["rows"] if path.suffix == ".parquet" else None)
            for path in paths]


class Segment:
    """One opened segment."""

    def __init__(self, artifact: Artifact, name: str, statistics: LexicalStatistics) -> None:
        facts = artifact.manifest.facts
        rows_name, postings_name, vectors_name, faiss_name = segment_files(name)
        self.name = name
        self.rows = artifact.table(rows_name)
        if missing := [one for one in ROWS.names if one not in self.rows.column_names]:
            raise IndexMismatch(f"{artifact.path}: its rows have no {', '.join(missing)}; build the index again")
        self.row_ids: Ints = self.rows["row_id"].to_numpy()
        self.product_ids: list[str] = self.rows["product_id"].to_pylist()
        self.alive = _alive(artifact, name, self.rows.num_rows)
        stored = artifact.names(f"segments/{name}/")
        self.vectors = VectorIndex.load(VectorIndexConfig.model_validate(facts["vector"]), artifact.file(vectors_name),
                                        artifact.file(faiss_name) if faiss_name in stored else None)
        lexical = LexicalConfig.model_validate(facts["lexical"])
        self.lexical = Bm25Segment(Postings.load(artifact.file(postings_name)), statistics, lexical)
        card = json.loads(artifact.file(card_file(name)).read_bytes())
        self.signals = SegmentSignals.load(artifact, name)
        if self.signals.sizes() - {self.rows.num_rows} or not self.signals.fit(facts["encoder"]):
            raise IndexMismatch(f"{artifact.path}/segments/{name}: its token weights and vectors are not those of "
                                f"{self.rows.num_rows} rows by the index's encoder; rebuild the index")
        if not self.vectors.size == self.lexical.size == self.rows.num_rows == card["rows"]:
            raise IndexMismatch(f"{artifact.path}/segments/{name}: {self.rows.num_rows} rows, {self.vectors.size} "
                                f"vectors and {self.lexical.size} texts do not belong together; rebuild the index")
        if (card["vector"], card["lexical"]) != (facts["vector"], facts["lexical"]):
            raise IndexMismatch(f"{artifact.path}/{card_file(name)}: the segment was built with other settings than "
                                "the index says; rebuild the index")
        self._filters = FilterColumns(self.rows)

    def allowed(self, filters: Filters | None) -> Mask:
        """The live rows that meet the filters, shape (N,)."""
        return self.alive if filters is None or filters.pass_all else self.alive & self._filters.mask(filters)

    def search(self, vectors: Floats | None, texts: Sequence[str] | None, depth: int,
               filters: Filters | None, sparse: SparseRows | None = None) -> list[SegmentHits]:
        """One answer per query: the `depth` best by each retriever that was asked."""
        allowed = self.allowed(filters)
        everything = bool(allowed.all())
        nearest = None if vectors is None else self.vectors.search(vectors, depth, None if everything else allowed)[1]
        count = len(vectors) if vectors is not None else len(texts or ())
        return [self._answer(None if vectors is None else vectors[i], None if nearest is None else nearest[i],
                             None if texts is None else texts[i], None if sparse is None else sparse.row(i), depth,
                             allowed) for i in range(count)]

    def _answer(self, vector: Floats | None, nearest: Ints | None, text: str | None,
                tokens: tuple[npt.NDArray[np.int32], Floats] | None, depth: int, allowed: Mask) -> SegmentHits:
        scores = None if text is None else self.lexical.document_scores(text)
        learned = None if tokens is None else self._postings().document_scores(*tokens)
        found = [np.zeros(0, np.int64)] if nearest is None else [nearest]
        found += [best_positions(one, depth, allowed)[1] for one in (scores, learned) if one is not None]
        places = np.unique(np.concatenate(found))
        dense = np.full(len(places), np.nan, np.float32) if vector is None else self.vectors.scores(vector, places)
        lexical = np.zeros(len(places), np.float32) if scores is None else scores[places]
        return SegmentHits(self.row_ids[places], [self.product_ids[place] for place in places], dense, lexical,
                           None if learned is None else learned[places])

    def _postings(self) -> SparsePostings:
        if self.signals.sparse is None:
            raise IndexMismatch(f"segment {self.name} has no token weights; embed with encoder.sparse=true and "
                                "rebuild the index, or set fusion.sparse_weight to 0")
        return self.signals.sparse

    def multi_scores(self, query: npt.NDArray[np.floating[Any]], places: Ints) -> Floats:
        """The late-interaction scores of the rows at `places` with the token vectors (V, M) of a query."""
        if self.signals.multi is None:
            raise IndexMismatch(f"segment {self.name} has no token vectors; embed with encoder.multi_vector=true and "
                                "rebuild the index, or set fusion.multi_weight to 0")
        return max_sim(query, self.signals.multi, places)

    def places(self, row_ids: Ints) -> Ints:
        """The positions of those of the products that live in this segment."""
        wanted = np.asarray(row_ids, dtype=np.int64)
        found = np.searchsorted(self.row_ids, wanted)   # rows lie by row id
        here = found < len(self.row_ids)
        found, wanted = found[here], wanted[here]
        live: Ints = found[(self.row_ids[found] == wanted) & self.alive[found]].astype(np.int64)
        return live

    def product(self, row_id: int) -> dict[str, Any] | None:
        """The row of a live product, or None."""
        places = self.places(np.array([row_id], dtype=np.int64))
        return None if not len(places) else {name: self.rows[name][int(places[0])].as_py()
                                             for name in self.rows.column_names}


def merge_hits(answers: Sequence[SegmentHits], depth: int) -> SegmentHits:
    """The candidates that one index of all rows would give: the `depth` best by each retriever, by row id."""
    row_ids = np.concatenate([one.row_ids for one in answers]) if answers else np.zeros(0, np.int64)
    product_ids = [product for one in answers for product in one.product_ids]
    dense = np.concatenate([one.dense_scores for one in answers]) if answers else np.zeros(0, np.float32)
    lexical = np.concatenate([one.lexical_scores for one in answers]) if answers else np.zeros(0, np.float32)
    sparse = _joined([one.sparse_scores for one in answers])
    multi = _joined([one.multi_scores for one in answers])
    by_dense = np.lexsort((row_ids, -dense))
    best = [by_dense[~np.isnan(dense[by_dense])][:depth]]
    for scores in (lexical, sparse):
        if scores is not None:
            ranked = np.lexsort((row_ids, -scores))
            best.append(ranked[scores[ranked] > 0][:depth])
    kept = np.unique(np.concatenate(best))
    order = kept[np.argsort(row_ids[kept], kind="stable")].astype(np.int64)
    return SegmentHits(row_ids[order], [product_ids[place] for place in order], dense[order], lexical[order],
                       None if sparse is None else sparse[order], None if multi is None else multi[order])


def _joined(scores: Sequence[Floats | None]) -> Floats | None:
    """The scores of all answers, or None where none was asked for."""
    known = [one for one in scores if one is not None]
    if len(known) not in (0, len(scores)):
        raise IndexMismatch(f"only {len(known)} of {len(scores)} answers have scores of a kind that the others lack")
    return np.concatenate(known) if known else None


class Index:
    """Some or all segments of one version of an index."""

    def __init__(self, artifact: Artifact, segments: Sequence[Segment]) -> None:
        self.artifact, self.segments = artifact, list(segments)

    @property
    def version(self) -> str:
        """The version of the artefact."""
        return self.artifact.manifest.version

    @property
    def concerns(self) -> tuple[str, ...]:
        """The concerns that its products were scored for; none without scores."""
        return indexed_concerns(self.artifact.manifest)

    @property
    def live_rows(self) -> int:
        """Rows that can be found."""
        return sum(int(segment.alive.sum()) for segment in self.segments)

    def search(self, query_vectors: Floats | None, query_texts: Sequence[str] | None, depth: int,
               filters: Filters | None = None, query_signals: Signals | None = None) -> list[SegmentHits]:
        """One list of candidates per query, merged over the segments; (Q, D) vectors, Q texts, or both.

        Token weights in `query_signals` find further candidates; with token vectors all candidates are
        scored once more, by late interaction.
        """
        if query_vectors is None and query_texts is None:
            raise ValueError("a search needs query vectors, query texts or both")
        if filters is not None:
            refuse_unknown_concerns(filters.concern, self.concerns)
        signals = query_signals or Signals()
        answers = [segment.search(query_vectors, query_texts, depth, filters, signals.sparse)
                   for segment in self.segments]
        count = len(query_vectors) if query_vectors is not None else len(query_texts or ())
        merged = [merge_hits([of_segment[number] for of_segment in answers], depth) for number in range(count)]
        if signals.multi is None:
            return merged
        return [self._rescored(hits, signals.multi.row(number)) for number, hits in enumerate(merged)]

    def _rescored(self, hits: SegmentHits, query: npt.NDArray[np.floating[Any]]) -> SegmentHits:
        scores = np.full(len(hits.row_ids), np.nan, dtype=np.float32)
        for segment in self.segments:
            places = segment.places(hits.row_ids)
            scores[np.searchsorted(hits.row_ids, segment.row_ids[places])] = segment.multi_scores(query, places)
        return replace(hits, multi_scores=scores)

    def products(self, row_ids: Ints, columns: Sequence[str]) -> list[dict[str, Any]]:
        """The named columns, `row_id` among them, of live products in the order of `row_ids`; else `KeyError`."""
        found = {row["row_id"]: row for row in self._live_rows(row_ids, columns).to_pylist()}
        return [found[int(one)] for one in row_ids]

    def rows(self, row_ids: Ints, columns: Sequence[str]) -> pa.Table:
        """The same as a table: the named columns of live products in the order of `row_ids`; else `KeyError`."""
        found = self._live_rows(row_ids, ["row_id", *(name for name in columns if name != "row_id")])
        places = pc.index_in(pa.array(row_ids, pa.int64()), value_set=found["row_id"].combine_chunks())
        if places.null_count:
            raise KeyError(int(row_ids[places.is_null().to_numpy(zero_copy_only=False)][0]))
        return found.take(places).select(list(columns))

    def _live_rows(self, row_ids: Ints, columns: Sequence[str]) -> pa.Table:
        """Those of the products that live here, segment by segment."""
        if self.segments and (missing := set(columns) - set(self.segments[0].rows.column_names)):
            raise IndexMismatch(f"{self.artifact.path}: its rows have no {', '.join(sorted(missing))}; "
                                "build the index again")
        tables = [segment.rows.select(list(columns)).take(pa.array(segment.places(row_ids)))
                  for segment in self.segments]
        return pa.concat_tables([pa.schema([ROWS.field(name) for name in columns]).empty_table(), *tables])

    def product(self, key: int | str) -> dict[str, Any] | None:
        """The row of a live product by row id or product id, or None."""
        number = row_id_of(key) if isinstance(key, str) else key
        rows = (segment.product(number) for segment in self.segments)
        return next((row for row in rows if row is not None), None)


def open_index(root: str | Path, version: str | None = None, encoder_identity: dict[str, Any] | None = None,
               segments: Sequence[str] | None = None) -> Index:
    """The current (or the named) index below `root`, whole or only the named segments, every file verified.

    Errors: `ArtifactError` for a file that is missing, damaged or foreign, `IndexMismatch` when its
    vectors are of another encoder than `encoder_identity`.
    """
    artifact = open_artifact(root, "index", version)
    facts = artifact.manifest.facts
    if encoder_identity is not None and encoder_identity != facts["encoder"]:
        different = sorted(key for key in {*encoder_identity, *facts["encoder"]}
                           if encoder_identity.get(key) != facts["encoder"].get(key))
        raise IndexMismatch(f"{artifact.path}: its vectors are of another encoder; different: " + ", ".join(
            f"{key} ({facts['encoder'].get(key)!r} there, {encoder_identity.get(key)!r} here)" for key in different))
    unknown = set(segments or ()) - set(facts["segments"])
    if unknown:
        raise IndexMismatch(f"{artifact.path}: has no segments {sorted(unknown)}; it has {facts['segments']}")
    statistics = LexicalStatistics.load(artifact.file(LEXICON))
    names = facts["segments"] if segments is None else segments
    return Index(artifact, [Segment(artifact, name, statistics) for name in names])


def _alive(artifact: Artifact, name: str, rows: int) -> Mask:
    alive = np.ones(rows, dtype=np.bool_)
    if tombstones_file(name) in artifact.names("tombstones/"):
        alive[np.load(artifact.file(tombstones_file(name)), allow_pickle=False)] = False
    return alive


def live_mask(artifact: Artifact, name: str) -> Mask:
    """Which rows of a segment are alive, shape (N,)."""
    rows_name = segment_files(name)[0]
    rows = next(entry.rows for entry in artifact.manifest.files if entry.path == rows_name)
    return _alive(artifact, name, rows or 0)

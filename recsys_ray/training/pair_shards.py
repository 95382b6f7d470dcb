"""Training pairs tokenised once: memory-mapped shards with random access.

    <split>/<name>.pairs.arrow      a row a pair: query tokens, groups, places of its documents
    <split>/<name>.documents.arrow  a row a different text of the shard: its tokens, the hash of the text
    <split>/<name>.teacher.arrow    a row a pair, where a teacher scored the pairs: its scores of the documents

Files are Arrow IPC, uncompressed, so that all workers of a node share one copy in the page cache and
a batch costs no reading of what it does not take.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys_ray.artifacts import Artifact, ArtifactError, FileEntry, file_entry, open_artifact
from recsys_ray.models.sentence_layout import find_model, read_layout
from recsys_ray.models.text_encoder import TextEncoderConfig, encoder_identity, load_tokenizer, prepare_text
from recsys_ray.schema import TEACHER_SCORES, TRAINING_PAIR, conform
from recsys_ray.training.contrastive import PairBatch

KIND = "pair_shards"
SHARD_VERSION = 1       # raise it when the same pairs would give other shards
TOKENISED_AT_ONCE = 2048
SPLITS = ("train", "valid")

Ints = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.int32]

PAIRS = pa.schema([
    ("pair_id", pa.string()), ("query_tokens", pa.list_(pa.int32())), ("query_hash", pa.int64()),
    ("row_id", pa.int64()), ("group_id", pa.int64()), ("positive", pa.int64()),     # place among the documents
    ("negatives", pa.list_(pa.int64())), ("negative_row_ids", pa.list_(pa.int64())),
    ("negative_group_ids", pa.list_(pa.int64()))])
DOCUMENTS = pa.schema([("tokens", pa.list_(pa.int32())), ("text_hash", pa.int64())])
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ShardSettings:
    """How texts become tokens: decides, with the pairs, what the shards hold."""

    encoder: dict[str, Any]     # TextEncoderConfig, with a model path that every node finds
    query_tokens: int           # queries are cut here
    document_tokens: int

    def identity(self) -> dict[str, Any]:
        """What two sets of shards must share to be equal, beside their pairs."""
        found = encoder_identity(self.config())
        return {"version": SHARD_VERSION, "query_tokens": min(self.query_tokens, found["max_tokens"]),
                "document_tokens": min(self.document_tokens, found["max_tokens"]),
                **{key: found[key] for key in ("tokenizer_sha256", "query_prompt", "document_prompt", "max_chars")}}

    def config(self) -> TextEncoderConfig:
        """The encoder's configuration."""
        return TextEncoderConfig.model_validate(self.encoder)


class PairTokenizer:
    """Texts of pairs -> token ids, cut at the two limits, prompts in front."""

    def __init__(self, settings: ShardSettings) -> None:
        identity, layout = settings.identity(), read_layout(find_model(settings.encoder["model"]))
        self._identity = identity
        self._tokenizers = {kind: load_tokenizer(layout, identity[f"{kind}_tokens"])[0]
                            for kind in ("query", "document")}

    def __call__(self, texts: Sequence[str], kind: str) -> list[Tokens]:
        """Token ids of N texts; `kind` is query or document."""
        prompt, longest, found = self._identity[f"{kind}_prompt"], self._identity["max_chars"], []
        for start in range(0, len(texts), TOKENISED_AT_ONCE):
            some = [prompt + prepare_text(text, longest) for text in texts[start:start + TOKENISED_AT_ONCE]]
            found += [np.array(one.ids, dtype=np.int32) for one in self._tokenizers[kind].encode_batch_fast(some)]
        return found


def write_shard(pairs: pa.Table, tokenizer: PairTokenizer, directory: Path, name: str) -> list[FileEntry]:
    """Tokenise one table of TRAINING_PAIR rows into `directory/<name>.{pairs,documents}.arrow`; returns the entries.

    A third file holds a teacher's scores, where the table has the columns of TEACHER_SCORES.
    """
    scored = conform(pairs, TEACHER_SCORES, name) if TEACHER_SCORES.names[0] in pairs.column_names else None
    pairs = conform(pairs, TRAINING_PAIR, name)
    texts, positives, negatives = different_texts(pairs)
    queries = pairs["query"].to_pylist()
    table = pa.table({
        "pair_id": pairs["pair_id"], "query_tokens": _lists(tokenizer(queries, "query")),
        "query_hash": text_hashes(queries), "row_id": pairs["row_id"], "group_id": pairs["group_id"],
        "positive": pa.array(positives, pa.int64()), "negatives": pa.array(negatives, pa.list_(pa.int64())),
        "negative_row_ids": pairs["negative_row_ids"], "negative_group_ids": pairs["negative_group_ids"]}, PAIRS)
    documents = pa.table({"tokens": _lists(tokenizer(texts, "document")), "text_hash": text_hashes(texts)}, DOCUMENTS)
    parts = {"pairs": table, "documents": documents, **({} if scored is None else {"teacher": scored})}
    return [_write_arrow(part, directory, f"{name}.{kind}.arrow") for kind, part in parts.items()]


def different_texts(pairs: pa.Table) -> tuple[list[str], list[int], list[list[int]]]:
    """(the different texts of documents, the place of each pair's positive among them, the places of its negatives)."""
    places: dict[str, int] = {}
    positives = [places.setdefault(text, len(places)) for text in pairs["text"].to_pylist()]
    negatives = [[places.setdefault(text, len(places)) for text in texts or ()]
                 for texts in pairs["negative_texts"].to_pylist()]
    return list(places), positives, negatives


def text_hashes(texts: Sequence[str]) -> Ints:
    """An int64 for each text, equal for equal texts."""
    digests = b"".join(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, dtype=np.int64)


def _lists(tokens: Sequence[Tokens]) -> pa.Array:
    offsets = np.cumsum([0, *map(len, tokens)]).astype(np.int32)
    flat = np.concatenate(tokens) if len(tokens) else np.zeros(0, np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, pa.int32()))


def _write_arrow(table: pa.Table, directory: Path, name: str) -> FileEntry:
    target = directory / name
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with partial.open("wb") as stream:
        with pa.ipc.new_file(stream, table.schema) as writer:
            writer.write_table(table.combine_chunks(), max_chunksize=max(1, table.num_rows))
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, target)
    return file_entry(directory, name, table.num_rows)


# --- reading --------------------------------------------------------------------------------------
class _Lists:
    """A list column without Arrow objects: `values[offsets[i]:offsets[i + 1]]`."""

    def __init__(self, column: pa.ListArray) -> None:
        self.offsets: Ints = column.offsets.to_numpy().astype(np.int64)
        self.values: npt.NDArray[Any] = column.values.to_numpy()

    def __getitem__(self, place: int) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = self.values[self.offsets[place]:self.offsets[place + 1]]
        return found

    def lengths(self) -> Ints:
        return np.diff(self.offsets)


class _Shard:
    """One pair of files, mapped into memory."""

    def __init__(self, pairs: Path, documents: Path, teacher: Path | None = None) -> None:
        table, texts = _map_arrow(pairs, PAIRS), _map_arrow(documents, DOCUMENTS)
        scored = None if teacher is None else _map_arrow(teacher, TEACHER_SCORES)
        self.rows: int = table.num_rows
        self.queries, self.documents = _Lists(table.column("query_tokens")), _Lists(texts.column("tokens"))
        self.query_hashes, self.text_hashes = table["query_hash"].to_numpy(), texts["text_hash"].to_numpy()
        self.row_ids, self.groups = table["row_id"].to_numpy(), table["group_id"].to_numpy()
        self.positives: Ints = table["positive"].to_numpy()
        self.negatives = _Lists(table.column("negatives"))
        self.negative_groups = _Lists(table.column("negative_group_ids"))
        self.negative_row_ids = _Lists(table.column("negative_row_ids"))
        self.teacher = None if scored is None else (
            scored["teacher_positive"].to_numpy(), _Lists(scored.column("teacher_negatives")))


def _map_arrow(path: Path, schema: pa.Schema) -> pa.RecordBatch:
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        if not reader.schema.equals(schema):
            raise ArtifactError(f"{path}: has other columns than this version writes; make the shards again")
        if reader.num_record_batches == 0:
            return pa.RecordBatch.from_pylist([], schema=schema)
        return reader.get_batch(0)


@dataclass(frozen=True)
class Places:
    """Where the texts of a batch of B queries and C documents lie: (number of the shard, place in it) of each.

    The first B documents are the positives; then come the hard negatives, query by query.
    """

    queries: list[tuple[int, int]]          # B
    documents: list[tuple[int, int]]        # C
    negatives: list[tuple[int, int]]        # C - B: (the query it was found for, its number among that one's)


class PairShards:
    """The pairs of one split by number, 0 to N - 1."""

    def __init__(self, shards: Sequence[_Shard], settings: dict[str, Any]) -> None:
        self._shards, self.settings = list(shards), settings
        self._starts = np.cumsum([0, *(shard.rows for shard in shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def groups(self) -> Ints:
        """The near-duplicate group of each pair's product, (N,)."""
        return self._joined([shard.groups for shard in self._shards])

    @property
    def row_ids(self) -> Ints:
        """The row id of each pair's product, (N,)."""
        return self._joined([shard.row_ids for shard in self._shards])

    @property
    def query_hashes(self) -> Ints:
        """A number for each query, equal for equal texts, (N,)."""
        return self._joined([shard.query_hashes for shard in self._shards])

    @property
    def lengths(self) -> Ints:
        """Tokens of each pair's query and positive together, (N,)."""
        return self._joined([shard.queries.lengths() + shard.documents.lengths()[shard.positives]
                             for shard in self._shards])

    def query_tokens(self) -> Iterator[tuple[Ints, Tokens]]:
        """(offsets, tokens) of the queries of each shard, in the order of the pairs."""
        return ((shard.queries.offsets, shard.queries.values) for shard in self._shards)

    def positive_tokens(self) -> Iterator[tuple[Ints, Tokens]]:
        """(offsets, tokens) of the different positives of each shard."""
        for shard in self._shards:
            texts = [shard.documents[place] for place in np.unique(shard.positives)]
            yield np.cumsum([0, *map(len, texts)]), np.concatenate([np.zeros(0, np.int32), *texts])

    def _joined(self, parts: Sequence[Ints]) -> Ints:
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def batch(self, indices: Ints, negatives: int | None = None) -> PairBatch:
        """The pairs of these numbers, with at most `negatives` hard negatives each (None: all they have)."""
        return self.batch_at(self.places(indices, negatives))

    def places(self, indices: Ints, negatives: int | None = None) -> Places:
        """Where the texts of these pairs lie, with at most `negatives` hard negatives each (None: all they have)."""
        queries = self._located(indices)
        documents = [(shard, int(self._shards[shard].positives[place])) for shard, place in queries]
        found: list[tuple[int, int]] = []
        for query, (shard, place) in enumerate(queries):
            hard = self._shards[shard].negatives[place][:negatives].tolist()
            documents += [(shard, document) for document in hard]
            found += [(query, number) for number in range(len(hard))]
        return Places(queries, documents, found)

    def batch_at(self, places: Places) -> PairBatch:
        """The batch of these places."""
        count, shards = len(places.queries), self._shards
        groups = [int(shards[shard].groups[place]) for shard, place in places.queries]
        for query, number in places.negatives:
            shard, place = places.queries[query]
            groups.append(int(shards[shard].negative_groups[place][number]))
        return PairBatch(
            query_tokens=[shards[shard].queries[place] for shard, place in places.queries],
            document_tokens=[shards[shard].documents[text] for shard, text in places.documents],
            positive=np.arange(count, dtype=np.int64),
            query_group=np.array(groups[:count], dtype=np.int64), document_group=np.array(groups, dtype=np.int64),
            document_text=np.array([shards[shard].text_hashes[text] for shard, text in places.documents],
                                   dtype=np.int64),
            negative_of=np.array([-1] * count + [query for query, _ in places.negatives], dtype=np.int64))

    def teacher_scores(self, places: Places) -> Floats:
        """A teacher's scores of each query's own documents, float32 (B, C), NaN for all others."""
        found = np.full((len(places.queries), len(places.documents)), np.nan, np.float32)
        for query, (shard, place) in enumerate(places.queries):
            if (scored := self._shards[shard].teacher) is not None:
                found[query, query] = scored[0][place]
        for column, (query, number) in enumerate(places.negatives, start=len(places.queries)):
            shard, place = places.queries[query]
            if (scored := self._shards[shard].teacher) is not None:
                found[query, column] = scored[1][place][number]
        return found

    def _located(self, indices: Ints) -> list[tuple[int, int]]:
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        return [(int(shard), int(index - self._starts[shard])) for shard, index in zip(shards, indices, strict=True)]

    def documents_of(self, indices: Ints) -> tuple[list[Tokens], Ints]:
        """(tokens of each pair's positive, its product's row id)."""
        found = [(self._shards[shard], place) for shard, place in self._located(indices)]
        return ([shard.documents[int(shard.positives[place])] for shard, place in found],
                np.array([shard.row_ids[place] for shard, place in found], dtype=np.int64))


def open_pair_shards(root: str | Path, split: str = "train", version: str | None = None) -> PairShards:
    """The shards of one split of a `pair_shards` artefact, its files checked."""
    return read_pair_shards(open_artifact(root, KIND, version), split)


def read_pair_shards(artifact: Artifact, split: str) -> PairShards:
    """The shards of one split of an opened artefact; a split without pairs has none."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: pairs are divided into {' and '.join(SPLITS)}")
    names = [name.removesuffix(".pairs.arrow") for name in artifact.names(f"{split}/") if name.endswith(".pairs.arrow")]
    scored = {name for name in names if f"{name}.teacher.arrow" in artifact.names(f"{split}/")}
    shards = [_Shard(artifact.file(f"{name}.pairs.arrow"), artifact.file(f"{name}.documents.arrow"),
                     artifact.file(f"{name}.teacher.arrow") if name in scored else None) for name in names]
    return PairShards(shards, artifact.manifest.facts["settings"])

"""BM25 over segments: stored term counts, statistics of the whole catalogue, scores by bm25s.

A segment keeps only what never changes: which term occurs how often in which of its texts
(`Postings`). How much a term is worth depends on the whole catalogue, so document frequencies and
the average length are gathered over all segments (`global_statistics`) and the weights of a segment
are computed from both when it is opened (`Bm25Segment`). Any division of the texts into segments
therefore gives the very scores of one big index.

Formulas: Kamphuis et al., "Which BM25 do you mean?", ECIR 2020, as in bm25s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from recsys_ray.config import Config

Language = Literal["danish", "dutch", "english", "french", "german", "italian", "norwegian", "portuguese", "russian",
                   "spanish", "swedish"]
Floats = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

MAX_TERM_CHARS = 64  # longer runs of word characters are encoded data, not words


class LexicalError(ValueError):
    """Postings or statistics that cannot be used; the message names the file or the term and the mend."""


class LexicalConfig(Config):
    """How texts become terms and terms become scores."""

    method: Literal["lucene", "robertson"] = "lucene"
    k1: float = Field(default=1.2, ge=0)
    b: float = Field(default=0.75, ge=0, le=1)
    language: Language = "english"
    remove_stop_words: bool = True
    stem: bool = True
    min_term_chars: int = Field(default=2, ge=1)

    def same_terms(self, other: LexicalConfig) -> bool:
        """Whether both cut texts into the same terms, so that postings of one serve the other."""
        names = ("language", "remove_stop_words", "stem", "min_term_chars")
        return all(getattr(self, name) == getattr(other, name) for name in names)


def tokenize(texts: Sequence[str], config: LexicalConfig) -> tuple[list[list[int]], list[str]]:
    """Term numbers of each text, in reading order, and the terms they number."""
    import bm25s
    import Stemmer

    tokens = bm25s.tokenize(
        list(texts), token_pattern=rf"(?u)\b\w{{{config.min_term_chars},{MAX_TERM_CHARS}}}\b",
        stopwords=config.language if config.remove_stop_words else [],
        stemmer=Stemmer.Stemmer(config.language) if config.stem else None, show_progress=False)
    return tokens.ids, sorted(tokens.vocab, key=tokens.vocab.__getitem__)


@dataclass(frozen=True)
class Postings:
    """Term counts of N texts, column by column: term t occurs `counts[i]` times in text `positions[i]`
    for i in `offsets[t]` to `offsets[t + 1]`. Terms are sorted, positions ascend within a term."""

    terms: pa.StringArray                     # string, (T,)
    offsets: npt.NDArray[np.int64]      # (T + 1,)
    positions: npt.NDArray[np.int32]    # (P,)
    counts: npt.NDArray[np.int32]       # (P,)
    lengths: npt.NDArray[np.int32]      # (N,): terms in each text

    def save(self, path: Path) -> None:
        """Write one .npz file without pickled content."""
        with path.open("wb") as stream:
            np.savez(stream, terms=_pack_terms(self.terms), offsets=self.offsets, positions=self.positions,
                     counts=self.counts, lengths=self.lengths)

    @classmethod
    def load(cls, path: Path) -> Postings:
        """The postings of a file written by `save`; `LexicalError` when it is not one."""
        arrays = _read_arrays(path, ("terms", "offsets", "positions", "counts", "lengths"))
        postings = cls(**{**arrays, "terms": _unpack_terms(arrays["terms"], path)})
        if (len(postings.offsets) != len(postings.terms) + 1 or postings.offsets[-1] != len(postings.positions)
                or len(postings.positions) != len(postings.counts)):
            raise LexicalError(f"{path}: the arrays do not fit together; rebuild the segment")
        return postings


@dataclass(frozen=True)
class LexicalStatistics:
    """What a term is worth in the whole catalogue: number of texts, their mean length, texts per term."""

    documents: int
    average_length: float
    terms: pa.StringArray                                 # string, sorted, (T,)
    document_frequencies: npt.NDArray[np.int64]     # (T,)

    def save(self, path: Path) -> None:
        """Write one .npz file without pickled content."""
        with path.open("wb") as stream:
            np.savez(stream, documents=np.int64(self.documents), average_length=np.float64(self.average_length),
                     terms=_pack_terms(self.terms), document_frequencies=self.document_frequencies)

    @classmethod
    def load(cls, path: Path) -> LexicalStatistics:
        """The statistics of a file written by `save`; `LexicalError` when it is not one."""
        arrays = _read_arrays(path, ("documents", "average_length", "terms", "document_frequencies"))
        terms = _unpack_terms(arrays["terms"], path)
        if len(terms) != len(arrays["document_frequencies"]):
            raise LexicalError(f"{path}: {len(terms)} terms but {len(arrays['document_frequencies'])} frequencies")
        return cls(int(arrays["documents"]), float(arrays["average_length"]), terms, arrays["document_frequencies"])


def build_postings(texts: Sequence[str], config: LexicalConfig) -> Postings:
    """The postings of N texts; text number i has position i. Empty texts are allowed and match nothing."""
    token_ids, terms = tokenize(texts, config)
    lengths = np.fromiter(map(len, token_ids), dtype=np.int32, count=len(token_ids))
    flat = np.fromiter(chain.from_iterable(token_ids), dtype=np.int64, count=int(lengths.sum()))
    order = sorted(range(len(terms)), key=terms.__getitem__)  # the tokeniser's own order changes from run to run
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    document = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
    width = max(1, len(lengths))
    cells, counts = np.unique(rank[flat] * width + document, return_counts=True)
    offsets = np.zeros(len(terms) + 1, dtype=np.int64)
    np.cumsum(np.bincount(cells // width, minlength=len(terms)), out=offsets[1:])
    return Postings(pa.array([terms[i] for i in order], pa.string()), offsets, (cells % width).astype(np.int32),
                    counts.astype(np.int32), lengths)


def global_statistics(postings: Sequence[Postings], alive: Sequence[Mask | None] | None = None) -> LexicalStatistics:
    """The statistics of all segments together.

    `alive` names the rows of each segment that count (None: all of them); rows that were deleted or
    replaced then weigh nothing, as if the catalogue had been indexed without them.
    """
    masks = alive if alive is not None else [None] * len(postings)
    if len(masks) != len(postings):
        raise LexicalError(f"{len(postings)} segments but {len(masks)} masks of live rows")
    documents, total_length, parts = 0, 0, []
    for segment, mask in zip(postings, masks, strict=True):
        frequencies = np.diff(segment.offsets)
        if mask is not None:
            frequencies = _live_frequencies(segment, mask)
        documents += len(segment.lengths) if mask is None else int(mask.sum())
        total_length += int(segment.lengths.sum() if mask is None else segment.lengths[mask].sum())
        parts.append(pa.table({"term": segment.terms, "texts": pa.array(frequencies, pa.int64())}))
    if not parts:
        return LexicalStatistics(0, 0.0, pa.array([], pa.string()), np.zeros(0, dtype=np.int64))
    merged = pa.concat_tables(parts).group_by("term").aggregate([("texts", "sum")])
    merged = merged.filter(pc.field("texts_sum") > 0).sort_by("term")
    terms = cast("pa.StringArray", merged["term"].combine_chunks())
    return LexicalStatistics(documents, total_length / documents if documents else 0.0, terms,
                             merged["texts_sum"].to_numpy().astype(np.int64))


def merged_statistics(parts: Sequence[LexicalStatistics]) -> LexicalStatistics:
    """The statistics of all segments together from those of each: what `global_statistics` gives in one go."""
    documents = sum(part.documents for part in parts)
    total_length = sum(round(part.average_length * part.documents) for part in parts)
    columns = [pa.table({"term": part.terms, "texts": pa.array(part.document_frequencies, pa.int64())})
               for part in parts]
    merged = pa.concat_tables([pa.schema([("term", pa.string()), ("texts", pa.int64())]).empty_table(), *columns])
    merged = merged.group_by("term").aggregate([("texts", "sum")]).sort_by("term")
    terms = cast("pa.StringArray", merged["term"].combine_chunks())
    return LexicalStatistics(documents, total_length / documents if documents else 0.0, terms,
                             merged["texts_sum"].to_numpy().astype(np.int64))


def term_weights(texts: Sequence[str], statistics: LexicalStatistics, config: LexicalConfig
                 ) -> list[npt.NDArray[np.float64]]:
    """The inverse document frequencies of the different terms of each text that the catalogue knows."""
    token_ids, terms = tokenize(texts, config)
    worth, known = _inverse_frequencies(pa.array(terms, pa.string()), statistics, config)
    different = [np.unique(np.asarray(one, dtype=np.int64)) for one in token_ids]
    return [worth[one[known[one]]] for one in different]


class Bm25Segment:
    """BM25 scores of one segment's texts under the statistics of the whole catalogue."""

    def __init__(self, postings: Postings, statistics: LexicalStatistics, config: LexicalConfig) -> None:
        self.size = len(postings.lengths)
        self._config = config
        self._numbers = {term: number for number, term in enumerate(postings.terms.to_pylist())}
        self._engine = _engine(postings, _weights(postings, statistics, config), config)

    def document_scores(self, query_text: str) -> Floats:
        """The score of every text, shape (N,); 0 where no term of the query occurs."""
        token_ids, terms = tokenize([query_text], self._config)
        numbers = [self._numbers[terms[i]] for i in token_ids[0] if terms[i] in self._numbers]
        if not numbers:
            return np.zeros(self.size, dtype=np.float32)
        scores: Floats = self._engine.get_scores_from_ids(numbers)
        return scores

    def search(self, query_text: str, k: int, allowed: Mask | None = None) -> tuple[Floats, Positions]:
        """Scores and positions of the at most `k` best allowed texts that match, best first, ties by position."""
        return best_positions(self.document_scores(query_text), k, allowed)

    def scores(self, query_text: str, positions: Positions) -> Floats:
        """The scores of the texts at `positions`, shape (len(positions),)."""
        return self.document_scores(query_text)[positions]


def best_positions(scores: Floats, k: int, allowed: Mask | None = None) -> tuple[Floats, Positions]:
    """The at most `k` highest positive scores and where they stand, best first, equal scores by position."""
    matching = np.flatnonzero(scores > 0 if allowed is None else (scores > 0) & allowed)
    values = scores[matching]
    if 0 < k < len(matching):
        threshold = np.partition(values, len(values) - k)[len(values) - k]
        above = np.flatnonzero(values > threshold)
        level = np.flatnonzero(values == threshold)[: k - len(above)]
        kept = np.sort(np.concatenate([above, level]))
        matching, values = matching[kept], values[kept]
    order = np.argsort(-values, kind="stable")[: max(0, k)]
    return values[order], matching[order].astype(np.int64)


def _weights(postings: Postings, statistics: LexicalStatistics, config: LexicalConfig) -> Floats:
    """The score that each posting adds to its text, shape (P,)."""
    # A term without a frequency occurs in deleted rows only: whatever it weighs is never seen.
    worth = _inverse_frequencies(postings.terms, statistics, config)[0].astype(np.float32)
    length = postings.lengths[postings.positions] / (statistics.average_length or 1.0)
    counts = postings.counts.astype(np.float64)
    saturation = counts / (config.k1 * ((1 - config.b) + config.b * length) + counts)
    return (np.repeat(worth, np.diff(postings.offsets)) * saturation).astype(np.float32)


def _inverse_frequencies(terms: pa.StringArray, statistics: LexicalStatistics, config: LexicalConfig
                         ) -> tuple[npt.NDArray[np.float64], Mask]:
    """Inverse document frequency of each term, and whether the catalogue knows it."""
    found = pc.index_in(terms, value_set=statistics.terms)
    known = pc.is_valid(found).to_numpy(zero_copy_only=False)
    frequencies = np.ones(len(terms), dtype=np.float64)
    frequencies[known] = statistics.document_frequencies[pc.drop_null(found).to_numpy()]
    odds = (statistics.documents - frequencies + 0.5) / (frequencies + 0.5)
    worth = np.log(1 + odds) if config.method == "lucene" else np.log(np.maximum(odds, 1))
    return worth, known


def _engine(postings: Postings, weights: Floats, config: LexicalConfig) -> Any:
    """A bm25s index that holds the given weights, as its own `load` would set it up."""
    import bm25s

    engine = bm25s.BM25(k1=config.k1, b=config.b, method=config.method)
    engine.scores = {"data": weights, "indices": postings.positions, "indptr": postings.offsets,
                     "num_docs": len(postings.lengths)}
    engine.nonoccurrence_array = None
    return engine


def _live_frequencies(postings: Postings, mask: Mask) -> npt.NDArray[np.int64]:
    if len(mask) != len(postings.lengths):
        raise LexicalError(f"a mask of {len(mask)} live rows for a segment of {len(postings.lengths)}")
    term = np.repeat(np.arange(len(postings.terms)), np.diff(postings.offsets))
    return np.bincount(term[mask[postings.positions]], minlength=len(postings.terms)).astype(np.int64)


def _pack_terms(terms: pa.StringArray) -> npt.NDArray[np.uint8]:
    return np.frombuffer("\n".join(str(term) for term in terms.to_pylist()).encode(), dtype=np.uint8)


def _unpack_terms(packed: npt.NDArray[np.uint8], path: Path) -> pa.StringArray:
    try:
        text = packed.tobytes().decode()
    except UnicodeDecodeError as error:
        raise LexicalError(f"{path}: the vocabulary is not UTF-8: {error}") from None
    return pa.array(text.split("\n") if text else [], pa.string())


def _read_arrays(path: Path, names: Sequence[str]) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in names}
    except (OSError, KeyError, ValueError, EOFError, BadZipFile) as error:
        raise LexicalError(f"{path}: not a file of lexical arrays ({error}); rebuild the segment") from None

"""Every system's score of every candidate book for every user of the goodbooks benchmark, as matrices (U, E).

Collaborative systems read all that is known of a user; text systems the context of the pairs. All were fitted to
training users alone, so the scores of validation and test users are out of fold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys_ray.artifacts import Artifact
from recsys_ray.config import fingerprint
from recsys_ray.data.reranker_pairs import POLICIES
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.models.text_encoder import TextEncoderConfig
from recsys_ray.ranking.histories import Histories, Sequences
from recsys_ray.ranking.train_recommenders import open_recommender, scored_chunks
from recsys_ray.retrieval.lexical import Bm25Segment, LexicalConfig, build_postings, global_statistics
from recsys_ray.training.sequence import open_sequence_model

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
POSITIVE = "positive"


@dataclass(frozen=True)
class Panel:
    """The users of one split that are judged: U users, E candidate books by place."""

    users: tuple[str, ...]
    contexts: list[str]
    known: Sequences
    allowed: npt.NDArray[np.bool_]          # (U, E): not known to the user
    rows: dict[str, list[Ints]]             # positive or a policy -> places of each user's books

    def __len__(self) -> int:
        return len(self.users)

    def first(self, most: int) -> Panel:
        """The same of the first `most` users."""
        return Panel(self.users[:most], self.contexts[:most], self.known.take(range(min(most, len(self)))),
                     self.allowed[:most], {name: books[:most] for name, books in self.rows.items()})

    def pairs(self, policy: str) -> tuple[Ints, Ints, Ints]:
        """(user, book, label) of the rows under one policy of negatives."""
        user, book, label = [], [], []
        for value, name in ((1, POSITIVE), (0, policy)):
            for row, books in enumerate(self.rows[name]):
                user.append(np.full(len(books), row))
                book.append(books)
                label.append(np.full(len(books), value))
        found = [np.concatenate(one).astype(np.int64) for one in (user, book, label)]
        order = np.lexsort((found[1], found[0]))
        return found[0][order], found[1][order], found[2][order]

    def union(self) -> tuple[Ints, Ints]:
        """(user, book) of the rows under any policy, each once."""
        parts = [self.pairs(policy)[:2] for policy in POLICIES]
        both = np.unique(np.stack([np.concatenate([one[axis] for one in parts]) for axis in (0, 1)]), axis=1)
        return both[0], both[1]


@dataclass(frozen=True)
class Books:
    """The candidate books: E places among all items."""

    ids: list[str]
    texts: list[str]
    places: Ints


def read_books(pairs: Artifact, histories: Histories) -> Books:
    """The eligible items and their texts."""
    items = pairs.table("items.parquet", ["product_id", "text", "eligible"])
    eligible = items.filter(items["eligible"])
    place = {item: at for at, item in enumerate(histories.items)}
    ids = eligible["product_id"].to_pylist()
    return Books(ids, eligible["text"].to_pylist(), np.array([place[one] for one in ids], dtype=np.int64))


def read_panel(pairs: Artifact, split: str, histories: Histories, books: Books, most: int) -> Panel:
    """The first `most` users of a split of the pairs by id, with the rows of all policies."""
    table = pa.concat_tables(pairs.tables(f"pairs/{split}/", ["query_id", "query", "product_id", "origin"]))
    asked = histories.asked[split]
    row_of = {user: row for row, user in enumerate(asked.known.users)}
    place = {book: at for at, book in enumerate(books.ids)}
    rows: dict[str, dict[str, list[int]]] = {}
    contexts: dict[str, str] = {}
    for user, context, book, origin in zip(*(table[name].to_pylist() for name in table.column_names), strict=True):
        rows.setdefault(user, {}).setdefault(origin, []).append(place[book])
        contexts[user] = context
    users = sorted(user for user in rows if user in row_of)[:most]
    taken = np.array([row_of[user] for user in users], dtype=np.int64)
    allowed = np.ones((len(users), len(books.ids)), dtype=bool)
    for row, at in enumerate(taken.tolist()):
        allowed[row] = ~np.isin(books.places, asked.seen[at])
    return Panel(tuple(users), [contexts[user] for user in users], asked.known.take(taken), allowed, {
        name: [np.array(rows[user].get(name, []), dtype=np.int64) for user in users] for name in (POSITIVE, *POLICIES)})


# --- scores ---------------------------------------------------------------------------------------
def collaborative(recommenders: Artifact, sequence: Artifact, panel: Panel, books: Books) -> dict[str, Floats]:
    """Popularity, ItemKNN, EASE and the sequence model."""
    found: dict[str, Floats] = {}
    for name in ("popularity", "item_knn", "ease"):
        model = open_recommender(recommenders, name)
        found[name] = np.concatenate([scores[:, books.places] for _, scores in scored_chunks(model, panel.known)])
    model_of_text = open_sequence_model(sequence)
    known = [panel.known.of(row) for row in range(len(panel))]
    found["sequence"] = model_of_text.score(known)[:, books.places]
    return found


def bm25_scores(contexts: Sequence[str], texts: Sequence[str]) -> Floats:
    """BM25 of the context's words in each book's text."""
    config = LexicalConfig()
    postings = build_postings(texts, config)
    segment = Bm25Segment(postings, global_statistics([postings]), config)
    return np.stack([segment.document_scores(context) for context in contexts])


def bi_encoder_scores(encoder: TextEncoderConfig, contexts: Sequence[str], texts: Sequence[str]) -> Floats:
    """Similarity of the context's vector and each book's."""
    model = build_text_encoder(encoder)
    return np.asarray(model.encode_queries(contexts) @ model.encode_documents(texts).T, dtype=np.float32)


def cached(path: Path, key: Any, make: Callable[[], Mapping[str, npt.NDArray[Any]]]) -> dict[str, npt.NDArray[Any]]:
    """The arrays of `make`, kept in a file named by what they depend on."""
    file = path.with_name(f"{path.name}-{fingerprint(key)}.npz")
    if not file.is_file():
        arrays = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        with partial.open("wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]
        partial.replace(file)
    with np.load(file, allow_pickle=False) as stored:
        return dict(stored)


def standardised(scores: Floats, allowed: npt.NDArray[np.bool_]) -> Floats:
    """Each user's scores with mean 0 and deviation 1 over the books that may be shown."""
    masked = np.where(allowed, scores, np.nan)
    mean, deviation = np.nanmean(masked, axis=1, keepdims=True), np.nanstd(masked, axis=1, keepdims=True)
    return np.asarray((scores - mean) / np.where(deviation > 0, deviation, 1.0), dtype=np.float32)


def ranks(scores: Floats, allowed: npt.NDArray[np.bool_]) -> Floats:
    """Each book's rank for each user among those that may be shown, as a share: 0 is the best."""
    order = np.argsort(np.argsort(-np.where(allowed, scores, -np.inf), axis=1, kind="stable"), axis=1, kind="stable")
    return np.asarray(order / allowed.sum(axis=1, keepdims=True), dtype=np.float32)

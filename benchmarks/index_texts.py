"""Real texts of products and real shoppers' queries for the index benchmark, and their vectors."""

from __future__ import annotations

import logging
import multiprocessing
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from recsys_ray.config import fingerprint
from recsys_ray.models.text_encoder import TextEncoder, TextEncoderConfig

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
CHUNK = 2000            # texts a worker gets at once
MIN_SENTENCE_CHARS = 25
SENTENCES = re.compile(r"(?<=[.!?])\s+|\n+|;\s+")


def product_texts(data: Path, rows: int) -> tuple[list[str], list[str]]:
    """`rows` different texts and the source of each: products and books first, then single sentences of products."""
    seen: dict[str, str] = {}
    for source, text in _all_texts(data):
        if text and text not in seen:
            seen[text] = source
            if len(seen) == rows:
                return list(seen), list(seen.values())
    raise ValueError(f"{data}: holds {len(seen)} different texts, {rows} are needed; set a smaller `rows`")


def _all_texts(data: Path) -> Iterator[tuple[str, str]]:
    esci = pq.read_table(data / "esci_us_subset/products.parquet",
                         columns=["title", "brand", "bullet_points", "description"]).to_pylist()
    icecat = pq.read_table(data / "chorus_icecat/products.parquet",
                           columns=["title", "supplier", "short_description"]).to_pylist()
    books = pq.read_table(data / "goodbooks/books.parquet", columns=["title", "authors"]).to_pylist()
    for row in esci:
        yield "esci", " ".join(str(row[name]) for name in ("title", "brand", "bullet_points") if row[name])
    for row in icecat:
        yield "icecat", " ".join(str(row[name]) for name in ("title", "supplier", "short_description") if row[name])
    for row in books:
        yield "books", f"{row['title']} {row['authors']}"
    for row in esci:
        for name in ("bullet_points", "description"):
            yield from (("esci_sentence", one) for one in _sentences(row[name]))
    for row in icecat:
        yield from (("icecat_sentence", one) for one in _sentences(row["short_description"]))


def _sentences(text: str | None) -> list[str]:
    return [one.strip() for one in SENTENCES.split(text or "") if len(one.strip()) >= MIN_SENTENCE_CHARS]


def shopper_queries(data: Path) -> list[str]:
    """The different queries of ESCI, Icecat and WANDS."""
    names = ("esci_us_subset", "chorus_icecat", "wands_queries")
    found = [pq.read_table(data / name / "queries.parquet", columns=["query"])["query"].to_pylist() for name in names]
    return list(dict.fromkeys(query for part in found for query in part))


def embedded(kind: str, texts: list[str], encoder: TextEncoderConfig, workers: int, work: Path) -> Floats:
    """Vectors (N, D) of documents or queries (`kind`), from the cache below `work` if they are there."""
    cache = work / f"{kind}-{fingerprint([texts, encoder.model_dump(mode='json')])}.npy"
    if not cache.is_file():
        work.mkdir(parents=True, exist_ok=True)
        tasks = [(kind, texts[start: start + CHUNK], encoder) for start in range(0, len(texts), CHUNK)]
        with multiprocessing.get_context("spawn").Pool(workers, initializer=_one_thread) as pool:
            parts = []
            for part in pool.imap(_encode, tasks):
                parts.append(part)
                log.info("%d of %d %s embedded", sum(map(len, parts)), len(texts), kind)
        partial = cache.with_suffix(".partial.npy")
        np.save(partial, np.concatenate(parts), allow_pickle=False)
        partial.rename(cache)
    vectors: Floats = np.load(cache, allow_pickle=False)
    return vectors


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _encode(task: tuple[str, list[str], TextEncoderConfig]) -> Floats:
    kind, texts, config = task
    encoder = _loaded(config)
    return np.asarray(encoder.encode_queries(texts) if kind == "queries" else encoder.encode_documents(texts))


@lru_cache(maxsize=1)
def _loaded(config: TextEncoderConfig) -> TextEncoder:
    """One encoder per worker process."""
    from recsys_ray.models.registry import build_text_encoder

    return build_text_encoder(config)

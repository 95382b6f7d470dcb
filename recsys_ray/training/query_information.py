"""How much the queries of training pairs say: one that names nothing teaches a retriever nothing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from recsys_ray.training.pair_shards import PairShards

Ints = npt.NDArray[np.int64]


def informative(pairs: PairShards, least: float) -> Ints:
    """The numbers of the pairs whose query brings at least `least` times what it takes to name a product."""
    return np.flatnonzero(query_information(pairs) >= least).astype(np.int64)


def query_information(pairs: PairShards) -> npt.NDArray[np.float64]:
    """Sum of ln(D / d_t) over the different tokens t of each query, divided by ln D, (N,).

    d_t of the D different positives hold the token t; one that none holds brings nothing. One of D products
    is ln D nats away: tokens that were independent would have to bring 1, real ones some multiple of it.
    """
    documents, held = 0, np.zeros(1, np.int64)
    for offsets, tokens in pairs.positive_tokens():
        found = np.bincount(_different(offsets, tokens)[1], minlength=len(held))
        found[:len(held)] += held
        documents, held = documents + len(offsets) - 1, found
    nats = np.log(max(documents, 2))
    worth = np.where(held > 0, nats - np.log(np.maximum(held, 1)), 0.0) / nats
    parts: list[npt.NDArray[np.float64]] = [np.zeros(0)]
    for offsets, tokens in pairs.query_tokens():
        texts, different = _different(offsets, tokens)
        known = different < len(worth)
        said = np.bincount(texts[known], weights=worth[different[known]], minlength=len(offsets) - 1)
        parts.append(said.astype(np.float64))
    return np.concatenate(parts)


def _different(offsets: Ints, tokens: npt.NDArray[np.int32]) -> tuple[Ints, Ints]:
    """(text, token) of every different token of each text, text i from offsets[i] to offsets[i + 1]."""
    size = int(tokens.max(initial=0)) + 1
    texts = np.repeat(np.arange(len(offsets) - 1, dtype=np.int64), np.diff(offsets))
    return np.divmod(np.unique(texts * size + tokens[offsets[0]:offsets[-1]]), size)

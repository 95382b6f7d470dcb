"""Validation while training: queries of the valid split against a small catalogue of their products and others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from recsys_ray.config import Config
from recsys_ray.training.pair_shards import PairShards

Tokens = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]
Ranks = npt.NDArray[np.float64]
TEXTS_AT_ONCE = 256
QUERIES_AT_ONCE = 1024


class MiniCatalogueConfig(Config):
    """How large the validation is, and the figure that decides which weights are best."""

    queries: int = Field(default=500, ge=1)
    products: int = Field(default=5000, ge=2)       # theirs and, to fill up, products of training pairs
    cutoffs: tuple[int, ...] = (1, 10, 100)
    objective: str = "mrr"                          # or recall@<one of the cutoffs>


@dataclass(frozen=True)
class MiniCatalogue:
    """Q tokenised queries, P tokenised products, and which product group answers which query."""

    queries: list[Tokens]
    answers: Ints           # (Q,) group of the query's product
    documents: list[Tokens]
    groups: Ints            # (P,)

    def evaluate(self, encode: Callable[[Sequence[Tokens]], Tensor], cutoffs: Sequence[int]) -> dict[str, float]:
        """recall@k and mrr of the first product of the query's group, by the inner product of embeddings."""
        return figures(self.ranks(encode), cutoffs)

    @torch.no_grad()
    def ranks(self, encode: Callable[[Sequence[Tokens]], Tensor]) -> Ranks:
        """The rank, from 1, of the best product that answers each query, (Q,); equal scores count against it."""
        query_QD, document_PD = (_embed(encode, texts) for texts in (self.queries, self.documents))
        return self.ranks_by(lambda rows: query_QD[rows] @ document_PD.T)

    def ranks_by(self, score: Callable[[slice], Tensor]) -> Ranks:
        """As `ranks`, by the scores (q, P) that `score` gives for some of the queries."""
        found = []
        for start in range(0, len(self.queries), QUERIES_AT_ONCE):
            scores = score(slice(start, start + QUERIES_AT_ONCE))
            groups, answers = (torch.from_numpy(one).to(scores.device) for one in (self.groups, self.answers))
            right = groups[None, :] == answers[start:start + QUERIES_AT_ONCE, None]
            best = scores.masked_fill(~right, -torch.inf).max(dim=1, keepdim=True).values
            found.append(((scores >= best) & ~right).sum(dim=1) + 1)
        return np.asarray(torch.cat(found).cpu().numpy(), dtype=np.float64)


def figures(ranks: Ranks, cutoffs: Sequence[int]) -> dict[str, float]:
    """recall@k for each cutoff, and mrr."""
    return {**{f"recall@{cutoff}": float((ranks <= cutoff).mean()) for cutoff in cutoffs},
            "mrr": float((1 / ranks).mean())}


def _embed(encode: Callable[[Sequence[Tokens]], Tensor], texts: Sequence[Tokens]) -> Tensor:
    order = np.argsort([-len(one) for one in texts], kind="stable")
    parts = [encode([texts[place] for place in order[start:start + TEXTS_AT_ONCE]])
             for start in range(0, len(order), TEXTS_AT_ONCE)]
    return torch.cat(parts)[torch.from_numpy(np.argsort(order))]


def draw_catalogue(valid: PairShards, train: PairShards, config: MiniCatalogueConfig, seed: int
                   ) -> MiniCatalogue | None:
    """Some queries of the valid split, their products, and products of training pairs; None without valid pairs."""
    if not len(valid):
        return None
    generator = np.random.default_rng([seed, 1])
    asked = generator.permutation(len(valid))[:config.queries].astype(np.int64)
    batch = valid.batch(asked, negatives=0)
    known: set[int] = set()
    documents: list[Tokens] = []
    groups: list[int] = []
    filling = generator.permutation(len(train))[:4 * config.products].astype(np.int64)
    for shards, places in ((valid, asked), (train, filling)):
        texts, rows = shards.documents_of(places)
        for text, row, group in zip(texts, rows.tolist(), shards.groups[places].tolist(), strict=True):
            if row not in known and (shards is valid or len(documents) < config.products):
                known.add(row)
                documents.append(text)
                groups.append(group)
    return MiniCatalogue(list(batch.query_tokens), batch.query_group, documents, np.array(groups, dtype=np.int64))

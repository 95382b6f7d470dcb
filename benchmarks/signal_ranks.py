"""Ranks by an encoder with BGE-M3's heads: its vector, that with BM25, and both with token weights and token vectors.

Token weights score the whole catalogue. Late interaction scores anew the best candidates of each query by
the other three, where the vector has its say meanwhile; a candidate that is not among them has the lowest of it.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field
from retriever_ranks import DOCUMENTS_A_CALL, QUERIES_A_BLOCK, Asked, Catalogue, Floats, rank_of

from recsys_ray.config import Config
from recsys_ray.models.bge_m3 import BgeM3Encoder
from recsys_ray.models.token_signals import Encoding, concat_encodings
from recsys_ray.retrieval.fusion import FusionConfig, fuse
from recsys_ray.retrieval.late_interaction import max_sim
from recsys_ray.retrieval.learned_sparse import SparsePostings


class SignalsConfig(Config):
    """How token weights and token vectors join the other scores.

    BM25 keeps its weight of `hybrid`; the three share the rest in BGE-M3's proportion, 1 : 0.3 : 1.
    """

    fusion: FusionConfig = FusionConfig(dense_weight=0.15, sparse_weight=0.05, multi_weight=0.15)
    rescored: int = Field(default=100, ge=1)        # candidates of a query that late interaction scores


def signal_ranks(encoder: BgeM3Encoder, catalogue: Catalogue, asked: Asked, hybrid: FusionConfig,
                 config: SignalsConfig) -> dict[str, list[int]]:
    """Ranks by the vector alone (dense), with BM25 (hybrid), and by everything (all)."""
    documents = concat_encodings([encoder.encode_all_documents(catalogue.texts[start:start + DOCUMENTS_A_CALL])
                                  for start in range(0, len(catalogue.texts), DOCUMENTS_A_CALL)])
    queries = encoder.encode_all_queries(asked.texts)
    assert documents.dense is not None
    assert queries.dense is not None
    assert documents.signals.sparse is not None
    postings = SparsePostings.build(documents.signals.sparse)
    found: dict[str, list[int]] = {"dense": [], "hybrid": [], "all": []}
    for start in range(0, len(asked.texts), QUERIES_A_BLOCK):
        block = queries.dense[start:start + QUERIES_A_BLOCK] @ documents.dense.T
        for at, dense in enumerate(block, start):
            lexical, target = catalogue.bm25.document_scores(asked.texts[at]), int(asked.target[at])
            whole = everything(dense, lexical, queries, documents, postings, at, config)
            for name, scores in (("dense", dense), ("hybrid", fuse(dense, lexical, hybrid)), ("all", whole)):
                found[name].append(rank_of(scores, target))
    return found


def everything(dense: Floats, lexical: Floats, queries: Encoding, documents: Encoding, postings: SparsePostings,
               at: int, config: SignalsConfig) -> Floats:
    """The scores of all products for query number `at`, (N,)."""
    fusion = config.fusion
    assert queries.signals.sparse is not None
    assert queries.signals.multi is not None
    assert documents.signals.multi is not None
    sparse = postings.document_scores(*queries.signals.sparse.row(at))
    first = fuse(dense, lexical, fusion.replace(dense_weight=fusion.dense_weight + fusion.multi_weight,
                                                multi_weight=0.0), sparse)
    best = np.argsort(-first, kind="stable")[:config.rescored].astype(np.int64)
    multi = np.full(len(dense), np.nan, dtype=np.float32)
    multi[best] = max_sim(queries.signals.multi.row(at), documents.signals.multi, best)
    return fuse(dense, lexical, fusion, sparse, multi)

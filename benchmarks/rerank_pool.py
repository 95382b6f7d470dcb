"""What judged queries are reranked from: of each the best products by BM25 and by vectors, and the judged ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from judged_answers import Problem, scored, stored_vectors
from retriever_ranks import Catalogue

from recsys_ray.data.pairs import draws
from recsys_ray.ranking.asked_lists import Asked
from recsys_ray.ranking.features import FEATURE_COLUMNS, Candidates
from recsys_ray.retrieval.fusion import FusionConfig, fuse, ranking
from recsys_ray.retrieval.segments import Index
from recsys_ray.schema import RERANKER_PAIR

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pool:
    """The products of one query that may be looked at: places in the catalogue with both scores."""

    query: str
    places: Ints
    dense: Floats
    lexical: Floats
    reached: npt.NDArray[np.bool_]      # by a retriever; the others are only judged

    def head(self, fusion: FusionConfig, row_ids: Ints, kept: int) -> tuple[Ints, Floats]:
        """(positions in the pool, their fused scores) of the `kept` best that a retriever reached, best first."""
        fused = fuse(self.dense, self.lexical, fusion)
        reached = np.flatnonzero(self.reached)
        order = reached[ranking(fused[reached], row_ids[self.places[reached]], kept)]
        return order, fused


def make_pools(encoder: Any, embeddings: Path, catalogue: Catalogue, problem: Problem, depth: int) -> dict[str, Pool]:
    """The pool of every query, by query id."""
    place = {product: at for at, product in enumerate(catalogue.product_ids)}
    judged: dict[str, set[int]] = {}
    for query, product in zip(problem.judgments["query_id"].to_pylist(), problem.judgments["product_id"].to_pylist(),
                              strict=True):
        if product in place:
            judged.setdefault(query, set()).add(place[product])
    texts = dict(zip(problem.query_ids, problem.texts, strict=True))
    found = {}
    for query_id, dense, lexical in scored(encoder, stored_vectors(embeddings, catalogue), catalogue, problem):
        words = ranking(lexical, catalogue.row_ids, depth)
        reached = np.union1d(ranking(dense, catalogue.row_ids, depth), words[lexical[words] > 0])
        places = np.union1d(reached, np.array(sorted(judged.get(query_id, ())), dtype=np.int64)).astype(np.int64)
        found[query_id] = Pool(texts[query_id], places, dense[places], lexical[places], np.isin(places, reached))
    return found


def save_pools(path: Path, pools: Mapping[str, Pool]) -> None:
    """Write pools as arrays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    joined = {name: np.concatenate([getattr(one, name) for one in pools.values()])
              for name in ("places", "dense", "lexical", "reached")}
    np.savez(path, ids=np.array(list(pools)), queries=np.array([one.query for one in pools.values()]),
             sizes=np.array([len(one.places) for one in pools.values()]), **joined)


def load_pools(path: Path) -> dict[str, Pool]:
    """The pools of a file."""
    with np.load(path, allow_pickle=False) as arrays:
        ends = np.cumsum(arrays["sizes"])[:-1]
        parts = [np.split(arrays[name], ends) for name in ("places", "dense", "lexical", "reached")]
        return {str(name): Pool(str(query), *of_query) for name, query, *of_query in zip(
            arrays["ids"], arrays["queries"], *parts, strict=True)}


def asked_of(query_id: str, pool: Pool, fusion: FusionConfig, catalogue: Catalogue, index: Index, kept: int,
             cross: Mapping[str, float], also: Sequence[str] = ()) -> Asked:
    """The `kept` best products of a query, and the products `also`, with the cross scores known of them by product."""
    head, fused = pool.head(fusion, catalogue.row_ids, kept)
    if also:
        named = set(also)
        more = [at for at, place in enumerate(pool.places.tolist()) if catalogue.product_ids[place] in named]
        rest = np.setdiff1d(np.array(more, dtype=np.int64), head)
        head = np.concatenate([head, rest[ranking(fused[rest], catalogue.row_ids[pool.places[rest]], len(rest))]])
    row_ids = catalogue.row_ids[pool.places[head]]
    products = [catalogue.product_ids[place] for place in pool.places[head].tolist()]
    candidates = Candidates(row_ids, {"dense": pool.dense[head], "lexical": pool.lexical[head], "fused": fused[head]},
                            index.rows(row_ids, FEATURE_COLUMNS))
    scores = np.array([cross.get(product, np.nan) for product in products], np.float32)
    return Asked(query_id, pool.query, candidates, products, None, scores)


def judged_lists(pools: Mapping[str, Pool], query_ids: Sequence[str], gains: Mapping[str, Mapping[str, float]],
                 catalogue: Catalogue, mined: int, seed: int, valid: Sequence[str]) -> dict[str, pa.Table]:
    """RERANKER_PAIR rows by split: the judged products of each query and `mined` reached ones that nobody judged."""
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "valid": []}
    for query_id in query_ids:
        pool, known, split = pools[query_id], gains[query_id], "valid" if query_id in valid else "train"
        free = [place for place in pool.places[pool.reached].tolist() if catalogue.product_ids[place] not in known]
        lot = np.argsort(draws([f"{query_id}:{place}" for place in free], seed), kind="stable")[:mined]
        listed = [(place, known[catalogue.product_ids[place]], "judged") for place in pool.places.tolist()
                  if catalogue.product_ids[place] in known] + [(free[at], 0.0, "mined") for at in lot.tolist()]
        rows[split] += [{"query_id": query_id, "query": pool.query, "product_id": catalogue.product_ids[place],
                         "text": catalogue.texts[place], "label": gain, "origin": origin, "split": split}
                        for place, gain, origin in listed]
    return {split: pa.Table.from_pylist(some, schema=RERANKER_PAIR) for split, some in rows.items()}

"""Judged queries of a shop -> (query, product text, gain) rows for a reranker, beside the products nobody judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from recsys_ray.artifacts import Artifact
from recsys_ray.data.candidate_lists import CandidateLists
from recsys_ray.data.judged_pairs import GradedQuery, JudgmentFolds, catalogue_rows_of
from recsys_ray.ids import row_id


class JudgedShop(JudgmentFolds):
    """A prepared shop and the judgments of its products."""

    prepared: Path                          # artefact of the prepare job: the texts as they are indexed
    uniform: int = Field(default=0, ge=0)   # of a query: products of the catalogue that nobody judged, gain 0
    mined: int = Field(default=0, ge=0)     # of a query: such products out of its candidate lists


def judged_rows(queries: Sequence[GradedQuery], prepared: Artifact, config: JudgedShop, mined: CandidateLists,
                counts: Counter[str]) -> list[dict[str, Any]]:
    """RERANKER_PAIR rows of the queries, a query's together; judged products outside the catalogue are counted.

    Unjudged products of the group of a judged one are no negatives. `mined` are candidates by query.
    """
    catalogue = _product_ids(prepared) if config.uniform else []
    drawn = {one.query_id: _unjudged(one, config, catalogue, mined.of(one.query_id)) for one in queries}
    names = sorted({name for one in queries for name in (*one.gains, *(name for name, _ in drawn[one.query_id]))})
    products = catalogue_rows_of(prepared, names)
    rows = []
    for one in queries:
        known = {name: gain for name, gain in sorted(one.gains.items()) if name in products}
        counts["judged products not in the catalogue"] += len(one.gains) - len(known)
        judged = {products[name]["group_id"] for name in known}
        listed = [(name, gain, "judged") for name, gain in known.items()] + [
            (name, 0.0, origin) for name, origin in drawn[one.query_id]
            if name in products and products[name]["group_id"] not in judged]
        counts[f"{one.split} users"] += 1
        for name, gain, origin in listed:
            counts[f"{one.split} rows, {origin}"] += 1
            rows.append({"query_id": one.query_id, "query": one.query, "product_id": name,
                         "text": products[name]["text"], "label": gain, "origin": origin, "split": one.split})
    return rows


def _product_ids(prepared: Artifact) -> list[str]:
    return sorted(name for table in prepared.tables("products/", ["product_id"])
                  for name in table["product_id"].to_pylist())


def _unjudged(query: GradedQuery, config: JudgedShop, catalogue: Sequence[str], mined: Sequence[str]
              ) -> list[tuple[str, str]]:
    random = np.random.default_rng(row_id(f"{config.seed}:negatives:{query.query_id}"))
    taken: dict[str, str] = {}
    for pool, count, origin in ((mined, config.mined, "mined"), (catalogue, config.uniform, "uniform")):
        places = random.permutation(len(pool))[:count + len(query.gains) + len(taken)] if count else ()
        free = [pool[place] for place in places if pool[place] not in query.gains and pool[place] not in taken]
        taken |= dict.fromkeys(free[:count], origin)
    return list(taken.items())

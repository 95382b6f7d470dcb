"""A shop of 40 products with reviews over three periods, its index, and candidates of reviews as queries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from recsys_ray.artifacts import Artifact, stage
from recsys_ray.config import Config
from recsys_ray.ids import bucket_of, row_ids
from recsys_ray.retrieval.catalogue_rows import row_hashes
from recsys_ray.retrieval.lexical import LexicalConfig, Postings, global_statistics
from recsys_ray.retrieval.segments import LEXICON, ROWS, segment_files, write_segment
from recsys_ray.retrieval.vector_index import VectorIndexConfig
from recsys_ray.schema import CANDIDATE, JUDGMENT, QUERY, REVIEW, conform

COUNT, BUCKETS, LISTED = 40, 2, 12
IDS = [f"p{number:02d}" for number in range(COUNT)]
COLOURS, NOUNS = ("red", "blue", "green", "oak"), ("sofa", "lamp", "chair", "shelf", "rug")
SPLITS = {"train": (0, 100), "valid": (100, 200), "test": (200, 300)}      # of times


@dataclass(frozen=True)
class Period:
    """Artefact roots."""

    prepared: Path
    index: Path
    valid: Path
    test: Path


def title(number: int) -> str:
    return f"{COLOURS[number % 4]} {NOUNS[number // 4 % 5]} {'large' if number >= 20 else 'small'}"


def reviews(seed: int = 0) -> list[dict[str, Any]]:
    """Reviews of popular products mostly; every review names its product's colour and noun."""
    rng = np.random.default_rng(seed)
    found = []
    for split, (start, end) in SPLITS.items():
        for number in range(120):
            product = int(COUNT * rng.random() ** 2)
            found.append({"review_id": f"{split}-{number:03d}", "product_id": IDS[product],
                          "row_id": int(row_ids([IDS[product]])[0]), "user_id": f"u{number % 30}", "split": split,
                          "rating": float(rng.integers(1, 6)), "text": f"the {title(product)}"[:-6],
                          "timestamp_ms": int(rng.integers(start, end)), "verified": bool(rng.integers(0, 2))})
    return found


def write_prepared(root: Path, rows: list[dict[str, Any]], fingerprint: str = "p") -> Path:
    table = conform(pa.Table.from_pylist(rows), REVIEW, "reviews")
    bucket = bucket_of(table["row_id"].to_numpy(), BUCKETS)
    splits = np.array(table["split"].to_pylist())
    with stage(root, "prepared", fingerprint) as staging:
        entries = [staging.write_table(f"reviews/{split}/bucket-{number:05d}.parquet",
                                       table.filter(pa.array((bucket == number) & (splits == split))))
                   for split in SPLITS for number in range(BUCKETS)]
        staging.commit(entries, config=Config(), facts={"num_buckets": BUCKETS})
    return root


def write_index(root: Path) -> Path:
    number = np.arange(COUNT)
    texts = [title(one) for one in number]
    given = {"row_id": row_ids(IDS), "product_id": IDS, "title": texts, "text": texts, "lexical_text": texts,
             "brand": [["Acme", "Bold"][one % 2] for one in number], "price_cents": 100 * (number + 1)}
    plain = pa.schema([one for one in ROWS if one.name != "row_hash"])
    rows = conform(pa.table(given).sort_by("row_id"), plain, "rows")
    rows = rows.append_column("row_hash", row_hashes(rows)).cast(ROWS)
    lexical, vector = LexicalConfig(), VectorIndexConfig()
    with stage(root, "index", "i") as staging:
        entries = write_segment(staging.path, "s0", rows, np.eye(COUNT, 8, dtype=np.float32), vector, lexical)
        global_statistics([Postings.load(staging.path / segment_files("s0")[1])]).save(staging.path / LEXICON)
        staging.commit([*entries, staging.entry(LEXICON)], config=Config(), facts={
            "encoder": {"dimension": 8}, "segments": ["s0"], "live_rows": COUNT,
            "vector": vector.model_dump(mode="json"), "lexical": lexical.model_dump(mode="json")})
    return root


def write_candidates(root: Path, split: str, seed: int = 1) -> Path:
    """Ten of the products of a colour and noun, and others, in an order that knows nothing; a fifth misses its own."""
    rng = np.random.default_rng(seed)
    asked = [one for one in reviews() if one["split"] == split]
    rows = []
    for one in sorted(asked, key=lambda review: str(review["review_id"])):
        own = IDS.index(one["product_id"])
        others = rng.permutation([place for place in range(COUNT) if place != own])[: LISTED - 1]
        listed = rng.permutation([*others, own] if rng.random() < 0.8 else others)
        scores = np.sort(rng.random(len(listed)))[::-1]
        words = set(str(one["text"]).split())
        rows += [{"query_id": one["review_id"], "row_id": int(row_ids([IDS[place]])[0]), "product_id": IDS[place],
                  "rank": rank, "score": float(score), "dense_score": float(rng.random()),
                  "lexical_score": float(len(words & set(title(place).split())))}
                 for rank, (place, score) in enumerate(zip(listed, scores, strict=True), 1)]
    queries = pa.table({"query_id": [one["review_id"] for one in asked], "query": [one["text"] for one in asked],
                        "unit_id": [one["product_id"] for one in asked]})
    judgments = pa.table({"query_id": [one["review_id"] for one in asked],
                          "product_id": [one["product_id"] for one in asked], "gain": [1.0] * len(asked)})
    with stage(root, "candidates", f"{split}{seed}") as staging:
        entries = [staging.write_table("candidates-00000.parquet", conform(pa.Table.from_pylist(rows), CANDIDATE, "c")),
                   staging.write_table("queries.parquet", conform(queries, QUERY, "q")),
                   staging.write_table("judgments.parquet", conform(judgments, JUDGMENT, "j"))]
        staging.commit(entries, config=Config())
    return root


def write_period(root: Path) -> Period:
    """Everything below `root`."""
    return Period(write_prepared(root / "prepared", reviews()), write_index(root / "index"),
                  write_candidates(root / "valid", "valid"), write_candidates(root / "test", "test"))


def candidates_of(artifact: Artifact) -> pa.Table:
    """All CANDIDATE rows."""
    return pa.concat_tables(artifact.tables("candidates-"))

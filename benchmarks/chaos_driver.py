"""The process that `benchmarks/chaos.py` kills: `python benchmarks/chaos_driver.py prepare|run TASK.json`.

prepare: a `prepared` artefact from a products table. run: embed and build the index, in one Ray.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recsys_ray.artifacts import stage
from recsys_ray.config import Config, fingerprint
from recsys_ray.ids import bucket_of, row_ids
from recsys_ray.schema import PRODUCT, PRODUCT_STATS, PRODUCT_TEXT, conform


def prepare(task: dict[str, Any]) -> None:
    """Publish `rows` products of a Parquet file with title, brand and bullet_points, the text repeated as needed."""
    table = pq.read_table(task["products"], columns=["product_id", "title", "brand", "bullet_points"]).to_pylist()
    rows = [{**table[number % len(table)], "copy": number // len(table)} for number in range(task["rows"])]
    names = [f"{row['product_id']}-{row['copy']}" for row in rows]
    texts = [f"{row['title']} {row['brand'] or ''} {row['bullet_points'] or ''} {row['copy'] or ''}" for row in rows]
    ids = row_ids(names)
    hashes = [hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts]
    products = pa.table({"row_id": ids, "product_id": names, "title": [row["title"] for row in rows],
                         "brand": [row["brand"] for row in rows], "group_id": ids})
    described = pa.table({"row_id": ids, "product_id": names, "text": texts, "lexical_text": texts,
                          "text_hash": hashes})
    stats = pa.table({"row_id": ids, "as_of_ms": [0] * len(ids), "num_reviews": [0] * len(ids)})
    buckets = bucket_of(ids, task["num_buckets"])
    with stage(task["prepared"], "prepared", fingerprint([task["rows"], task["num_buckets"]])) as staging:
        files = [
            staging.write_table(f"{folder}/bucket-{bucket:05d}.parquet",
                                conform(one, schema, folder).filter(pa.array(buckets == bucket)).sort_by("row_id"))
            for folder, one, schema in (("products", products, PRODUCT), ("product_text", described, PRODUCT_TEXT),
                                        ("product_stats", stats, PRODUCT_STATS))
            for bucket in range(task["num_buckets"])]
        staging.commit(files, config=Config(), facts={"num_buckets": task["num_buckets"], "template": "chaos"})


def run(task: dict[str, Any]) -> None:
    """Embed the prepared products and build their index below `root`."""
    from recsys_ray.retrieval.embed import EmbedConfig, embed_products
    from recsys_ray.retrieval.index_build import BuildIndexConfig, build_index
    from recsys_ray.runtime import RayConfig, connected

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    settings, root = RayConfig(progress=False), Path(task["root"])
    with connected(settings):
        embed_products(EmbedConfig.model_validate({
            "prepared": task["prepared"], "output": root / "embeddings", "encoder": task["encoder"],
            "workers": task["workers"], "unit_rows": task["unit_rows"], "ray": settings}))
        build_index(BuildIndexConfig.model_validate({
            "prepared": task["prepared"], "embeddings": root / "embeddings", "output": root / "index",
            "vector": {"kind": "flat"}, "rows_per_segment": task["rows_per_segment"], "ray": settings}))


if __name__ == "__main__":
    {"prepare": prepare, "run": run}[sys.argv[1]](json.loads(Path(sys.argv[2]).read_bytes()))

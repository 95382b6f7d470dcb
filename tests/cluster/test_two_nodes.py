"""The embedding job on a cluster of two nodes: losing one while it works loses nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

REPO = Path(__file__).resolve().parents[2]

# In a process of its own: the cluster has its own ports and must not meet the Ray of the other tests.
DRIVER = """
import hashlib, json, sys, threading, time
from pathlib import Path

import pyarrow as pa
import ray
from ray.cluster_utils import Cluster

from recsys_ray.artifacts import stage
from recsys_ray.config import Config
from recsys_ray.ids import bucket_of, row_ids
from recsys_ray.retrieval.embed import EmbedConfig, embed_products
from recsys_ray.runtime import RayConfig
from recsys_ray.schema import PRODUCT_TEXT, conform

work, model = Path(sys.argv[1]), sys.argv[2]
names = [f"p{i}" for i in range(6000)]
texts = ["velvet sofa with brass legs " * 12 + name for name in names]
table = conform(pa.table({"row_id": row_ids(names), "product_id": names, "text": texts, "text_hash": [
    hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts]}), PRODUCT_TEXT, "texts")
buckets = bucket_of(row_ids(names), 4)
with stage(work / "prepared", "prepared", "x") as staging:
    files = [staging.write_table(f"product_text/bucket-{b:05d}.parquet", table.filter(pa.array(buckets == b)))
             for b in range(4)]
    staging.commit(files, config=Config(), facts={"num_buckets": 4})

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 128 << 20})
second = cluster.add_node(num_cpus=2, object_store_memory=128 << 20)
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False)

def finished_units():
    return len(list((work / "embeddings").rglob("shards/*.json")))

finished_at_loss = []

def lose_the_second_node():
    while finished_units() < 4:
        time.sleep(0.02)
    cluster.remove_node(second, allow_graceful=False)
    finished_at_loss.append(finished_units())

def alive_nodes():
    return sum(node["Alive"] for node in ray.nodes())

lost = threading.Thread(target=lose_the_second_node)
lost.start()
settings = EmbedConfig(prepared=work / "prepared", output=work / "embeddings", workers=3, unit_rows=64,
                       encoder={"model": model, "device": "cpu"}, ray=RayConfig(progress=False))
artifact = embed_products(settings)
lost.join()
artifact.verify()
rows = pa.concat_tables(artifact.tables("vectors/")).column("product_id").to_pylist()
deadline = time.monotonic() + 60  # the head counts a killed node as alive until its health check fails
while alive_nodes() > 1 and time.monotonic() < deadline:
    time.sleep(0.2)
found = {"rows": len(rows), "distinct": len(set(rows)), "alive": alive_nodes(),
         "finished_at_loss": finished_at_loss[0], "facts": artifact.manifest.facts}
(work / "found.json").write_text(json.dumps(found))
ray.shutdown()
cluster.shutdown()
"""


def test_a_node_is_lost_and_no_row_is(tmp_path: Path, tiny_text_model: Callable[..., Path]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    finished = subprocess.run([sys.executable, "-c", DRIVER, str(tmp_path), str(tiny_text_model())], cwd=REPO,
                              env=environment, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_bytes())  # Ray writes to the same standard output
    assert (found["rows"], found["distinct"], found["alive"]) == (6000, 6000, 1)
    assert found["finished_at_loss"] < 6000 // 64  # lost while there was work left
    assert found["facts"]["embedded_now"] == 6000
    assert found["facts"]["units_recomputed"] <= 12  # at most what the lost node had in hand and the queue behind it

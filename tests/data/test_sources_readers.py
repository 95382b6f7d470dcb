"""The readers through Ray, from local files and from a real S3 server."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from recsys_ray.data.sources import AmazonReviewsSource, SourceError, TableSource, file_states, load_table
from recsys_ray.data.sources.blocks import block_schema, pieces_of, read_piece
from recsys_ray.data.sources.files import find_files
from recsys_ray.data.sources.plan import recipes
from recsys_ray.schema import QUERY, RAW_PRODUCT

ROWS = 3_000


def meta(count: int = ROWS) -> bytes:
    lines = [json.dumps({"parent_asin": f"P{number}", "title": f"Item {number}", "store": "Acme"})
             for number in range(count)]
    lines[10] = "{broken"
    return ("\n".join(lines) + "\n").encode()


@pytest.mark.ray
def test_ray_streams_every_row_once(local_ray: None, tmp_path: Path) -> None:
    from recsys_ray.data.sources import read_products

    (tmp_path / "meta_A.jsonl").write_bytes(meta())
    (tmp_path / "meta_B.jsonl.gz").write_bytes(gzip.compress(meta(500).replace(b'"P', b'"Q')))
    dataset = read_products(AmazonReviewsSource(products=str(tmp_path)), split_bytes=20_000).materialize()
    table = pa.concat_tables(list(dataset.iter_batches(batch_size=None, batch_format="pyarrow")))
    assert dataset.num_blocks() > 5     # several tasks shared the plain file
    assert table.schema.equals(block_schema(RAW_PRODUCT))
    assert table.num_rows == ROWS + 500
    assert table["_error"].null_count == table.num_rows - 2
    ids = table["product_id"].drop_null().to_pylist()
    assert len(ids) == len(set(ids)) == table.num_rows - 2


@pytest.mark.ray
def test_ray_reads_parquet_and_csv(local_ray: None, tmp_path: Path) -> None:
    from recsys_ray.data.sources import read_products, read_queries

    pq.write_table(pa.table({"query_id": list(range(50)), "query": ["sofa"] * 50}), tmp_path / "q.parquet")
    (tmp_path / "p.csv").write_text("product_id,title\n1,Sofa\n2\n")
    source = TableSource(products=str(tmp_path / "p.csv"), queries=str(tmp_path / "q.parquet"))
    assert read_queries(source).count() == 50
    rows = sorted(read_products(source).take_all(), key=lambda row: row["_source"])
    assert [row["product_id"] for row in rows] == ["1", None]
    assert rows[1]["_error"].startswith("expected 2 cells")


def test_a_bad_source_fails_before_ray_is_needed(tmp_path: Path) -> None:
    from recsys_ray.data.sources import read_products

    with pytest.raises(SourceError, match="no such file"):
        read_products(TableSource(products=str(tmp_path / "gone.csv")))


# --- S3 -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The address of an S3 server of our own, with a bucket `shop` of a few files."""
    patch = pytest.MonkeyPatch()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"):
        patch.setenv(name, "testing")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    try:
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="shop")
        client.put_object(Bucket="shop", Key="raw/meta_X.jsonl.gz", Body=gzip.compress(meta()))
        client.put_object(Bucket="shop", Key="raw/meta_Y.jsonl", Body=meta(1_000).replace(b'"P', b'"Q'))
        client.put_object(Bucket="shop", Key="raw/empty.jsonl", Body=b"")
        client.put_object(Bucket="shop", Key="truth/meta_X.jsonl", Body=meta(20))
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.table({"qid": [1, 2], "query": ["sofa", "couch"]}), buffer)
        client.put_object(Bucket="shop", Key="queries/q.parquet", Body=buffer.getvalue().to_pybytes())
        yield endpoint
    finally:
        server.stop()
        patch.undo()


@pytest.mark.ray
def test_s3_files_are_found_and_read(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = AmazonReviewsSource(products="s3://shop/raw/meta_*", endpoint_url=bucket)
    [recipe] = recipes(source, "products")
    assert [file.path for file in recipe.files] == ["s3://shop/raw/meta_X.jsonl.gz", "s3://shop/raw/meta_Y.jsonl"]
    found = pa.concat_tables([block for file in recipe.files for piece in pieces_of(file, 10_000)
                              for block in read_piece(piece, recipe)])
    assert found.num_rows == ROWS + 1_000
    assert len(set(found["product_id"].drop_null().to_pylist())) == ROWS + 1_000 - 2
    assert found["_source"][0].as_py() == "s3://shop/raw/meta_X.jsonl.gz:1"
    assert all(len(str(state["state"])) >= 32 for state in file_states(source))     # the store's own content tags
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket)
    table = load_table("s3://shop/queries/", {"query_id": "qid"}, QUERY)
    assert table["query"].to_pylist() == ["sofa", "couch"]


@pytest.mark.ray
@pytest.mark.parametrize(("path", "message"), [
    ("s3://shop/gone.jsonl", "s3://shop/gone.jsonl: no such file"), ("s3://nowhere/x.jsonl", "no such file"),
    ("s3://shop/raw/empty.jsonl", r"raw/empty.jsonl: the file is empty"), ("s3://shop/truth/meta_X.jsonl", "truth"),
])
def test_s3_problems_are_named(bucket: str, path: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        find_files(path, bucket)


STREAM = """
import sys
from recsys_ray.data.sources import AmazonReviewsSource, TableSource, read_products, read_queries
from recsys_ray.runtime import RayConfig, connected

with connected(RayConfig(num_cpus=4, progress=False)):
    products = read_products(AmazonReviewsSource(products="s3://shop/raw/meta_*"), split_bytes=20_000)
    queries = read_queries(TableSource(queries="s3://shop/queries/q.parquet", query_columns={"query_id": "qid"}))
    sys.stdout.write(f"{products.count()} {queries.count()}")
"""


@pytest.mark.ray
def test_ray_workers_read_s3_with_what_the_environment_holds(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: workers inherit the environment that their Ray was started with."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket)
    done = subprocess.run([sys.executable, "-c", STREAM], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == f"{ROWS + 1_000} 2", done.stderr[-3000:]

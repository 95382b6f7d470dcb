"""What is checked before any row is read: files, columns, secrets, truth."""

from __future__ import annotations

import gzip
import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from recsys_ray.config import Config, ConfigError, load_config
from recsys_ray.data.sources import (
    AmazonReviewsSource,
    ClothingSource,
    EsciSource,
    GoodbooksSource,
    IcecatSource,
    SourceConfig,
    SourceError,
    TableSource,
    file_states,
    load_table,
)
from recsys_ray.data.sources.blocks import pieces_of
from recsys_ray.data.sources.files import byte_ranges, file_system, find_files, refuse_truth
from recsys_ray.data.sources.plan import recipes, tables_of
from recsys_ray.schema import JUDGMENT, QUERY

META = {"parent_asin": "P1", "title": "Serum", "store": "Acme"}
REVIEW = {"parent_asin": "P1", "asin": "V1", "user_id": "U", "rating": 5.0, "timestamp": 1_588_680_000_000}


def write_jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_parquet(path: Path, **columns: list[Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


# --- configuration --------------------------------------------------------------------------------
class Job(Config):
    source: SourceConfig


@pytest.mark.parametrize("source", [
    AmazonReviewsSource(products="p", reviews="r"), EsciSource(path="p"), IcecatSource(path="p", attributes=True),
    GoodbooksSource(path="p"), ClothingSource(path="p"), TableSource(products="p", product_columns={"title": "name"}),
])
def test_the_format_tells_the_families_apart(source: SourceConfig, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(Job(source=source).to_yaml())
    assert load_config(Job, tmp_path / "job.yaml").source == source


@pytest.mark.parametrize(("values", "message"), [
    ({"format": "amazon", "products": "p"}, "source"), ({"format": "esci", "folder": "p"}, "folder"),
    ({"format": "table"}, "name at least one of products"),
    ({"format": "table", "products": "p", "product_columns": {"titel": "name"}}, "did you mean 'title'"),
    ({"format": "table", "queries": "p", "query_columns": {"zzz": "name"}}, "there are query_id, query"),
])
def test_a_configuration_that_cannot_work_says_so(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(json.dumps({"source": values}))
    with pytest.raises(ConfigError, match=message):
        load_config(Job, tmp_path / "job.yaml")


def test_every_example_in_the_docstrings_is_a_valid_source() -> None:
    import yaml

    found = 0
    for cls in (AmazonReviewsSource, EsciSource, IcecatSource, GoodbooksSource, ClothingSource, TableSource):
        lines = [line.strip() for line in (cls.__doc__ or "").splitlines()]
        start = next(at for at, line in enumerate(lines) if line.startswith("format:"))
        example = yaml.safe_load("\n".join(line for line in lines[start:] if line))
        assert isinstance(TypeAdapter(SourceConfig).validate_python(example), cls)
        found += 1
    assert found == 6


# --- files ----------------------------------------------------------------------------------------
def test_a_path_may_be_a_file_a_folder_or_a_glob(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.jsonl", "_tmp/d.jsonl", ".hidden.jsonl", "notes.txt"):
        write_jsonl(tmp_path / name, META)
    def names(path: Path | str) -> list[str]:
        return [Path(file.path).name for file in find_files(str(path))]
    assert names(tmp_path) == ["a.jsonl.gz", "b.jsonl", "c.jsonl"]
    assert names(tmp_path / "?.jsonl*") == ["a.jsonl.gz", "b.jsonl"]
    assert names(tmp_path / "**/*.jsonl.gz") == ["a.jsonl.gz"]
    assert names(tmp_path / "b.jsonl") == ["b.jsonl"]
    assert names(f"file://{tmp_path}/b.jsonl") == ["b.jsonl"]


def test_a_name_with_brackets_is_a_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "shop [old].jsonl", META)
    assert [file.path for file in find_files(str(path))] == [str(path)]


def test_relative_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "a.jsonl", META)
    monkeypatch.chdir(tmp_path)
    assert find_files("a.jsonl")[0].path == str(tmp_path / "a.jsonl")     # a worker may run elsewhere


@pytest.mark.parametrize(("path", "message"), [
    ("gone.jsonl", "no such file"), ("gone/*.jsonl", "no such file"), ("empty.jsonl", r"the file is empty \(0 bytes\)"),
    ("empty.parquet", r"the file is empty \(0 bytes\)"), ("notes.txt", "found notes.txt"),
    ("http://host/a.csv", "cannot read http://"), ("s3://key:secret@bucket/a.csv", "must not hold credentials"),
])
def test_a_path_that_cannot_be_read_says_why(path: str, message: str, tmp_path: Path) -> None:
    for name in ("empty.jsonl", "empty.parquet"):
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(SourceError, match=message) as caught:
        find_files(path if "://" in path else str(tmp_path / path))
    assert "secret" not in str(caught.value)


def test_truth_is_out_of_reach(tmp_path: Path) -> None:
    truth = write_jsonl(tmp_path / "shop/truth/meta_Shop.jsonl", META)
    (tmp_path / "linked").symlink_to(truth.parent)
    (tmp_path / "innocent.jsonl").symlink_to(truth)
    for path in (truth, truth.parent, tmp_path / "linked", tmp_path / "innocent.jsonl", tmp_path / "shop/*/meta_*",
                 tmp_path / "shop/public/../truth/meta_Shop.jsonl", f"file://{truth}"):
        (tmp_path / "shop/public").mkdir(exist_ok=True)
        with pytest.raises(SourceError, match="truth"):
            recipes(AmazonReviewsSource(products=str(path)), "products")
        with pytest.raises(SourceError, match="truth"):
            recipes(TableSource(reviews=str(path)), "reviews")
    with pytest.raises(SourceError, match="truth"):
        refuse_truth("s3://bucket/shop/Truth/users.parquet")


def test_a_folder_that_holds_truth_is_refused_as_a_whole(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "shop/public/meta_Shop.jsonl", META)
    write_jsonl(tmp_path / "shop/truth/secret.jsonl", META)
    with pytest.raises(SourceError, match="truth"):
        recipes(AmazonReviewsSource(products=str(tmp_path / "shop")), "products")


def test_evaluation_may_read_the_queries_of_the_truth(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "truth/queries.jsonl", {"query_id": "1", "query": "sofa"})
    assert load_table(str(path), {}, QUERY).num_rows == 1
    assert recipes(TableSource(queries=str(path)), "queries")


def test_hf_paths_go_to_the_hub_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    class Hub:
        """Stands for the hub: no test may use the network."""

        def info(self, path: str) -> dict[str, Any]:
            return {"name": path, "size": 12, "type": "file", "blob_id": "abc"}

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Hub)
    system, inner = file_system("hf://datasets/owner/name/a.jsonl")
    assert isinstance(system, Hub)
    assert inner == "datasets/owner/name/a.jsonl"
    file = find_files("hf://datasets/owner/name@main/a.jsonl")[0]
    assert (file.path, file.state) == ("hf://datasets/owner/name@main/a.jsonl", "abc")


def test_the_state_of_the_files_changes_with_them(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "meta_X.jsonl", META)
    source = AmazonReviewsSource(products=str(path))
    before = file_states(source)
    assert before == file_states(source)
    assert before[0]["bytes"] == path.stat().st_size
    os.utime(path, ns=(1, 1_000_000_000))
    assert file_states(source) != before


# --- pieces ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(("size", "split"), [(1, 10), (10, 10), (11, 10), (99, 10), (12345, 7)])
def test_byte_ranges_cover_the_file(size: int, split: int) -> None:
    ranges = byte_ranges(size, split)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == size
    assert all(0 < stop - start <= split for start, stop in ranges)
    assert all(one[1] == two[0] for one, two in pairwise(ranges))


def test_pieces_follow_the_kind_of_file(tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl", *[META] * 100)
    packed = write_jsonl(tmp_path / "a.jsonl.gz", *[META] * 100)
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": list(range(100))}), table, row_group_size=10)
    def pieces(path: Path, split: int) -> list[tuple[int, int | None, int]]:
        return [(one.start, one.stop, one.rows_before) for one in pieces_of(find_files(str(path))[0], split)]
    assert len(pieces(plain, 1000)) == -(-plain.stat().st_size // 1000)
    assert pieces(packed, 10) == [(0, None, 0)]
    assert pieces(table, 1) == [(at, at + 1, at * 10) for at in range(10)]
    assert pieces(table, 1 << 30) == [(0, 10, 0)]


# --- columns --------------------------------------------------------------------------------------
def test_a_source_says_which_tables_it_has() -> None:
    assert tables_of(AmazonReviewsSource(products="p")) == ("products",)
    with pytest.raises(SourceError, match="'goodbooks' has no reviews here; it has products, interactions, tags"):
        recipes(GoodbooksSource(path="nowhere"), "reviews")


def test_an_amazon_file_of_another_kind_is_recognised(tmp_path: Path) -> None:
    reviews = write_jsonl(tmp_path / "X.jsonl", REVIEW)
    with pytest.raises(SourceError, match=r"X\.jsonl: no 'title' in the first lines.*found parent_asin, asin, user_id"):
        recipes(AmazonReviewsSource(products=str(reviews)), "products")
    with pytest.raises(SourceError, match=r"expected \.jsonl"):
        recipes(AmazonReviewsSource(products=str(write_parquet(tmp_path / "m.parquet", parent_asin=["a"]))), "products")


def test_an_amazon_folder_divides_by_name(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "meta_X.jsonl", META)
    write_jsonl(tmp_path / "X.jsonl.gz", REVIEW)
    source = AmazonReviewsSource(products=str(tmp_path), reviews=str(tmp_path))
    assert [Path(file.path).name for file in recipes(source, "products")[0].files] == ["meta_X.jsonl"]
    assert [Path(file.path).name for file in recipes(source, "reviews")[0].files] == ["X.jsonl.gz"]


@pytest.mark.parametrize(("content", "message"), [
    ("\n\n", "expected one JSON object a line, found no line"),
    ("<html>", "expected one JSON object a line, found not JSON"),
    ('[{"parent_asin": 1}]', "expected a JSON object, found list"),
])
def test_a_file_without_any_object_is_no_jsonl(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(SourceError, match=message):
        recipes(TableSource(products=str(tmp_path / "x.jsonl")), "products")


def test_a_missing_file_of_a_family_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"products\.parquet: no such file"):
        recipes(EsciSource(path=str(tmp_path)), "products")
    write_parquet(tmp_path / "queries.parquet", query_id=[1], text=["sofa"])
    with pytest.raises(SourceError, match=r"queries\.parquet: no column 'query'.*found query_id, text"):
        recipes(EsciSource(path=str(tmp_path)), "queries")
    (tmp_path / "judgments.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(SourceError, match=r"judgments\.parquet: not a readable Parquet file"):
        recipes(EsciSource(path=str(tmp_path)), "judgments")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_mapping_is_checked_against_the_columns(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"shop.{kind}"
    if kind == "csv":
        path.write_text("sku,name,price_eur\n1,Sofa,99\n")
    elif kind == "jsonl":
        write_jsonl(path, {"sku": "1", "name": "Sofa", "price_eur": 99})
    else:
        write_parquet(path, sku=["1"], name=["Sofa"], price_eur=[99])
    mapping = {"product_id": "sku", "title": "name", "price": "price"}
    with pytest.raises(SourceError, match=r"no column 'price' \(did you mean 'price_eur'\?\); found sku, name"):
        recipes(TableSource(products=str(path), product_columns=mapping), "products")
    with pytest.raises(SourceError, match="no column for our 'title'; found sku, name, price_eur"):
        recipes(TableSource(products=str(path), product_columns={"product_id": "sku"}), "products")
    [recipe] = recipes(TableSource(products=str(path), product_columns={**mapping, "price": "price_eur"}), "products")
    assert set(recipe.columns) >= {"sku", "name", "price_eur"}


def test_files_of_one_table_must_agree(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", product_id=["1"], title=["x"], brand=["b"])
    write_parquet(tmp_path / "b.parquet", product_id=["2"], title=["y"])
    with pytest.raises(SourceError, match=r"b\.parquet: 'brand' not in both this file and .*a\.parquet"):
        recipes(TableSource(products=str(tmp_path)), "products")
    write_jsonl(tmp_path / "c.jsonl", {"product_id": "3", "title": "z"})
    with pytest.raises(SourceError, match="one kind of file"):
        recipes(TableSource(products=str(tmp_path)), "products")


def test_a_wrong_delimiter_shows_in_the_message(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("product_id;title\n1;x\n")
    with pytest.raises(SourceError, match="no column for our 'product_id'; found product_id;title"):
        recipes(TableSource(products=str(tmp_path / "a.csv")), "products")
    assert recipes(TableSource(products=str(tmp_path / "a.csv"), delimiter=";"), "products")
    (tmp_path / "b.tsv").write_text("product_id\ttitle\n")
    with pytest.raises(SourceError, match="no row below the header"):
        recipes(TableSource(products=str(tmp_path / "b.tsv")), "products")


# --- small tables ---------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["j.csv", "j.jsonl", "j.parquet"])
def test_a_small_table_is_the_same_from_every_kind_of_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    rows = {"qid": [1, 2], "asin": ["a", "b"], "gain": [1.0, 0.1]}
    if name.endswith("csv"):
        path.write_text("qid,asin,gain\n1,a,1.0\n2,b,0.1\n")
    elif name.endswith("jsonl"):
        write_jsonl(path, *(dict(zip(rows, one, strict=True)) for one in zip(*rows.values(), strict=True)))
    else:
        write_parquet(path, **rows)
    table = load_table(str(path), {"query_id": "qid", "product_id": "asin"}, JUDGMENT)
    assert table.schema == JUDGMENT
    assert table.to_pylist() == [{"query_id": "1", "product_id": "a", "gain": 1.0, "label": None},
                                 {"query_id": "2", "product_id": "b", "gain": pytest.approx(0.1), "label": None}]


def test_a_small_table_with_a_bad_row_is_refused(tmp_path: Path) -> None:
    (tmp_path / "j.csv").write_text("query_id,product_id,gain\n1,a,1\n2,b,high\n,c,1\n")
    with pytest.raises(SourceError, match=r"j\.csv:3: gain: cannot read 'high' as a number \(2 bad row\(s\)"):
        load_table(str(tmp_path / "j.csv"), {}, JUDGMENT)
    with pytest.raises(SourceError, match="'gian' is none of our columns; did you mean 'gain'"):
        load_table(str(tmp_path / "j.csv"), {"gian": "gain"}, JUDGMENT)

"""Each family's rows under our names: hand-made files, and the real ones counted against their READMEs."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_ray.data.sources import (
    AmazonReviewsSource,
    ClothingSource,
    EsciSource,
    GoodbooksSource,
    GoodreadsSource,
    IcecatSource,
    SourceConfig,
    SourceError,
    TableSource,
    adapters,
    blocks,
)
from recsys_ray.data.sources.blocks import block_schema, pieces_of, read_piece, record_blocks
from recsys_ray.data.sources.config import TABLES
from recsys_ray.data.sources.lines import Record
from recsys_ray.data.sources.plan import recipes
from recsys_ray.data.sources.values import RowError

RealData = Callable[[str], Path]


def stream(source: SourceConfig, table: str, split_bytes: int = 1 << 25) -> Iterator[pa.Table]:
    for recipe in recipes(source, table):
        for file in recipe.files:
            for piece in pieces_of(file, split_bytes):
                for block in read_piece(piece, recipe):
                    assert block.schema == block_schema(TABLES[table])
                    assert 0 < block.num_rows <= recipe.batch_rows
                    yield block


def read(source: SourceConfig, table: str, split_bytes: int = 1 << 25) -> pa.Table:
    return pa.concat_tables(stream(source, table, split_bytes))


def jsonl(path: Path, *rows: dict[str, Any] | str) -> str:
    lines = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return str(path)


# --- Amazon Reviews 2023 --------------------------------------------------------------------------
PRODUCT = {
    "main_category": "All Beauty", "title": "Night Serum", "average_rating": 4.8, "rating_number": 10,
    "features": ["Calms", "Vegan"], "description": ["One.", "Two."], "price": 12.99,
    "images": [{"thumb": "t1", "large": "l1", "variant": "MAIN", "hi_res": None}, {"large": "l2", "hi_res": "h2"}],
    "videos": [], "store": "Acme", "categories": [], "parent_asin": "P1", "bought_together": None,
    "details": {"Color": "Clear", "Ingredients": "Aqua, Niacinamide", "Date First Available": "May 5, 2020", "N": 3},
}
REVIEW = {
    "rating": 5.0, "title": "Good", "text": "Works", "images": [], "asin": "V1", "parent_asin": "P1", "user_id": "U",
    "timestamp": 1_588_687_728_923, "helpful_vote": 2, "verified_purchase": True,
}


def products(path: Path, *rows: dict[str, Any] | str) -> list[dict[str, Any]]:
    return read(AmazonReviewsSource(products=jsonl(path / "meta_X.jsonl", *rows)), "products").to_pylist()


def reviews(path: Path, *rows: dict[str, Any] | str) -> list[dict[str, Any]]:
    source = AmazonReviewsSource(products="unused", reviews=jsonl(path / "X.jsonl.gz", *rows))
    return read(source, "reviews").to_pylist()


def test_an_amazon_product(tmp_path: Path) -> None:
    assert products(tmp_path, PRODUCT) == [{
        "product_id": "P1", "title": "Night Serum", "description": "One.\nTwo.", "features": ["Calms", "Vegan"],
        "brand": "Acme", "color": "Clear", "categories": ["All Beauty"], "ingredients": "Aqua, Niacinamide",
        "attributes": [("Color", "Clear"), ("Ingredients", "Aqua, Niacinamide"),
                       ("Date First Available", "May 5, 2020"), ("N", "3")],
        "price": "12.99", "released": "May 5, 2020", "image_urls": ["l1", "h2"],
        "_error": None, "_source": f"{tmp_path}/meta_X.jsonl:1",
    }]


def test_an_amazon_review(tmp_path: Path) -> None:
    [row] = reviews(tmp_path, REVIEW)
    assert len(row.pop("review_id")) == 32
    assert row == {
        "product_id": "P1", "variant_id": "V1", "user_id": "U", "rating": 5.0, "title": "Good", "text": "Works",
        "timestamp_ms": 1_588_687_728_923, "verified": True, "helpful_votes": 2,
        "_error": None, "_source": f"{tmp_path}/X.jsonl.gz:1",
    }


def test_nothing_counted_at_crawl_time_is_read(tmp_path: Path) -> None:
    [row] = products(tmp_path, {**PRODUCT, "average_rating": 4.321, "rating_number": 987654})
    assert "4.321" not in str(row)
    assert "987654" not in str(row)


@pytest.mark.parametrize(("change", "expected"), [
    ({"price": "$12.99"}, {"price": "$12.99"}), ({"price": "from 5"}, {"price": "from 5"}),
    ({"price": 7}, {"price": "7"}),
    ({"price": None}, {"price": None}), ({"details": None}, {"attributes": [], "color": None}),
    ({"details": '{"Brand": "B", "color": "Red"}', "store": None}, {"brand": "B", "color": "Red"}),
    ({"details": "free text"}, {"attributes": [("details", "free text")]}),
    ({"categories": ["Beauty", None, "Serums"]}, {"categories": ["Beauty", "Serums"]}),
    ({"images": {"hi_res": ["h", None], "large": ["l", "m"]}}, {"image_urls": ["h", "m"]}),
    ({"images": ["u", None, {"thumb": None}]}, {"image_urls": ["u"]}), ({"features": None}, {"features": None}),
    ({"description": "plain"}, {"description": "plain"}), ({"parent_asin": None}, {"product_id": None}),
    ({"title": "half \ud83d"}, {"title": "half \ufffd"}), ({"title": "nul \x00"}, {"title": "nul "}),
])
def test_the_shapes_that_amazon_fields_take(change: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    _, row = products(tmp_path, PRODUCT, {**PRODUCT, **change})
    assert {name: row[name] for name in expected} == expected
    assert row["_error"] is None


@pytest.mark.parametrize(("bad", "reason"), [
    ({**PRODUCT, "title": {"en": "x"}}, "title: expected text, found dict"), ("{broken", "not JSON"),
    ({**PRODUCT, "details": [1]}, "details: expected names and values"), ("[]", "expected a JSON object"),
    ({**PRODUCT, "images": {"hi_res": "u"}}, "images: expected lists"),
    ({**PRODUCT, "images": 3}, "images: expected a"),
    ({**PRODUCT, "categories": 3}, "categories: expected a list"), ({**PRODUCT, "parent_asin": "\ud800"}, "product_id"),
    ({**PRODUCT, "features": [{"a": 1}]}, "features: expected text"),
    ({**PRODUCT, "price": [1, {}]}, "price: expected"),
])
def test_a_bad_product_is_a_row_of_nulls_with_its_reason(bad: Any, reason: str, tmp_path: Path) -> None:
    first, row, last = products(tmp_path, PRODUCT, bad, {**PRODUCT, "parent_asin": "P2"})
    assert (first["product_id"], last["product_id"]) == ("P1", "P2")
    assert reason in row.pop("_error")
    assert row.pop("_source").endswith("meta_X.jsonl:2")
    assert set(row.values()) == {None}


def test_bad_reviews_do_not_get_an_id(tmp_path: Path) -> None:
    rows = reviews(tmp_path, REVIEW, {**REVIEW, "rating": "five"}, {**REVIEW, "timestamp": {}}, REVIEW)
    assert [bool(row["review_id"]) for row in rows] == [True, False, False, True]
    assert rows[0]["review_id"] == rows[3]["review_id"]     # the same review twice: de-duplication finds it


@pytest.mark.parametrize("name", ["user_id", "asin", "timestamp", "text", "title", "parent_asin"])
def test_reviews_that_differ_have_different_ids(name: str, tmp_path: Path) -> None:
    one, two = reviews(tmp_path, REVIEW, {**REVIEW, name: 12345})
    assert one["review_id"] != two["review_id"]


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from(sorted({**PRODUCT, **REVIEW})), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6)))
def test_no_object_breaks_the_adapters(record: dict[str, Any]) -> None:
    for table, adapt in (("products", adapters.amazon_product), ("reviews", adapters.amazon_review)):
        recipe = blocks.Recipe(table, TABLES[table], (), record=adapt)
        [block] = record_blocks([Record(record, None, "f:1", 10)], recipe)
        block.validate(full=True)
        assert block.num_rows == 1


def test_blocks_are_bounded_by_rows_and_by_bytes() -> None:
    recipe = blocks.Recipe("reviews", TABLES["reviews"], (), record=adapters.amazon_review, batch_rows=100)
    taken = 0

    def endless(size: int) -> Iterator[Record]:
        nonlocal taken
        while True:
            taken += 1
            yield Record(REVIEW, None, "f:1", size)

    stream = record_blocks(endless(10), recipe)
    assert [next(stream).num_rows for _ in range(3)] == [100, 100, 100]
    assert taken == 300     # a block is given away before the next row is read
    assert next(record_blocks(endless(blocks.BLOCK_BYTES // 4), recipe)).num_rows == 4


def test_a_large_file_in_pieces_equals_the_file_at_once(tmp_path: Path) -> None:
    rows = [{**REVIEW, "text": f"{number} " + "é" * (number % 97)} for number in range(5000)]
    path = jsonl(tmp_path / "X.jsonl", *rows, "{broken")
    source = AmazonReviewsSource(products="unused", reviews=path)
    whole, parts = read(source, "reviews"), read(source, "reviews", split_bytes=10_000)
    assert whole.num_rows == 5001
    assert parts.drop_columns("_source").to_pylist() == whole.drop_columns("_source").to_pylist()
    place = parts["_source"].to_pylist()[-1]
    assert ":byte " in place
    assert Path(path).read_bytes()[int(place.split(":byte ")[1]):].startswith(b"{broken")


# --- any table ------------------------------------------------------------------------------------
CSV = """sku,name,cat,price_eur,spec,when
1,"Sofa, red",Home > Sofas,"1.299,00 EUR","{""Legs"": 4}",2020-05-05
2,Couch,,from 5,,2020-05-06T10:00:00+02:00
,nameless,,,,
4,too,few
5,"open,,,,
6,Chair,Home,12,,
"""
COLUMNS = {"product_id": "sku", "title": "name", "categories": "cat", "price": "price_eur", "attributes": "spec",
           "released": "when"}


def test_any_csv(tmp_path: Path) -> None:
    (tmp_path / "shop.csv").write_text(CSV)
    source = TableSource(products=str(tmp_path / "shop.csv"), product_columns=COLUMNS, list_separator=">")
    rows = read(source, "products").to_pylist()
    assert [row["product_id"] for row in rows] == ["1", "2", None, None, None, "6"]
    assert rows[0]["title"] == "Sofa, red"
    assert rows[0]["categories"] == ["Home", "Sofas"]
    assert rows[0]["attributes"] == [("Legs", "4")]
    assert rows[0]["price"] == "1.299,00 EUR"
    assert [bool(row["_error"]) for row in rows] == [False, False, False, True, True, False]
    assert rows[3]["_error"].startswith("expected 6 cells, found 3")
    assert rows[5]["_source"].endswith("shop.csv:7")


def test_csv_jsonl_and_parquet_say_the_same(tmp_path: Path) -> None:
    table = pa.table({"sku": ["1", "2"], "stars": [5, 4], "at": [1_588_687_728, 1_588_687_729], "body": ["good", None]})
    pq.write_table(table, tmp_path / "r.parquet")
    jsonl(tmp_path / "r.jsonl", *table.to_pylist())
    (tmp_path / "r.tsv").write_text("sku\tstars\tat\tbody\n1\t5\t1588687728\tgood\n2\t4\t1588687729\t\n")
    columns = {"product_id": "sku", "rating": "stars", "timestamp_ms": "at", "text": "body"}
    found = [read(TableSource(reviews=str(tmp_path / name), review_columns=columns, time_unit="s"), "reviews")
             for name in ("r.parquet", "r.jsonl", "r.tsv")]
    assert found[0]["timestamp_ms"].to_pylist() == [1_588_687_728_000, 1_588_687_729_000]
    assert len(set(found[0]["review_id"].to_pylist())) == 2
    for other in found[1:]:
        assert other.drop_columns("_source").to_pylist() == found[0].drop_columns("_source").to_pylist()
    assert found[0]["_source"].to_pylist() == [f"{tmp_path}/r.parquet:1", f"{tmp_path}/r.parquet:2"]
    assert found[2]["_source"].to_pylist() == [f"{tmp_path}/r.tsv:2", f"{tmp_path}/r.tsv:3"]


def test_a_key_that_first_appears_late_is_read(tmp_path: Path) -> None:
    rows = [{"product_id": str(number), "title": "x"} for number in range(500)]
    path = jsonl(tmp_path / "p.jsonl", *rows, {"product_id": "late", "title": "x", "brand": "Late"})
    assert read(TableSource(products=path), "products")["brand"].to_pylist()[-1] == "Late"


def test_own_review_ids_are_kept(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "r.jsonl", {"id": "r1", "product_id": "1", "timestamp_ms": 1}, {"product_id": "1",
                                                                                          "timestamp_ms": 2})
    ids = read(TableSource(reviews=path, review_columns={"review_id": "id"}), "reviews")["review_id"].to_pylist()
    assert ids[0] == "r1"
    assert len(ids[1]) == 32


def test_bad_parquet_rows_keep_their_place(tmp_path: Path) -> None:
    ids = pa.array([b"a", b"\xff", None, b"d"], pa.binary()).view(pa.string())
    table = pa.table({"query_id": ids, "query": ["w", "x", "y", "z"]})
    pq.write_table(table, tmp_path / "q.parquet", row_group_size=1)
    rows = read(TableSource(queries=str(tmp_path / "q.parquet")), "queries", split_bytes=1).to_pylist()
    assert [row["query"] for row in rows] == ["w", None, None, "z"]
    assert [row["_error"] for row in rows] == [None, "query_id: not UTF-8 text", "query_id is missing", None]
    assert [row["_source"].rsplit(":", 1)[1] for row in rows] == ["1", "2", "3", "4"]


def test_damage_inside_a_parquet_file_is_an_error_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "q.parquet"
    pq.write_table(pa.table({"query_id": [str(number) for number in range(2000)], "query": ["sofa"] * 2000}), path,
                   write_page_checksum=True, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[3000] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"q\.parquet: damaged after row 0"):
        read(TableSource(queries=str(path)), "queries")


def test_events_from_a_log(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "log.jsonl", {"id": "e", "kind": "click", "t": "2020-05-05T12:00Z", "product_id": 7},
                 {"id": None, "kind": "click", "t": 1, "product_id": 7})
    source = TableSource(events=path, event_columns={"event_id": "id", "timestamp_ms": "t"})
    rows = read(source, "events").to_pylist()
    assert rows[0]["timestamp_ms"] == 1_588_680_000_000
    assert rows[1]["_error"] == "event_id is missing"


# --- the other families, small --------------------------------------------------------------------
def test_icecat_attributes_have_plain_names() -> None:
    sheet = {"t_print_technology": "Laser", "n_width": 38.0, "b_wifi": True, "t_operating_temperature__t_t_": "0 - 35",
             "n_x": 1.5, "t_x": "wide", "t_empty": "", "n_none": None}
    assert adapters.icecat_attributes(json.dumps(sheet)) == {
        "print technology": "Laser", "width": "38", "wifi": "yes", "operating temperature": "0 - 35", "x": "1.5, wide"}
    assert adapters.icecat_attributes(None) == {}
    assert adapters.icecat_attributes("broken {") == {"details": "broken {"}


def test_tags_join_through_the_goodreads_id(tmp_path: Path) -> None:
    pq.write_table(pa.table({"book_id": [1, 2], "goodreads_book_id": [900, 800]}), tmp_path / "books.parquet")
    pq.write_table(pa.table({"tag_id": [5, 6], "tag_name": ["fantasy", "to-read"]}), tmp_path / "tags.parquet")
    pq.write_table(pa.table({"goodreads_book_id": [800, 900, 900, 777, 800], "tag_id": [5, 5, 6, 5, 99],
                             "count": [3, 2, 1, 1, 1]}), tmp_path / "book_tags.parquet")
    rows = read(GoodbooksSource(path=str(tmp_path)), "tags").to_pylist()
    assert [(row["product_id"], row["tag"], row["count"]) for row in rows[:3]] == [
        ("2", "fantasy", 3), ("1", "fantasy", 2), ("1", "to-read", 1)]
    assert [row["_error"] for row in rows[3:]] == ["product_id is missing", "tag is missing"]


def test_adapters_name_what_they_cannot_use() -> None:
    with pytest.raises(RowError, match="details"):
        adapters.amazon_product({"details": 3})


# --- the other families, real ---------------------------------------------------------------------
def test_esci(real_data: RealData) -> None:
    source = EsciSource(path=str(real_data("esci_us_subset")))
    found = read(source, "products")
    assert found.num_rows == len(set(found["product_id"].to_pylist())) == 6_764
    assert found["_error"].null_count == 6_764
    assert found["description"].null_count == 3_388
    assert found["price"].null_count == 4_774
    prices = found["price"].drop_null().to_pylist()
    assert all(float(price) >= 0 and len(price.partition(".")[2]) <= 2 for price in prices)
    queries, judgments = read(source, "queries"), read(source, "judgments")
    assert queries.num_rows == 150      # with the 45 whose labels are withheld
    assert judgments.num_rows == 4_712
    gains = {(row["label"], round(row["gain"], 4)) for row in judgments.to_pylist()}
    assert gains == {("E", 1.0), ("S", 0.1), ("C", 0.01), ("I", 0.0)}
    assert set(judgments["product_id"].to_pylist()) <= set(found["product_id"].to_pylist())


@pytest.mark.parametrize("attributes", [False, True])
def test_icecat(real_data: RealData, attributes: bool) -> None:
    source = IcecatSource(path=str(real_data("chorus_icecat")), attributes=attributes)
    found = read(source, "products")
    assert found.num_rows == len(set(found["product_id"].to_pylist())) == 19_406
    assert found["_error"].null_count == 19_406
    assert found["description"].null_count == 721
    assert (found["attributes"].null_count == 0) is attributes
    row = found.filter(pa.compute.equal(found["product_id"], "3920564")).to_pylist()[0]
    assert (row["price"], row["released"], row["brand"]) == ("49.95", "2009-12-10T00:00:00Z", "Xerox")
    if attributes:
        assert ("print technology", "Laser printing") in row["attributes"]
        assert found["color"].null_count == 19_406 - 8_730
    assert read(source, "queries").num_rows == 135
    ratings = read(source, "judgments")
    assert ratings.num_rows == 2_568
    assert len(set(ratings["query_id"].to_pylist())) == 95
    assert set(ratings["gain"].to_pylist()) == {0.0, 1.0, 2.0, 3.0}


def test_goodbooks(real_data: RealData) -> None:
    source = GoodbooksSource(path=str(real_data("goodbooks")))
    books = read(source, "products")
    assert books.num_rows == len(set(books["product_id"].to_pylist())) == 10_000
    assert books.to_pylist()[0]["title"] == "The Hunger Games (The Hunger Games, #1)"
    kinds: dict[str, int] = {}
    for block in stream(source, "interactions"):
        assert block["_error"].null_count == block.num_rows
        for pair in block["kind"].value_counts().to_pylist():
            kinds[pair["values"]] = kinds.get(pair["values"], 0) + pair["counts"]
    assert kinds == {"rating": 583_273, "to_read": 597_840}
    tags = read(source, "tags")
    assert tags.num_rows == 999_898
    assert tags["_error"].null_count == 999_898
    assert ("1", "favorites") in zip(tags["product_id"].to_pylist(), tags["tag"].to_pylist(), strict=True)


def test_clothing(real_data: RealData) -> None:
    counts: dict[str, int] = {}
    senders = set()
    for block in stream(ClothingSource(path=str(real_data("clothing"))), "images"):
        assert block["_error"].null_count == block.num_rows
        assert all(data[:2] == b"\xff\xd8" for data in block["data"].to_pylist())     # JPEG, and not decoded
        senders |= set(block["group_id"].to_pylist())
        for label in block["label"].to_pylist():
            counts[label] = counts.get(label, 0) + 1
    assert sum(counts.values()) == 5_163
    assert (counts["T-Shirt"], counts["Blouse"], len(counts)) == (1_011, 23, 18)
    assert len(senders) == 346


# --- Goodreads ------------------------------------------------------------------------------------
def goodreads(root: Path) -> SourceConfig:
    """The book source's own four files, with lists of structs in one place and plain lists in the other."""
    books = [{"book_id": "7", "title": "Emma", "description": "d", "authors": [{"author_id": "1", "role": ""},
              {"author_id": "404", "role": ""}], "popular_shelves": [{"name": "classics", "count": "3"}]},
             {"book_id": "8", "title": "Dune", "description": None, "authors": [], "popular_shelves": []}]
    pq.write_table(pa.Table.from_pylist(books), root / "reduced_books.parquet")
    pq.write_table(pa.table({"author_id": [1, 2], "name": ["Jane Austen", "B"]}), root / "new_authors.parquet")
    pq.write_table(pa.table({"book_id": ["7"], "text": ["all of it"]}), root / "book_texts_reduced.parquet")
    pq.write_table(pa.table({
        "user_id": ["u", "u"], "book_id": ["7", "8"], "rating": [5, 0],
        "date_added": ["Tue Oct 17 09:40:11 -0700 2017", "yesterday"]}), root / "reduced_interactions.parquet")
    return GoodreadsSource(path=str(root))


def test_goodreads_files_under_our_names(tmp_path: Path) -> None:
    source = goodreads(tmp_path)
    books = read(source, "products").to_pylist()
    assert [(row["product_id"], row["brand"], row["description"]) for row in books] == [
        ("7", "Jane Austen", "d"), ("8", None, None)]
    assert [(row["product_id"], row["tag"], row["count"]) for row in read(source, "tags").to_pylist()] == [
        ("7", "classics", 3)]
    met = read(source, "interactions").to_pylist()
    assert [(row["kind"], row["rating"], row["timestamp_ms"]) for row in met] == [
        ("rating", 5.0, 1508258411000), ("to_read", None, None)]
    assert [row["text"] for row in read(source, "texts").to_pylist()] == ["all of it"]


def test_goodreads_files_with_plain_lists(tmp_path: Path) -> None:
    source = goodreads(tmp_path)
    pq.write_table(pa.table({"book_id": [7], "title": ["Emma"], "authors": [[1, 2]],
                             "popular_shelves": [["classics", "war"]]}), tmp_path / "reduced_books.parquet")
    assert read(source, "products").to_pylist()[0]["brand"] == "Jane Austen, B"
    assert [(row["tag"], row["count"]) for row in read(source, "tags").to_pylist()] == [
        ("classics", None), ("war", None)]
    (tmp_path / "new_authors.parquet").unlink()
    with pytest.raises(SourceError, match="new_authors"):
        recipes(source, "products")

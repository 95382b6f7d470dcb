"""What a text says of a garment, what it denies, imitates or says of another, and the tables it is read by."""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recsys_ray.data.attribute_schema import NAMES, AttributeSchemaError, load_schema
from recsys_ray.data.attributes import AttributeReader, category_of, read_attributes, split_of_group, value_of
from recsys_ray.data.demo_shop import DemoShopConfig, make_demo_shop
from recsys_ray.schema import ATTRIBUTE_ROW

SCHEMA = load_schema()
READER = AttributeReader(SCHEMA)
REPO = Path(__file__).parents[2]


def said(text: str) -> dict[str, list[str]]:
    return {name: [one.value for one in found] for name, found in READER.named(text).items()}


def read(**product: Any) -> dict[str, str]:
    return {name: one.value for name, one in READER.read({"product_id": "p", **product}).items()}


@pytest.mark.parametrize(("text", "name", "values"), [
    ("Top with no sleeves", "sleeve", ["sleeveless"]),                      # a denial that is a value
    ("not sleeveless", "sleeve", []), ("Not leather", "material", []), ("leather-free", "material", []),
    ("no leather or denim", "material", []), ("not made of real leather", "material", []),
    ("not wool but cotton", "material", ["cotton"]), ("no fuss, cotton", "material", ["cotton"]),
    ("no-iron cotton", "material", ["cotton"]), ("not just cotton", "material", ["cotton"]),
    ("faux leather", "material", ["faux leather"]), ("faux silk", "material", []), ("velvet look", "material", []),
    ("wool with leather trim", "material", ["wool"]), ("without pattern", "pattern", ["solid"]),
    ("Denim. Pair it with leather boots and a wool coat", "material", ["denim"]),
    ("V-Neck", "neckline", ["v neck"]), ("crew socks", "neckline", []), ("3/4 sleeves", "sleeve", ["three quarter"]),
    ("short sleeve shirt", "category2", ["shirt"]), ("cargo shorts", "category2", ["shorts"]),
    ("shirt dresses", "category2", ["dress"]), ("dress shoes", "category2", []), ("check our size", "pattern", []),
])
def test_what_a_text_says(text: str, name: str, values: list[str]) -> None:
    assert said(text).get(name, []) == values


@pytest.mark.parametrize(("text", "material"), [
    ("20% cotton, 80% polyester", "polyester"), ("60% cotton 40% polyester", "cotton"),
    ("denim: 98% cotton, 2% elastane", "denim"), ("Cotton 30%, Wool 70%", "wool"),
])
def test_of_a_composition_the_largest_share_counts_and_fabrics_before_fibres(text: str, material: str) -> None:
    assert read(title=f"Trousers, {text}")["material"] == material


def test_the_surest_place_decides() -> None:
    found = READER.read({
        "product_id": "p", "title": "Acme Wool Polo with V-Neck or Crew Neck", "brand": "Acme Wool",
        "categories": ["Clothing", "Shirts > Polos"], "features": ["Crew neck"],
        "attributes": [("Neckline", "Square"), ("Sleeve", "")]})
    assert {name: one.value for name, one in found.items()} == {"category2": "polo", "neckline": "square"}
    assert found["neckline"].evidence("neckline") == 'neckline: square, in field Neckline ("Square")'
    two = read(title="Knit in V-Neck or Crew Neck", features=["Scoop neck"])
    assert two["neckline"] == "scoop"           # the title names two, so the features are asked


def test_a_kind_is_read_only_where_there_are_garments() -> None:
    assert "category2" not in read(title="Sofa jacket", categories=["Home", "Slipcovers"])
    assert read(title="Rain jacket", categories=["Women", "New arrivals"])["category2"] == "jacket"
    assert read(title="Rain jacket")["category2"] == "jacket"
    assert read(title="Wool trousers", categories=["Men", "Pants", "Dress"])["category2"] == "pants"
    assert read(title="Quilted vest", categories=["Women", "Coats, Jackets & Vests"])["category2"] == "vest"
    assert read(title="Quilted", categories=["Women", "Vests & Jackets"])["category2"] == "vest"
    assert "category2" not in read(title="Leather Belt for Jeans")
    assert read(title="Trench Coat with Belt")["category2"] == "coat"
    assert "category2" not in read(title="Garment Rack for Coats", categories=["Women"])


def test_graphic_is_a_pattern_and_no_kind() -> None:
    found = read(title="Band logo", categories=["Men", "Graphic Tees"])
    assert found == {"category2": "graphic", "pattern": "graphic"} == read(categories=["Graphic"])
    assert read(title="Graphic Funny T-Shirt") == {"category2": "tee", "pattern": "graphic"}
    assert category_of("graphic") is None
    assert value_of(found, "category2") is None
    assert value_of(found, "pattern") == "graphic"
    assert category_of("tee") == "tee"


def test_rows_have_the_schema_and_evidence_of_each_value() -> None:
    products = pa.table({"product_id": ["a77_view1", "a77_view2", "b"], "title": ["Denim jacket", None, "?"]})
    rows = read_attributes(products, SCHEMA)
    assert rows.schema == ATTRIBUTE_ROW
    first, second, third = rows.to_pylist()
    assert (first["material"], len(first["evidence"])) == ("denim", 2)
    assert first["group_key"] == second["group_key"] == "a77_view1"
    assert (third["group_key"], third["evidence"]) == (None, [])


def test_a_field_that_no_value_knows_is_counted_for_the_audit() -> None:
    reader = AttributeReader(SCHEMA)
    reader.read({"product_id": "p", "title": "Shirt", "attributes": [("Fabric Type", "Unobtainium")]})
    assert reader.unknown == {("material", "unobtainium"): 1}


def test_splits_come_of_the_group_alone() -> None:
    keys = [f"g{number}" for number in range(2000)]
    split = [split_of_group(key, 7) for key in keys]
    assert split == [split_of_group(key, 7) for key in keys]
    assert 0.66 < split.count("train") / len(split) < 0.74
    assert split != [split_of_group(key, 8) for key in keys]


def test_what_is_read_is_what_was_planted(tmp_path: Path) -> None:
    """Nine in ten products of a value have one planted value; furniture, books and bottles have no kind."""
    make_demo_shop(DemoShopConfig(output=tmp_path, products=900, reviews=1000, queries=0, image_products=0))
    truth = {row["product_id"]: row for row in pq.read_table(tmp_path / "truth/products.parquet").to_pylist()}
    found: dict[str, dict[str, Counter[str]]] = {name: defaultdict(Counter) for name in NAMES}
    for line in gzip.decompress((tmp_path / "public/meta_Demo_Shop.jsonl.gz").read_bytes()).decode().splitlines():
        try:
            row = json.loads(line)
            planted = truth[row["parent_asin"]]
        except (ValueError, KeyError):      # planted dirt
            continue
        said = READER.read({"product_id": "p", "title": row.get("title"), "categories": row.get("categories"),
                            "features": row.get("features"), "attributes": list((row.get("details") or {}).items()),
                            "description": "\n".join(row.get("description") or [])})
        if planted["department"] != "fashion":
            assert "category2" not in said, row
            continue
        for name, one in said.items():
            found[name][one.value][planted["kind" if name == "category2" else name]] += 1
    for name, values in found.items():
        counts = [own for value, own in values.items() if value not in ("dress", "hooded")]     # several kinds, none
        assert sum(map(Counter.total, counts)) > 80, name
        assert sum(max(own.values()) for own in counts) > 0.9 * sum(map(Counter.total, counts)), name


# --- tables ---------------------------------------------------------------------------------------
def test_a_shop_adds_words_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "material.yaml").write_text("values: {cork: [cork fabric], denim: [dungaree cloth]}\n")
    reader = AttributeReader(load_schema(["packaged", tmp_path]))
    assert [one.value for one in reader.named("cork fabric")["material"]] == ["cork"]
    assert "material" not in reader.named("denim")      # a value that comes again replaces what was there
    assert reader.schema.digest != SCHEMA.digest


@pytest.mark.parametrize(("name", "text", "message"), [
    ("colour.yaml", "values: {}", "not an attribute table"),
    ("material.yaml", "values: {cork: []}", "values.cork: no words"),
    ("material.yaml", "values: {cork: [denim]}", "'denim' belongs to"),
    ("material.yaml", "valeus: {}", "valeus"),
    ("language.yaml", "negation: {before: [no]}", 'write "no"'),
])
def test_bad_tables_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(AttributeSchemaError, match=message):
        load_schema(["packaged", tmp_path])


def test_the_tables_share_nothing_with_the_demo_shop() -> None:
    """Attributes read with the generator's own words would be the truth they are measured by."""
    planted = yaml.safe_load((REPO / "recsys_ray/data/demo_shop/tables/fashion.yaml").read_text())
    for name in NAMES:
        theirs = planted["types"] if name == "category2" else planted["facets"][name]
        words = [one["words"] if isinstance(one, dict) else one for one in theirs.values()]
        spoken = {part.strip().lower() for one in words for side in one.split("|") for part in side.split(",")}
        ours = {word for phrases in SCHEMA.attributes[name].values.values() for word in phrases}
        assert not spoken <= ours
        assert len(ours) > 1.5 * len(spoken)
    for path in (REPO / "recsys_ray/data").glob("attribute*.py"):
        assert "demo_shop" not in path.read_text("utf-8")

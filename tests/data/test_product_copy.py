"""Copy that says what the fields say is believed; whatever is invented is named and set aside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from chat_server import Reply, Sent, chat_server

from recsys_ray.artifacts import stage
from recsys_ray.config import Config
from recsys_ray.data.llm_client import LlmConfig
from recsys_ray.data.llm_keywords import AnswerError
from recsys_ray.data.product_copy import CopyCheck, WriteCopyConfig, sheet_of, write_copy
from recsys_ray.schema import PRODUCT, conform

DRESS = {"row_id": 1, "product_id": "D1", "group_id": 1, "title": "Linen dress with V neck", "brand": "Meadow",
         "color": "navy", "features": ["Striped", "Pockets on both sides", "Length 98 cm"], "attributes": [],
         "description": "A light dress for warm evenings in the garden."}
SHEET = sheet_of(DRESS, 300)


@pytest.fixture(scope="module")
def check() -> CopyCheck:
    return CopyCheck()


def told(check: CopyCheck, copy: object, **values: object) -> str:
    return check.copy_of(SHEET, "t1", json.dumps({"id": "t1", "copy": copy, **values}))


def test_what_the_fields_say_is_believed(check: CopyCheck) -> None:
    good = "A navy linen dress by Meadow with a V neck and stripes, light for warm evenings; 98 cm long, with pockets."
    assert told(check, good) == good


@pytest.mark.parametrize(("copy", "reason"), [
    ("A navy silk dress with a V neck for warm evenings in the garden.", "material silk"),
    ("A linen dress with long sleeves for warm evenings in the garden.", "sleeve long"),
    ("A floral linen dress for warm evenings in the garden with pockets.", "pattern floral"),
    ("A red linen dress for warm evenings in the garden with pockets.", "says red"),
    ("An organic linen dress for warm evenings in the garden with pockets.", "says organic"),
    ("A linen dress, 120 cm long, for warm evenings in the garden.", "number 120"),
    ("Winter holidays beside glaciers need reliable mountaineering equipment.", "what the fields do not"),
    ("A linen dress, see www.shop.example for warm evenings.", "address"), ("linen dress " * 40, "more than 300"),
    ("", "not a text"), (None, "not a text"), (["linen"], "not a text")])
def test_what_they_do_not_say_is_named(check: CopyCheck, copy: object, reason: str) -> None:
    with pytest.raises(AnswerError, match=reason):
        told(check, copy)


def publish(root: Path, *products: dict[str, Any]) -> None:
    table = conform(pa.Table.from_pylist(list(products)).drop_columns(["attributes"]), PRODUCT, "products")
    with stage(root, "prepared", str(len(products)) * 16) as staging:
        staging.commit([staging.write_table("products/bucket-00000.parquet", table)], config=Config())


def test_only_what_changed_is_asked_and_inventions_are_set_aside(tmp_path: Path) -> None:
    bag = {**DRESS, "row_id": 2, "product_id": "B1", "group_id": 2, "title": "Canvas bag"}
    shirt = {**DRESS, "row_id": 3, "product_id": "S1", "group_id": 3, "title": "Linen shirt"}

    def behave(sent: Sent, number: int) -> Reply:
        fields = sent["fields"]
        copy = f"{fields['title']} by {fields['brand']}, light for warm evenings in the garden."
        if "bag" in fields["title"]:
            copy = copy.replace("Canvas", "Leather")
        return Reply(json.dumps({"id": sent["id"], "copy": copy}))

    with chat_server(behave) as server:
        config = WriteCopyConfig(prepared=tmp_path / "prepared", output=tmp_path / "copy",
                                 llm=LlmConfig(base_url=f"{server.url}", attempts=2))
        publish(config.prepared, DRESS, bag)
        first = write_copy(config)
        assert first is not None
        assert first.manifest.facts["counts"] == {"written": 1, "kept": 0, "set aside": 1, "unavailable": 0}
        assert "leather" in first.table("quarantine.parquet")["reason"][0].as_py()
        assert len(server.requests) == 3        # the invention was asked twice
        publish(config.prepared, DRESS, bag, shirt)
        second = write_copy(config)
        assert second is not None
        assert second.manifest.facts["counts"]["kept"] == 1
        assert second.table("copy/bucket-00000.parquet")["product_id"].to_pylist() == ["D1", "S1"]
        asked = [one["fields"]["title"] for one in server.sent()[3:]]
        assert sorted(asked) == ["Canvas bag", "Canvas bag", "Linen shirt"]
    assert write_copy(config.replace(llm=None)) is None

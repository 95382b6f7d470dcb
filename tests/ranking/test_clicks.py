"""Events as labels: the best that happened, the highest place, and nothing that was not shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_ray.ranking.clicks import labelled_events, read_events
from recsys_ray.schema import EVENT, conform


def event(kind: str, query: str | None, product: str, position: int | None = None, number: int = 0) -> dict[str, Any]:
    return {"event_id": f"{kind}{query}{product}{position}{number}", "kind": kind, "timestamp_ms": 1, "list_id": "l",
            "query_id": query, "product_id": product, "position": position}


def table(*events: dict[str, Any]) -> pa.Table:
    return conform(pa.Table.from_pylist(list(events)), EVENT, "events")


def test_the_best_event_counts_and_the_highest_place() -> None:
    found = labelled_events(table(
        event("impression", "q", "a", 3), event("impression", "q", "a", 1), event("impression", "q", "b", 2),
        event("click", "q", "a"), event("purchase", "q", "a"), event("cart", "q", "b"), event("click", None, "a"),
        event("click", "r", "c")))
    assert found.gains == {"q": {"a": 3.0, "b": 2.0}, "r": {"c": 1.0}}
    assert found.positions == {"q": {"a": 1, "b": 2}}       # c was never shown


def test_a_folder_of_files_is_read_and_bad_events_are_refused(tmp_path: Path, caplog: Any) -> None:
    pq.write_table(table(event("impression", "q", "a", 1)), tmp_path / "1.parquet")
    pq.write_table(table(event("impression", "q", "b", 0), event("click", "q", "a")), tmp_path / "2.parquet")
    assert read_events(tmp_path)["kind"].to_pylist() == ["impression", "click"]
    assert "1 events refused: an impression needs a position" in caplog.text
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \.parquet"):
        read_events(tmp_path / "empty")

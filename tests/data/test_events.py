"""Events: what is kept, what is refused and why."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from recsys_ray.data.events import clean_events
from recsys_ray.schema import EVENT, QUARANTINE

LOOSE = pa.schema([field.with_nullable(True) for field in EVENT])


def event(**changes: Any) -> dict[str, Any]:
    return {"event_id": "e1", "kind": "impression", "timestamp_ms": 1_700_000_000_000, "user_id": "u", "query_id": "q",
            "list_id": "l", "product_id": "p", "position": 1, "propensity": 0.5, **changes}


def cleaned(*events: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    kept, refused = clean_events(pa.Table.from_pylist(list(events), schema=LOOSE))
    assert kept.schema == EVENT
    assert refused.schema == QUARANTINE
    assert kept.num_rows + refused.num_rows == len(events)
    return kept.to_pylist(), refused.to_pylist()


def test_a_good_list_is_kept_as_it_is() -> None:
    shown = [event(event_id=f"e{at}", product_id=f"p{at}", position=at, propensity=1 / at) for at in (1, 2, 4)]
    click = event(event_id="c", kind="click", position=None, propensity=None)
    kept, refused = cleaned(*shown, click)
    assert kept == [*shown, click]
    assert not refused


@pytest.mark.parametrize(("change", "reason"), [
    ({"event_id": None}, "event_id is missing"), ({"event_id": "  "}, "event_id is missing"),
    ({"kind": "view"}, "kind is none of impression, click, cart, purchase"), ({"kind": None}, "kind is none of"),
    ({"timestamp_ms": None}, "timestamp_ms is missing"), ({"timestamp_ms": -5}, "not in milliseconds"),
    ({"timestamp_ms": 1_700_000_000_000_000}, "not in milliseconds"), ({"product_id": None}, "product_id is missing"),
    ({"list_id": None}, "needs the list_id"), ({"position": None}, "needs a position"),
    ({"position": 0}, "needs a position"), ({"position": 10**6}, "needs a position"),
    ({"propensity": 0.0}, "propensity"), ({"propensity": -0.1}, "propensity"), ({"propensity": 1.01}, "propensity"),
    ({"propensity": float("nan")}, "propensity"),
])
def test_a_bad_event_is_refused_with_its_reason(change: dict[str, Any], reason: str) -> None:
    good = event(event_id="good")
    kept, refused = cleaned(good, event(**change))
    assert kept == [good]
    assert reason in refused[0]["reason"]
    assert refused[0]["table"] == "events"


def test_propensity_may_be_one_or_unknown() -> None:
    kept, _ = cleaned(event(propensity=1.0), event(event_id="e2", propensity=None))
    assert [one["propensity"] for one in kept] == [1.0, None]


def test_the_first_of_two_events_with_one_id_counts() -> None:
    kept, refused = cleaned(event(product_id="a"), event(event_id="e2"), event(product_id="b"))
    assert [one["product_id"] for one in kept] == ["a", "p"]
    assert refused[0]["reason"] == "event_id was seen before"


def test_only_impressions_have_a_position() -> None:
    kept, _ = cleaned(event(kind="click", position=3, propensity=0.2))
    assert kept[0]["position"] is None
    assert kept[0]["propensity"] is None


def test_a_line_that_could_not_be_read_keeps_its_reason_and_place() -> None:
    raw = pa.Table.from_pylist([{"_error": "not JSON", "_source": "log.jsonl:7"}],
                               schema=pa.schema([*LOOSE, ("_error", pa.string()), ("_source", pa.string())]))
    kept, refused = clean_events(raw)
    assert kept.num_rows == 0
    assert refused.select(["source", "reason"]).to_pylist() == [{"source": "log.jsonl:7", "reason": "not JSON"}]


def test_no_events_are_no_events() -> None:
    assert cleaned() == ([], [])

"""Searches and clicks as files: what is shown is what training reads, and nothing is lost without a word."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
from small_shop import body, client, local_app, open_parts, small_first_stage

from recsys_ray.data.events import clean_events
from recsys_ray.ranking.clicks import labelled_events, read_events
from recsys_ray.retrieval.query_sets import TableQueries, table_query_set
from recsys_ray.serving import event_log
from recsys_ray.serving.api import Event
from recsys_ray.serving.config import EventsConfig
from recsys_ray.serving.event_log import EventLog, query_of


@pytest.fixture
def events(tmp_path: Path) -> EventLog:
    return EventLog(EventsConfig(directory=tmp_path / "log", flush_s=3600))


async def session(root: Path, events: EventLog) -> list[httpx.Response]:
    """Two searches with one query, one with another, a recommendation, and what came of them."""
    parts = open_parts(root)
    parts.events, parts.first = events, small_first_stage()
    async with client(local_app(parts)) as http:
        answers = [await http.post("/v1/search", content=body(query=query, k=4, offset=offset, user_id="u1"))
                   for query, offset in (("red sofa", 0), ("red sofa", 4), ("oak  lamp", 0))]
        answers.append(await http.post("/v1/recommend", content=json.dumps({"history": [], "k": 3}).encode()))
        first, lamps = answers[0].json(), answers[2].json()
        happened = [{"kind": "click", "product_id": first["items"][1]["product_id"], "list_id": first["list_id"]},
                    {"kind": "purchase", "product_id": lamps["items"][0]["product_id"], "list_id": lamps["list_id"],
                     "event_id": "order-1", "timestamp_ms": 1_700_000_000_000, "user_id": "u1"},
                    {"kind": "click", "product_id": answers[3].json()["items"][0]["product_id"],
                     "list_id": answers[3].json()["list_id"]}]
        answers.append(await http.post("/v1/events", content=json.dumps({"events": happened}).encode()))
        return answers


def test_what_was_shown_and_clicked_is_what_the_ranker_learns_from(small_index: Path, events: EventLog) -> None:
    answers = asyncio.run(session(small_index, events))
    assert [one.status_code for one in answers] == [200] * 4 + [202]
    assert answers[-1].json()["accepted"] == 3
    events.close()
    queries = table_query_set(TableQueries(path=str(events.directory / "queries"))).queries
    key = {query: query_id for query_id, query in zip(queries["query_id"].to_pylist(), queries["query"].to_pylist(),
                                                      strict=True)}
    assert set(key) == {"red sofa", "oak lamp"}     # as they were asked: cleaned
    found = labelled_events(read_events(events.directory / "events"))
    first, second, lamps = ([item["product_id"] for item in answer.json()["items"]] for answer in answers[:3])
    assert found.positions == {key["red sofa"]: {one: place for place, one in enumerate([*first, *second], 1)},
                               key["oak lamp"]: {one: place for place, one in enumerate(lamps, 1)}}
    assert found.gains == {key["red sofa"]: {one: float(one == first[1]) for one in [*first, *second]},
                           key["oak lamp"]: {one: 3.0 * (one == lamps[0]) for one in lamps}}


def test_every_row_can_be_trusted(small_index: Path, events: EventLog) -> None:
    asyncio.run(session(small_index, events))
    events.flush()
    (file,) = (events.directory / "events").iterdir()
    good, refused = clean_events(pq.read_table(file))
    assert refused.num_rows == 0
    assert good["kind"].value_counts().to_pylist() == [
        {"values": "impression", "counts": 15}, {"values": "click", "counts": 2}, {"values": "purchase", "counts": 1}]
    assert good["user_id"].to_pylist().count("u1") == 13
    events.flush()      # nothing waits: no empty file
    assert len(list((events.directory / "events").iterdir())) == 1


def test_rows_are_written_now_and_then(tmp_path: Path) -> None:
    events = EventLog(EventsConfig(directory=tmp_path, flush_s=0.05))
    events.shown("sofa", [(1, "P1")], None)
    deadline = time.monotonic() + 10
    while not list(tmp_path.glob("events/*.parquet")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    events.close()


def test_what_cannot_be_written_waits_and_what_finds_no_room_is_counted(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    events = EventLog(EventsConfig(directory=tmp_path, flush_s=3600, max_buffered=5))
    write = event_log.write_table

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(event_log, "write_table", full)
    events.shown("sofa", [(1, "P1"), (2, "P2")], None)
    with pytest.raises(OSError, match="no space"):
        events.flush()
    with caplog.at_level(logging.WARNING):
        assert not events.happened([Event(kind="click", product_id="P1")] * 3)
        assert events.shown("lamp", [(1, "P3"), (2, "P4")], None)   # the list is shown all the same
    assert events.refused == 6
    assert "6 refused so far" in caplog.text
    assert events.happened([Event(kind="click", product_id="P1")])
    monkeypatch.setattr(event_log, "write_table", write)
    events.close()
    kept = pq.read_table(tmp_path / "events")
    assert kept["product_id"].to_pylist() == ["P1", "P2", "P1"]


def test_a_full_log_asks_to_come_back(small_index: Path, tmp_path: Path) -> None:
    parts = open_parts(small_index)
    parts.events = EventLog(EventsConfig(directory=tmp_path, flush_s=3600, max_buffered=1))

    async def post(content: bytes) -> httpx.Response:
        async with client(local_app(parts)) as http:
            return await http.post("/v1/events", content=content)

    two = json.dumps({"events": [{"kind": "click", "product_id": "P1"}] * 2}).encode()
    answer = asyncio.run(post(two))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    for bad in ({"events": []}, {"events": [{"kind": "impression", "product_id": "P1"}]},
                {"events": [{"kind": "click", "product_id": ""}]}, {"events": [{"kind": "click"}]},
                {"events": [{"kind": "click", "product_id": "P1", "timestamp_ms": 10**15}]},
                {"events": [{"kind": "click", "product_id": "P1"}] * 101}):
        assert asyncio.run(post(json.dumps(bad).encode())).status_code == 422, bad


def test_the_application_writes_what_waits_when_it_ends(small_index: Path, tmp_path: Path) -> None:
    parts = open_parts(small_index)
    parts.events = EventLog(EventsConfig(directory=tmp_path, flush_s=3600))
    app = local_app(parts)

    async def live() -> None:
        async with app.router.lifespan_context(app), client(app) as http:
            await http.post("/v1/search", content=body())
            assert not list(tmp_path.glob("events/*"))

    asyncio.run(live())
    assert pq.read_table(tmp_path / "events").num_rows == 10


def test_only_our_own_lists_name_a_query() -> None:
    assert query_of("0123456789abcdef-0123456789abcdef") == "0123456789abcdef"
    for other in (None, "", "recommendation-0123456789abcdef", "0123456789abcdef", "x" * 33):
        assert query_of(other) is None

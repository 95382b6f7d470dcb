"""Searches, shown lists and what shoppers did, as files that training reads: queries/ (QUERY) and events/ (EVENT).

Rows wait in memory for a thread that writes them, a file at a time, each whole or not at all. What cannot be
written stays in memory and is tried again; when that is full, further rows are refused and counted, never
dropped in silence. The id of a list names its query, so that a click that names its list needs no look-up.
"""

from __future__ import annotations

import logging
import re
import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from recsys_ray.artifacts import write_table
from recsys_ray.data.events import query_key
from recsys_ray.schema import EVENT, QUERY
from recsys_ray.serving.api import Event
from recsys_ray.serving.config import EventsConfig

log = logging.getLogger(__name__)

Rows = list[dict[str, Any]]
NO_QUERY = "recommendation"
LIST_ID = re.compile(rf"([0-9a-f]{{16}}|{NO_QUERY})-[0-9a-f]{{16}}")


class EventLog:
    """The events of one gateway; any number of them may write to one directory."""

    def __init__(self, config: EventsConfig) -> None:
        """Errors: `OSError` when the directory cannot be made."""
        self.directory, self.max_buffered = config.directory, config.max_buffered
        self.directory.mkdir(parents=True, exist_ok=True)
        self.refused = 0                    # rows that found no room
        self._rows: dict[str, Rows] = {"queries": [], "events": []}
        self._lock = threading.Lock()       # of the rows
        self._writing = threading.Lock()    # of the files
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write_now_and_then, args=(config.flush_s,), daemon=True)
        self._thread.start()

    def shown(self, query: str | None, ranked: Sequence[tuple[int, str]], user_id: str | None) -> str:
        """Keep a list that is shown, as (position, product id), and the query it answers; returns the list's id."""
        query_id = None if query is None else query_key(query)
        list_id, now = f"{query_id or NO_QUERY}-{uuid.uuid4().hex[:16]}", _now_ms()
        events = [{"event_id": f"{list_id}-{position}", "kind": "impression", "timestamp_ms": now, "user_id": user_id,
                   "query_id": query_id, "list_id": list_id, "product_id": product, "position": position}
                  for position, product in ranked]
        queries = [] if query is None else [{"query_id": query_id, "query": query}]
        self._keep(queries, events)
        return list_id

    def happened(self, events: Sequence[Event]) -> bool:
        """Keep what shoppers did; False when there is no room, and then none of it is kept."""
        now = _now_ms()
        return self._keep([], [{
            "event_id": one.event_id or uuid.uuid4().hex, "kind": one.kind, "user_id": one.user_id,
            "timestamp_ms": now if one.timestamp_ms is None else one.timestamp_ms, "list_id": one.list_id,
            "query_id": query_of(one.list_id), "product_id": one.product_id} for one in events])

    def _keep(self, queries: Rows, events: Rows) -> bool:
        with self._lock:
            waiting = sum(map(len, self._rows.values()))
            if waiting + len(queries) + len(events) > self.max_buffered:
                self.refused += len(queries) + len(events)
                log.warning("no room for %d rows of events, %d refused so far: %d wait to be written to %s",
                            len(queries) + len(events), self.refused, waiting, self.directory)
                return False
            self._rows["queries"] += queries
            self._rows["events"] += events
            return True

    def flush(self) -> None:
        """Write what waits; raises `OSError` when that fails, and then it goes on waiting."""
        with self._writing:
            for name, schema in (("queries", QUERY), ("events", EVENT)):
                with self._lock:
                    rows = list(self._rows[name])
                if rows:
                    file = f"{name}/{_now_ms()}-{uuid.uuid4().hex[:12]}.parquet"
                    write_table(self.directory, file, pa.Table.from_pylist(rows, schema=schema))
                    with self._lock:
                        del self._rows[name][:len(rows)]

    def close(self) -> None:
        """Write what waits, and end; what cannot be written is counted in the log."""
        self._ended.set()
        self._thread.join()
        self._try_to_flush()
        if lost := sum(map(len, self._rows.values())):
            log.error("%d rows of events could not be written to %s and are lost", lost, self.directory)

    def _write_now_and_then(self, every_s: float) -> None:
        while not self._ended.wait(every_s):
            self._try_to_flush()

    def _try_to_flush(self) -> None:
        try:
            self.flush()
        except OSError as error:
            log.warning("events cannot be written to %s (%s); they wait", self.directory, error)


def query_of(list_id: str | None) -> str | None:
    """The id of the query that a list answers; None for a recommendation, or a list that is not ours."""
    found = LIST_ID.fullmatch(list_id or "")
    return None if found is None or found[1] == NO_QUERY else found[1]


def _now_ms() -> int:
    return time.time_ns() // 1_000_000

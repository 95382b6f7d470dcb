"""What a gateway tells the outside of its requests: Prometheus metrics through Ray, and the log."""

from __future__ import annotations

import logging
import sys

from ray.util.metrics import Counter, Gauge, Histogram

from recsys_ray.serving.event_log import EventLog
from recsys_ray.serving.records import Record, log, log_record

BOUNDARIES_MS = [1.0, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]


class Measures:
    """Called with the record of each request: counts it, measures its stages, writes its line."""

    def __init__(self, events: EventLog | None) -> None:
        self._events = events
        self._requests = Counter("recsys_requests", "Requests that were answered.", ("path", "status"))
        self._degraded = Counter("recsys_degraded", "Answers that had to do without a stage.", ("stage",))
        self._total = Histogram("recsys_request_ms", "Milliseconds of a request.", BOUNDARIES_MS, ("path",))
        self._stages = Histogram("recsys_stage_ms", "Milliseconds of a stage of a request.", BOUNDARIES_MS, ("stage",))
        self._refused = Gauge("recsys_events_refused", "Rows of events that found no room since the start.")

    def __call__(self, record: Record) -> None:
        """Measure and log one request."""
        self._requests.inc(1, {"path": record.path, "status": str(record.status)})
        self._total.observe(record.total_ms, {"path": record.path})
        for stage, took in record.stages_ms.items():
            self._stages.observe(took, {"stage": stage})
        if record.degraded:
            self._degraded.inc(1, {"stage": record.degraded})
        if self._events is not None:
            self._refused.set(self._events.refused)
        log_record(record)


def log_requests_to_stderr() -> None:
    """Let the lines of requests reach the replica's log: a worker shows warnings alone otherwise."""
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False

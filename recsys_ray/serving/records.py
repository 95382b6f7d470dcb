"""One line of JSON for each request: what was asked, how it was answered, what each stage took."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

log = logging.getLogger("recsys_ray.requests")


@dataclass
class Record:
    """What is known of a request once it is answered; the gateway fills in what it knows, the gate the rest."""

    request_id: str
    path: str = "other"                     # as the routes name it, so that there are few
    status: int = 0
    total_ms: float = 0.0
    stages_ms: dict[str, float] = field(default_factory=dict)
    degraded: str | None = None             # the stage that was left out
    query: str | None = None                # only where the service is told to log queries


Observe = Callable[[Record], None]


def log_record(record: Record) -> None:
    """Write the line; a key without a value is left out."""
    line = {"request_id": record.request_id, "path": record.path, "status": record.status,
            "ms": round(record.total_ms, 3), "stages_ms": record.stages_ms or None, "degraded": record.degraded,
            "query": record.query}
    log.info(json.dumps({name: value for name, value in line.items() if value is not None}))

"""A replica's log: one JSON object a line on stderr, which Ray keeps in its log folder.

A line holds ids of artifacts, counts, times, error classes and messages of our own errors; never a text, a user id, a
content id, a token or a user embedding.
"""

from __future__ import annotations

import json
import sys
import threading
from datetime import UTC, datetime

Value = str | int | float | bool | None


class ReplicaLog:
    """Lines of one replica."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def info(self, event: str, **fields: Value) -> None:
        """Something went as it should."""
        self._write("info", event, fields)

    def error(self, event: str, **fields: Value) -> None:
        """Something failed."""
        self._write("error", event, fields)

    def _write(self, level: str, event: str, fields: dict[str, Value]) -> None:
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": level, "logger": "e2p_ray.serve", "event": event, **fields}
        with self._lock:
            print(json.dumps(line, ensure_ascii=False), file=sys.stderr, flush=True)

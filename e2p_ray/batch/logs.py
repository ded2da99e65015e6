"""Structured logs of generator actors: one JSON object a line on the actor's stderr, which Ray keeps in its log folder.

A line holds ids of runs, shards and artifacts, counts, times and error classes; never a text or a user embedding, nor a
user id or a content id, but where a message names the keys of requests that a shard has lost or has twice. Messages of
errors have been through `write._said`.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

_LOGGER = "e2p_ray.batch"

Value = str | int | float | bool | None


class JsonLines(logging.Formatter):
    """A record as one line of JSON: time, level, logger, event, then the record's fields."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname.lower(), "logger": record.name, "event": record.getMessage()}
        return json.dumps(line | getattr(record, "fields", {}), ensure_ascii=False)


class ActorLog:
    """The log of one actor; every line says its run and its worker. Off, it writes nothing."""

    def __init__(self, *, on: bool, run_id: str, worker: str) -> None:
        self._always: dict[str, Value] = {"run_id": run_id, "worker": worker}
        # Of its own: Ray's handlers would write the line once more.
        self._logger = logging.Logger(_LOGGER, logging.INFO)
        self._logger.disabled = not on
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonLines())
        self._logger.addHandler(handler)

    def info(self, event: str, **fields: Value) -> None:
        """Something went as it should."""
        self._write(logging.INFO, event, fields)

    def error(self, event: str, **fields: Value) -> None:
        """A shard or the worker failed."""
        self._write(logging.ERROR, event, fields)

    def _write(self, level: int, event: str, fields: dict[str, Value]) -> None:
        self._logger.log(level, event, extra={"fields": self._always | fields})

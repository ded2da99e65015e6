"""Writing to whoever may have left."""

from __future__ import annotations

from contextlib import suppress
from typing import TextIO


def put(stream: TextIO, text: str) -> None:
    """Write at once. As of `2>&1 | head` nobody may read it any more: no reason for a job to end, or end otherwise."""
    with suppress(BrokenPipeError):
        stream.write(text)
        stream.flush()

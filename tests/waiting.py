"""Waiting for what another process or thread does."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(holds: Callable[[], object], what: str, *, longest_s: float = 60.0, pause_s: float = 0.05) -> None:
    """Return once it holds; fails after a time that no machine needs."""
    end_s = time.monotonic() + longest_s
    while not holds():
        assert time.monotonic() < end_s, f"not in {longest_s:g} s: {what}"
        time.sleep(pause_s)

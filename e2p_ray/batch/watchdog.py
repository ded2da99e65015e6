"""Ends a generator process whose engine has stopped making steps, so that Ray replaces it."""

from __future__ import annotations

import faulthandler
import threading
from types import TracebackType

from e2p_ray.engine.contract import TextEngine

_MAX_PAUSE_S = 5.0
_STDERR = 2  # the file descriptor: sys.stderr may be anything


class Watchdog:
    """While entered: a process whose engine's counts stand still for `max_step_s` says where it stands and ends.

    The end comes from a thread of the interpreter in C (`faulthandler`), which needs nothing that a hung process may
    hold: one stuck in a kernel ends, and so does one that never lets go of Python's lock. What is said is names of
    functions and lines, no values.
    """

    def __init__(self, engine: TextEngine, max_step_s: float) -> None:
        self._engine, self._max_step_s = engine, max_step_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._arm()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _arm(self) -> None:
        faulthandler.dump_traceback_later(self._max_step_s, exit=True, file=_STDERR)

    def _watch(self) -> None:
        seen = self._engine.stats
        while not self._over.wait(min(self._max_step_s / 4, _MAX_PAUSE_S)):
            now = self._engine.stats
            if now != seen:
                seen = now
                self._arm()

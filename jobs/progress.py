"""How far a run is: one line that rewrites itself on a terminal; elsewhere a plain one with news and every minute."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TextIO

from e2p_ray.batch import BatchProgress
from jobs.streams import put
from jobs.tables import duration_text

_TERMINAL_S, _PLAIN_S = 1.0, 10.0
_NOTHING_NEW_S = 60.0  # then a plain line says so: a large model loads, or a long shard is written, without a word
_BAR_CHARS = 20


class ProgressLine:
    """Use it in a `with` and hand it to `run_batch` as `on_progress`. Writes from a thread of its own."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._latest: BatchProgress | None = None
        self._started_s = time.monotonic()
        self._stop, self._soon = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._tick, name="progress", daemon=True)

    def __enter__(self) -> ProgressLine:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._stop.set()
        self._soon.set()
        self._thread.join()
        self._write(last=True)

    def __call__(self, progress: BatchProgress) -> None:
        self._latest = progress
        if progress.waits_for:
            self._soon.set()

    def _tick(self) -> None:
        shown: BatchProgress | None = None
        shown_s = time.monotonic()
        while not self._stop.is_set():
            self._soon.wait(_TERMINAL_S if self._terminal else _PLAIN_S)
            self._soon.clear()
            if self._stop.is_set():
                return
            if self._terminal or self._latest is not shown or time.monotonic() - shown_s >= _NOTHING_NEW_S:
                shown, shown_s = self._latest, time.monotonic()
                self._write()

    def _write(self, *, last: bool = False) -> None:
        if self._latest is None:
            return
        line = progress_text(self._latest, time.monotonic() - self._started_s)
        if self._terminal:
            put(self._stream, f"\r\x1b[K{line}" + ("\n" if last else ""))
        else:
            put(self._stream, line + "\n")


def progress_text(progress: BatchProgress, elapsed_s: float) -> str:
    """One line: shards, rates, time left."""
    share = progress.num_done / max(progress.num_shards, 1)
    bar = ("#" * round(share * _BAR_CHARS)).ljust(_BAR_CHARS, ".")
    parts = [f"[{bar}] {progress.num_done:,}/{progress.num_shards:,} shards"]
    if progress.num_requests:
        parts.append(f"{progress.num_requests:,} rows")
        parts.append(f"{progress.rows_per_s:,.1f} rows/s")
        parts.append(f"{progress.tokens_per_s:,.0f} tokens/s")
        left_s = progress.generating_s / max(progress.num_done_here, 1) * (progress.num_shards - progress.num_done)
        if left_s:
            parts.append(f"{duration_text(left_s)} left")
    else:
        parts.append(f"waiting: {progress.waits_for}" if progress.waits_for else "starting")
    parts.append(f"{duration_text(elapsed_s)} so far")
    if progress.num_failures:
        parts.append(f"{progress.num_failures:,} failed tries")
    if progress.attempt > 1:
        parts.append(f"attempt {progress.attempt}")
    return ", ".join(parts)

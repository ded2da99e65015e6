"""How far a training is: one line that rewrites itself on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from e2p_ray.train.job.board import TrainProgress
from jobs.streams import put
from jobs.tables import duration_text

_TERMINAL_S, _PLAIN_S = 1.0, 10.0
_BAR_CHARS = 20


class TrainLine:
    """Use it in a `with` and hand it to `run_training` as `on_progress` and, for whole lines, its `say`."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._latest: TrainProgress | None = None
        self._shown: TrainProgress | None = None
        self._shown_s = -_PLAIN_S
        self._open = False  # a line is on the terminal without its end

    def __enter__(self) -> TrainLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._latest is not None and self._latest is not self._shown:
            self._write(self._latest)
        self._end()

    def say(self, line: str) -> None:
        """A line of its own."""
        self._end()
        put(self._stream, line + "\n")

    def __call__(self, progress: TrainProgress) -> None:
        self._latest = progress
        waited_s = time.monotonic() - self._shown_s
        if progress != self._shown and waited_s >= (_TERMINAL_S if self._terminal else _PLAIN_S):
            self._write(progress)

    def _write(self, progress: TrainProgress) -> None:
        self._shown, self._shown_s = progress, time.monotonic()
        line = training_text(progress)
        put(self._stream, f"\r\x1b[K{line}" if self._terminal else line + "\n")
        self._open = self._terminal

    def _end(self) -> None:
        if self._open:
            put(self._stream, "\n")
        self._open = False


def training_text(progress: TrainProgress) -> str:
    """One line: steps, losses, rates, time left."""
    bar = ("#" * round(progress.step / progress.num_steps * _BAR_CHARS)).ljust(_BAR_CHARS, ".")
    parts = [f"[{bar}] {progress.step:,}/{progress.num_steps:,} steps"]
    if progress.loss is None:
        parts.append("starting")
    else:
        parts.append(f"loss {progress.loss:.3f}")
        if progress.validation_loss is not None:
            parts.append(f"validation {progress.validation_loss:.3f}")
        parts.append(f"{progress.steps_per_s:,.1f} steps/s")
        parts.append(f"{progress.tokens_per_s:,.0f} tokens/s")
        if progress.steps_per_s and progress.step < progress.num_steps:
            parts.append(f"{duration_text((progress.num_steps - progress.step) / progress.steps_per_s)} left")
        parts.append(f"{duration_text(progress.seconds_s)} so far")
    if progress.num_starts > 1:
        parts.append(f"start {progress.num_starts} of the workers")
    return ", ".join(parts)

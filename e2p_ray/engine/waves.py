"""The waves that take turns: one on a CPU; on a GPU two, each looked after while the GPU works on the other.

What a wave costs between two passes (tokens to be looked at, rows that come and go, texts, whoever checks and writes
them) takes the CPU 75 us a row, as long as a 1 B model's rows take an H200: with one wave, one of the two always waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch

from e2p_ray.engine.wave import Wave

# Rows that are one wave rather than two: passes of fewer take a GPU hardly less time, as they read the same weights.
LEAST_ROWS = 256


def num_waves(device: torch.device, max_rows: int) -> int:
    """How many take turns."""
    return 2 if device.type == "cuda" and max_rows >= 2 * LEAST_ROWS else 1


def looks_later(device: torch.device) -> bool:
    """Whether a pass is launched and its tokens looked at in the next turn: who launches on a CPU has them already."""
    return device.type == "cuda"


class Waves:
    """Up to `num` waves; `current` is the one whose turn it is, None where there is none."""

    def __init__(self, num: int) -> None:
        self._places: deque[Wave | None] = deque([None] * num)

    def grow(self, num: int) -> None:
        """So many may take turns from now on, or as many as before if these were more."""
        self._places.extend([None] * (num - len(self._places)))

    @property
    def current(self) -> Wave | None:
        return self._places[0]

    @current.setter
    def current(self, wave: Wave | None) -> None:
        self._places[0] = wave

    def end(self, wave: Wave) -> None:
        """Give a wave's place free."""
        self._places[self._places.index(wave)] = None

    def __iter__(self) -> Iterator[Wave]:
        return (wave for wave in self._places if wave is not None)

    def share(self, num_pending: int, max_rows: int) -> int:
        """How many of at most max_rows each should have, with those that wait shared among them."""
        num_rows = sum(map(len, self)) + num_pending
        return min(max_rows, max(-(-num_rows // len(self._places)), LEAST_ROWS))

    def turn(self, num_pending: int, max_rows: int) -> None:
        """The next one's turn; a new wave begins only once all others have their share."""
        share = self.share(num_pending, max_rows)
        for _ in range(len(self._places)):
            self._places.rotate(-1)
            if self.current is not None or (num_pending and all(len(wave) >= share for wave in self)):
                return

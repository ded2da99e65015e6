"""How often guessed tokens hold, learned from all of them, whether or not they were tried."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import numpy.typing as npt

_Ints = npt.NDArray[np.int64]

_MEMORY = 2048  # observations after which older ones count half
MAX_STREAK = 4  # of tokens that held in a row: more say no more
_CLASSES = (0, 1, 1, 1, 2)  # by streak: none, few, several
NUM_CLASSES = 3


class Source(IntEnum):
    """Where a guess is from."""

    GIVEN = 0  # the request's own draft
    REALIGNED = 1  # the same, set on again behind where it went wrong
    TOLD = 2  # another row's text for the same content


class Agreement:
    """How often the next guessed token was right, by how many before it were: none, few, several.

    It starts doubtful, and with few observations, so that a handful of rows decide: a guess that is not tried is
    judged by what its row writes, so to be doubtful costs the first rows' time at most.
    """

    def __init__(self, num_right: Sequence[float], num_seen: Sequence[float]) -> None:
        self._num_right, self._num_seen = list(num_right), list(num_seen)

    def rate(self, streak: int) -> float:
        at = _CLASSES[min(streak, MAX_STREAK)]
        return self._num_right[at] / self._num_seen[at]

    def chances(self, streak: int, max_ahead: int) -> list[float]:
        """That the next 0, 1, ... max_ahead guesses hold, all of them."""
        found = [1.0]
        for ahead in range(max_ahead):
            found.append(found[-1] * self.rate(streak + ahead))
        return found

    def see(self, num_right: Sequence[int], num_seen: Sequence[int]) -> None:
        """So many more guesses were right, of those that were judged, by class (3,)."""
        for at in range(NUM_CLASSES):
            self._num_right[at] += num_right[at]
            self._num_seen[at] += num_seen[at]
            while self._num_seen[at] > _MEMORY:
                self._num_right[at] /= 2
                self._num_seen[at] /= 2


def classes_of(streaks: _Ints) -> _Ints:
    """The class of each streak."""
    return np.array(_CLASSES)[np.minimum(streaks, MAX_STREAK)]


def new_agreements() -> tuple[Agreement, ...]:
    """One of each source."""
    given = Agreement([3.5, 8.5, 19.0], [5.0, 10.0, 20.0])
    return given, *(Agreement([2.5, 7.5, 18.0], [5.0, 10.0, 20.0]) for _ in (Source.REALIGNED, Source.TOLD))

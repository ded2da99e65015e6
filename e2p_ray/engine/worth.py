"""Whether rows that come in get guesses at all: what guesses have saved rows like them before.

To make a row's guesses and to follow them takes 1 to 2 % of the time of its passes, whether or not one is tried
(LOG.md, 2026-11-29). So where next to none of the tokens came of them, few rows have any: enough to see that they pay
again.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_Ints = npt.NDArray[np.int64]

_LEAST_SAVED = 0.04  # of the tokens: more than guesses take of the time, as a token is no more than its part of it
_MAX_SIZES = 20  # sizes of a wave, by doublings
_NUM_KINDS = 2 * _MAX_SIZES
_ONE_IN = 8  # of the times that rows come in, guesses are made
# Tokens to judge by: eight calls of the wave's rows with 16 new tokens each, and a dozen texts of rows alone.
_EVIDENCE, _EVIDENCE_OF_ROW = 256, 128
_MEMORY = 4  # times as many, after which older ones count half


def kind_of(num_rows: int, *, has_draft: bool) -> int:
    """Rows that are alike: as many of them together in a wave, to the next power of two, with or without a draft."""
    return 2 * min(num_rows.bit_length(), _MAX_SIZES - 1) + has_draft


class Worth:
    """What guesses saved, by kinds of rows. It begins hopeful, as what an engine has not tried it cannot know."""

    def __init__(self) -> None:
        self._num_written, self._num_saved = np.zeros(_NUM_KINDS), np.zeros(_NUM_KINDS)
        self._num_asked = [0] * _NUM_KINDS

    def is_tried(self, kind: int) -> bool:
        """Whether rows of this kind, which come in together, get guesses."""
        is_known = self._num_written[kind] >= _evidence(kind)
        if not is_known or self._num_saved[kind] >= _LEAST_SAVED * self._num_written[kind]:
            return True
        self._num_asked[kind] += 1
        return self._num_asked[kind] % _ONE_IN == 0

    def see(self, kinds: _Ints, num_written: _Ints, num_saved: _Ints) -> None:
        """Rows (n,) that have guesses wrote so many tokens, of which so many took no pass."""
        self._num_written += np.bincount(kinds, num_written, _NUM_KINDS)
        self._num_saved += np.bincount(kinds, num_saved, _NUM_KINDS)
        for kind in set(kinds.tolist()):
            if self._num_written[kind] > _MEMORY * _evidence(kind):
                self._num_written[kind] /= 2
                self._num_saved[kind] /= 2


def _evidence(kind: int) -> int:
    most_rows: int = 2 ** (kind // 2)
    return _EVIDENCE + _EVIDENCE_OF_ROW * most_rows // 2

"""New tokens of a wave's rows, packed row after row into one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from e2p_ray.engine.readers import Readers

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class PackedTokens:
    """counts (n,) new tokens, T in all, of the rows in the slots first_slot .., behind lengths (n,) earlier own ones.

    row (T,) and offset (T,) say whose token stands where, at (T,) which of the row's own tokens it is, end (n,) where
    each row's last one stands.
    """

    first_slot: int
    lengths: _Ints
    counts: _Ints
    row: _Ints
    offset: _Ints
    at: _Ints
    end: _Ints

    @classmethod
    def of(cls, first_slot: int, lengths: _Ints, counts: _Ints) -> PackedTokens:
        """From what each row has and gets."""
        ends = np.cumsum(counts)
        row = np.repeat(np.arange(len(counts)), counts)
        offset = np.arange(len(row)) - np.repeat(ends - counts, counts)
        return cls(first_slot, lengths, counts, row, offset, lengths[row] + offset, ends - 1)

    @property
    def num_own(self) -> int:
        """The most own tokens that a row has then."""
        return int((self.lengths + self.counts).max())

    @property
    def is_fresh(self) -> bool:
        """Whether no row has an own token yet."""
        return not self.lengths.any()

    def by_prefix(self, readers: Readers) -> tuple[_Ints, _Ints]:
        """The tokens (T,) with those of one prefix's readers side by side, and where each prefix's begin and end."""
        counts = self.counts[readers.order]
        asking = np.concatenate([[0], np.cumsum(counts)])
        order = (self.end + 1 - self.counts)[readers.order].repeat(counts)
        order += np.arange(len(order)) - asking[:-1].repeat(counts)
        return order, asking[readers.starts]

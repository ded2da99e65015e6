"""Which rows of a pass read which shared prefix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from e2p_ray.engine.shared_prefix import Prefix

_Ints = npt.NDArray[np.int64]

# Contents with few readers are read several in a call (128 contents of 256 tokens, microseconds a content for 2 and 4
# queries in fp32: 66 and 104 alone, 60 and 75 by eights; in bf16 65 and 69, 57 and 62; nothing is gained from 16 on).
_FEW_READERS = 8
_MAX_RUN = 16


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Readers:
    """Which rows read which prefix.

    order (n,): the rows, those of one prefix together. Of each of `prefixes`: its first `visible` tokens are read by
    the rows order[starts[i] : starts[i + 1]]; the rows behind the last start read none. prefix_lengths (n,) by row.
    runs: (first, end) of prefixes that lie side by side in memory and have equally many rows.
    """

    order: _Ints
    prefixes: tuple[Prefix, ...]
    visible: tuple[int, ...]
    starts: _Ints
    prefix_lengths: _Ints
    runs: tuple[tuple[int, int], ...]

    def by_row(self) -> list[tuple[Prefix, int] | None]:
        """What each row reads, and how much of it."""
        found: list[tuple[Prefix, int] | None] = [None] * len(self.order)
        for at, reading in enumerate(zip(self.prefixes, self.visible, strict=True)):
            for row in self.order[self.starts[at] : self.starts[at + 1]]:
                found[row] = reading
        return found

    @classmethod
    def of(cls, prefixes: Sequence[Prefix | None], visible: Sequence[int]) -> Readers:
        """From each row's prefix and how much of it the row sees."""
        groups: dict[tuple[int, int], list[int]] = {}
        alone: list[int] = []
        for row, (prefix, length) in enumerate(zip(prefixes, visible, strict=True)):
            (groups.setdefault((id(prefix), length), []) if prefix is not None and length else alone).append(row)
        lengths = np.array(visible, np.int64)
        lengths[alone] = 0
        readings = [(prefix, rows) for rows in groups.values() if (prefix := prefixes[rows[0]]) is not None]
        if len(readings) * _FEW_READERS >= len(prefixes):  # neighbours in memory become neighbours here
            rank = {id(prefix.batch): at for at, (prefix, _) in reversed(list(enumerate(readings)))}
            readings.sort(key=lambda reading: (rank[id(reading[0].batch)], reading[0].place))
        found, readers = [prefix for prefix, _ in readings], [rows for _, rows in readings]
        return cls(
            order=np.array([row for rows in (*readers, alone) for row in rows], np.int64),
            prefixes=tuple(found),
            visible=tuple(int(visible[rows[0]]) for rows in readers),
            starts=np.cumsum([0, *map(len, readers)]),
            prefix_lengths=lengths,
            runs=tuple(_runs(found, [len(rows) for rows in readers])),
        )


def _runs(prefixes: Sequence[Prefix], num_rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    first = 0
    for at in range(1, len(prefixes) + 1):
        if at < len(prefixes) and at - first < _MAX_RUN:
            one, other = prefixes[at - 1], prefixes[at]
            beside = one.batch is other.batch and one.batch is not None and other.place == one.place + 1
            if beside and num_rows[at] == num_rows[first] <= _FEW_READERS:
                continue
        if prefixes:
            yield first, at
        first = at

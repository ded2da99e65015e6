"""A wave: the rows that are decoded together, and what each has written so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from e2p_ray.engine.drafts import RowDraft
from e2p_ray.engine.guesses import Guesses
from e2p_ray.engine.launched import Launched
from e2p_ray.engine.readers import Readers
from e2p_ray.engine.resized import resized
from e2p_ray.engine.row import Row
from e2p_ray.engine.row_sampling import RowSampling
from e2p_ray.engine.rows_step import RowsStep
from e2p_ray.engine.sent import sent
from e2p_ray.engine.shared_prefix import Prefix, SuffixSlots
from e2p_ray.schema import FinishReason

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Ended:
    """A row that is done, with all that it has written."""

    row: Row
    tokens: _Ints
    mean_logprob: float
    reason: FinishReason


class Wave:
    """Rows in the slots 0..n-1 of static buffers; a row that is done leaves, and the last rows close the gap."""

    def __init__(self, slots: SuffixSlots, max_new_tokens: int) -> None:
        size = slots.max_rows
        self.slots = slots
        self.rows: list[Row] = []
        self.guesses = Guesses(size, max_new_tokens)
        self.written = np.zeros((size, max_new_tokens), np.int64)
        self.num_written = np.zeros(size, np.int64)
        self.num_own = np.zeros(size, np.int64)  # tokens in the slots
        self.num_chars = np.zeros(size, np.int64)  # an upper bound
        self.max_new = np.zeros(size, np.int64)
        self.max_chars = np.zeros(size, np.int64)
        self.stops = np.zeros(size, np.int64)  # numbers of their stop strings
        self.logprobs = np.zeros((size, max_new_tokens), np.float32)
        self.num_fresh = np.zeros(size, np.int64)  # tokens that the last pass wrote
        self.sampling = RowSampling.of([])
        self.launched: list[Launched] = []  # passes whose tokens nobody has looked at
        self.prefixes: list[Prefix | None] = []
        self._visible: list[int] = []
        self._readers: Readers | None = None
        self._step: RowsStep | None = None  # the last one

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def max_new_tokens(self) -> int:
        """How many tokens a row may write."""
        return self.written.shape[1]

    def grow(self, max_rows: int, max_tokens: int, max_new_tokens: int) -> None:
        """Buffers for so many rows of so many tokens, with what these hold."""
        self.slots, self._step = self.slots.grown(max_rows, max_tokens, len(self.rows)), None
        self.guesses.grow(max_rows, max_new_tokens)
        self.written = resized(self.written, (max_rows, max_new_tokens))
        self.logprobs = resized(self.logprobs, (max_rows, max_new_tokens))
        self.num_written, self.num_own, self.num_chars, self.num_fresh, self.max_new, self.max_chars, self.stops = (
            resized(array, (max_rows,))
            for array in (
                self.num_written, self.num_own, self.num_chars, self.num_fresh, self.max_new, self.max_chars,
                self.stops,
            )
        )  # fmt: skip

    def add(
        self,
        rows: Sequence[Row],
        drafts: Sequence[RowDraft | None],
        prefixes: Sequence[Prefix | None],
        visible: Sequence[int],
        stops: Sequence[int],
    ) -> None:
        """Put new rows behind those that are there; with guesses or without."""
        span = slice(len(self.rows), len(self.rows) + len(rows))
        self.rows += rows
        self.guesses.add(drafts)
        self.prefixes += prefixes
        self._visible += visible
        self._readers = None
        self.num_own[span] = self.num_written[span] = self.num_chars[span] = self.num_fresh[span] = 0
        self.max_new[span] = [row.sampling.max_new_tokens for row in rows]
        self.max_chars[span] = [row.sampling.max_chars or np.iinfo(np.int64).max for row in rows]
        self.stops[span] = stops
        self.sampling = self.sampling.join(RowSampling.of([(row.sampling, row.stream) for row in rows]))

    def readers(self, first: int = 0) -> Readers:
        """Which rows from `first` on read which prefix; those of all are kept until rows come or go."""
        if first:
            return Readers.of(self.prefixes[first:], self._visible[first:])
        if self._readers is None:
            self._readers = Readers.of(self.prefixes, self._visible)
        return self._readers

    def step(self, first: int, counts: _Ints) -> RowsStep:
        """The next pass of the rows from slot `first` on, with so many new tokens (n,) of each."""
        given = self.slots, first, self.num_own[first : len(self)], counts, self.readers(first)
        before = self._step
        self._step = before.next() if before is not None and before.precedes(*given) else RowsStep(*given)
        return self._step

    def last_tokens(self, first: int, end: int) -> _Ints:
        """The token that each of these rows wrote last."""
        return self.written[np.arange(first, end), self.num_written[first:end] - 1]

    def tokens(self, slot: int) -> _Ints:
        """All that a row has written."""
        return self.written[slot, : self.num_written[slot]]

    def write(self, slots: _Ints, counts: _Ints, tokens: _Ints, logprobs: npt.NDArray[np.float32]) -> None:
        """Append counts (n,) of the tokens (n, m) to these rows."""
        for at in range(tokens.shape[1]):
            more = slots[at < counts]
            place = self.num_written[more] + at
            self.written[more, place] = tokens[at < counts, at]
            self.logprobs[more, place] = logprobs[at < counts, at]
        self.num_written[slots] += counts
        self.num_fresh[slots] = counts

    def ended(self, slot: int, reason: FinishReason) -> Ended:
        """A row that is about to be taken out. What went wrong in its slot must not reach the next row there."""
        if reason is FinishReason.ERROR:
            self.slots.clear(slot)
        mean_logprob = float(self.logprobs[slot, : self.num_written[slot]].mean(dtype=np.float64))
        return Ended(self.rows[slot], self.tokens(slot).copy(), mean_logprob, reason)

    def cut(self, slot: int, num_tokens: int) -> None:
        """Forget what a row wrote beyond so many tokens."""
        self.num_written[slot] = num_tokens

    def remove(self, finished: Sequence[int]) -> None:
        """Take rows out; the last ones move into their slots."""
        num_left = len(self.rows) - len(finished)
        gone = set(finished)
        targets = [slot for slot in finished if slot < num_left]
        sources = [slot for slot in range(num_left, len(self.rows)) if slot not in gone]
        if targets:
            device = self.slots.keys[0].device
            num_tokens = int(self.num_own[sources].max())
            self.slots.move(sent(np.array(sources), device), sent(np.array(targets), device), num_tokens)
        for array in (self.written, self.logprobs, self.num_written, self.num_own, self.num_fresh, self.num_chars,
                      self.max_new, self.max_chars, self.stops):  # fmt: skip
            array[targets] = array[sources]
        order = np.arange(num_left)
        order[targets] = sources
        self.sampling = self.sampling.take(order)
        self.rows = [self.rows[slot] for slot in order]
        self.guesses.move(targets, sources, num_left)
        self.prefixes = [self.prefixes[slot] for slot in order]
        self._visible = [self._visible[slot] for slot in order]
        self._readers = None

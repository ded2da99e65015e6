"""A wave: the rows that are decoded together, and what each has written so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from e2p_ray.config import SamplingConfig
from e2p_ray.engine.prompt import Segments
from e2p_ray.engine.sampling import RowSampling
from e2p_ray.engine.shared_prefix import Prefix, PrefixRows, SuffixSlots, by_prefix
from e2p_ray.schema import RequestKey, UserEmbedding

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One request, ready to be decoded."""

    key: RequestKey
    segments: Segments
    user_embedding: UserEmbedding | None
    sampling: SamplingConfig
    stream: int

    @property
    def _takes_last(self) -> bool:
        """A row without any token of its own takes over the last one of its prefix, to have something to run."""
        return self.user_embedding is None and not self.segments.right

    @property
    def right(self) -> tuple[int, ...]:
        """The token ids behind the soft token."""
        return self.segments.left[-1:] if self._takes_last else self.segments.right

    def num_suffix_tokens(self, num_soft_tokens: int) -> int:
        """Own tokens before the first new one."""
        return len(self.right) + (num_soft_tokens if self.user_embedding is not None else 0)

    def num_visible(self, num_soft_tokens: int) -> int:
        """How much of the shared prefix the row reads."""
        return len(self.segments.left) - self._takes_last


class Wave:
    """Rows in the slots 0..n-1 of static buffers; a row that is done leaves, and the last rows close the gap."""

    def __init__(self, slots: SuffixSlots, max_new_tokens: int) -> None:
        size = slots.max_rows
        self.slots = slots
        self.rows: list[Row] = []
        self.written = np.zeros((size, max_new_tokens), np.int64)
        self.num_written = np.zeros(size, np.int64)
        self.num_own = np.zeros(size, np.int64)  # tokens in the slots
        self.num_chars = np.zeros(size, np.int64)  # an upper bound
        self.max_new = np.zeros(size, np.int64)
        self.max_chars = np.zeros(size, np.int64)
        self.logprobs = np.zeros(size, np.float64)
        self.sampling = RowSampling.of([])
        self._prefixes: list[Prefix | None] = []
        self._visible: list[int] = []
        self._shared: list[PrefixRows] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def has_room_for(self, num_tokens: int, max_new_tokens: int) -> bool:
        """Whether a row of this size fits into the buffers."""
        free = len(self.rows) < self.slots.max_rows
        return free and num_tokens <= self.slots.max_tokens and max_new_tokens <= self.written.shape[1]

    def add(
        self, rows: Sequence[Row], prefixes: Sequence[Prefix | None], visible: Sequence[int], num_own: Sequence[int]
    ) -> None:
        """Put new rows behind those that are there."""
        span = slice(len(self.rows), len(self.rows) + len(rows))
        self.rows += rows
        self._prefixes += prefixes
        self._visible += visible
        self._shared = None
        self.num_own[span] = num_own
        self.num_written[span] = self.num_chars[span] = 0
        self.logprobs[span] = 0.0
        self.max_new[span] = [row.sampling.max_new_tokens for row in rows]
        self.max_chars[span] = [row.sampling.max_chars or np.iinfo(np.int64).max for row in rows]
        self.sampling = self.sampling.join(RowSampling.of([(row.sampling, row.stream) for row in rows]))

    def shared(self, device: torch.device) -> list[PrefixRows]:
        """The rows by the prefix they read; kept until rows come or go."""
        if self._shared is None:
            self._shared = by_prefix(self._prefixes, self._visible, device)
        return self._shared

    def last_tokens(self) -> _Ints:
        """The token each row wrote last (n,)."""
        n = len(self.rows)
        return self.written[np.arange(n), self.num_written[:n] - 1]

    def tokens(self, slot: int) -> _Ints:
        """All that a row has written."""
        return self.written[slot, : self.num_written[slot]]

    def write(self, slots: _Ints, tokens: _Ints, logprobs: npt.NDArray[np.float32]) -> None:
        """Append one token to each of these rows."""
        self.written[slots, self.num_written[slots]] = tokens
        self.num_written[slots] += 1
        self.logprobs[slots] += logprobs

    def remove(self, finished: Sequence[int]) -> None:
        """Take rows out; the last ones move into their slots."""
        num_left = len(self.rows) - len(finished)
        gone = set(finished)
        targets = [slot for slot in finished if slot < num_left]
        sources = [slot for slot in range(num_left, len(self.rows)) if slot not in gone]
        if targets:
            device = self.slots.keys[0].device
            num_tokens = int(self.num_own[sources].max())
            self.slots.move(torch.tensor(sources, device=device), torch.tensor(targets, device=device), num_tokens)
        for array in (self.written, self.num_written, self.num_own, self.num_chars, self.max_new, self.max_chars):
            array[targets] = array[sources]
        self.logprobs[targets] = self.logprobs[sources]
        order = np.arange(num_left)
        order[targets] = sources
        self.sampling = self.sampling.take(order)
        self.rows = [self.rows[slot] for slot in order]
        self._prefixes = [self._prefixes[slot] for slot in order]
        self._visible = [self._visible[slot] for slot in order]
        self._shared = None

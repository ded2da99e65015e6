"""A wave: rows of many contents decoded together behind their shared prefixes.

Each content's left part is prefilled once, all rows' own tokens in one batch; then one token a row and step. Finished
rows leave the batch at once; new ones come in when half the wave is free (a wave of 64 that waits for its longest row
loses a fifth against one of 256 that is compacted: ENGINE_FACTS, "Rows that end early").
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from e2p_ray.config import SamplingConfig
from e2p_ray.engine.contract import EngineStats
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.projector import Projector
from e2p_ray.engine.prompt import Segments
from e2p_ray.engine.sampling import RowSampling, choose
from e2p_ray.engine.shared_prefix import PrefillStep, Prefix, PrefixRows, RowsStep, SuffixSlots
from e2p_ray.engine.stopping import Stopping
from e2p_ray.schema import Completion, ErrorCode, FinishReason, RequestKey, UserEmbedding

# Matrix products stop gaining from more rows at about 256 on a CPU core (measured: 109 GFLOP/s at 64 rows, 144 at 256,
# 142 at 1,024), and activations grow with them.
PREFILL_TOKENS = 2048
# Contents of one prefill batch may differ in length by this much: padding is wasted work.
MAX_PADDING = 1.15


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One request, ready to be decoded."""

    key: RequestKey
    segments: Segments
    user_embedding: UserEmbedding | None
    sampling: SamplingConfig
    stream: int

    def num_suffix_tokens(self, num_soft_tokens: int) -> int:
        """Own tokens before the first new one. Without any of its own, a row takes over the prefix's last token."""
        num_soft = num_soft_tokens if self.user_embedding is not None else 0
        return max(num_soft + len(self.segments.right), 1)

    def num_visible(self, num_soft_tokens: int) -> int:
        """How much of the shared prefix the row reads from the cache."""
        takes_last = self.user_embedding is None and not self.segments.right
        return len(self.segments.left) - takes_last


@dataclass(frozen=True, slots=True)
class Bounds:
    """How large a wave may get."""

    max_rows: int
    max_bytes: int


class _Active:
    """The rows in the slots 0..n-1 of a wave, and what each has written."""

    def __init__(self, slots: SuffixSlots, max_new_tokens: int) -> None:
        self.slots = slots
        self.rows: list[Row] = []
        self.prefixes: list[Prefix | None] = []
        self.written = np.zeros((slots.max_rows, max_new_tokens), np.int64)
        self.num_written = np.zeros(slots.max_rows, np.int64)
        self.num_own = np.zeros(slots.max_rows, np.int64)  # tokens in the slots
        self.num_chars = np.zeros(slots.max_rows, np.int64)  # upper bound
        self.logprobs = np.zeros(slots.max_rows, np.float64)
        self.max_new = np.zeros(slots.max_rows, np.int64)
        self.max_chars = np.zeros(slots.max_rows, np.int64)
        self.sampling = RowSampling.of([])

    def add(self, rows: list[Row], prefixes: list[Prefix | None], num_own: list[int]) -> None:
        span = slice(len(self.rows), len(self.rows) + len(rows))
        self.rows += rows
        self.prefixes += prefixes
        self.num_own[span] = num_own
        self.num_written[span] = self.num_chars[span] = 0
        self.logprobs[span] = 0.0
        self.max_new[span] = [row.sampling.max_new_tokens for row in rows]
        self.max_chars[span] = [row.sampling.max_chars or np.iinfo(np.int64).max for row in rows]
        self.sampling = self.sampling.join(RowSampling.of([(row.sampling, row.stream) for row in rows]))

    def remove(self, finished: list[int]) -> None:
        """Close the gaps: the last rows move into the finished rows' slots."""
        num_left = len(self.rows) - len(finished)
        gone = set(finished)
        targets = [slot for slot in finished if slot < num_left]
        sources = [slot for slot in range(num_left, len(self.rows)) if slot not in gone]
        order = np.arange(num_left)
        order[targets] = sources
        if targets:
            device = self.slots.keys[0].device
            num_tokens = int(self.num_own[sources].max())
            self.slots.move(torch.tensor(sources, device=device), torch.tensor(targets, device=device), num_tokens)
        for array in (self.written, self.num_written, self.num_own, self.num_chars, self.logprobs):
            array[targets] = array[sources]
        self.max_new[targets] = self.max_new[sources]
        self.max_chars[targets] = self.max_chars[sources]
        self.sampling = self.sampling.take(order)
        self.rows = [self.rows[slot] for slot in order]
        self.prefixes = [self.prefixes[slot] for slot in order]


class Decoder:
    """Runs rows through the base model in waves. Completions come as they finish, in no order."""

    def __init__(self, base: BaseModel, projector: Projector, stopping: Stopping, bounds: Bounds) -> None:
        self._base, self._projector, self._stopping = base, projector, stopping
        self._num_soft = projector.manifest.num_soft_tokens
        self.bounds = bounds
        self.stats = EngineStats()
        self._pending: deque[Row] = deque()
        self._active: _Active | None = None
        self._prefixes: dict[tuple[int, ...], Prefix] = {}
        self._prefix_rows: list[PrefixRows] | None = None

    def run(self, rows: Iterable[Row]) -> Iterator[Completion]:
        """Decode every row. Out of memory halves the wave, down to one row, which then becomes an error."""
        source = iter(rows)
        try:
            while self._fill(source) or self._active is not None:
                try:
                    finished = self._advance()
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    finished = self._shrink()
                yield from finished
        finally:
            self._reset()
            self._pending.clear()

    # -- the wave's life ---------------------------------------------------------------------------------------------

    def _fill(self, source: Iterator[Row]) -> bool:
        """Keep a wave's worth of rows waiting."""
        while len(self._pending) < self.bounds.max_rows:
            row = next(source, None)
            if row is None:
                break
            self._pending.append(row)
        return bool(self._pending)

    def _advance(self) -> list[Completion]:
        num_active = len(self._active.rows) if self._active is not None else 0
        if self._pending and num_active <= self.bounds.max_rows // 2 and self._admit():
            return self._retire()
        if num_active:
            self._step()
        return self._retire()

    def _shrink(self) -> list[Completion]:
        """Put the wave's rows back and go on with half as many; a single row that does not fit is given up."""
        active = self._active.rows if self._active is not None else []
        rows = [*active, *self._pending]
        self._reset()
        self._pending = deque(rows)
        if self.bounds.max_rows > 1:
            tried = min(self.bounds.max_rows, max(len(rows), 2))
            self.bounds = replace(self.bounds, max_rows=max(tried // 2, 1))
            return []
        return [self._error(self._pending.popleft(), ErrorCode.OUT_OF_MEMORY)]

    def _reset(self) -> None:
        self._active, self._prefix_rows = None, None
        self._prefixes.clear()

    # -- rows come in ------------------------------------------------------------------------------------------------

    def _admit(self) -> bool:
        """Take as many waiting rows as fit, prefill what they need, choose their first tokens."""
        rows = self._take()
        if not rows:
            return False
        self._pending.extendleft(reversed(rows))  # each stays waiting until it is in the wave: memory may still run out
        if self._active is None:
            self._active = self._allocate(rows)
        prefixes = self._prefill_prefixes(rows)
        for part in self._parts(rows):
            self._prefill_rows(self._active, rows[part], prefixes[part])
        return True

    def _take(self) -> list[Row]:
        """The waiting rows that the bounds allow now; at least one when the wave is empty."""
        active = self._active
        num_active = len(active.rows) if active is not None else 0
        taken: list[Row] = []
        lefts = set(self._prefixes)
        num_bytes = num_active * self._row_bytes(active.slots.max_tokens if active is not None else 0)
        num_bytes += sum(map(len, lefts)) * self._base.kv_bytes_per_token
        max_tokens = active.slots.max_tokens if active is not None else 0
        max_new = active.written.shape[1] if active is not None else None
        while self._pending and num_active + len(taken) < self.bounds.max_rows:
            row = self._pending[0]
            tokens = self._own_tokens(row)
            if active is not None and (tokens > max_tokens or row.sampling.max_new_tokens > (max_new or 0)):
                break  # needs larger slots: they come when this wave is done
            if active is None:
                grown = max(max_tokens, tokens)
                num_bytes += (self._row_bytes(grown) - self._row_bytes(max_tokens)) * len(taken)
                max_tokens = grown
            num_bytes += self._row_bytes(max_tokens)
            if row.segments.left not in lefts:
                num_bytes += len(row.segments.left) * self._base.kv_bytes_per_token
                lefts.add(row.segments.left)
            if num_bytes > self.bounds.max_bytes and (taken or num_active):
                break
            taken.append(self._pending.popleft())
        return taken

    def _own_tokens(self, row: Row) -> int:
        return row.num_suffix_tokens(self._num_soft) + row.sampling.max_new_tokens

    def _row_bytes(self, num_tokens: int) -> int:
        """Slots, logits (kept twice) and a step's activations of one row."""
        base = self._base
        return num_tokens * base.kv_bytes_per_token + 8 * base.vocab_size + 64 * base.d_model

    def _allocate(self, rows: list[Row]) -> _Active:
        base = self._base
        max_new = max(row.sampling.max_new_tokens for row in rows)
        max_tokens = max(map(self._own_tokens, rows))
        num_rows = self.bounds.max_rows if len(self._pending) >= self.bounds.max_rows else len(self._pending)
        fitting = max(self.bounds.max_bytes // self._row_bytes(max_tokens), 1)
        slots = SuffixSlots(
            base.num_layers,
            max(min(num_rows, fitting), len(rows)),
            base.num_kv_heads,
            max_tokens,
            base.head_dim,
            dtype=base.dtype,
            device=base.device,
        )
        self.stats = replace(self.stats, num_waves=self.stats.num_waves + 1)
        return _Active(slots, max_new)

    @torch.inference_mode()
    def _prefill_prefixes(self, rows: list[Row]) -> list[Prefix | None]:
        """The prefix of every row; the missing ones are computed, contents of like length in one batch."""
        missing = {row.segments.left for row in rows} - set(self._prefixes)
        for batch in _batches(sorted((left for left in missing if left), key=len)):
            lengths = [len(left) for left in batch]
            ids = torch.zeros(len(batch), max(lengths), dtype=torch.long)
            for at, left in enumerate(batch):
                ids[at, : len(left)] = torch.tensor(left)
            step = PrefillStep(lengths, self._base.num_layers)
            positions = torch.arange(max(lengths), device=self._base.device).expand(len(batch), -1)
            self._base.hidden(self._base.embed(ids.to(self._base.device)), positions, step)
            self._prefixes.update(zip(batch, step.prefixes(), strict=True))
            self._count_prompt(sum(lengths), prefix=True)
        return [self._prefixes.get(row.segments.left) for row in rows]

    def _parts(self, rows: list[Row]) -> Iterator[slice]:
        """Rows whose own tokens are prefilled together: as many as a prefill batch holds."""
        start = 0
        longest = 0
        for end, row in enumerate(rows):
            longest = max(longest, row.num_suffix_tokens(self._num_soft))
            if end > start and (end + 1 - start) * longest > max(PREFILL_TOKENS, self.bounds.max_rows):
                yield slice(start, end)
                start, longest = end, row.num_suffix_tokens(self._num_soft)
        yield slice(start, len(rows))

    @torch.inference_mode()
    def _prefill_rows(self, active: _Active, rows: list[Row], prefixes: list[Prefix | None]) -> None:
        """Soft tokens and right parts of new rows in one batch, padded on the right; then their first tokens."""
        first = len(active.rows)
        num_own = [row.num_suffix_tokens(self._num_soft) for row in rows]
        embeds = self._suffix_embeds(rows, num_own)
        step = RowsStep(
            active.slots,
            first,
            torch.zeros(len(rows), dtype=torch.long, device=self._base.device),
            max(num_own),
            0,
            self._rows_by_prefix(rows, prefixes),
        )
        hidden = self._base.hidden(embeds, step.position_ids, step)
        ends = torch.tensor(num_own, device=self._base.device) - 1
        logits = self._base.logits(hidden[torch.arange(len(rows), device=hidden.device), ends])
        active.add(rows, prefixes, num_own)
        for _ in rows:
            self._pending.popleft()
        self._prefix_rows = None
        self._count_prompt(sum(num_own))
        num_prompt = sum(self._num_prompt_tokens(row) for row in rows)
        self.stats = replace(self.stats, num_prompt_tokens=self.stats.num_prompt_tokens + num_prompt)
        self._choose(active, logits, first)

    def _suffix_embeds(self, rows: list[Row], num_own: list[int]) -> Tensor:
        """(n, q, d_model): each row's soft tokens, then its right part (or the prefix's last token), then padding."""
        ids = torch.zeros(len(rows), max(num_own), dtype=torch.long)
        soft_rows = [at for at, row in enumerate(rows) if row.user_embedding is not None]
        for at, row in enumerate(rows):
            takes_last = row.user_embedding is None and not row.segments.right
            right = row.segments.left[-1:] if takes_last else row.segments.right
            ids[at, num_own[at] - len(right) : num_own[at]] = torch.tensor(right, dtype=torch.long)
        embeds = self._base.embed(ids.to(self._base.device))
        if soft_rows:
            stacked = np.stack([rows[at].user_embedding for at in soft_rows])  # type: ignore[misc]
            soft = self._projector(torch.from_numpy(stacked).to(self._base.device))
            embeds[torch.tensor(soft_rows, device=embeds.device), : self._num_soft] = soft.to(embeds.dtype)
        return embeds

    def _rows_by_prefix(self, rows: list[Row], prefixes: list[Prefix | None]) -> list[PrefixRows]:
        found: dict[tuple[int, int], list[int]] = {}
        for at, (row, prefix) in enumerate(zip(rows, prefixes, strict=True)):
            if prefix is not None and (visible := row.num_visible(self._num_soft)):
                found.setdefault((id(prefix), visible), []).append(at)
        items, start = [], 0
        for (_, visible), members in found.items():
            prefix = prefixes[members[0]]
            assert prefix is not None
            items.append(PrefixRows(prefix, visible, torch.tensor(members, device=self._base.device), start))
            start += len(members)
        return items

    # -- one token -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _step(self) -> None:
        """Every active row's next token."""
        active = self._active
        assert active is not None
        n = len(active.rows)
        if self._prefix_rows is None:
            self._prefix_rows = self._rows_by_prefix(active.rows, active.prefixes)
        last = active.written[np.arange(n), active.num_written[:n] - 1]
        device = self._base.device
        step = RowsStep(
            active.slots,
            0,
            torch.from_numpy(active.num_own[:n].copy()).to(device),
            1,
            int(active.num_own[:n].max()),
            self._prefix_rows,
        )
        embeds = self._base.embed(torch.from_numpy(last).to(device)[:, None])
        logits = self._base.logits(self._base.hidden(embeds, step.position_ids, step)[:, 0])
        active.num_own[:n] += 1
        self.stats = replace(self.stats, num_steps=self.stats.num_steps + 1)
        self._choose(active, logits, 0)

    def _choose(self, active: _Active, logits: Tensor, first: int) -> None:
        """Write the next token of the rows from slot `first` on; a row without finite logits is marked by -1."""
        span = slice(first, first + len(logits))
        sampling = active.sampling.take(np.arange(span.start, span.stop))
        chosen = choose(logits, sampling, active.written[span], active.num_written[span])
        rows = np.arange(span.start, span.stop)
        active.written[rows, active.num_written[span]] = np.where(chosen.finite, chosen.tokens, -1)
        active.num_written[span] += 1
        active.logprobs[span] += chosen.logprobs
        active.num_chars[span] += self._stopping.max_chars_of(chosen.tokens)
        self.stats = replace(self.stats, num_output_tokens=self.stats.num_output_tokens + len(rows))

    # -- rows go out -------------------------------------------------------------------------------------------------

    def _retire(self) -> list[Completion]:
        """Take the rows that are done out of the wave."""
        active = self._active
        if active is None:
            return []
        n = len(active.rows)
        last = active.written[np.arange(n), active.num_written[:n] - 1]
        ended = (last < 0) | self._stopping.is_end(last) | (active.num_written[:n] >= active.max_new[:n])
        long = active.num_chars[:n] >= active.max_chars[:n]
        completions, finished = [], []
        for slot in range(n):
            row = active.rows[slot]
            look = ended[slot] or long[slot] or self._stopping.may_stop(row.sampling.stop, int(last[slot]))
            reason = self._finish_reason(active, slot, int(last[slot])) if look else None
            if reason is not None:
                completions.append(self._completion(active, slot, reason))
                finished.append(slot)
            if reason is FinishReason.ERROR:
                active.slots.clear(slot)
        if finished:
            active.remove(finished)
            self._prefix_rows = None
            self._forget_prefixes()
        return completions

    def _finish_reason(self, active: _Active, slot: int, last: int) -> FinishReason | None:
        if last < 0:
            return FinishReason.ERROR
        num_written, sampling = active.num_written[slot], active.rows[slot].sampling
        reason = self._stopping.reason(active.written[slot, :num_written], sampling)
        if reason is not None:
            return reason
        if self._stopping.is_end(np.array([last]))[0]:
            return FinishReason.END_TOKEN
        return FinishReason.MAX_TOKENS if num_written >= active.max_new[slot] else None

    def _completion(self, active: _Active, slot: int, reason: FinishReason) -> Completion:
        row = active.rows[slot]
        if reason is FinishReason.ERROR:
            return self._error(row, ErrorCode.NON_FINITE_LOGITS)
        num_written = int(active.num_written[slot])
        return Completion(
            key=row.key,
            text=self._stopping.text(active.written[slot, :num_written], row.sampling),
            finish_reason=reason,
            num_prompt_tokens=self._num_prompt_tokens(row),
            num_output_tokens=num_written,
            mean_logprob=float(active.logprobs[slot]) / num_written,
            truncated=row.segments.truncated,
        )

    def _error(self, row: Row, code: ErrorCode) -> Completion:
        return Completion(
            row.key, "", FinishReason.ERROR, self._num_prompt_tokens(row), 0, 0.0, code, row.segments.truncated
        )

    def _forget_prefixes(self) -> None:
        """Free the prefixes that neither an active nor the next waiting row reads."""
        active = self._active
        assert active is not None
        wanted: set[tuple[int, ...]] = {row.segments.left for row in active.rows}
        if self._pending:
            wanted.add(self._pending[0].segments.left)
        for left in set(self._prefixes) - wanted:
            del self._prefixes[left]
        if not active.rows:
            self._active = None

    # -- counting ----------------------------------------------------------------------------------------------------

    def _num_prompt_tokens(self, row: Row) -> int:
        return row.segments.num_tokens + (self._num_soft if row.user_embedding is not None else 0)

    def _count_prompt(self, num_tokens: int, *, prefix: bool = False) -> None:
        self.stats = replace(
            self.stats,
            num_computed_tokens=self.stats.num_computed_tokens + num_tokens,
            num_prefix_tokens=self.stats.num_prefix_tokens + (num_tokens if prefix else 0),
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out: CUDA's own type, or what the CPU allocator says."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)


def _batches(lefts: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Prefixes sorted by length, cut where a batch grows too large or its padding too wide."""
    batch: list[tuple[int, ...]] = []
    for left in lefts:
        if batch and (len(left) > MAX_PADDING * len(batch[0]) or (len(batch) + 1) * len(left) > PREFILL_TOKENS):
            yield batch
            batch = []
        batch.append(left)
    if batch:
        yield batch

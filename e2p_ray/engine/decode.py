"""The token loop: rows of many contents decoded together behind their shared prefixes.

Each content's left part is prefilled once, all rows' own tokens in one batch; then one token a row and step. Finished
rows leave the batch at once; new ones come in when half the wave is free (a wave of 64 that waits for its longest row
loses a fifth against one of 256 that is compacted: measured while designing, 8 contents x 64 users).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from e2p_ray.engine.contract import EngineStats
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.prefixes import PREFILL_TOKENS, PrefixStore
from e2p_ray.engine.projector import Projector
from e2p_ray.engine.sampling import choose
from e2p_ray.engine.shared_prefix import Prefix, RowsStep, SuffixSlots, by_prefix
from e2p_ray.engine.stopping import Stopping
from e2p_ray.engine.wave import Row, Wave
from e2p_ray.schema import Completion, ErrorCode, FinishReason


@dataclass(frozen=True, slots=True)
class Bounds:
    """How large a wave may get."""

    max_rows: int
    max_bytes: int


class Decoder:
    """Runs rows through the base model in waves. Completions come as they finish, in no order.

    Prefixes stay in the store between calls, so that a second try or the unpersonalised text of a content costs no
    second prefill; they make room for rows when memory is short.
    """

    def __init__(self, base: BaseModel, projector: Projector, stopping: Stopping, bounds: Bounds) -> None:
        self._base, self._projector, self._stopping = base, projector, stopping
        self._num_soft = projector.manifest.num_soft_tokens
        self.bounds = bounds
        self.stats = EngineStats()
        self._store = PrefixStore(base, bounds.max_bytes // 2)
        self._pending: deque[Row] = deque()
        self._wave: Wave | None = None

    def run(self, rows: Iterable[Row]) -> Iterator[Completion]:
        """Decode every row. Out of memory halves the wave, down to one row, which then becomes an error."""
        source = iter(rows)
        try:
            while self._fill(source) or self._wave is not None:
                try:
                    finished = self._advance()
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    finished = self._shrink()
                yield from finished
        finally:
            self._wave = None
            self._pending.clear()

    def _fill(self, source: Iterator[Row]) -> bool:
        """Keep a wave's worth of rows waiting."""
        while len(self._pending) < self.bounds.max_rows:
            row = next(source, None)
            if row is None:
                break
            self._pending.append(row)
        return bool(self._pending)

    def _advance(self) -> list[Completion]:
        num_rows = 0 if self._wave is None else len(self._wave)
        admitted = bool(self._pending) and num_rows <= self.bounds.max_rows // 2 and self._admit()
        if not admitted:
            self._step()
        return self._retire()

    def _shrink(self) -> list[Completion]:
        """Put the wave's rows back and go on with half as many; a single row that does not fit is given up."""
        rows = [*(self._wave.rows if self._wave is not None else []), *self._pending]
        self._wave = None
        self._store.trim(0)
        self._pending = deque(rows)
        if self.bounds.max_rows > 1:
            tried = min(self.bounds.max_rows, max(len(rows), 2))
            self.bounds = replace(self.bounds, max_rows=tried // 2)
            return []
        return [self._error(self._pending.popleft(), ErrorCode.OUT_OF_MEMORY)]

    # -- rows come in ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _admit(self) -> bool:
        """Take as many waiting rows as fit, prefill what they need, choose their first tokens."""
        rows = self._fitting()
        if not rows:
            return False
        if self._wave is None:
            self._wave = self._new_wave(rows)
        computed = self._store.num_computed_tokens
        prefixes = self._store.get([row.segments.left for row in rows])
        self._count(prefix=self._store.num_computed_tokens - computed)
        for part in self._parts(rows):
            self._prefill(self._wave, rows[part], prefixes[part])
        return True

    def _fitting(self) -> list[Row]:
        """The waiting rows that the bounds allow now; at least one when the wave is empty."""
        wave = self._wave
        num_rows, max_tokens = (len(wave), wave.slots.max_tokens) if wave is not None else (0, 0)
        prefixes = {row.segments.left for row in wave.rows} if wave is not None else set()
        num_prefix_tokens = sum(map(len, prefixes))
        fitting: list[Row] = []
        for row in self._pending:
            tokens = self._num_slot_tokens(row)
            if wave is not None and not wave.has_room_for(tokens, row.sampling.max_new_tokens):
                break  # needs larger slots: they come when this wave is done
            longest = max(max_tokens, tokens)
            more = 0 if row.segments.left in prefixes else len(row.segments.left)
            count = num_rows + len(fitting) + 1
            num_bytes = count * self._row_bytes(longest) + self._store.bytes_of(num_prefix_tokens + more)
            if count > self.bounds.max_rows or (num_bytes > self.bounds.max_bytes and count > 1):
                break
            fitting.append(row)
            prefixes.add(row.segments.left)
            max_tokens, num_prefix_tokens = longest, num_prefix_tokens + more
        self._store.trim(max(self.bounds.max_bytes - (num_rows + len(fitting)) * self._row_bytes(max_tokens), 0))
        return fitting

    def _num_slot_tokens(self, row: Row) -> int:
        return row.num_suffix_tokens(self._num_soft) + row.sampling.max_new_tokens

    def _row_bytes(self, num_tokens: int) -> int:
        """Slots, logits (kept twice) and a step's activations of one row."""
        base = self._base
        return num_tokens * base.kv_bytes_per_token + 8 * base.vocab_size + 64 * base.d_model

    def _new_wave(self, rows: list[Row]) -> Wave:
        """Buffers for these rows, and for as many of their kind as may come in later."""
        base = self._base
        max_tokens = max(map(self._num_slot_tokens, rows))
        affordable = self.bounds.max_bytes // self._row_bytes(max_tokens)
        num_rows = max(min(self.bounds.max_rows, len(self._pending), affordable), len(rows))
        slots = SuffixSlots(
            base.num_layers,
            num_rows,
            base.num_kv_heads,
            max_tokens,
            base.head_dim,
            dtype=base.dtype,
            device=base.device,
        )
        self.stats = replace(self.stats, num_waves=self.stats.num_waves + 1)
        return Wave(slots, max(row.sampling.max_new_tokens for row in rows))

    def _parts(self, rows: list[Row]) -> Iterator[slice]:
        """Rows whose own tokens are prefilled together: as many as a prefill batch holds."""
        limit = max(PREFILL_TOKENS, self.bounds.max_rows)
        start, longest = 0, 0
        for end, row in enumerate(rows):
            num_tokens = row.num_suffix_tokens(self._num_soft)
            if end > start and (end + 1 - start) * max(longest, num_tokens) > limit:
                yield slice(start, end)
                start, longest = end, 0
            longest = max(longest, num_tokens)
        yield slice(start, len(rows))

    def _prefill(self, wave: Wave, rows: list[Row], prefixes: list[Prefix | None]) -> None:
        """Soft tokens and right parts of new rows in one batch, padded on the right; then their first tokens."""
        first = len(wave)
        num_own = [row.num_suffix_tokens(self._num_soft) for row in rows]
        device = self._base.device
        visible = [row.num_visible(self._num_soft) for row in rows]
        shared = by_prefix(prefixes, visible, device)
        step = RowsStep(
            wave.slots, first, torch.zeros(len(rows), dtype=torch.long, device=device), max(num_own), 0, shared
        )
        hidden = self._base.hidden(self._suffix_embeds(rows, num_own), step.position_ids, step)
        ends = torch.tensor(num_own, device=device) - 1
        logits = self._base.logits(hidden[torch.arange(len(rows), device=device), ends])
        wave.add(rows, prefixes, visible, num_own)
        for _ in rows:  # only now: memory may have run out before
            self._pending.popleft()
        self._count(rows=sum(num_own), prompt=sum(map(self._num_prompt_tokens, rows)))
        num_truncated = sum(row.segments.truncated for row in rows)
        self.stats = replace(self.stats, num_truncated=self.stats.num_truncated + num_truncated)
        self._choose(wave, logits, first)

    def _suffix_embeds(self, rows: list[Row], num_own: list[int]) -> Tensor:
        """(n, q, d_model): each row's soft tokens, then its right part (or the prefix's last token), then padding."""
        ids = torch.zeros(len(rows), max(num_own), dtype=torch.long)
        soft_rows = [at for at, row in enumerate(rows) if row.user_embedding is not None]
        for at, row in enumerate(rows):
            right = row.right
            ids[at, num_own[at] - len(right) : num_own[at]] = torch.tensor(right, dtype=torch.long)
        embeds = self._base.embed(ids.to(self._base.device))
        if soft_rows:
            stacked = np.stack([rows[at].user_embedding for at in soft_rows])  # type: ignore[misc]
            soft = self._projector(torch.from_numpy(stacked).to(self._base.device))
            embeds[torch.tensor(soft_rows, device=embeds.device), : self._num_soft] = soft.to(embeds.dtype)
        return embeds

    # -- one token ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _step(self) -> None:
        """The next token of every row of the wave."""
        wave = self._wave
        assert wave is not None, "there are rows to decode or to admit"
        n, device = len(wave), self._base.device
        own = torch.from_numpy(wave.num_own[:n].copy()).to(device)
        step = RowsStep(wave.slots, 0, own, 1, int(wave.num_own[:n].max()), wave.shared(device))
        embeds = self._base.embed(torch.from_numpy(wave.last_tokens()).to(device)[:, None])
        logits = self._base.logits(self._base.hidden(embeds, step.position_ids, step)[:, 0])
        wave.num_own[:n] += 1
        self.stats = replace(self.stats, num_steps=self.stats.num_steps + 1)
        self._choose(wave, logits, 0)

    def _choose(self, wave: Wave, logits: Tensor, first: int) -> None:
        """Write the next token of the rows from slot `first` on; -1 stands for one without finite logits."""
        rows = np.arange(first, first + len(logits))
        chosen = choose(logits, wave.sampling.take(rows), wave.written[rows], wave.num_written[rows])
        wave.write(rows, np.where(chosen.finite, chosen.tokens, -1), chosen.logprobs)
        wave.num_chars[rows] += self._stopping.max_chars_of(chosen.tokens)
        self.stats = replace(self.stats, num_output_tokens=self.stats.num_output_tokens + len(rows))

    # -- rows go out -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _retire(self) -> list[Completion]:
        """Take the rows that are done out of the wave."""
        wave = self._wave
        assert wave is not None
        n, last = len(wave), wave.last_tokens()
        ended = (last < 0) | self._stopping.is_end(last) | (wave.num_written[:n] >= wave.max_new[:n])
        look = ended | (wave.num_chars[:n] >= wave.max_chars[:n])
        completions, finished = [], []
        for slot, row in enumerate(wave.rows):
            if look[slot] or self._stopping.may_stop(row.sampling.stop, int(last[slot])):
                reason = self._finish_reason(wave, slot)
                if reason is not None:
                    completions.append(self._completion(wave, slot, reason))
                    finished.append(slot)
        if finished:
            wave.remove(finished)
        if not len(wave):
            self._wave = None
        return completions

    def _finish_reason(self, wave: Wave, slot: int) -> FinishReason | None:
        tokens = wave.tokens(slot)
        if tokens[-1] < 0:
            return FinishReason.ERROR
        reason = self._stopping.reason(tokens, wave.rows[slot].sampling)
        if reason is None and self._stopping.is_end(tokens[-1:])[0]:
            reason = FinishReason.END_TOKEN
        if reason is None and len(tokens) >= wave.max_new[slot]:
            reason = FinishReason.MAX_TOKENS
        return reason

    def _completion(self, wave: Wave, slot: int, reason: FinishReason) -> Completion:
        row, tokens = wave.rows[slot], wave.tokens(slot)
        if reason is FinishReason.ERROR:
            wave.slots.clear(slot)
            return self._error(row, ErrorCode.NON_FINITE_LOGITS)
        return Completion(
            key=row.key,
            text=self._stopping.text(tokens, row.sampling),
            finish_reason=reason,
            num_prompt_tokens=self._num_prompt_tokens(row),
            num_output_tokens=len(tokens),
            mean_logprob=float(wave.logprobs[slot]) / len(tokens),
            truncated=row.segments.truncated,
        )

    def _error(self, row: Row, code: ErrorCode) -> Completion:
        num_prompt, truncated = self._num_prompt_tokens(row), row.segments.truncated
        return Completion(row.key, "", FinishReason.ERROR, num_prompt, 0, 0.0, code, truncated)

    # -- counting ----------------------------------------------------------------------------------------------------

    def _num_prompt_tokens(self, row: Row) -> int:
        return row.segments.num_tokens + (self._num_soft if row.user_embedding is not None else 0)

    def _count(self, *, prefix: int = 0, rows: int = 0, prompt: int = 0) -> None:
        self.stats = replace(
            self.stats,
            num_prompt_tokens=self.stats.num_prompt_tokens + prompt,
            num_computed_tokens=self.stats.num_computed_tokens + prefix + rows,
            num_prefix_tokens=self.stats.num_prefix_tokens + prefix,
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out: CUDA's own type, or what the CPU allocator says."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)

"""Which waiting rows may come into a wave: bounds on rows and bytes, and the buffers that follow from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from e2p_ray.config import EngineConfig
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.prefixes import PrefixStore, prefill_tokens
from e2p_ray.engine.row import Row
from e2p_ray.engine.shared_prefix import SuffixSlots
from e2p_ray.engine.wave import Wave


@dataclass(frozen=True, slots=True)
class Bounds:
    """How large a wave may get, or all of them together."""

    max_rows: int
    max_bytes: int
    max_prefill_tokens: int | None = None  # of prefixes computed between two steps; one prefix always is

    def shared(self, num_waves: int) -> Bounds:
        """Those of each of so many waves."""
        return replace(self, max_rows=max(self.max_rows // num_waves, 1), max_bytes=self.max_bytes // num_waves)

    def times(self, num_waves: int) -> Bounds:
        """Those of so many waves together."""
        return replace(self, max_rows=self.max_rows * num_waves, max_bytes=self.max_bytes * num_waves)


# 512, and room for the unpersonalised texts of a shard's contents: beside 1,024 requests these two to four rows were a
# wave of their own, of as many steps as the others, each of which reads every weight (2 % of a run; 2026-11-29).
_CPU_ROWS = 512 + 32
# Paper arithmetic for an 8 B model on an H200 has its best waves at 1,024 to 4,096 rows; there two take turns.
_GPU_ROWS = 4096
_GPU_SHARE = 0.8  # of the memory that is free once the model is loaded: the rest is for what is not counted


def bounds_on(device: torch.device, config: EngineConfig) -> Bounds:
    """What the configuration says, and for what it does not say, what this device likes."""
    if device.type != "cuda":
        return Bounds(config.max_rows or _CPU_ROWS, config.usual_bytes)
    max_bytes = config.max_bytes or int(_GPU_SHARE * torch.cuda.mem_get_info(device)[0])
    return Bounds(config.max_rows or _GPU_ROWS, max_bytes)


# How much longer than needed the rows of slots may be that are used again: a row is counted with all its places.
_MAX_LONGER = 1.25


# Passes of waves that are at least half full, after which a size counts as one that works, and a larger one is tried.
_PATIENCE_PASSES = 32


@dataclass(frozen=True, slots=True)
class _Size:
    """Each wave's rows at most, and how many waves take turns."""

    max_rows: int
    num_waves: int


@dataclass(frozen=True, slots=True)
class Fitting:
    """Waiting rows that may come into a wave, and the bytes of its prefixes, theirs among them."""

    rows: list[Row]
    num_prefix_bytes: int


class Admission:
    """Keeps waves within their bounds, which shrink when memory runs out, and grow again.

    A size is doubled after some passes. Where that fails, it is tried again after twice as many: on a machine that has
    less memory than it was taken for, it fails as often as the number of passes doubles.
    """

    def __init__(self, base: BaseModel, num_soft_tokens: int, bounds: Bounds, num_waves: int) -> None:
        """Of `bounds` for all waves together."""
        self._base, self._num_soft = base, num_soft_tokens
        self.bounds = bounds.shared(num_waves)  # each wave's
        self.num_waves = num_waves
        self._given = self._proven = _Size(self.bounds.max_rows, num_waves)
        self._num_passes, self._patience_passes = 0, _PATIENCE_PASSES
        self._is_trial, self._has_given_up = False, False
        self._spare: SuffixSlots | None = None

    def halve(self, num_rows: int) -> bool:
        """Go on with half as many rows as were tried, in one wave; False when it was a single one."""
        self._spare = None
        if self._is_trial:
            self._patience_passes *= 2
        was_alone = self.bounds.max_rows * self.num_waves == 1
        self._resize(_Size(max(min(self.bounds.max_rows, num_rows) // 2, 1), 1))
        return not was_alone

    def gave_up(self) -> None:
        """A row did not fit alone: perhaps all others do, together. The next pass that goes well shows that."""
        self._has_given_up = True

    def passed(self, num_rows: int) -> None:
        """A pass over a wave of so many rows went well."""
        if self._has_given_up:
            self._has_given_up = False
            self._resize(self._proven)
        elif 2 * num_rows >= self.bounds.max_rows:
            self._num_passes += 1
            if self._num_passes == self._patience_passes:
                self._grow()

    def _grow(self) -> None:
        if self._is_trial:
            self._patience_passes, self._is_trial = _PATIENCE_PASSES, False
        self._proven = size = _Size(self.bounds.max_rows, self.num_waves)
        if size.max_rows < self._given.max_rows:
            self._resize(_Size(min(2 * size.max_rows, self._given.max_rows), size.num_waves), is_trial=True)
        elif size != self._given:
            self._resize(self._given, is_trial=True)

    def _resize(self, size: _Size, *, is_trial: bool = False) -> None:
        self.bounds, self.num_waves = replace(self.bounds, max_rows=size.max_rows), size.num_waves
        self._num_passes, self._is_trial = 0, is_trial

    def fitting(self, pending: Iterable[Row], wave: Wave | None, store: PrefixStore) -> Fitting:
        """The waiting rows that the bounds allow now; at least one when there is no wave.

        Makes room for them in the store, and in a wave that has more free slots than rows.
        """
        num_rows, max_tokens = (len(wave), wave.slots.max_tokens) if wave is not None else (0, 0)
        num_slots = 0 if wave is None else wave.slots.max_rows
        # The memories that prefixes of these rows keep, whole, and what is still to be computed.
        kept = dict(prefix.memory for prefix in wave.prefixes if prefix is not None) if wave is not None else {}
        new = set[tuple[int, ...]]()
        num_kept_bytes, num_new_bytes, num_computed = sum(kept.values()), 0, 0
        fitting: list[Row] = []
        for row in pending:
            left, prefix = row.segments.left, store.use(row.segments.left)
            longest = max(max_tokens, self._num_slot_tokens(row))
            memory, num_bytes = (0, 0) if prefix is None else prefix.memory
            more_kept = 0 if memory in kept else num_bytes
            more_new = store.bytes_of(len(left)) if prefix is None and left not in new else 0
            count = num_rows + len(fitting) + 1
            room = self.bounds.max_bytes - num_kept_bytes - num_new_bytes - more_kept - more_new
            total = self._num_bytes(count, num_slots, longest)
            if wave is not None and 2 * count <= num_slots and total > room:
                least = self._num_bytes(count, count, longest)
                if least <= room:
                    num_slots, total = count, least
                    wave.grow(num_slots, wave.slots.max_tokens, wave.max_new_tokens)
            if count > self.bounds.max_rows or (total > room and count > 1):
                break
            if more_new and self.bounds.max_prefill_tokens is not None:
                if num_computed and num_computed + len(left) > self.bounds.max_prefill_tokens:
                    break
                num_computed += len(left)
            fitting.append(row)
            kept[memory] = num_bytes
            if more_new:
                new.add(left)
            max_tokens, num_kept_bytes, num_new_bytes = longest, num_kept_bytes + more_kept, num_new_bytes + more_new
        taken = self._num_bytes(num_rows + len(fitting), num_slots, max_tokens) + num_new_bytes
        taken += sum(num_bytes for memory, num_bytes in kept.items() if not store.holds(memory))
        store.trim(max(self.bounds.max_bytes - taken, 0))
        return Fitting(fitting, num_kept_bytes + num_new_bytes)

    def _num_slot_tokens(self, row: Row) -> int:
        return row.num_suffix_tokens(self._num_soft) + row.sampling.max_new_tokens

    def _num_bytes(self, num_rows: int, num_slots: int, num_tokens: int) -> int:
        """Of rows, and of the slots that there are for them and others, with places for so many tokens each."""
        return num_rows * self._pass_bytes() + max(num_rows, num_slots) * self._slot_bytes(num_tokens)

    def _slot_bytes(self, num_tokens: int) -> int:
        """One slot's keys and values."""
        base = self._base
        return num_tokens * (base.kv_bytes_per_token * base.own_dtype.itemsize // base.dtype.itemsize)

    def _pass_bytes(self) -> int:
        """Logits (three times: as they are, controlled, normalised) and a step's activations of one row.

        What sampling makes of logits is of some rows at a time, however many there are.
        """
        return 12 * self._base.vocab_size + self._base.activation_bytes_per_token

    def wave_for(self, fitting: Fitting, num_pending: int, wave: Wave | None) -> Wave:
        """A wave with room for these rows besides its own, and for as many of the pending ones as may come in later.

        Beside prefixes there is no room for as many as without.
        """
        rows = fitting.rows
        max_new = max(row.sampling.max_new_tokens for row in rows)
        max_tokens = max(map(self._num_slot_tokens, rows))
        if wave is None:
            prefix_bytes = fitting.num_prefix_bytes // len(rows)
            max_rows = self._max_rows(max_tokens, len(rows), num_pending, prefix_bytes)
            spare = self._spare_slots(max_rows, max_tokens, prefix_bytes)
            return Wave(spare or self._base.slots(max_rows, max_tokens), max_new)
        slots, num_rows = wave.slots, len(wave) + len(rows)
        max_tokens, max_new = max(max_tokens, slots.max_tokens), max(max_new, wave.max_new_tokens)
        if num_rows > slots.max_rows or max_tokens > slots.max_tokens or max_new > wave.max_new_tokens:
            # Twice as many, because who comes one by one would have everything copied for each.
            wanted = max(2 * num_rows, slots.max_rows)
            max_rows = self._max_rows(max_tokens, num_rows, wanted, fitting.num_prefix_bytes // num_rows)
            wave.grow(max_rows, max_tokens, max_new)
        return wave

    def ended(self, wave: Wave) -> None:
        """Keep the slots of a wave without rows for the next one: new memory costs more than what is written to it.

        512 rows of a model of 30 M parameters: 60 to 75 ms of 1.8 s. On a GPU torch's allocator keeps it.
        """
        if self._base.device.type == "cpu":
            self._spare = wave.slots

    def _spare_slots(self, max_rows: int, max_tokens: int, prefix_bytes: int) -> SuffixSlots | None:
        """What an ended wave left, where it has enough rows, not too many, and such long ones; else it is freed."""
        spare, self._spare = self._spare, None
        if spare is None:
            return None
        most = max(self._affordable(spare.max_tokens, prefix_bytes), max_rows)
        if not max_rows <= spare.max_rows <= most:
            return None
        return spare if max_tokens <= spare.max_tokens <= _MAX_LONGER * max_tokens else None

    def _max_rows(self, max_tokens: int, least: int, wanted: int, prefix_bytes: int) -> int:
        return max(min(self.bounds.max_rows, wanted, self._affordable(max_tokens, prefix_bytes)), least)

    def _affordable(self, max_tokens: int, prefix_bytes: int) -> int:
        """Rows that there are bytes for, of so many own tokens each, and of prefixes so many bytes to a row.

        Those that come later bring some as well: slots that took all that is left would keep them out.
        """
        return self.bounds.max_bytes // (self._num_bytes(1, 1, max_tokens) + prefix_bytes)

    def run_along(self, rows: Sequence[Row], num_running: int) -> bool:
        """Whether the first pass of new rows may take those that run along: a pass for all costs less than two.

        Those that run have a place for each of the new ones' tokens in it, filled or not, in the attention to own
        tokens: a sixtieth of what a token costs (d_model 512).
        """
        longest = max(row.num_suffix_tokens(self._num_soft) for row in rows)
        return (num_running + len(rows)) * longest <= prefill_tokens(self._base.device)

    def parts(self, rows: Sequence[Row]) -> Iterator[slice]:
        """Rows whose own tokens are prefilled together: as many as a prefill batch holds."""
        limit = max(prefill_tokens(self._base.device), self.bounds.max_rows)
        start, longest = 0, 0
        for end, row in enumerate(rows):
            num_tokens = row.num_suffix_tokens(self._num_soft)
            if end > start and (end + 1 - start) * max(longest, num_tokens) > limit:
                yield slice(start, end)
                start, longest = end, 0
            longest = max(longest, num_tokens)
        yield slice(start, len(rows))

"""The store of shared prefixes: each content's left part is run through the model once and kept while there is room."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence, Set

import numpy as np
import torch
from torch import Tensor

from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.readers import Readers
from e2p_ray.engine.rows_step import RowsStep
from e2p_ray.engine.sent import sent
from e2p_ray.engine.shared_prefix import PrefillBatch, PrefillDoneError, PrefillStep, Prefix, SuffixSlots

TokenIds = tuple[int, ...]

# Matrix products stop gaining from more rows at about 256 on a CPU core (measured: 109 GFLOP/s at 64 rows, 144 at 256,
# 142 at 1,024), and activations grow with them.
_CPU_PREFILL_TOKENS = 2048
# On a GPU as many as keep all of it busy, as far as activations go (16,384 x 28,672 of an 8 B model: 0.9 GB).
_GPU_PREFILL_TOKENS = 16_384
# Contents of one prefill batch may differ in length by this much: padding is wasted work; packed, only memory.
MAX_PADDING = 1.15
_MAX_CONTINUED = 128  # left parts of one pass that go on from a stem: cues are a few tokens each


def prefill_tokens(device: torch.device) -> int:
    """The most tokens that one pass of prefills takes, if it is not a single content's."""
    return _CPU_PREFILL_TOKENS if device.type == "cpu" else _GPU_PREFILL_TOKENS


class PrefixStore:
    """Keys and values by token ids, least recently used dropped first beyond `max_bytes`.

    What was computed together lies in one memory, which counts until the last of it is dropped. Where half of it or
    less is kept, this gets memory of its own. Rows hold the `Prefix` they read, so dropping one here never takes
    it from a row.

    The ids are the whole key: layout and cue are part of them, and a store belongs to one base model. A content's
    second task begins as its first one did, with its stem, and only its cue is computed.
    """

    def __init__(self, base: BaseModel, max_bytes: int) -> None:
        self._base, self.max_bytes = base, max_bytes
        self._kept: OrderedDict[TokenIds, Prefix] = OrderedDict()
        self._with_stem: dict[TokenIds, TokenIds] = {}  # a kept left part for every stem
        self._stem_of: dict[TokenIds, TokenIds] = {}
        self._beside: dict[int, set[TokenIds]] = {}  # the kept left parts in every memory
        self.num_bytes = 0  # of these memories
        self.num_computed_tokens = 0

    def bytes_of(self, num_tokens: int) -> int:
        """Bytes that the keys and values of so many tokens take."""
        return num_tokens * self._base.kv_bytes_per_token

    def use(self, left: TokenIds) -> Prefix | None:
        """A left part's prefix where it is kept: no longer the least recently used one."""
        found = self._kept.get(left)
        if found is not None:
            self._kept.move_to_end(left)
        return found

    def holds(self, memory: int) -> bool:
        """Whether this memory counts among the store's."""
        return memory in self._beside

    def get(self, lefts: Sequence[TokenIds], num_stems: Sequence[int] | None = None) -> list[Prefix | None]:
        """The prefix of every left part, None for an empty one; those not kept are computed, alike lengths together.

        num_stems: how many tokens of each other left parts may begin with as well.
        """
        stems: dict[TokenIds, TokenIds] = {}
        for left, num in zip(lefts, num_stems or [0] * len(lefts), strict=True):
            if left and left not in stems:
                stems[left] = left[:num]
        found = {left: self._kept[left] for left in stems if left in self._kept}
        missing = [left for left in stems if left not in found]
        whole, begun = self._split(missing, stems)
        for batch in _batches(sorted(whole, key=len), prefill_tokens(self._base.device)):
            found.update(zip(batch, self._prefill(batch), strict=True))
        sources = {left: found.get(source) or self._kept[source] for left, source in begun.items()}
        for start in range(0, len(sources), _MAX_CONTINUED):
            part = list(sources.items())[start : start + _MAX_CONTINUED]
            found.update(self._continue([(left, len(stems[left]), source) for left, source in part]))
        for left, stem in stems.items():
            self._keep(left, stem, found[left])
        self.trim(self.max_bytes)
        return [found.get(left) for left in lefts]

    def trim(self, max_bytes: int) -> None:
        """Drop the least recently used until no more than this is kept."""
        while self._kept and self.num_bytes > max_bytes:
            left, prefix = self._kept.popitem(last=False)
            stem = self._stem_of.pop(left)
            if self._with_stem.get(stem) == left:
                del self._with_stem[stem]
            self._release(left, prefix)
            # What is used once leaves as it came, neighbours one after the other: nothing is copied for them.
            beside, oldest = self._beside.get(prefix.memory[0], set()), next(iter(self._kept), None)
            is_last = oldest not in beside or len(self._beside) == 1
            if max_bytes and is_last and self._is_half_dropped(beside, prefix):  # copies need memory: none for no bytes
                self._move_out(beside)

    def _is_half_dropped(self, beside: Set[TokenIds], prefix: Prefix) -> bool:
        return 0 < 2 * self.bytes_of(sum(map(len, beside))) <= prefix.memory[1]

    def _move_out(self, lefts: Set[TokenIds]) -> None:
        for left in [*lefts]:
            prefix = self._kept[left]
            self._kept[left] = copy = prefix.alone()
            self._hold(left, copy)
            self._release(left, prefix)

    def _hold(self, left: TokenIds, prefix: Prefix) -> None:
        memory, num_bytes = prefix.memory
        if memory not in self._beside:
            self._beside[memory] = set()
            self.num_bytes += num_bytes
        self._beside[memory].add(left)

    def _release(self, left: TokenIds, prefix: Prefix) -> None:
        memory, num_bytes = prefix.memory
        self._beside[memory].remove(left)
        if not self._beside[memory]:
            del self._beside[memory]
            self.num_bytes -= num_bytes

    def _keep(self, left: TokenIds, stem: TokenIds, prefix: Prefix) -> None:
        if left not in self._kept:
            self._kept[left] = prefix
            self._hold(left, prefix)
            self._stem_of[left] = stem
            if stem:
                self._with_stem.setdefault(stem, left)
        self._kept.move_to_end(left)

    def _split(
        self, missing: Sequence[TokenIds], stems: Mapping[TokenIds, TokenIds]
    ) -> tuple[list[TokenIds], dict[TokenIds, TokenIds]]:
        """Left parts to be computed whole, and those that go on from another one with their stem."""
        whole, begun = list[TokenIds](), dict[TokenIds, TokenIds]()
        first: dict[TokenIds, TokenIds] = {}
        for left in missing:
            stem = stems[left]
            source = first.get(stem) or self._with_stem.get(stem)
            if not stem or source is None:
                whole.append(left)
                first[stem] = left
            else:
                begun[left] = source
        return whole, begun

    @torch.no_grad()
    def _continue(self, rows: list[tuple[TokenIds, int, Prefix]]) -> dict[TokenIds, Prefix]:
        """Prefixes of left parts whose first tokens another prefix has: only what follows is computed."""
        rests = [left[num_stem:] for left, num_stem, _ in rows]
        counts = np.array([len(rest) for rest in rests])
        slots = self._base.slots(len(rows), max(int(counts.max()), 1))
        asked = np.flatnonzero(counts)
        if len(asked):
            readers = Readers.of([rows[at][2] for at in asked], [rows[at][1] for at in asked])
            self._run([rests[at] for at in asked], readers, slots)
        slot_of = np.cumsum(counts > 0) - 1
        return {
            left: _joined(source, num_stem, slots, int(slot_of[at]), int(counts[at]))
            for at, (left, num_stem, source) in enumerate(rows)
        }

    @torch.no_grad()
    def _prefill(self, batch: list[TokenIds]) -> list[Prefix]:
        lengths = [len(left) for left in batch]
        if self._base.packs_contents(max(lengths)):
            slots = self._base.slots(len(batch), max(lengths))
            self._run(batch, Readers.of([None] * len(batch), [0] * len(batch)), slots)
            return PrefillBatch(tuple(slots.keys), tuple(slots.values)).prefixes(lengths)
        ids = np.zeros((len(batch), max(lengths)), np.int64)
        for at, left in enumerate(batch):
            ids[at, : len(left)] = left
        step = PrefillStep(lengths, self._base.num_layers)
        positions = torch.arange(max(lengths), device=self._base.device).expand(len(batch), -1)
        with contextlib.suppress(PrefillDoneError):
            self._base.hidden(self._base.embed(sent(ids, self._base.device)), positions, step)
        self.num_computed_tokens += sum(lengths)
        return step.prefixes()

    def _run(self, rests: Sequence[TokenIds], readers: Readers, slots: SuffixSlots) -> None:
        """Keys and values of these tokens behind what their rows read, to slots 0, 1, ..."""
        counts = np.array([len(rest) for rest in rests])
        step = RowsStep(slots, 0, np.zeros(len(rests), np.int64), counts, readers, keys_only=True)
        embeds = self._base.embed(sent(np.concatenate(rests), self._base.device))
        self._base.hidden(embeds[None], step.position_ids, step)
        self.num_computed_tokens += int(counts.sum())


def _joined(source: Prefix, num_stem: int, slots: SuffixSlots, slot: int, count: int) -> Prefix:
    """The first num_stem tokens of a prefix, and behind them `count` tokens of a slot."""

    def join(before: Tensor, behind: Tensor) -> Tensor:
        stem = before[:, :, :num_stem]
        if not count:
            return stem
        return torch.cat([stem, behind[slot : slot + 1, :, :count].to(stem.dtype)], dim=2)

    keys = tuple(map(join, source.keys, slots.keys))
    values = tuple(map(join, source.values, slots.values))
    return Prefix(keys, values, num_stem + count)


def _batches(lefts: Sequence[TokenIds], max_tokens: int) -> Iterator[list[TokenIds]]:
    """Left parts sorted by length, cut where a batch grows too large or its padding too wide."""
    batch: list[TokenIds] = []
    for left in lefts:
        if batch and (len(left) > MAX_PADDING * len(batch[0]) or (len(batch) + 1) * len(left) > max_tokens):
            yield batch
            batch = []
        batch.append(left)
    if batch:
        yield batch

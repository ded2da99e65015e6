"""The store of shared prefixes: each content's left part is run through the model once and kept while there is room."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch

from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.shared_prefix import PrefillDoneError, PrefillStep, Prefix

TokenIds = tuple[int, ...]

# Matrix products stop gaining from more rows at about 256 on a CPU core (measured: 109 GFLOP/s at 64 rows, 144 at 256,
# 142 at 1,024), and activations grow with them.
PREFILL_TOKENS = 2048
# Contents of one prefill batch may differ in length by this much: padding is wasted work.
MAX_PADDING = 1.15


class PrefixStore:
    """Keys and values by token ids, least recently used dropped first beyond `max_bytes`.

    Rows hold the `Prefix` they read, so dropping one here never takes it from a row. The ids are the whole key: layout
    and cue are part of them, and a store belongs to one base model.
    """

    def __init__(self, base: BaseModel, max_bytes: int) -> None:
        self._base, self.max_bytes = base, max_bytes
        self._kept: OrderedDict[TokenIds, Prefix] = OrderedDict()
        self._num_kept_tokens = 0
        self.num_computed_tokens = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of what is kept."""
        return self.bytes_of(self._num_kept_tokens)

    def bytes_of(self, num_tokens: int) -> int:
        """Bytes that the keys and values of so many tokens take."""
        return num_tokens * self._base.kv_bytes_per_token

    def get(self, lefts: Sequence[TokenIds]) -> list[Prefix | None]:
        """The prefix of every left part, None for an empty one; those not kept are computed, alike lengths together."""
        wanted = dict.fromkeys(left for left in lefts if left)
        found = {left: self._kept[left] for left in wanted if left in self._kept}
        for batch in _batches(sorted((left for left in wanted if left not in found), key=len)):
            found.update(zip(batch, self._prefill(batch), strict=True))
        for left in wanted:
            if left not in self._kept:
                self._kept[left] = found[left]
                self._num_kept_tokens += len(left)
            self._kept.move_to_end(left)
        self.trim(self.max_bytes)
        return [found.get(left) for left in lefts]

    def trim(self, max_bytes: int) -> None:
        """Drop the least recently used until no more than this is kept."""
        while self._kept and self.num_bytes > max_bytes:
            left, _ = self._kept.popitem(last=False)
            self._num_kept_tokens -= len(left)

    @torch.no_grad()
    def _prefill(self, batch: list[TokenIds]) -> list[Prefix]:
        lengths = [len(left) for left in batch]
        ids = torch.zeros(len(batch), max(lengths), dtype=torch.long)
        for at, left in enumerate(batch):
            ids[at, : len(left)] = torch.tensor(left)
        step = PrefillStep(lengths, self._base.num_layers)
        positions = torch.arange(max(lengths), device=self._base.device).expand(len(batch), -1)
        with contextlib.suppress(PrefillDoneError):
            self._base.hidden(self._base.embed(ids.to(self._base.device)), positions, step)
        self.num_computed_tokens += sum(lengths)
        return step.prefixes()


def _batches(lefts: Sequence[TokenIds]) -> Iterator[list[TokenIds]]:
    """Left parts sorted by length, cut where a batch grows too large or its padding too wide."""
    batch: list[TokenIds] = []
    for left in lefts:
        if batch and (len(left) > MAX_PADDING * len(batch[0]) or (len(batch) + 1) * len(left) > PREFILL_TOKENS):
            yield batch
            batch = []
        batch.append(left)
    if batch:
        yield batch

"""Prefixes of contents with gradient, behind a learned prefix: for what changes the keys and values of a content."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.prefixes import PrefixStore, TokenIds
from e2p_ray.engine.shared_prefix import Prefix
from e2p_ray.engine.teaching import TeachingStep


class ContentStep(TeachingStep):
    """A differentiable pass over the tokens of contents, packed into one row, behind one prefix that they share."""

    def __init__(self, before: Prefix, lengths: Sequence[int]) -> None:
        device = before.keys[0].device
        real = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
        super().__init__([before], [len(lengths)], real)
        self._before, self._lengths = before, lengths
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any) -> tuple[Tensor, Tensor]:
        assert layer == len(self._keys), "layers come in order"
        self._keys.append(self._unpacked(keys))
        self._values.append(self._unpacked(values))
        return keys, values

    def prefixes(self) -> list[Prefix]:
        """Every content's keys and values after those that stand before it, still part of the graph."""
        found = []
        for at, length in enumerate(self._lengths):
            keys = _joined(self._before.keys, self._keys, at, length)
            values = _joined(self._before.values, self._values, at, length)
            found.append(Prefix(keys, values, self._before.length + length))
        return found


def _joined(before: Sequence[Tensor], own: Sequence[Tensor], at: int, length: int) -> tuple[Tensor, ...]:
    return tuple(torch.cat([old, new[at : at + 1, :, :length]], dim=2) for old, new in zip(before, own, strict=True))


class LivePrefixes(PrefixStore):
    """A store that keeps nothing, since the next step changes everything; `learned` stands before every content."""

    def __init__(self, base: BaseModel, learned: Callable[[], Prefix]) -> None:
        super().__init__(base, max_bytes=0)
        self._learned = learned

    def get(self, lefts: Sequence[TokenIds], num_stems: Sequence[int] | None = None) -> list[Prefix | None]:
        """The prefix of every left part, computed whole; for an empty one it is what was learned."""
        return [prefix or self._learned() for prefix in super().get(lefts)]

    def _prefill(self, batch: list[TokenIds]) -> list[Prefix]:
        """As the engine's, with gradient where it is enabled."""
        step = ContentStep(self._learned(), [len(left) for left in batch])
        packed = torch.tensor([token for left in batch for token in left], device=self._base.device)
        self._base.hidden(self._base.embed(packed)[None], step.position_ids, step)
        return step.prefixes()

"""Memory that layer after layer writes its results to."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Workspace:
    """Tensors by name, whose memory stays: a page of new memory costs what a thousand products of its numbers do.

    One pass at a time. It keeps as much as the widest pass needed.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    @property
    def memory(self) -> tuple[Tensor, ...]:
        """All that is kept now."""
        return tuple(self._kept.values())

    def tensor(self, name: str, *size: int, dtype: torch.dtype) -> Tensor:
        """Of this size with whatever it holds; good until this name is asked for again."""
        num, kept = math.prod(size), self._kept.get((name, dtype))
        if kept is None or len(kept) < num:
            kept = self._kept[name, dtype] = torch.empty(num, dtype=dtype)
        return kept[:num].view(size)

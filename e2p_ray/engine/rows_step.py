"""A forward pass over the rows of a wave: some new tokens each, behind their shared prefix and their own earlier ones.

One attention call per content with the queries of all its rows stacked, one over each row's own short suffix, merged
by log-sum-exp (Hydragen, arXiv 2402.05099; cascade inference).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from e2p_ray.engine.attention import Shape, attention, attention_by_products, merge
from e2p_ray.engine.shared_prefix import Prefix, SuffixSlots

_Ints = npt.NDArray[np.int64]

# From so many new tokens a row on, torch's CPU kernel beats two products (256 rows of 16: 5.2 ms against 6.8 ms).
_KERNEL_WIDTH = 8


@dataclass(frozen=True, slots=True, eq=False)
class Readers:
    """Which rows read which prefix.

    order (n,): the rows, those of one prefix together. Of each of `prefixes`: its first `visible` tokens are read by
    the rows order[starts[i] : starts[i + 1]]; the rows behind the last start read none. prefix_lengths (n,) by row.
    """

    order: _Ints
    prefixes: tuple[Prefix, ...]
    visible: tuple[int, ...]
    starts: _Ints
    prefix_lengths: _Ints

    @classmethod
    def of(cls, prefixes: Sequence[Prefix | None], visible: Sequence[int]) -> Readers:
        """From each row's prefix and how much of it the row sees."""
        groups: dict[tuple[int, int], list[int]] = {}
        alone: list[int] = []
        for row, (prefix, length) in enumerate(zip(prefixes, visible, strict=True)):
            (groups.setdefault((id(prefix), length), []) if prefix is not None and length else alone).append(row)
        lengths = np.array(visible, np.int64)
        lengths[alone] = 0
        found = [prefixes[rows[0]] for rows in groups.values()]
        return cls(
            order=np.array([row for rows in (*groups.values(), alone) for row in rows], np.int64),
            prefixes=tuple(prefix for prefix in found if prefix is not None),
            visible=tuple(length for _, length in groups),
            starts=np.cumsum([0, *map(len, groups.values())]),
            prefix_lengths=lengths,
        )


class RowsStep:
    """n rows in the slots first_slot .., with counts (n,) new tokens each behind the lengths (n,) of earlier ones.

    Only real tokens go through the model, T of them, packed into one row: `row` (T,) and `offset` (T,) say whose token
    stands where, `end` (n,) where each row's last one does.
    """

    def __init__(self, slots: SuffixSlots, first_slot: int, lengths: _Ints, counts: _Ints, readers: Readers) -> None:
        device = slots.keys[0].device
        self._slots, self._readers = slots, readers
        self._span = slice(first_slot, first_slot + len(counts))
        self._fresh = not lengths.any()
        ordered = counts[readers.order]
        ends = np.cumsum(ordered)
        self.row: _Ints = np.repeat(readers.order, ordered)
        self.offset: _Ints = np.arange(len(self.row)) - np.repeat(ends - ordered, ordered)
        self.end = np.empty(len(counts), np.int64)
        self.end[readers.order] = ends - 1
        at = lengths[self.row] + self.offset
        positions = readers.prefix_lengths[self.row] + at
        self._bounds = np.concatenate([[0], ends])[readers.starts].tolist()
        self._last_position = int(positions.max())
        # A grid (n, width) of the rows' own queries: short rows repeat their last token.
        width = int(counts.max())
        across = np.minimum(np.arange(width), counts[:, None] - 1)
        place = self.end[:, None] - counts[:, None] + 1 + across
        self._in_order = place.size == len(self.row) and bool((np.diff(place.ravel()) == 1).all())
        self._num_own = int((lengths + counts).max())
        self._all_visible = width == 1 and int(lengths.min()) == int(lengths.max())

        def on_device(array: _Ints) -> Tensor:
            return torch.from_numpy(array).to(device)

        self.position_ids = on_device(positions)[None]  # (1, T)
        self._slot_row, self._slot_at = on_device(self.row + first_slot), on_device(at)
        self._place, self._in_grid = on_device(place), on_device(self.row * width + self.offset)
        self._grid_at = on_device(lengths[:, None] + across)  # (n, width) own positions

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any) -> tuple[Tensor, Tensor]:
        for slots, new in ((self._slots.keys[layer], keys), (self._slots.values[layer], values)):
            given = new[0].transpose(0, 1).to(slots.dtype)  # (T, Hkv, D)
            if self._all_visible:  # one token a row, all at the same place
                slots.select(2, self._num_own - 1).index_copy_(0, self._slot_row, given)
            else:
                slots[self._slot_row, :, self._slot_at] = given
        return keys, values

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, shape: Shape) -> Tensor:
        """Attention output (1, H, T, D) for packed queries (1, H, T, D)."""
        window = shape.window if shape.window is not None and self._last_position >= shape.window else None
        _, num_heads, num_tokens, head_dim = queries.shape
        num_kv_heads = keys.shape[1]
        # (Hkv, T, g, D): the heads that share keys lie side by side, so that a content's queries are one view.
        folded = queries.view(num_kv_heads, -1, num_tokens, head_dim).transpose(1, 2).contiguous()
        own = self._attend_own(layer, folded, shape, window)
        merged = merge(self._attend_prefixes(layer, folded, shape, window), own) if self._readers.prefixes else own[0]
        return merged.transpose(1, 2).reshape(1, num_heads, num_tokens, head_dim).to(queries.dtype)

    def _attend_own(self, layer: int, folded: Tensor, shape: Shape, window: int | None) -> tuple[Tensor, Tensor]:
        """(Hkv, T, g, D) and log-sum-exp (Hkv, T, g) over the rows' own tokens."""
        num_kv_heads, _, g, head_dim = folded.shape
        n, width = self._place.shape
        keys = self._slots.keys[layer][self._span, :, : self._num_own]
        values = self._slots.values[layer][self._span, :, : self._num_own]
        grid = folded.view(num_kv_heads, n, width, g, head_dim) if self._in_order else folded[:, self._place]
        grid = grid.to(keys.dtype)
        if (
            self._fresh and window is None and width >= _KERNEL_WIDTH
        ):  # (n, Hkv * g, width, D): the kernel knows causal attention
            asked = grid.permute(1, 0, 3, 2, 4).reshape(n, num_kv_heads * g, width, head_dim)
            output, lse = attention(asked, keys, values, shape, causal=True)
            output = output.view(n, num_kv_heads, g, width, head_dim).permute(1, 0, 3, 2, 4)
            lse = lse.view(n, num_kv_heads, g, width).permute(1, 0, 3, 2)
        else:
            asked = grid.transpose(0, 1).reshape(n, num_kv_heads, width * g, head_dim)
            output, lse = attention_by_products(asked, keys, values, shape, self._visible(g, window))
            output = output.view(n, num_kv_heads, width, g, head_dim).transpose(0, 1)
            lse = lse.view(n, num_kv_heads, width, g).transpose(0, 1)
        output, lse = output.flatten(1, 2), lse.flatten(1, 2)
        return (output, lse) if self._in_order else (output[:, self._in_grid], lse[:, self._in_grid])

    def _visible(self, g: int, window: int | None) -> Tensor | None:
        """(n, 1, width * g, num_own): which own tokens each query sees; None for all."""
        if self._all_visible and window is None:
            return None
        key_at = torch.arange(self._num_own, device=self._grid_at.device)
        seen = key_at <= self._grid_at[:, :, None]
        if window is not None:
            seen &= key_at > self._grid_at[:, :, None] - window
        return seen.repeat_interleave(g, dim=1)[:, None]

    def _attend_prefixes(self, layer: int, folded: Tensor, shape: Shape, window: int | None) -> tuple[Tensor, Tensor]:
        """The same over the shared prefixes: 0 and -inf for rows that read none."""
        num_kv_heads, num_tokens, g, head_dim = folded.shape
        outputs, lses = [], []
        for prefix, visible, start, stop in self._readings():
            asked = folded[:, start:stop].view(1, num_kv_heads, -1, head_dim)
            near = None if window is None else self._near(visible, start, stop, window, g)
            keys, values = prefix.keys[layer][:, :, :visible], prefix.values[layer][:, :, :visible]
            output, lse = attention(asked, keys, values, shape, visible=near)
            outputs.append(output)
            lses.append(lse)
        if num_alone := num_tokens - self._bounds[-1]:
            outputs.append(folded.new_zeros(1, num_kv_heads, num_alone * g, head_dim))
            lses.append(torch.full((1, num_kv_heads, num_alone * g), -torch.inf, device=folded.device))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        lse = lses[0] if len(lses) == 1 else torch.cat(lses, dim=2)
        return output.view(num_kv_heads, num_tokens, g, head_dim), lse.view(num_kv_heads, num_tokens, g)

    def _readings(self) -> Iterator[tuple[Prefix, int, int, int]]:
        """Every prefix, how much of it is read, and by which packed tokens."""
        readers = self._readers
        return zip(readers.prefixes, readers.visible, self._bounds[:-1], self._bounds[1:], strict=True)

    def _near(self, visible: int, start: int, stop: int, window: int, g: int) -> Tensor:
        """(m * g, visible) which of a prefix's tokens a sliding window reaches."""
        at = self.position_ids[0, start:stop, None]
        seen = torch.arange(visible, device=at.device) > at - window
        return seen.repeat_interleave(g, dim=0)

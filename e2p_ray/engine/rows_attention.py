"""Attention of packed tokens by torch's operations: on a GPU, and for what the compiled loops do not know.

One attention call per content with the queries of all its rows stacked, one over each row's own short suffix, merged
by log-sum-exp (Hydragen, arXiv 2402.05099; cascade inference).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from e2p_ray.engine.attention import Shape, attention, joined_attention, merge
from e2p_ray.engine.packed_tokens import PackedTokens
from e2p_ray.engine.readers import Readers
from e2p_ray.engine.sent import sent
from e2p_ray.engine.shared_prefix import SuffixSlots

# From so many new tokens a row on, torch's CPU kernel beats two products (256 rows of 16: 5.2 ms against 6.8 ms).
_KERNEL_WIDTH = 8


class RowsAttention:
    """The tokens' queries over their prefixes and over their rows' own keys, layer by layer."""

    def __init__(self, slots: SuffixSlots, tokens: PackedTokens, readers: Readers, positions: Tensor) -> None:
        device, counts, lengths = positions.device, tokens.counts, tokens.lengths
        self._slots, self._readers, self._positions = slots, readers, positions
        self._span = slice(tokens.first_slot, tokens.first_slot + len(counts))
        self._fresh, self._num_own = tokens.is_fresh, tokens.num_own
        # A grid (n, width) of the rows' own queries: short rows repeat their last token.
        width = int(counts.max())
        across = np.minimum(np.arange(width), counts[:, None] - 1)
        self._width = width
        self._even = int(counts.min()) == width
        self._all_visible = width == 1 and int(lengths.min()) == int(lengths.max())
        order, bounds = tokens.by_prefix(readers)
        self._bounds: list[int] = bounds.tolist()
        self._in_order = bool((order == np.arange(len(order))).all())

        def on_device(array: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Tensor:
            return sent(array, device)

        self._place = on_device((tokens.end + 1 - counts)[:, None] + across)
        self._in_grid = on_device(tokens.row * width + tokens.offset)
        self._grid_at = on_device(lengths[:, None] + across)  # (n, width) own positions
        self._order, self._place_in_order = on_device(order), on_device(np.argsort(order))
        self._masks: dict[int | None, Tensor | None] = {}  # by window: the same in all layers that have it
        self._runs = readers.runs if self._even else self._singly()
        self._paddings = [self._padding(*run) for run in self._runs]

    def attend(self, layer: int, queries: Tensor, shape: Shape) -> Tensor:
        """(T, Hkv, g, D) to the same. A window in `shape` is one that something lies out of reach of."""
        before = self._attend_prefixes(layer, queries, shape, shape.window) if self._readers.prefixes else None
        return self._attend_own(layer, queries, before, shape, shape.window)

    def _attend_own(
        self, layer: int, queries: Tensor, before: tuple[Tensor, Tensor] | None, shape: Shape, window: int | None
    ) -> Tensor:
        """(T, Hkv, g, D): attention over the rows' own tokens, joined with that over what stands before them."""
        n, (_, num_kv_heads, g, head_dim) = len(self._place), queries.shape
        keys = self._slots.keys[layer][self._span, :, : self._num_own]
        values = self._slots.values[layer][self._span, :, : self._num_own]
        grid = self._to_grid(queries.to(keys.dtype))
        if self._fresh and window is None and self._width >= _KERNEL_WIDTH:  # the kernel knows causal attention
            asked = grid.permute(0, 2, 3, 1, 4).reshape(n, num_kv_heads * g, self._width, head_dim)
            output, lse = attention(asked, keys, values, shape, causal=True)
            output = self._from_grid(output.view(n, num_kv_heads, g, self._width, head_dim).permute(0, 3, 1, 2, 4))
            lse = self._from_grid(lse.view(n, num_kv_heads, g, self._width).permute(0, 3, 1, 2))
            return output if before is None else merge(before, (output, lse))
        asked = grid.transpose(1, 2).reshape(n, num_kv_heads, self._width * g, head_dim)
        joined = None
        if before is not None:
            outer, lse = self._to_grid(before[0]), self._to_grid(before[1])
            joined = outer.transpose(1, 2).flatten(2, 3), lse.transpose(1, 2).flatten(2, 3)
        if window not in self._masks:
            self._masks[window] = self._own_visible(g, window)
        output = joined_attention(asked, keys, values, shape, self._masks[window], joined)
        return self._from_grid(output.view(n, num_kv_heads, self._width, g, head_dim).transpose(1, 2))

    def _to_grid(self, packed: Tensor) -> Tensor:
        """(T, ...) to (n, width, ...)."""
        return packed.view(-1, self._width, *packed.shape[1:]) if self._even else packed[self._place]

    def _from_grid(self, grid: Tensor) -> Tensor:
        """(n, width, ...) to (T, ...)."""
        return grid.flatten(0, 1) if self._even else grid.flatten(0, 1)[self._in_grid]

    def _own_visible(self, g: int, window: int | None) -> Tensor | None:
        """(n, 1, width * g, num_own): which own tokens each query sees; None for all."""
        if self._all_visible and window is None:
            return None
        key_at = torch.arange(self._num_own, device=self._grid_at.device)
        seen = key_at <= self._grid_at[:, :, None]
        if window is not None:
            seen &= key_at > self._grid_at[:, :, None] - window
        return seen.repeat_interleave(g, dim=1)[:, None]

    def _attend_prefixes(self, layer: int, queries: Tensor, shape: Shape, window: int | None) -> tuple[Tensor, Tensor]:
        """(T, Hkv, g, D) and log-sum-exp (T, Hkv, g) over the shared prefixes: 0 and -inf for rows that read none."""
        num_tokens, num_kv_heads, g, head_dim = queries.shape
        asked = queries.transpose(0, 1) if self._in_order else queries.transpose(0, 1)[:, self._order]
        # The heads that share keys lie side by side, so that a content's queries are one view.
        asked = asked.to(self._readers.prefixes[0].keys[layer].dtype, memory_format=torch.contiguous_format)
        asked = asked.reshape(num_kv_heads, num_tokens * g, head_dim)
        output = torch.zeros(num_kv_heads, num_tokens * g, head_dim, dtype=torch.float32, device=asked.device)
        lse = torch.full((num_kv_heads, num_tokens * g), -torch.inf, device=asked.device)
        for number, (first, end) in enumerate(self._runs if window is None else self._singly()):
            span = slice(self._bounds[first] * g, self._bounds[end] * g)
            # (c, Hkv, m * g, D): the queries of c contents that lie side by side
            of_contents = asked[:, span].view(num_kv_heads, end - first, -1, head_dim).transpose(0, 1)
            keys, values = self._read(layer, first, end)
            near = None if window is None else self._near(first, window, g)
            padding = self._paddings[number] if window is None else None
            found, total = attention(of_contents, keys, values, shape, visible=near, padding=padding)
            output[:, span].view(num_kv_heads, end - first, -1, head_dim).copy_(found.transpose(0, 1))
            lse[:, span].view(num_kv_heads, end - first, -1).copy_(total.transpose(0, 1))
        output, lse = output.view(num_kv_heads, num_tokens, g, head_dim), lse.view(num_kv_heads, num_tokens, g)
        if not self._in_order:
            output, lse = output[:, self._place_in_order], lse[:, self._place_in_order]
        return output.transpose(0, 1), lse.transpose(0, 1)

    def _singly(self) -> list[tuple[int, int]]:
        return [(at, at + 1) for at in range(len(self._readers.prefixes))]

    def _padding(self, first: int, end: int) -> Tensor | None:
        """(c, longest): -inf where a content is shorter than its neighbours in a run; None where none is."""
        visible = self._readers.visible[first:end]
        longest = max(visible)
        if min(visible) == longest:
            return None
        behind = np.arange(longest) >= np.array(visible)[:, None]
        return sent(np.where(behind, -np.inf, 0.0).astype(np.float32), self._positions.device)

    def _read(self, layer: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values (c, Hkv, longest, D) of a run of prefixes."""
        longest, prefix = max(self._readers.visible[first:end]), self._readers.prefixes[first]
        if end - first == 1:
            return prefix.keys[layer][:, :, :longest], prefix.values[layer][:, :, :longest]
        assert prefix.batch is not None, "runs are of one batch"
        places = slice(prefix.place, prefix.place + end - first)
        return prefix.batch.keys[layer][places, :, :longest], prefix.batch.values[layer][places, :, :longest]

    def _near(self, number: int, window: int, g: int) -> Tensor:
        """(m * g, visible) which of a prefix's tokens a sliding window reaches."""
        at = self._positions[self._order[self._bounds[number] : self._bounds[number + 1]], None]
        seen = torch.arange(self._readers.visible[number], device=at.device) > at - window
        return seen.repeat_interleave(g, dim=0)

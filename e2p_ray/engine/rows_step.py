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

from e2p_ray.engine.attention import Shape, attention, joined_attention, merge
from e2p_ray.engine.shared_prefix import Prefix, SuffixSlots

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float32]

# From so many new tokens a row on, torch's CPU kernel beats two products (256 rows of 16: 5.2 ms against 6.8 ms).
_KERNEL_WIDTH = 8
# Contents with few readers are read several in a call (128 contents of 256 tokens, microseconds a content for 2 and 4
# queries in fp32: 66 and 104 alone, 60 and 75 by eights; in bf16 65 and 69, 57 and 62; nothing is gained from 16 on).
_FEW_READERS = 8
_MAX_RUN = 16


@dataclass(frozen=True, slots=True, eq=False)
class Readers:
    """Which rows read which prefix.

    order (n,): the rows, those of one prefix together. Of each of `prefixes`: its first `visible` tokens are read by
    the rows order[starts[i] : starts[i + 1]]; the rows behind the last start read none. prefix_lengths (n,) by row.
    runs: (first, end) of prefixes that lie side by side in memory and have equally many rows.
    """

    order: _Ints
    prefixes: tuple[Prefix, ...]
    visible: tuple[int, ...]
    starts: _Ints
    prefix_lengths: _Ints
    runs: tuple[tuple[int, int], ...]

    def by_row(self) -> list[tuple[Prefix, int] | None]:
        """What each row reads, and how much of it."""
        found: list[tuple[Prefix, int] | None] = [None] * len(self.order)
        for at, reading in enumerate(zip(self.prefixes, self.visible, strict=True)):
            for row in self.order[self.starts[at] : self.starts[at + 1]]:
                found[row] = reading
        return found

    @classmethod
    def of(cls, prefixes: Sequence[Prefix | None], visible: Sequence[int]) -> Readers:
        """From each row's prefix and how much of it the row sees."""
        groups: dict[tuple[int, int], list[int]] = {}
        alone: list[int] = []
        for row, (prefix, length) in enumerate(zip(prefixes, visible, strict=True)):
            (groups.setdefault((id(prefix), length), []) if prefix is not None and length else alone).append(row)
        lengths = np.array(visible, np.int64)
        lengths[alone] = 0
        readings = [(prefix, rows) for rows in groups.values() if (prefix := prefixes[rows[0]]) is not None]
        if len(readings) * _FEW_READERS >= len(prefixes):  # neighbours in memory become neighbours here
            rank = {id(prefix.batch): at for at, (prefix, _) in reversed(list(enumerate(readings)))}
            readings.sort(key=lambda reading: (rank[id(reading[0].batch)], reading[0].place))
        found, readers = [prefix for prefix, _ in readings], [rows for _, rows in readings]
        return cls(
            order=np.array([row for rows in (*readers, alone) for row in rows], np.int64),
            prefixes=tuple(found),
            visible=tuple(int(visible[rows[0]]) for rows in readers),
            starts=np.cumsum([0, *map(len, readers)]),
            prefix_lengths=lengths,
            runs=tuple(_runs(found, [len(rows) for rows in readers])),
        )


def _runs(prefixes: Sequence[Prefix], num_rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    first = 0
    for at in range(1, len(prefixes) + 1):
        if at < len(prefixes) and at - first < _MAX_RUN:
            one, other = prefixes[at - 1], prefixes[at]
            beside = one.batch is other.batch and one.batch is not None and other.place == one.place + 1
            if beside and num_rows[at] == num_rows[first] <= _FEW_READERS:
                continue
        if prefixes:
            yield first, at
        first = at


class RowsStep:
    """n rows in the slots first_slot .., with counts (n,) new tokens each behind the lengths (n,) of earlier ones.

    Only real tokens go through the model, T of them, packed into one row, row after row: `row` (T,) and `offset` (T,)
    say whose token stands where, `end` (n,) where each row's last one does.
    """

    def __init__(self, slots: SuffixSlots, first_slot: int, lengths: _Ints, counts: _Ints, readers: Readers) -> None:
        device = slots.keys[0].device
        self._slots, self._readers = slots, readers
        self._span = slice(first_slot, first_slot + len(counts))
        self._fresh = not lengths.any()
        ends = np.cumsum(counts)
        self.row: _Ints = np.repeat(np.arange(len(counts)), counts)
        self.offset: _Ints = np.arange(len(self.row)) - np.repeat(ends - counts, counts)
        self.end: _Ints = ends - 1
        at = lengths[self.row] + self.offset
        positions = readers.prefix_lengths[self.row] + at
        self.last_position = int(positions.max())
        self._num_own = int((lengths + counts).max())
        # A grid (n, width) of the rows' own queries: short rows repeat their last token.
        width = int(counts.max())
        across = np.minimum(np.arange(width), counts[:, None] - 1)
        self._width = width
        self._even = int(counts.min()) == width
        self._lengths = lengths
        self._single: list[tuple[int, tuple[Prefix, int] | None]] | None = None
        self._all_visible = width == 1 and int(lengths.min()) == int(lengths.max())
        # The tokens of one prefix's readers, side by side.
        asking = np.concatenate([[0], np.cumsum(counts[readers.order])])
        self._bounds: list[int] = asking[readers.starts].tolist()
        order = (ends - counts)[readers.order].repeat(counts[readers.order])
        order += np.arange(len(order)) - asking[:-1].repeat(counts[readers.order])
        self._in_order = bool((order == np.arange(len(order))).all())

        def on_device(array: _Ints) -> Tensor:
            return torch.from_numpy(array).to(device)

        self.position_ids = on_device(positions)[None]  # (1, T)
        self._slot_row, self._slot_at = on_device(self.row + first_slot), on_device(at)
        self._place = on_device((ends - counts)[:, None] + across)
        self._in_grid = on_device(self.row * width + self.offset)
        self._grid_at = on_device(lengths[:, None] + across)  # (n, width) own positions
        self._order, self._place_in_order = on_device(order), on_device(np.argsort(order))
        self._masks: dict[int | None, Tensor | None] = {}  # by window: the same in all layers that have it
        self._runs = readers.runs if self._even else self._singly()
        self._paddings = [self._padding(*run) for run in self._runs]

    @property
    def is_single(self) -> bool:
        """Whether every row has one new token."""
        return self._width == 1

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any) -> tuple[Tensor, Tensor]:
        for slots, new in ((self._slots.keys[layer], keys), (self._slots.values[layer], values)):
            given = new[0].transpose(0, 1)  # (T, Hkv, D)
            if self._all_visible:  # one token a row, all at the same place
                slots[self._span, :, self._num_own - 1] = given
            else:
                slots[self._slot_row, :, self._slot_at] = given.to(slots.dtype)
        return keys, values

    def read_singly(self, layer: int, keys: _Floats, values: _Floats) -> Iterator[list[tuple[_Floats, _Floats]]]:
        """For each row, by numpy, keys and values (Hkv, t, D) of its prefix and of its own tokens.

        With the new ones (n, Hkv, D) among them; for a pass `is_single` on a CPU.
        """
        if self._single is None:
            self._single = [*zip(self._lengths.tolist(), self._readers.by_row(), strict=True)]
        own_keys, own_values = (slots[layer][self._span].numpy() for slots in (self._slots.keys, self._slots.values))
        for row, (at, reading) in enumerate(self._single):
            own_keys[row, :, at], own_values[row, :, at] = keys[row], values[row]
            parts = [(own_keys[row, :, : at + 1], own_values[row, :, : at + 1])]
            if reading is not None:
                prefix, length = reading
                before = prefix.keys[layer].numpy(), prefix.values[layer].numpy()
                parts.append((before[0][0, :, :length], before[1][0, :, :length]))
            yield parts

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, shape: Shape) -> Tensor:
        """Attention output (1, H, T, D) for packed queries (1, H, T, D), each token's heads side by side in memory."""
        window = shape.window if shape.window is not None and self.last_position >= shape.window else None
        _, num_heads, num_tokens, head_dim = queries.shape
        by_token = queries[0].transpose(0, 1).view(num_tokens, keys.shape[1], -1, head_dim)  # (T, Hkv, g, D)
        before = self._attend_prefixes(layer, by_token, shape, window) if self._readers.prefixes else None
        output = self._attend_own(layer, by_token, before, shape, window)
        return output.reshape(num_tokens, num_heads, head_dim).transpose(0, 1)[None]

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
        return torch.from_numpy(np.where(behind, -np.inf, 0.0).astype(np.float32)).to(self.position_ids.device)

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
        at = self.position_ids[0, self._order[self._bounds[number] : self._bounds[number + 1]], None]
        seen = torch.arange(self._readers.visible[number], device=at.device) > at - window
        return seen.repeat_interleave(g, dim=0)

"""A pass over the rows of a wave: some new tokens each, behind their shared prefix and their own earlier ones."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from e2p_ray.engine.attention import Room, Shape
from e2p_ray.engine.compiled_attention import can_attend
from e2p_ray.engine.compiled_rows import CompiledRows
from e2p_ray.engine.layers_table import LayersTable
from e2p_ray.engine.packed_tokens import PackedTokens
from e2p_ray.engine.readers import Readers
from e2p_ray.engine.rows_attention import RowsAttention
from e2p_ray.engine.sent import sent
from e2p_ray.engine.shared_prefix import Prefix, SuffixSlots

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float32]


class RowsStep:
    """n rows in the slots first_slot .., with counts (n,) new tokens each behind the lengths (n,) of earlier ones.

    Only real tokens go through the model, T of them, packed into one row, row after row. keys_only: nobody looks at
    the last layer's states, so that they may be anything.
    """

    def __init__(
        self,
        slots: SuffixSlots,
        first_slot: int,
        lengths: _Ints,
        counts: _Ints,
        readers: Readers,
        *,
        keys_only: bool = False,
    ) -> None:
        device = slots.keys[0].device
        self.keys_only = keys_only
        self.tokens = tokens = PackedTokens.of(first_slot, lengths, counts)
        self.slots, self.readers = slots, readers
        self._span = slice(first_slot, first_slot + len(counts))
        positions = readers.prefix_lengths[tokens.row] + tokens.at
        self.last_position = int(positions.max())
        self.is_single = int(counts.max()) == 1
        self._all_at_one_place = self.is_single and int(lengths.min()) == int(lengths.max())
        self.position_ids = sent(positions, device)[None]  # (1, T)
        self._single: list[tuple[int, tuple[Prefix, int] | None]] | None = None
        self._places: _Ints | None = None
        self._compiled: CompiledRows | None = None
        self._by_torch: RowsAttention | None = None
        self.table: LayersTable | None = None  # its calls, once it has been run by them
        self.table_before: LayersTable | None = None  # those of the pass that precedes this one

    def precedes(self, slots: SuffixSlots, first_slot: int, lengths: _Ints, counts: _Ints, readers: Readers) -> bool:
        """Whether a pass is this one a token later, and by the same calls."""
        is_alike = self.table is not None and self.is_single and slots is self.slots and readers is self.readers
        if not is_alike or first_slot != self.tokens.first_slot or len(counts) != len(self.tokens.counts):
            return False
        return int(counts.max()) == 1 and np.array_equal(lengths, self.tokens.at + 1)

    def next(self) -> RowsStep:
        """The pass that it precedes."""
        found = copy(self)
        found.tokens = replace(self.tokens, lengths=self.tokens.at + 1, at=self.tokens.at + 1)
        found.last_position, found.position_ids = self.last_position + 1, self.position_ids + 1
        found._places = found._compiled = found.table = None
        found.table_before = self.table
        return found

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any) -> tuple[Tensor, Tensor]:
        for slots, new in ((self.slots.keys[layer], keys), (self.slots.values[layer], values)):
            given = new[0].transpose(0, 1)  # (T, Hkv, D)
            if self._all_at_one_place:
                slots[self._span, :, self.tokens.num_own - 1] = given
            else:
                row, at = self._slot_places
                slots[row, :, at] = given.to(slots.dtype)
        return keys, values

    @cached_property
    def _slot_places(self) -> tuple[Tensor, Tensor]:
        """Slots of the tokens (T,), and places there."""
        device, tokens = self.slots.keys[0].device, self.tokens
        return sent(tokens.row + tokens.first_slot, device), sent(tokens.at, device)

    def room(self, layer: int) -> Room:
        """Where the tokens' keys and values belong, in place of `update`."""
        keys = self.slots.keys[layer]
        if self._places is None:
            tokens = self.tokens
            slots = (tokens.row + tokens.first_slot) * keys.stride(0)
            self._places = (slots + tokens.at * keys.stride(2)) * keys.element_size()
        return Room(keys, self.slots.values[layer], self._places)

    def read_singly(self, layer: int, keys: _Floats, values: _Floats) -> Iterator[list[tuple[_Floats, _Floats]]]:
        """For each row, by numpy, keys and values (Hkv, t, D) of its prefix and of its own tokens.

        With the new ones (n, Hkv, D) among them; for a pass `is_single` on a CPU.
        """
        if self._single is None:
            self._single = [*zip(self.tokens.lengths.tolist(), self.readers.by_row(), strict=True)]
        own_keys, own_values = (slots[layer][self._span].numpy() for slots in (self.slots.keys, self.slots.values))
        for row, (at, reading) in enumerate(self._single):
            own_keys[row, :, at], own_values[row, :, at] = keys[row], values[row]
            parts = [(own_keys[row, :, : at + 1], own_values[row, :, : at + 1])]
            if reading is not None:
                prefix, length = reading
                before = prefix.keys[layer].numpy(), prefix.values[layer].numpy()
                parts.append((before[0][0, :, :length], before[1][0, :, :length]))
            yield parts

    def is_within(self, window: int | None) -> bool:
        """Whether a window reaches everything."""
        return window is None or self.last_position < window

    def compiled(self, num_heads: int, num_kv_heads: int) -> CompiledRows:
        """This pass's attention by the compiled loops."""
        if self._compiled is None:
            self._compiled = CompiledRows(self.slots, self.tokens, self.readers, num_heads, num_kv_heads)
        return self._compiled

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, shape: Shape) -> Tensor:
        """Attention output (1, H, T, D) for packed queries (1, H, T, D), each token's heads side by side in memory."""
        if shape.window is not None and self.is_within(shape.window):
            shape = replace(shape, window=None)  # it reaches everything
        _, num_heads, num_tokens, head_dim = queries.shape
        by_token = queries[0].transpose(0, 1)  # (T, H, D)
        num_kv_heads = keys.shape[1]
        prefixes = self.readers.prefixes
        if can_attend(shape, queries, prefixes[0].keys[layer] if prefixes else self.slots.keys[layer]):
            return self.compiled(num_heads, num_kv_heads).attend(layer, by_token, shape.scale).transpose(0, 1)[None]
        if self._by_torch is None:
            self._by_torch = RowsAttention(self.slots, self.tokens, self.readers, self.position_ids[0])
        grouped = by_token.view(num_tokens, num_kv_heads, -1, head_dim)
        output = self._by_torch.attend(layer, grouped, shape)
        return output.reshape(num_tokens, num_heads, head_dim).transpose(0, 1)[None]

"""Attention of packed tokens by compiled loops: over the prefixes that rows share, then over each row's own tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from e2p_ray.engine.compiled_attention import SharedReads, addresses_of, as_numbers
from e2p_ray.engine.packed_tokens import PackedTokens
from e2p_ray.engine.readers import Readers
from e2p_ray.engine.shared_prefix import SuffixSlots

if TYPE_CHECKING:
    from e2p_ray.engine.torch_threads import Call

_Ints = npt.NDArray[np.int64]

# More new tokens than this behind nothing else see each other by blocks; fewer, and later ones, are taken singly.
_MAX_SINGLY = 8


class CompiledRows:
    """The tokens' queries over their prefixes and over their rows' own keys, layer by layer."""

    def __init__(
        self, slots: SuffixSlots, tokens: PackedTokens, readers: Readers, num_heads: int, num_kv_heads: int
    ) -> None:
        self._slots, self._prefixes, self._num_heads = slots, readers.prefixes, num_heads
        group = num_heads // num_kv_heads
        self._slot_of = tokens.row + tokens.first_slot
        self.place = tokens.at.copy()  # that the loops read, of whichever pass
        self._max_own = tokens.num_own
        self._shared: SharedReads | None = None
        self._has_blocks = not self._prefixes and tokens.is_fresh and self._max_own > _MAX_SINGLY
        if self._prefixes:
            order, bounds = tokens.by_prefix(readers)
            keys = [prefix.keys[0][0] for prefix in self._prefixes]
            self._shared = SharedReads.of(order, bounds, readers.visible, keys, group)
        elif self._has_blocks:
            self._span = slice(tokens.first_slot, tokens.first_slot + len(tokens.counts))
            bounds = np.concatenate([[0], tokens.end + 1])
            counts = tokens.counts.tolist()
            self._shared = SharedReads.of(
                np.arange(len(tokens.row)), bounds, counts, list(slots.keys[0][self._span]), group
            )
        size = (len(tokens.row), num_heads)
        self.outputs = torch.empty(*size, slots.keys[0].shape[-1])  # (T, H, D), of whatever was called last
        # Of the scores over prefixes: the largest, and the sum of weights against it, 0 for rows that read none.
        self._tops, self._sums = torch.zeros(size), torch.zeros(size)
        self._scales = np.zeros(1, np.float32)
        self._addresses: _Ints | None = None

    def attend(self, layer: int, queries: Tensor, scale: float) -> Tensor:
        """(T, H, D) in float32 for queries (T, H, D); good until the next call."""
        from e2p_ray.engine import torch_threads

        asked = as_numbers(queries)
        for call in self.calls(layer, asked, scale):
            torch_threads.run(*call)
        return self.outputs

    def calls(self, layer: int, queries: Tensor, scale: float) -> list[Call]:
        """What `attend` runs, in this order, for queries as numbers; all layers have one scale."""
        self._scales[0] = scale
        found = []
        if self._shared is not None:
            source = self._slots if self._has_blocks else self._prefixes[0]
            keys, addresses = source.keys[layer][0], self.addresses[layer]
            lse = None if self._has_blocks else (self._tops, self._sums)
            call = self._shared.call(
                queries, keys, addresses, self.outputs, self._scales, causal=self._has_blocks, lse=lse
            )
            found.append(call)
        if not self._has_blocks:
            found.append(self._own_call(layer, queries))
        return found

    @property
    def addresses(self) -> _Ints:
        """(num_layers, n, 2), where the keys and values are that more than one token reads; kept for the loops."""
        if self._addresses is None:
            self._addresses = self._own_addresses() if self._has_blocks else self._prefix_addresses()
        return self._addresses

    def _prefix_addresses(self) -> _Ints:
        return np.ascontiguousarray(np.stack([prefix.addresses for prefix in self._prefixes], axis=1))

    def _own_addresses(self) -> _Ints:
        keys = self._slots.keys[0]
        places = np.arange(self._span.start, self._span.stop) * keys.stride(0) * keys.element_size()
        return addresses_of(self._slots.keys, self._slots.values)[:, None] + places[:, None]

    def _own_call(self, layer: int, queries: Tensor) -> Call:
        from e2p_ray.engine import own_keys

        keys, values, outputs = self._slots.keys[layer], self._slots.values[layer], self.outputs
        size = keys.element_size()
        call = own_keys.OwnCall(
            num_tokens=len(self._slot_of),
            slots=self._slot_of.ctypes.data,
            places=self.place.ctypes.data,
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            slot_bytes=size * keys.stride(0),
            head_bytes=size * keys.stride(1),
            queries=queries.data_ptr(),
            query_token=4 * queries.stride(0),
            query_head=4 * queries.stride(1),
            outputs=outputs.data_ptr(),
            output_token=4 * outputs.stride(0),
            output_head=4 * outputs.stride(1),
            tops=self._tops.data_ptr(),
            sums=self._sums.data_ptr(),
            num_heads=self._num_heads,
            group=self._num_heads // keys.shape[1],
            dim=keys.shape[-1],
            max_keys=self._max_own,
            scale=self._scales.ctypes.data,
            is_half=int(keys.dtype is torch.bfloat16),
        )
        return own_keys.attend_own, -(-call.num_tokens // own_keys.TASK_TOKENS), call

"""Attention of packed tokens by compiled loops: over the prefixes that rows share, then over each row's own tokens."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from e2p_ray.engine.compiled_attention import SharedReads, as_numbers
from e2p_ray.engine.packed_tokens import PackedTokens
from e2p_ray.engine.readers import Readers
from e2p_ray.engine.shared_prefix import SuffixSlots

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
        self._place = np.ascontiguousarray(tokens.at)
        self._max_own = tokens.num_own
        self._shared = self._blocks = None
        if self._prefixes:
            order, bounds = tokens.by_prefix(readers)
            keys = [prefix.keys[0][0] for prefix in self._prefixes]
            self._shared = SharedReads.of(order, bounds, readers.visible, keys, group)
        elif tokens.is_fresh and self._max_own > _MAX_SINGLY:
            self._span = slice(tokens.first_slot, tokens.first_slot + len(tokens.counts))
            bounds = np.concatenate([[0], tokens.end + 1])
            counts = tokens.counts.tolist()
            self._blocks = SharedReads.of(
                np.arange(len(tokens.row)), bounds, counts, list(slots.keys[0][self._span]), group
            )
        size = (len(tokens.row), num_heads)
        self._outputs = torch.empty(*size, slots.keys[0].shape[-1])
        # Of the scores over prefixes: the largest, and the sum of weights against it, 0 for rows that read none.
        self._tops, self._sums = torch.zeros(size), torch.zeros(size)

    def attend(self, layer: int, queries: Tensor, scale: float) -> Tensor:
        """(T, H, D) in float32 for queries (T, H, D); good until the next call."""
        from e2p_ray.engine import flash, torch_threads

        asked, outputs = as_numbers(queries), self._outputs
        keys, values = self._slots.keys[layer], self._slots.values[layer]
        if self._blocks is not None:
            own = list(keys[self._span]), list(values[self._span])
            self._blocks.attend(asked, *own, outputs, scale, causal=True)
            return outputs
        if self._shared is not None:
            before = [prefix.keys[layer][0] for prefix in self._prefixes]
            behind = [prefix.values[layer][0] for prefix in self._prefixes]
            self._shared.attend(asked, before, behind, outputs, scale, lse=(self._tops, self._sums))
        scales = np.array([scale], np.float32)
        call = flash.OwnCall(
            num_tokens=len(self._slot_of),
            slots=self._slot_of.ctypes.data,
            places=self._place.ctypes.data,
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            slot_bytes=4 * keys.stride(0),
            head_bytes=4 * keys.stride(1),
            queries=asked.data_ptr(),
            query_token=4 * asked.stride(0),
            query_head=4 * asked.stride(1),
            outputs=outputs.data_ptr(),
            output_token=4 * outputs.stride(0),
            output_head=4 * outputs.stride(1),
            tops=self._tops.data_ptr(),
            sums=self._sums.data_ptr(),
            num_heads=self._num_heads,
            group=self._num_heads // keys.shape[1],
            dim=keys.shape[-1],
            max_keys=self._max_own,
            scale=scales.ctypes.data,
        )
        torch_threads.run(flash.attend_own, -(-call.num_tokens // flash.TASK_TOKENS), call)
        return outputs

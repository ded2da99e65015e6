"""Attention of a pass's packed tokens by the kernels, layer by layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from e2p_ray.engine.gpu.attention_kernels import attend_own, attend_prefixes
from e2p_ray.engine.gpu.blocks import blocks_of, shared_bytes
from e2p_ray.engine.gpu.tables import PrefixTable, SlotTable, TokenTable

_LOG2_E = math.log2(math.e)
_BLOCK_OWN_KEYS = 32
_LEAST_OF_DOT = 16  # rows of the smallest product of the matrix units


class GpuRows:
    """The tokens' queries over their prefixes and over their rows' own keys; memory that all layers share."""

    def __init__(
        self,
        tokens: TokenTable,
        prefixes: PrefixTable,
        slots: SlotTable,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        device = tokens.numbers.device
        self.tokens, self.slots, self._prefixes = tokens, slots, prefixes
        self.slot_addresses, self._prefix_addresses = slots.addresses, prefixes.addresses
        self.token_slots, self.places, self.positions, self._order = tokens.by_token
        self._tiles = tokens.by_tile
        self._num_heads, self._num_kv_heads, self._head_dim = num_heads, num_kv_heads, head_dim
        size = (tokens.num_tokens, num_heads, head_dim)
        self.queries, self.outputs = (torch.empty(size, dtype=dtype, device=device) for _ in range(2))
        self._block_dim = block_dim_of(head_dim)
        blocks = blocks_of(tokens.tile, self._block_dim, dtype, shared_bytes(device))
        assert blocks is not None, "tiles are chosen so"
        self._blocks = blocks
        self._before = torch.empty(size, dtype=torch.float32, device=device)
        self._lses = torch.empty(size[:2], dtype=torch.float32, device=device)

    def attend(self, layer: int, queries: Tensor, scale: float) -> Tensor:
        """(T, H, D) for queries (T, H, D), whose keys and values are in their slots; good until the next call."""
        group, tile = self._num_heads // self._num_kv_heads, self.tokens.tile
        block_dim = self._block_dim
        # float32 as the sum of three products of the matrix units; bfloat16 has nothing to do with it.
        precision = "tf32x3" if queries.dtype is torch.float32 else "tf32"
        if self.tokens.num_tiles:
            attend_prefixes[self.tokens.num_tiles, self._num_kv_heads](
                queries,
                self._before,
                self._lses,
                self._order,
                *self._tiles,
                self._prefixes.lengths,
                self._prefixes.strides,
                self._prefix_addresses[layer],
                scale * _LOG2_E,
                NUM_HEADS=self._num_heads,
                GROUP=group,
                HEAD_DIM=self._head_dim,
                BLOCK_DIM=block_dim,
                BLOCK_QUERIES=tile,
                BLOCK_KEYS=self._blocks.num_keys,
                ALIGNMENT=math.gcd(self._head_dim, 16),
                PRECISION=precision,
                num_warps=8 if tile * block_dim > 64 * 128 else 4,
                num_stages=self._blocks.num_stages,
            )
        attend_own[self.tokens.num_tokens, self._num_kv_heads](
            queries,
            self._before,
            self._lses,
            self.outputs,
            self.token_slots,
            self.places,
            self.positions,
            self.slot_addresses[layer],
            self.slots.num_tokens,
            scale * _LOG2_E,
            NUM_HEADS=self._num_heads,
            GROUP=group,
            HEAD_DIM=self._head_dim,
            BLOCK_DIM=block_dim,
            BLOCK_GROUP=max(next_power_of_2(group), _LEAST_OF_DOT),
            BLOCK_KEYS=_BLOCK_OWN_KEYS,
            PRECISION=precision,
            num_warps=2,
            num_stages=1,
        )
        return self.outputs


def block_dim_of(head_dim: int) -> int:
    """The block that a head of so many numbers takes."""
    return max(next_power_of_2(head_dim), _LEAST_OF_DOT)


def next_power_of_2(number: int) -> int:
    """The least power of two that is not less: kernels' blocks are such."""
    return 1 << (number - 1).bit_length()

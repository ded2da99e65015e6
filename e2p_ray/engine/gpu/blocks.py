"""How large the blocks of attention to prefixes are: what fits into a multiprocessor's shared memory.

Bytes as Triton 3.6 takes them for a Hopper GPU, which are the most: queries, and keys and values of every stage; half
as much again where float32 is multiplied as three products. An H100 has 227 KB, an A100 163, an L4 or A10 99.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

# Queries of a tile: what the matrix units like, and fewer for contents with few readers.
TILES = (16, 32, 64, 128)
_KEYS_AND_STAGES = ((64, 3), (64, 2), (64, 1), (32, 1), (16, 1))  # the first that fits
_OF_INTERPRETER = 227 << 10  # where no GPU says


@dataclass(frozen=True, slots=True)
class Blocks:
    """Keys that are read at once, and blocks of them that are on their way."""

    num_keys: int
    num_stages: int


@cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may take."""
    if device.type != "cuda":
        return _OF_INTERPRETER
    properties: Any = torch.cuda.get_device_properties(device)  # torch's types lack what it says of this
    return int(properties.shared_memory_per_block_optin)


def blocks_of(tile: int, block_dim: int, dtype: torch.dtype, max_bytes: int) -> Blocks | None:
    """The largest that fit, for heads of so many numbers; None where a tile of so many queries does not."""
    is_single = dtype is torch.float32
    size = dtype.itemsize * 3 // 2 if is_single else dtype.itemsize
    for num_keys, num_stages in _KEYS_AND_STAGES:
        if num_stages > 1 and is_single:
            continue
        if size * block_dim * (tile + 2 * num_stages * num_keys) <= max_bytes:
            return Blocks(num_keys, num_stages)
    return None


def tiles_of(block_dim: int, dtype: torch.dtype, max_bytes: int) -> tuple[int, ...]:
    """The tiles that fit."""
    return tuple(tile for tile in TILES if blocks_of(tile, block_dim, dtype, max_bytes) is not None)

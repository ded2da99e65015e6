"""Numbers in memory that are float32, or bfloat16 where `is_half`; in a register they are float32."""

from __future__ import annotations

from typing import Any

from e2p_ray.engine.loop import loop
from e2p_ray.engine.vectors import load, load_bfloat16, load_float, load_one_bfloat16, store, store_bfloat16


@loop
def load_either(is_half: int, address: int) -> Any:
    """A vector from an address."""
    return load_bfloat16(address) if is_half else load(address)


@loop
def load_one_of_either(is_half: int, address: int) -> Any:
    """One number from an address."""
    return load_one_bfloat16(address) if is_half else load_float(address)


@loop
def store_either(is_half: int, value: Any, address: int) -> None:
    """A vector to an address."""
    if is_half:
        store_bfloat16(value, address)
    else:
        store(value, address)

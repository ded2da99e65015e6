"""Numbers in memory that are float32, or bfloat16 where `is_half`; in a register they are float32."""

from __future__ import annotations

from typing import Any

import numpy as np

from e2p_ray.engine.loop import loop
from e2p_ray.engine.vectors import (
    load,
    load_bfloat16,
    load_float,
    load_one_bfloat16,
    splat,
    store,
    store_bfloat16,
    store_float,
)


@loop
def load_either(is_half: int, address: int) -> Any:
    """A vector from an address."""
    return load_bfloat16(address) if is_half else load(address)


@loop
def load_one_of_either(is_half: int, address: int) -> Any:
    """One number from an address."""
    return load_one_bfloat16(address) if is_half else load_float(address)


@loop
def load_up_to(is_half: int, address: int, num: int, room: int) -> Any:
    """A vector of the first num numbers from an address, with -inf behind them; it is made at `room`."""
    store(splat(np.float32(-np.inf)), room)
    for at in range(num):
        store_float(load_one_of_either(is_half, address + (2 if is_half else 4) * at), room + 4 * at)
    return load(room)


@loop
def store_either(is_half: int, value: Any, address: int) -> None:
    """A vector to an address."""
    if is_half:
        store_bfloat16(value, address)
    else:
        store(value, address)

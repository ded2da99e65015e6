"""The likeliest token of every row on a CPU, and what its log-probability needs of the others: logits are read once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from e2p_ray.engine.compiled import LANES
from e2p_ray.engine.either import load_either, load_one_of_either, load_up_to
from e2p_ray.engine.loop import loop
from e2p_ray.engine.vectors import (
    add,
    exp,
    fetch_and_add,
    largest,
    maximum,
    splat,
    store_float,
    store_int,
    subtract,
    total,
)

_Ints = npt.NDArray[np.int64]

TASK_ROWS = 16
_UNROLLED = 4  # vectors that do not wait for each other
_STEP = _UNROLLED * LANES
_BLOCK = 8 * _STEP  # numbers that are searched for the largest one by one


class LikeliestCall(NamedTuple):
    """What find_likeliest is given, all int64: rows side by side, and where int64 tokens, float32 tops and sums go.

    Numbers have 4 bytes, or 2 where `is_half`.
    """

    numbers: int
    num_rows: int
    width: int
    tokens: int
    tops: int
    sums: int
    is_half: int


@loop
def find_likeliest(p: _Ints) -> None:
    """For some rows a task: the largest number that is one, its first place, and the sum of exp(number - largest).

    The sum is no number where the row has NaN or +Inf, or nothing above -Inf; the other two mean nothing then.
    """
    num_tasks, counter, numbers, num_rows, width = p[0], p[1], p[2], p[3], p[4]
    tokens, tops, sums, is_half = p[5], p[6], p[7], p[8]
    size = 2 if is_half else 4
    vector = LANES * size
    rest = np.empty(LANES, np.float32)
    nothing, zero = splat(np.float32(-np.inf)), splat(np.float32(0.0))
    whole = width // _STEP * _STEP
    while True:
        task = fetch_and_add(counter)
        if task >= num_tasks:
            break
        for row in range(task * TASK_ROWS, min((task + 1) * TASK_ROWS, num_rows)):
            of_row = numbers + size * row * width
            top, begin = np.float32(-np.inf), 0
            for block in range(0, whole, _BLOCK):
                a, b, c, d = nothing, nothing, nothing, nothing
                for place in range(block, min(block + _BLOCK, whole), _STEP):
                    at = of_row + size * place
                    a = maximum(a, load_either(is_half, at))
                    b = maximum(b, load_either(is_half, at + vector))
                    c = maximum(c, load_either(is_half, at + 2 * vector))
                    d = maximum(d, load_either(is_half, at + 3 * vector))
                found = largest(maximum(maximum(a, b), maximum(c, d)))
                if found > top:
                    top, begin = found, block
            for place in range(whole, width):
                found = load_one_of_either(is_half, of_row + size * place)
                if found > top:
                    top, begin = found, place
            token = begin
            while token < width - 1 and load_one_of_either(is_half, of_row + size * token) != top:
                token += 1
            a, b, c, d = zero, zero, zero, zero
            for at in range(of_row, of_row + size * whole, size * _STEP):
                a = add(a, exp(subtract(load_either(is_half, at), splat(top))))
                b = add(b, exp(subtract(load_either(is_half, at + vector), splat(top))))
                c = add(c, exp(subtract(load_either(is_half, at + 2 * vector), splat(top))))
                d = add(d, exp(subtract(load_either(is_half, at + 3 * vector), splat(top))))
            for left in range(whole, width, LANES):
                number = load_up_to(is_half, of_row + size * left, min(width - left, LANES), rest.ctypes.data)
                a = add(a, exp(subtract(number, splat(top))))
            store_int(token, tokens + 8 * row)
            store_float(top, tops + 4 * row)
            store_float(total(add(add(a, b), add(c, d))), sums + 4 * row)
    rest[0] = 0  # numba frees an array behind its last use, and an address is none

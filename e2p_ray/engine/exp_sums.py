"""Sums of exponentials of rows on a CPU, read once: of a log-probability all that a whole vocabulary is needed for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from e2p_ray.engine.compiled import LANES
from e2p_ray.engine.loop import loop
from e2p_ray.engine.vectors import (
    VECTOR_BYTES,
    add,
    exp,
    fetch_and_add,
    load,
    load_float,
    splat,
    store,
    store_float,
    subtract,
    total,
)

_Ints = npt.NDArray[np.int64]

TASK_ROWS = 16
_UNROLLED = 4  # vectors whose sums do not wait for each other


class SumCall(NamedTuple):
    """What sum_exponentials is given, all int64; float32 everywhere, rows side by side."""

    numbers: int
    num_rows: int
    width: int
    largest: int
    sums: int


@loop
def sum_exponentials(p: _Ints) -> None:
    """For some rows a task, sum over a row of exp(number - the row's largest)."""
    num_tasks, counter, numbers, num_rows, width, largest, sums = p[0], p[1], p[2], p[3], p[4], p[5], p[6]
    rest = np.empty(LANES, np.float32)
    nothing = splat(np.float32(-np.inf))
    whole = width // (_UNROLLED * LANES) * (_UNROLLED * VECTOR_BYTES)
    while True:
        task = fetch_and_add(counter)
        if task >= num_tasks:
            break
        for row in range(task * TASK_ROWS, min((task + 1) * TASK_ROWS, num_rows)):
            of_row, top = numbers + 4 * row * width, splat(load_float(largest + 4 * row))
            a = splat(np.float32(0.0))
            b, c, d = a, a, a
            for at in range(of_row, of_row + whole, _UNROLLED * VECTOR_BYTES):
                a = add(a, exp(subtract(load(at), top)))
                b = add(b, exp(subtract(load(at + VECTOR_BYTES), top)))
                c = add(c, exp(subtract(load(at + 2 * VECTOR_BYTES), top)))
                d = add(d, exp(subtract(load(at + 3 * VECTOR_BYTES), top)))
            for at in range(whole, 4 * width, VECTOR_BYTES):
                store(nothing, rest.ctypes.data)
                for place in range(at, min(at + VECTOR_BYTES, 4 * width), 4):
                    store_float(load_float(of_row + place), rest.ctypes.data + place - at)
                a = add(a, exp(subtract(load(rest.ctypes.data), top)))
            store_float(total(add(add(a, b), add(c, d))), sums + 4 * row)
    rest[0] = 0  # numba frees an array behind its last use, and an address is none

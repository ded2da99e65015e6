"""Root-mean-square norms of rows on a CPU, float32 or bfloat16, reckoned in float32 and rounded once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from e2p_ray.engine.compiled import LANES
from e2p_ray.engine.either import load_either, store_either
from e2p_ray.engine.loop import loop
from e2p_ray.engine.vectors import (
    fetch_and_add,
    load,
    load_float,
    multiply,
    multiply_add,
    splat,
    store_bfloat16,
    total,
)

_Ints = npt.NDArray[np.int64]

TASK_ROWS = 64


class RoundCall(NamedTuple):
    """What round_rows is given, all int64; rows side by side."""

    numbers: int
    num_rows: int
    width: int
    outputs: int


class NormCall(NamedTuple):
    """What normalise_rows is given, all int64; rows side by side.

    is_half: states and weight are bfloat16; gives_half: outputs are.
    """

    states: int
    num_rows: int
    width: int
    weight: int
    epsilon: int
    outputs: int
    is_half: int
    gives_half: int


@loop
def normalise_rows(p: _Ints) -> None:
    """For some rows a task: each divided by its root mean square and multiplied by the weight."""
    num_tasks, counter, states, num_rows, width = p[0], p[1], p[2], p[3], p[4]
    weight, epsilon, outputs, is_half, gives_half = p[5], load_float(p[6]), p[7], p[8], p[9]
    size, out_size = 2 if is_half else 4, 2 if gives_half else 4
    while True:
        task = fetch_and_add(counter)
        if task >= num_tasks:
            break
        for row in range(task * TASK_ROWS, min((task + 1) * TASK_ROWS, num_rows)):
            source, target = states + row * width * size, outputs + row * width * out_size
            squares = splat(np.float32(0.0))
            for at in range(0, width, LANES):
                value = load_either(is_half, source + at * size)
                squares = multiply_add(value, value, squares)
            mean = total(squares) / np.float32(width) + epsilon
            factor = splat(np.float32(1.0) / np.float32(np.sqrt(mean)))
            for at in range(0, width, LANES):
                normed = multiply(load_either(is_half, source + at * size), factor)
                normed = multiply(normed, load_either(is_half, weight + at * size))
                store_either(gives_half, normed, target + at * out_size)


@loop
def round_rows(p: _Ints) -> None:
    """For some rows a task: float32 as bfloat16."""
    num_tasks, counter, numbers, num_rows, width, outputs = p[0], p[1], p[2], p[3], p[4], p[5]
    while True:
        task = fetch_and_add(counter)
        if task >= num_tasks:
            break
        first, end = task * TASK_ROWS * width, min((task + 1) * TASK_ROWS, num_rows) * width
        for at in range(first, end, LANES):
            store_bfloat16(load(numbers + 4 * at), outputs + 2 * at)

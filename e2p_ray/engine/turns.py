"""Rotary embeddings on a CPU: queries, keys and values out of their one product to where attention reads them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from e2p_ray.engine.either import load_either, store_either
from e2p_ray.engine.loop import loop
from e2p_ray.engine.vectors import (
    VECTOR_BYTES,
    fetch_and_add,
    load,
    load_int,
    rotate,
    store,
)

_Ints = npt.NDArray[np.int64]

TASK_TOKENS = 64


class TurnCall(NamedTuple):
    """What turn_heads is given, all int64.

    heads (tokens, heads of queries, of keys, of values, dim), turns (tokens, dim) complex numbers' parts in turns,
    queries (tokens, heads, dim) in float32; a token's key heads go to its place (bytes behind keys and values), the
    next one head_bytes on. `from_half`, `to_half`: heads, and keys and values, are bfloat16.
    """

    heads: int
    turns: int
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    dim: int
    queries: int
    keys: int
    values: int
    places: int
    head_bytes: int
    from_half: int
    to_half: int


@loop
def turn_heads(p: _Ints) -> None:
    """For some tokens a task, what the docstring of `TurnCall` says."""
    num_tasks, counter, heads, turns, num_tokens = p[0], p[1], p[2], p[3], p[4]
    num_heads, num_kv_heads, dim, queries, keys, values = p[5], p[6], p[7], p[8], p[9], p[10]
    places, head_bytes, from_half, to_half = p[11], p[12], p[13], p[14]
    all_heads = num_heads + 2 * num_kv_heads
    size = 2 if from_half else 4
    while True:
        task = fetch_and_add(counter)
        if task >= num_tasks:
            break
        for token in range(task * TASK_TOKENS, min((task + 1) * TASK_TOKENS, num_tokens)):
            turn, place = turns + 4 * token * dim, load_int(places + 8 * token)
            for head in range(all_heads):
                source = heads + (token * all_heads + head) * dim * size
                of_keys = head - num_heads
                of_values = of_keys - num_kv_heads
                for at in range(0, 4 * dim, VECTOR_BYTES):
                    value = load_either(from_half, source + (at // 2 if from_half else at))
                    if of_values < 0:
                        value = rotate(value, load(turn + at))
                    if of_keys < 0:
                        store(value, queries + 4 * (token * num_heads + head) * dim + at)
                        continue
                    target = keys + of_keys * head_bytes if of_values < 0 else values + of_values * head_bytes
                    store_either(to_half, value, target + place + (at // 2 if to_half else at))

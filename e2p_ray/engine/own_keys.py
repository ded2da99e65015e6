"""Attention of tokens over their own rows' keys on a CPU, joined with what `flash` found over shared ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from e2p_ray.engine.compiled import LANES
from e2p_ray.engine.either import load_either
from e2p_ray.engine.loop import loop
from e2p_ray.engine.vectors import (
    LINE_BYTES,
    VECTOR_BYTES,
    add,
    divide,
    exp,
    fetch,
    fetch_and_add,
    largest,
    load,
    load_float,
    load_int,
    maximum,
    multiply,
    multiply_add,
    splat,
    store,
    store_float,
    subtract,
    total,
)

_Ints = npt.NDArray[np.int64]
_Vector = Any

TASK_TOKENS = 32
_UNROLLED = 4  # vectors of values whose sums do not wait for each other


class OwnCall(NamedTuple):
    """What attend_own is given, all int64: each token's slot, and its place among its row's own tokens.

    `is_half`: keys and values are bfloat16.
    """

    num_tokens: int
    slots: int
    places: int
    keys: int
    values: int
    slot_bytes: int
    head_bytes: int
    queries: int
    query_token: int
    query_head: int
    outputs: int
    output_token: int
    output_head: int
    tops: int
    sums: int
    num_heads: int
    group: int
    dim: int
    max_keys: int
    scale: int
    is_half: int


@loop
def _dot(is_half: int, query: int, key: int, dim: int) -> Any:
    """The dot product of a query and a key, by address."""
    sums = splat(np.float32(0.0))
    for at in range(0, 4 * dim, VECTOR_BYTES):
        sums = multiply_add(load(query + at), load_either(is_half, key + (at // 2 if is_half else at)), sums)
    return total(sums)


@loop
def _weigh_own(
    is_half: int, query: int, keys: int, num_keys: int, dim: int, scale: float, scores: int, top: float, shared: float
) -> tuple[_Vector, _Vector]:
    """Scores become weights; what to multiply with for their share, and with for that of keys seen before.

    Of these, `top` is the largest score and `shared` the sum of weights against it, 0 where there are none.
    """
    for vector in range(0, 4 * num_keys, VECTOR_BYTES):
        store(splat(np.float32(-np.inf)), scores + vector)
    for key in range(num_keys):
        at = keys + (2 if is_half else 4) * key * dim
        store_float(_dot(is_half, query, at, dim) * scale, scores + 4 * key)
    highest = load(scores)
    for vector in range(VECTOR_BYTES, 4 * num_keys, VECTOR_BYTES):
        highest = maximum(highest, load(scores + vector))
    against, sum_ = splat(largest(highest)), splat(np.float32(0.0))
    kept = sum_
    if shared != 0:  # nor NaN, which a row must not lose
        against = maximum(against, splat(top))
        kept = multiply(exp(subtract(splat(top), against)), splat(shared))
    for vector in range(0, 4 * num_keys, VECTOR_BYTES):
        weight = exp(subtract(load(scores + vector), against))
        store(weight, scores + vector)
        sum_ = add(sum_, weight)
    factor = divide(splat(np.float32(1.0)), add(splat(total(sum_)), kept))
    return factor, multiply(kept, factor)


@loop
def _add_own(
    is_half: int,
    values: int,
    num_keys: int,
    dim: int,
    weights: int,
    factor: _Vector,
    kept: _Vector,
    shared: float,
    output: int,
) -> None:
    """What weights take of values, joined with what stands at `output`."""
    row, part = 4 * dim, 2 if is_half else 1  # of a vector's bytes in an output those of a value's
    vector = VECTOR_BYTES // part
    dimension = 0
    while dimension + _UNROLLED * VECTOR_BYTES <= row:
        a = splat(np.float32(0.0))
        b, c, d = a, a, a
        for key in range(num_keys):
            weight = splat(load_float(weights + 4 * key))
            value = values + (key * row + dimension) // part
            a = multiply_add(weight, load_either(is_half, value), a)
            b = multiply_add(weight, load_either(is_half, value + vector), b)
            c = multiply_add(weight, load_either(is_half, value + 2 * vector), c)
            d = multiply_add(weight, load_either(is_half, value + 3 * vector), d)
        place = output + dimension
        _join(a, factor, kept, shared, place)
        _join(b, factor, kept, shared, place + VECTOR_BYTES)
        _join(c, factor, kept, shared, place + 2 * VECTOR_BYTES)
        _join(d, factor, kept, shared, place + 3 * VECTOR_BYTES)
        dimension += _UNROLLED * VECTOR_BYTES
    while dimension < row:
        a = splat(np.float32(0.0))
        for key in range(num_keys):
            value = load_either(is_half, values + (key * row + dimension) // part)
            a = multiply_add(splat(load_float(weights + 4 * key)), value, a)
        _join(a, factor, kept, shared, output + dimension)
        dimension += VECTOR_BYTES


@loop
def _join(own: _Vector, factor: _Vector, kept: _Vector, shared: float, place: int) -> None:
    """What a token's own keys gave, with what stands there already."""
    found = multiply(own, factor)
    if shared != 0:
        found = multiply_add(load(place), kept, found)
    store(found, place)


@loop
def _fetch_keys(keys: int, values: int, num_bytes: int) -> None:
    """Those of the next key head, while this one's are used: each is short, and the CPU sees no row in them."""
    for at in range(0, num_bytes, LINE_BYTES):
        fetch(keys + at)
        fetch(values + at)


@loop
def attend_own(p: _Ints) -> None:
    """Tasks of some tokens: each token's queries over its row's own keys, joined with what attend_shared found."""
    num_tasks, counter, num_tokens, slots, places = p[0], p[1], p[2], p[3], p[4]
    keys, values, slot_bytes, head_bytes = p[5], p[6], p[7], p[8]
    queries, query_token, query_head = p[9], p[10], p[11]
    outputs, output_token, output_head = p[12], p[13], p[14]
    tops, sums, num_heads, group, dim, max_keys = p[15], p[16], p[17], p[18], p[19], p[20]
    scale, is_half = load_float(p[21]), p[22]
    scratch = np.empty(max_keys + 2 * LANES, np.float32)
    scores = (scratch.ctypes.data + VECTOR_BYTES - 1) // VECTOR_BYTES * VECTOR_BYTES
    while True:
        task = fetch_and_add(counter)
        if task >= num_tasks:
            break
        for token in range(task * TASK_TOKENS, min((task + 1) * TASK_TOKENS, num_tokens)):
            num_keys = load_int(places + 8 * token) + 1
            of_row = load_int(slots + 8 * token) * slot_bytes
            num_bytes = num_keys * dim * (2 if is_half else 4)
            for head in range(num_heads):
                of_head = of_row + head // group * head_bytes
                if head % group == 0:
                    of_next = of_head + head_bytes
                    if head + group == num_heads:
                        of_next = load_int(slots + 8 * min(token + 1, num_tokens - 1)) * slot_bytes
                    _fetch_keys(keys + of_next, values + of_next, num_bytes)
                before = 4 * (token * num_heads + head)
                top, shared = load_float(tops + before), load_float(sums + before)
                query = queries + token * query_token + head * query_head
                factor, kept = _weigh_own(is_half, query, keys + of_head, num_keys, dim, scale, scores, top, shared)
                output = outputs + token * output_token + head * output_head
                _add_own(is_half, values + of_head, num_keys, dim, scores, factor, kept, shared, output)
    scratch[0] = 0  # numba frees an array behind its last use, and an address is none

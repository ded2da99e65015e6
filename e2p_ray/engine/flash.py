"""Attention of many rows' queries over the keys that they share, on a CPU, as a compiled loop of our own.

Queries lie in the lanes of vectors, so that keys and values are read as they are stored, one number for sixteen queries
at a time, and a softmax over keys goes lane by lane (flash attention, arXiv 2205.14135). Everything comes by address,
with distances in bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from e2p_ray.engine.compiled import LANES
from e2p_ray.engine.loop import loop
from e2p_ray.engine.tiles import TILE_ROWS, product_tile
from e2p_ray.engine.vectors import (
    LINE_BYTES,
    VECTOR_BYTES,
    add,
    divide,
    exp,
    fetch_and_add,
    gather_transposed,
    load,
    load_bfloat16,
    load_float,
    load_int,
    maximum,
    multiply,
    or_minus_infinity,
    scatter_transposed,
    splat,
    store,
    store_float,
    store_pairs,
    subtract,
)

_Ints = npt.NDArray[np.int64]

BLOCK_VECTORS = 3
BLOCK_LANES = BLOCK_VECTORS * LANES
# Blocks of queries that read a block of keys before the next one: their state stays in the second-level cache.
TASK_BLOCKS = 6
TASK_LANES = TASK_BLOCKS * BLOCK_LANES
_KEYS = 128  # a block of keys, 32 KB for heads of 64, whose scores of 48 queries stay in the first-level cache

_WIDTHS = (3, 2, 1)
_product = product_tile(TILE_ROWS, _WIDTHS)
_product_of_one = product_tile(1, _WIDTHS)


class SharedCall(NamedTuple):
    """What attend_shared is given, all int64.

    tasks: reading, key head, first and end in `order`; readings: first in `order`, bytes from one head of keys to the
    next, from one key to the next, number of keys; addresses: keys and values of a reading; order: tokens. `causal`:
    the n-th of a reading's tokens sees n keys. out_tops and out_sums (tokens, heads), or 0: the largest score, and the
    sum of weights against it.
    `is_half`: keys and values are bfloat16; `halves`: and multiplied as such, with queries and weights rounded to it.
    """

    tasks: int
    readings: int
    order: int
    queries: int
    query_token: int
    query_head: int
    outputs: int
    output_token: int
    output_head: int
    out_tops: int
    out_sums: int
    num_heads: int
    group: int
    dim: int
    is_half: int
    halves: int
    causal: int
    scale: int
    addresses: int


@loop
def _score(
    halves: int,
    num_vectors: int,
    keys: int,
    key_row: int,
    queries: int,
    scores: int,
    dim: int,
    num_keys: int,
    next_keys: int,
    next_values: int,
) -> None:
    """Scores (num_keys, lanes) of keys (num_keys, dim) and queries (dim, lanes); `halves`: both in bfloat16.

    A block of keys and values is fetched meanwhile, at 0 none: half of the tiles bring keys, half values.
    """
    row, depth = num_vectors * VECTOR_BYTES, dim // 2 if halves else dim
    at = 0
    while at < num_keys:
        if at + TILE_ROWS > num_keys:
            if num_keys < TILE_ROWS:
                break
            at = num_keys - TILE_ROWS  # some keys once more
        some, tile = keys + at * key_row, at // TILE_ROWS
        ahead = some
        if next_keys:
            later = tile - _KEYS // TILE_ROWS // 2
            ahead = (next_keys + tile * depth * LINE_BYTES) if later < 0 else (next_values + later * depth * LINE_BYTES)
        _product(halves, num_vectors, 0, some, key_row, 4, queries, scores + at * row, depth, ahead)
        at += TILE_ROWS
    while at < num_keys:
        some = keys + at * key_row
        _product_of_one(halves, num_vectors, 0, some, key_row, 4, queries, scores + at * row, depth, some)
        at += 1


@loop
def _add_values(
    halves: int, num_vectors: int, values: int, value_row: int, weights: int, outputs: int, dim: int, num_keys: int
) -> None:
    """Outputs (dim, lanes) and what weights (num_keys, lanes) take of values (num_keys, dim).

    `halves`: values and weights are pairs of bfloat16, those of two keys side by side.
    """
    row, depth = num_vectors * VECTOR_BYTES, (num_keys + 1) // 2 if halves else num_keys
    for at in range(0, dim, TILE_ROWS):
        _product(halves, num_vectors, 1, values + 4 * at, 4, value_row, weights, outputs + at * row, depth, values)


@loop
def _weigh(
    num_vectors: int, scores: int, num_keys: int, tops: int, sums: int, outputs: int, dim: int, begun: bool
) -> None:
    """Scores become weights against the largest score so far, and what was found before is brought to it."""
    row = num_vectors * VECTOR_BYTES
    for at in range(0, row, VECTOR_BYTES):
        before = load(tops + at)
        top = before
        for key in range(num_keys):
            top = maximum(top, load(scores + key * row + at))
        shrunk = exp(subtract(before, top))
        sum_ = multiply(load(sums + at), shrunk)
        for key in range(num_keys):
            place = scores + key * row + at
            weight = exp(subtract(load(place), top))
            store(weight, place)
            sum_ = add(sum_, weight)
        store(top, tops + at)
        store(sum_, sums + at)
        if begun:
            for dimension in range(dim):
                place = outputs + dimension * row + at
                store(multiply(load(place), shrunk), place)


@loop
def _hide_later(num_vectors: int, scores: int, first_key: int, num_keys: int, limits: int) -> None:
    """-inf for keys at or behind a lane's limit."""
    row = num_vectors * VECTOR_BYTES
    for at in range(0, row, VECTOR_BYTES):
        limit = load(limits + at)
        for key in range(num_keys):
            place = scores + key * row + at
            store(or_minus_infinity(load(place), limit, np.float32(first_key + key)), place)


@loop
def _widen(source: int, row: int, target: int, num_rows: int, dim: int) -> None:
    """Rows of bfloat16 as rows of float32 side by side."""
    for at in range(num_rows):
        for dimension in range(0, dim, LANES):
            value = load_bfloat16(source + at * row + 2 * dimension)
            store(value, target + 4 * (at * dim + dimension))


@loop
def _pair_values(source: int, row: int, target: int, num_rows: int, dim: int) -> None:
    """Rows of bfloat16 as rows of pairs, those of two rows side by side; a last one alone has zeros beside it."""
    for at in range(0, num_rows, 2):
        for dimension in range(0, dim, LANES):
            place = source + at * row + 2 * dimension
            second = load_bfloat16(place + row) if at + 1 < num_rows else splat(np.float32(0.0))
            store_pairs(load_bfloat16(place), second, target + 4 * (at // 2 * dim + dimension))


@loop
def _pair_rows(num_vectors: int, rows: int, num_rows: int) -> None:
    """Rows (num_rows, lanes) in their own place as half as many of pairs; a last one alone has zeros beside it."""
    row = num_vectors * VECTOR_BYTES
    for at in range(0, num_rows, 2):
        for lane in range(0, row, VECTOR_BYTES):
            place = rows + at * row + lane
            second = load(place + row) if at + 1 < num_rows else splat(np.float32(0.0))
            store_pairs(load(place), second, rows + at // 2 * row + lane)


@loop
def _turn_queries(
    num_vectors: int,
    block: int,
    query_at: int,
    queries: int,
    tops: int,
    sums: int,
    outputs: int,
    dim: int,
    scale: float,
) -> None:
    """Every block's queries with their numbers in rows of lanes, scaled, and nothing found for them yet."""
    nothing, zero = splat(np.float32(-np.inf)), splat(np.float32(0.0))
    for vector in range(num_vectors):
        row = _num_vectors_beside(vector, num_vectors) * VECTOR_BYTES
        place = vector // BLOCK_VECTORS * block + vector % BLOCK_VECTORS * VECTOR_BYTES
        for dimension in range(0, dim, LANES):
            gather_transposed(
                query_at + 8 * LANES * vector, 4 * dimension, queries + place + dimension * row, row, scale
            )
        for dimension in range(dim):
            store(zero, outputs + place + dimension * row)
        store(nothing, tops + VECTOR_BYTES * vector)
        store(zero, sums + VECTOR_BYTES * vector)


@loop
def _write_outputs(num_vectors: int, block: int, outputs: int, sums: int, output_at: int, dim: int) -> None:
    """What every block found, divided by the sum of its weights, to where it belongs."""
    one = splat(np.float32(1.0))
    for vector in range(num_vectors):
        row = _num_vectors_beside(vector, num_vectors) * VECTOR_BYTES
        place = vector // BLOCK_VECTORS * block + vector % BLOCK_VECTORS * VECTOR_BYTES
        factor = divide(one, load(sums + VECTOR_BYTES * vector))
        for dimension in range(0, dim, LANES):
            scatter_transposed(
                outputs + place + dimension * row, row, output_at + 8 * LANES * vector, 4 * dimension, factor
            )


@loop
def _num_vectors_beside(vector: int, num_vectors: int) -> Any:
    """Of the block that a vector is in: three, but for the last one."""
    return min(num_vectors - vector // BLOCK_VECTORS * BLOCK_VECTORS, BLOCK_VECTORS)


@loop
def _begin_of(task: int, readings: int, addresses: int) -> tuple[int, int]:
    """Where a task's keys and values are."""
    reading, head = load_int(task), load_int(task + 8)
    of_head = head * load_int(readings + 32 * reading + 8)
    return load_int(addresses + 16 * reading) + of_head, load_int(addresses + 16 * reading + 8) + of_head


@loop
def attend_shared(p: _Ints) -> None:
    """Tasks, one after the other as they are free: lanes of one key head over the keys that its readers share."""
    num_tasks, counter, tasks, readings, order = p[0], p[1], p[2], p[3], p[4]
    queries, query_token, query_head = p[5], p[6], p[7]
    outputs, output_token, output_head = p[8], p[9], p[10]
    out_tops, out_sums, num_heads, group, dim = p[11], p[12], p[13], p[14], p[15]
    is_half, halves, causal, scale, addresses = p[16], p[17], p[18], load_float(p[19]), p[20]
    block = 4 * BLOCK_LANES * dim
    scratch = np.empty(
        2 * TASK_LANES * dim + _KEYS * (BLOCK_LANES + 2 * dim) + 3 * TASK_LANES + dim + LANES, np.float32
    )
    turned = (scratch.ctypes.data + VECTOR_BYTES - 1) // VECTOR_BYTES * VECTOR_BYTES  # (dim, lanes), block by block
    found = turned + 4 * TASK_LANES * dim  # alike
    scores = found + 4 * TASK_LANES * dim
    wide_keys = scores + 4 * _KEYS * BLOCK_LANES
    wide_values = wide_keys + 4 * _KEYS * dim
    tops = wide_values + 4 * _KEYS * dim
    sums = tops + 4 * TASK_LANES
    limits = sums + 4 * TASK_LANES
    nowhere = limits + 4 * TASK_LANES  # where lanes go that are no query's
    places = np.empty((2, TASK_LANES), np.int64)
    query_at, output_at = places[0].ctypes.data, places[1].ctypes.data
    while True:
        task = tasks + 32 * fetch_and_add(counter)
        if task >= tasks + 32 * num_tasks:
            break
        reading, head, first, end = load_int(task), load_int(task + 8), load_int(task + 16), load_int(task + 24)
        of_reading = readings + 32 * reading
        row_bytes, num_keys = load_int(of_reading + 16), load_int(of_reading + 24)
        keys, values = _begin_of(task, readings, addresses)
        num_before = first - load_int(of_reading)  # tokens of this reading
        num_lanes = (end - first) * group
        num_vectors = (num_lanes + LANES - 1) // LANES
        for lane in range(num_vectors * LANES):
            real = min(lane, num_lanes - 1)
            token, of_head = load_int(order + 8 * (first + real // group)), head * group + real % group
            places[0, lane] = queries + token * query_token + of_head * query_head
            places[1, lane] = outputs + token * output_token + of_head * output_head if lane == real else nowhere
            store_float(np.float32(num_before + real // group + 1), limits + 4 * lane)
        _turn_queries(num_vectors, block, query_at, turned, tops, sums, found, dim, scale)
        if halves:
            for vector in range(0, num_vectors, BLOCK_VECTORS):
                _pair_rows(_num_vectors_beside(vector, num_vectors), turned + vector // BLOCK_VECTORS * block, dim)
        num_seen = min(num_keys, num_before + end - first) if causal else num_keys
        for first_key in range(0, num_seen, _KEYS):
            some_keys, some_values = keys + first_key * row_bytes, values + first_key * row_bytes
            some, key_row, value_row = min(num_seen - first_key, _KEYS), row_bytes, row_bytes
            next_keys, next_values = some_keys + _KEYS * row_bytes, some_values + _KEYS * row_bytes
            if first_key + _KEYS >= num_seen and task + 32 < tasks + 32 * num_tasks:
                next_keys, next_values = _begin_of(task + 32, readings, addresses)
            elif first_key + _KEYS >= num_seen:
                next_keys = 0
            if halves:
                _pair_values(some_values, row_bytes, wide_values, some, dim)
                some_values, value_row = wide_values, 4 * dim
            elif is_half:
                _widen(some_keys, row_bytes, wide_keys, some, dim)
                _widen(some_values, row_bytes, wide_values, some, dim)
                some_keys, some_values, key_row, value_row = wide_keys, wide_values, 4 * dim, 4 * dim
            for vector in range(0, num_vectors, BLOCK_VECTORS):
                beside = _num_vectors_beside(vector, num_vectors)
                of_block, lane = vector // BLOCK_VECTORS * block, 4 * LANES * vector
                seen, seen_by_all = some, some
                if causal:
                    last = min((vector + beside) * LANES, num_lanes) - 1
                    seen = min(some, num_before + last // group + 1 - first_key)
                    seen_by_all = max(num_before + LANES * vector // group + 1 - first_key, 0)
                if seen <= 0:
                    continue
                _score(halves, beside, some_keys, key_row, turned + of_block, scores, dim, seen, next_keys, next_values)
                next_keys = 0
                if seen_by_all < seen:
                    hidden = scores + seen_by_all * beside * VECTOR_BYTES
                    _hide_later(beside, hidden, first_key + seen_by_all, seen - seen_by_all, limits + lane)
                _weigh(beside, scores, seen, tops + lane, sums + lane, found + of_block, dim, first_key > 0)
                if halves:
                    _pair_rows(beside, scores, seen)
                _add_values(halves, beside, some_values, value_row, scores, found + of_block, dim, seen)
        _write_outputs(num_vectors, block, found, sums, output_at, dim)
        if out_tops:
            for lane in range(num_lanes):
                token = load_int(order + 8 * (first + lane // group))
                place = 4 * (token * num_heads + head * group + lane % group)
                store_float(load_float(tops + 4 * lane), out_tops + place)
                store_float(load_float(sums + 4 * lane), out_sums + place)
    scratch[0] = places[0, 0] = 0  # numba frees an array behind its last use, and an address is none

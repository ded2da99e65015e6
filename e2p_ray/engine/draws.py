"""Tokens drawn from rows' logits on a CPU, as a compiled loop: temperature, top-k, top-p, one random number a row.

Without a cut the running sum goes through the vocabulary in the order of its ids, behind one through falling
weights. No row is sorted for that: a histogram of its weights says in which bucket a cut or the token lies, and that
one is. By torch a step of 192 rows of 8,192 took 13 ms, 51 with top-p, of the 114 that a model of 30 M takes for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from e2p_ray.engine.compiled import LANES
from e2p_ray.engine.either import load_up_to
from e2p_ray.engine.loop import loop
from e2p_ray.engine.vectors import (
    VECTOR_BYTES,
    add,
    exp,
    fetch_and_add,
    largest,
    load,
    load_double,
    load_float,
    load_int,
    maximum,
    multiply,
    splat,
    store,
    store_int,
    subtract,
    total,
)

_Ints = npt.NDArray[np.int64]

_BLOCK = 64 * LANES  # numbers whose sum is kept, so that the running sum need not go through all of them
_BUCKETS_A_NAT = 16  # of the histogram of weights
_NUM_BUCKETS = 90 * _BUCKETS_A_NAT  # weights below exp(-87) are 0
_MAX_FACTOR = 1e30  # of a temperature at which the likeliest token is all there is; in float32, and times 0 is 0
_SURE = 1.0 - 1e-4  # more than sums in float32 are wrong by


class DrawCall(NamedTuple):
    """What draw_tokens is given, all int64: rows of float32 logits side by side, and of every row the rest.

    temperatures, top_ps and numbers in [0, 1) are float64, top_ks (0: none) and tokens int64.
    """

    logits: int
    width: int
    temperatures: int
    top_ps: int
    top_ks: int
    numbers: int
    tokens: int


@loop
def _weigh(logits: int, width: int, factor: float, top: float, weights: int, sums: npt.NDArray[np.float64]) -> float:
    """exp(factor * (logit - top)) of a row, zeros behind it, the sums of its blocks, and the sum of all."""
    scale, shift, whole = splat(np.float32(factor)), splat(np.float32(top)), width // LANES * LANES
    rest = np.empty(LANES, np.float32)
    everything = 0.0
    for block in range(0, width, _BLOCK):
        sum_ = splat(np.float32(0.0))
        for at in range(block, min(block + _BLOCK, whole), LANES):
            weight = exp(multiply(subtract(load(logits + 4 * at), shift), scale))
            store(weight, weights + 4 * at)
            sum_ = add(sum_, weight)
        if whole < width <= block + _BLOCK:
            logit = load_up_to(0, logits + 4 * whole, width - whole, rest.ctypes.data)
            weight = exp(multiply(subtract(logit, shift), scale))
            store(weight, weights + 4 * whole)
            sum_ = add(sum_, weight)
        sums[block // _BLOCK] = total(sum_)
        everything += sums[block // _BLOCK]
    rest[0] = 0  # numba frees an array behind its last use, and an address is none
    return everything


@loop
def _largest_of(logits: int, width: int) -> Any:
    """The largest of a row that is a number."""
    found, whole = splat(np.float32(-np.inf)), width // LANES * LANES
    for at in range(logits, logits + 4 * whole, VECTOR_BYTES):
        found = maximum(found, load(at))
    top = largest(found)
    for at in range(whole, width):
        top = max(top, load_float(logits + 4 * at))
    return top


@loop
def _drawn_from_all(weights: int, width: int, sums: npt.NDArray[np.float64], target: float) -> int:
    """The first token at which the running sum passes the target; the last that has a weight where none does."""
    running, block = 0.0, 0
    while (block + 1) * _BLOCK < width and running + sums[block] <= target:
        running, block = running + sums[block], block + 1
    token = block * _BLOCK
    while token < width:
        running += load_float(weights + 4 * token)
        if running > target:
            return token
        token += 1
    token = width - 1
    while token > 0 and load_float(weights + 4 * token) <= 0:
        token -= 1
    return token


@loop
def _sort_falling(
    values: npt.NDArray[np.float32],
    ids: _Ints,
    num_values: int,
    other_values: npt.NDArray[np.float32],
    other_ids: _Ints,
) -> None:
    """Sort ids by their values in place, of equals the first one first: merged in pairs, by way of the other arrays.

    Numba's own sort takes 2 s more to compile, and slices of arrays 3 s.
    """
    size = 1
    while size < num_values:
        for first in range(0, num_values, 2 * size):
            middle, end = min(first + size, num_values), min(first + 2 * size, num_values)
            one, two = first, middle
            for at in range(first, end):
                if one < middle and (two >= end or values[one] >= values[two]):
                    other_values[at], other_ids[at], one = values[one], ids[one], one + 1
                else:
                    other_values[at], other_ids[at], two = values[two], ids[two], two + 1
        for at in range(num_values):
            values[at], ids[at] = other_values[at], other_ids[at]
        size *= 2


@loop
def _cut(
    by_count: bool,
    goal: float,
    last: int,
    num_last: int,
    logits: int,
    weights: int,
    masses: npt.NDArray[np.float64],
    counts: _Ints,
    known: _Ints,
    buckets: _Ints,
    num_known: int,
    ids: _Ints,
    other_ids: _Ints,
    values: npt.NDArray[np.float32],
    other_values: npt.NDArray[np.float32],
) -> tuple[int, int, float]:
    """Where falling tokens, or their weights, come to the goal: the bucket, how many of its tokens belong, all weights.

    Among the buckets before `last` and the first num_last tokens of that one. `ids` are the bucket's, sorted.
    """
    bucket, mass, count = 0, 0.0, 0
    while bucket < last and (count + counts[bucket] if by_count else mass + masses[bucket]) < goal:
        mass, count, bucket = mass + masses[bucket], count + counts[bucket], bucket + 1
    while counts[bucket] == 0:  # behind the last token: the goal is beyond all there are, or sums are a little wrong
        bucket -= 1
        mass, count = mass - masses[bucket], count - counts[bucket]
    num_ids = 0
    for at in range(num_known):
        if buckets[at] == bucket:
            ids[num_ids], values[num_ids] = known[at], load_float(logits + 4 * known[at])
            num_ids += 1
    _sort_falling(values, ids, num_ids, other_values, other_ids)
    if bucket == last:
        num_ids = min(num_ids, num_last)
    num = 0
    while num < num_ids and (num == 0 or (count + num if by_count else mass) < goal):
        mass += load_float(weights + 4 * ids[num])
        num += 1
    return bucket, num, mass


@loop
def _drawn_from_likeliest(
    logits: int,
    weights: int,
    width: int,
    everything: float,
    top: float,
    steepness: float,
    top_k: int,
    top_p: float,
    number: float,
    masses: npt.NDArray[np.float64],
    counts: _Ints,
    known: _Ints,
    buckets: _Ints,
    ids: _Ints,
    other_ids: _Ints,
    values: npt.NDArray[np.float32],
    other_values: npt.NDArray[np.float32],
) -> Any:
    """The same among the top_k largest, and of these the fewest that have top_p of their sum, in falling order.

    steepness: buckets that a logit is below the largest one's for every unit that it is less.
    """
    # What lies below this is together less than what top-p leaves out.
    least = 0.0 if top_k > 0 else (1.0 - top_p) * everything / width * _SURE
    for bucket in range(_NUM_BUCKETS):
        masses[bucket], counts[bucket] = 0.0, 0
    num_known = 0
    for token in range(width):
        weight = load_float(weights + 4 * token)
        if weight > least:
            bucket = min(int((top - load_float(logits + 4 * token)) * steepness), _NUM_BUCKETS - 1)
            masses[bucket] += weight
            counts[bucket] += 1
            known[num_known], buckets[num_known] = token, bucket
            num_known += 1
    rest = (logits, weights, masses, counts, known, buckets, num_known, ids, other_ids, values, other_values)
    last, num_last, kept = _NUM_BUCKETS - 1, width, everything
    if top_k > 0:
        last, num_last, kept = _cut(True, float(top_k), last, num_last, *rest)
    last, num_last, kept = _cut(False, top_p * kept, last, num_last, *rest)
    _, num, _ = _cut(False, np.nextafter(number * kept, np.inf), last, num_last, *rest)  # beyond it, not only at it
    return ids[num - 1]


@loop
def draw_tokens(p: _Ints) -> None:
    """One row a task. A row with NaN or +Inf, or nothing above -Inf, gets token 0."""
    num_tasks, counter, logits, width = p[0], p[1], p[2], p[3]
    temperatures, top_ps, top_ks, numbers, tokens = p[4], p[5], p[6], p[7], p[8]
    scratch = np.empty(width + 2 * LANES, np.float32)
    weights = (scratch.ctypes.data + VECTOR_BYTES - 1) // VECTOR_BYTES * VECTOR_BYTES
    sums = np.empty((width + _BLOCK - 1) // _BLOCK, np.float64)
    masses, counts = np.empty(_NUM_BUCKETS, np.float64), np.empty(_NUM_BUCKETS, np.int64)
    known, buckets = np.empty(width, np.int64), np.empty(width, np.int64)
    ids, other_ids = np.empty(width, np.int64), np.empty(width, np.int64)
    values, other_values = np.empty(width, np.float32), np.empty(width, np.float32)
    while True:
        row = fetch_and_add(counter)
        if row >= num_tasks:
            break
        of_row, token = logits + 4 * row * width, 0
        top = _largest_of(of_row, width)
        if np.isfinite(top):
            factor = min(1.0 / load_double(temperatures + 8 * row), _MAX_FACTOR)
            everything = _weigh(of_row, width, factor, top, weights, sums)
            top_k, top_p = load_int(top_ks + 8 * row), load_double(top_ps + 8 * row)
            number = load_double(numbers + 8 * row)
            if not np.isfinite(everything):
                token = 0
            elif top_k > 0 or top_p < 1.0:
                token = _drawn_from_likeliest(
                    of_row,
                    weights,
                    width,
                    everything,
                    top,
                    factor * _BUCKETS_A_NAT,
                    top_k,
                    top_p,
                    number,
                    masses,
                    counts,
                    known,
                    buckets,
                    ids,
                    other_ids,
                    values,
                    other_values,
                )
            else:
                token = _drawn_from_all(weights, width, sums, number * everything)
        store_int(token, tokens + 8 * row)
    scratch[0] = 0  # numba frees an array behind its last use, and an address is none

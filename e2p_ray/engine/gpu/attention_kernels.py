"""Attention of packed tokens on a GPU: over the prefixes that rows share, then over each row's own tokens.

Keys and values are read where they lie, by address: prefixes are never gathered or copied, and a captured pass finds
those of the next wave in the same tables (see `tables`). Log-sum-exps are base 2, of scores times log2(e). A shared
prefix is one more key of a row's own attention: its score is the log-sum-exp, its value the output (Hydragen, arXiv
2402.05099; online softmax: FlashAttention, arXiv 2205.14135).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _attend(
    asked,  # (m, BLOCK_DIM) queries
    keys,  # (num_keys, HEAD_DIM), and values
    values,
    num_keys,
    top,  # (m,) the largest score so far, (m,) the sum of weights against it, (m, BLOCK_DIM) that of weighed values
    total,
    sums,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take so many keys along, some at a time."""
    dim = tl.arange(0, BLOCK_DIM)
    in_head = dim < HEAD_DIM
    for start in range(0, num_keys, BLOCK_KEYS):
        at = start + tl.arange(0, BLOCK_KEYS)
        there = (at < num_keys)[:, None] & in_head[None, :]
        near = at[:, None] * HEAD_DIM + dim[None, :]
        key = tl.load(keys + near, mask=there, other=0.0)
        scores = tl.dot(asked, tl.trans(key), input_precision=PRECISION) * scale
        scores = tl.where((at < num_keys)[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weights, 1)
        value = tl.load(values + near, mask=there, other=0.0)
        sums = tl.dot(weights.to(asked.dtype), value, sums * fade[:, None], input_precision=PRECISION)
        top = new_top
    return top, total, sums


@triton.jit
def attend_prefixes(
    queries,  # (T, NUM_HEADS, HEAD_DIM)
    outputs,  # the same in float32, and with `lses` (T, NUM_HEADS) written for tokens that read a prefix only
    lses,
    order,  # tokens, those of one prefix together
    tile_prefixes,  # of every tile of queries: its prefix or -1, its first place in `order`, how many from there on
    tile_firsts,
    tile_counts,
    lengths,  # of prefixes
    strides,  # numbers between two heads of a prefix
    addresses,  # of its keys and values, two for each prefix
    scale,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # what every head's place is a multiple of: unknown, numbers are read one by one
    PRECISION: tl.constexpr,
):
    tile, head = tl.program_id(0), tl.program_id(1)
    prefix = tl.load(tile_prefixes + tile)
    if prefix < 0:
        return
    first, count = tl.load(tile_firsts + tile), tl.load(tile_counts + tile)
    length = tl.load(lengths + prefix).to(tl.int32)
    dtype: tl.constexpr = queries.dtype.element_ty
    before_head = tl.multiple_of(head * tl.load(strides + prefix), ALIGNMENT)
    keys = tl.multiple_of(tl.load(addresses + 2 * prefix).to(tl.pointer_type(dtype)), 16) + before_head
    values = tl.multiple_of(tl.load(addresses + 2 * prefix + 1).to(tl.pointer_type(dtype)), 16) + before_head

    # The heads that share keys are folded into the queries.
    folded = tl.arange(0, BLOCK_QUERIES)
    asks = folded < count * GROUP
    token = tl.load(order + first + folded // GROUP, mask=asks, other=0).to(tl.int64)
    row = token * NUM_HEADS + head * GROUP + folded % GROUP
    dim = tl.arange(0, BLOCK_DIM)
    in_head = dim < HEAD_DIM
    wanted = asks[:, None] & in_head[None, :]
    places = row[:, None] * HEAD_DIM + dim[None, :]
    asked = tl.load(queries + places, mask=wanted, other=0.0)

    top = tl.full([BLOCK_QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    sums = tl.zeros([BLOCK_QUERIES, BLOCK_DIM], tl.float32)
    top, total, sums = _attend(
        asked, keys, values, length, top, total, sums, scale, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS, PRECISION
    )
    tl.store(outputs + places, sums / total[:, None], mask=wanted)
    tl.store(lses + row, top + tl.log2(total), mask=asks)


@triton.jit
def attend_own(
    queries,  # (T, NUM_HEADS, HEAD_DIM)
    before,  # what `attend_prefixes` wrote
    lses,
    outputs,  # (T, NUM_HEADS, HEAD_DIM)
    token_slots,  # of every token: whose slot, or -1 for none at all, its place there, and its position in the text
    token_places,
    positions,
    addresses,  # of the slots' keys and values: (max_rows, Hkv, max_tokens, HEAD_DIM)
    num_slot_tokens,
    scale,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(token_slots + token).to(tl.int64)
    if slot < 0:
        return
    place = tl.load(token_places + token)
    dtype: tl.constexpr = queries.dtype.element_ty
    before_head = (slot * (NUM_HEADS // GROUP) + head) * tl.load(num_slot_tokens) * HEAD_DIM
    keys = tl.multiple_of(tl.load(addresses).to(tl.pointer_type(dtype)), 16) + before_head
    values = tl.multiple_of(tl.load(addresses + 1).to(tl.pointer_type(dtype)), 16) + before_head

    of_group = tl.arange(0, BLOCK_GROUP)
    row = token * NUM_HEADS + head * GROUP + of_group
    asks = of_group < GROUP
    dim = tl.arange(0, BLOCK_DIM)
    in_head = dim < HEAD_DIM
    wanted = asks[:, None] & in_head[None, :]
    places = row[:, None] * HEAD_DIM + dim[None, :]
    asked = tl.load(queries + places, mask=wanted, other=0.0)

    # What stands before a row's own tokens, if anything does: positions count from there.
    reads = tl.where(asks, tl.load(positions + token), -1) > place
    top = tl.load(lses + row, mask=reads, other=-float("inf"))
    total = tl.where(reads, 1.0, 0.0)
    sums = tl.load(before + places, mask=reads[:, None] & in_head[None, :], other=0.0)
    top, total, sums = _attend(
        asked, keys, values, place + 1, top, total, sums, scale, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS, PRECISION
    )
    tl.store(outputs + places, (sums / total[:, None]).to(dtype), mask=wanted)

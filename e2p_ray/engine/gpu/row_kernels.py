"""What a layer does between its products, as one kernel each, and the likeliest token of every row."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normalise_rows(states, weight, outputs, epsilon, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    there = at < WIDTH
    given = tl.load(states + row * WIDTH + at, mask=there, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(given * given, 0) / WIDTH + epsilon)
    # Rounded before the weight comes in, as transformers does.
    normed = (given * factor).to(outputs.dtype.element_ty) * tl.load(weight + at, mask=there, other=0.0)
    tl.store(outputs + row * WIDTH + at, normed, mask=there)


@triton.jit
def gate_rows(products, outputs, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """silu(gate) * up of rows (gate, up), each WIDTH wide."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < WIDTH
    gate = tl.load(products + row * 2 * WIDTH + at, mask=there, other=0.0).to(tl.float32)
    up = tl.load(products + row * 2 * WIDTH + WIDTH + at, mask=there, other=0.0)
    opened = (gate / (1.0 + tl.exp(-gate))).to(outputs.dtype.element_ty)
    tl.store(outputs + row * WIDTH + at, opened * up, mask=there)


@triton.jit
def turn_heads(
    heads,  # (T, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM): queries, keys, values of every token
    queries,  # (T, NUM_HEADS, HEAD_DIM), turned
    token_slots,  # of every token: the slot that its keys and values go to, or -1 for none, the place there, and its
    token_places,  # position in the text
    positions,
    addresses,  # of the slots' keys and values: (max_rows, NUM_KV_HEADS, max_tokens, HEAD_DIM)
    num_slot_tokens,
    frequencies,  # (HEAD_DIM / 2,) of the rotary embedding
    query_norm,  # (HEAD_DIM,) weights of norms of queries and keys, where the model has them
    key_norm,
    size,  # what the rotary embedding multiplies with
    epsilon,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HAS_NORMS: tl.constexpr,
):
    """Turn queries and keys by their positions; keys and values go to their places in the slots."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    half: tl.constexpr = HEAD_DIM // 2
    dim = tl.arange(0, BLOCK_HALF)
    dtype: tl.constexpr = heads.dtype.element_ty
    is_query, is_value = head < NUM_HEADS, head >= NUM_HEADS + NUM_KV_HEADS
    is_there = head < NUM_HEADS + 2 * NUM_KV_HEADS
    in_half = (dim < half)[None, :]
    source = heads + token * (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM + head[:, None] * HEAD_DIM + dim[None, :]
    given = tl.load(source, mask=is_there[:, None] & in_half, other=0.0)
    given_behind = tl.load(source + half, mask=is_there[:, None] & in_half, other=0.0)
    first, behind = given.to(tl.float32), given_behind.to(tl.float32)
    if HAS_NORMS:
        factor = 1.0 / tl.sqrt((tl.sum(first * first, 1) + tl.sum(behind * behind, 1)) / HEAD_DIM + epsilon)
        of_half = dim < half
        weight = tl.where(
            is_query[:, None],
            tl.load(query_norm + dim, mask=of_half, other=0.0)[None, :],
            tl.load(key_norm + dim, mask=of_half, other=0.0)[None, :],
        )
        weight_behind = tl.where(
            is_query[:, None],
            tl.load(query_norm + half + dim, mask=of_half, other=0.0)[None, :],
            tl.load(key_norm + half + dim, mask=of_half, other=0.0)[None, :],
        )
        first = ((first * factor[:, None]).to(dtype) * weight).to(tl.float32)
        behind = ((behind * factor[:, None]).to(dtype) * weight_behind).to(tl.float32)
    angle = tl.load(positions + token).to(tl.float32) * tl.load(frequencies + dim, mask=dim < half, other=0.0)
    cos, sin = (tl.cos(angle) * size)[None, :], (tl.sin(angle) * size)[None, :]
    turned, turned_behind = (first * cos - behind * sin).to(dtype), (behind * cos + first * sin).to(dtype)

    target = queries + token * NUM_HEADS * HEAD_DIM + head[:, None] * HEAD_DIM + dim[None, :]
    tl.store(target, turned, mask=is_query[:, None] & in_half)
    tl.store(target + half, turned_behind, mask=is_query[:, None] & in_half)

    slot = tl.load(token_slots + token).to(tl.int64)
    place = tl.load(token_places + token)
    # Of keys and of values alike; which of the two decides where they are, and whether they are turned.
    kv_head = head - NUM_HEADS - tl.where(is_value, NUM_KV_HEADS, 0)
    at = ((slot * NUM_KV_HEADS + kv_head) * tl.load(num_slot_tokens) + place)[:, None] * HEAD_DIM + dim[None, :]
    key_target = tl.multiple_of(tl.load(addresses).to(tl.pointer_type(dtype)), 16) + at
    value_target = tl.multiple_of(tl.load(addresses + 1).to(tl.pointer_type(dtype)), 16) + at
    is_kept = tl.where(is_there & (head >= NUM_HEADS), slot, -1) >= 0
    is_kept_key = (is_kept & (head < NUM_HEADS + NUM_KV_HEADS))[:, None] & in_half
    tl.store(key_target, turned, mask=is_kept_key)
    tl.store(key_target + half, turned_behind, mask=is_kept_key)
    is_kept_value = (is_kept & is_value)[:, None] & in_half
    tl.store(value_target, given, mask=is_kept_value)
    tl.store(value_target + half, given_behind, mask=is_kept_value)


@triton.jit
def find_likeliest(logits, tokens, tops, sums, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Of every row the largest logit, the first token that has it, and the sum of exp(logit - largest).

    The sum is no number where a row has NaN or +Inf, or nothing above -Inf.
    """
    row = tl.program_id(0).to(tl.int64)
    top = -float("inf")
    token = 0
    total = 0.0
    for start in range(0, WIDTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        some = tl.load(logits + row * WIDTH + at, mask=at < WIDTH, other=-float("inf")).to(tl.float32)
        largest, place = tl.max(some, return_indices=True, axis=0)
        token = tl.where(largest > top, start + place, token)
        new_top = tl.maximum(top, largest)
        # As long as nothing is above -Inf there is nothing to scale by.
        reference = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp(top - reference) + tl.sum(tl.exp(some - reference), 0)
        top = new_top
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(tops + row, top)
    tl.store(sums + row, tl.where(top == -float("inf"), float("nan"), total))

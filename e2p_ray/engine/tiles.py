"""Products of small blocks whose sums stay in registers.

A CPU with AVX-512 has 32 registers, which a tile fills: on a Zen 5 core such tiles run at 258 GF/s, where MKL's
products reach 100 and oneDNN's packed ones 235. One with AVX2 has sixteen of half the width: there a tile is made piece
by piece, of one vector of lanes and at most six rows each.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from e2p_ray.engine import llvm
from e2p_ray.engine.vectors import LINE_BYTES, VECTOR_BYTES

TILE_ROWS = 8  # with three vectors of lanes 24 of 32 registers
_NARROW_ROWS = 6  # of a piece: sums in twelve of sixteen registers


def product_tile(num_rows: int, widths: tuple[int, ...]) -> Any:
    """C (num_rows, lanes) = A (num_rows, depth) B (depth, lanes), and what C holds where it `adds`; kept in registers.

    By addresses and distances in bytes: A's rows and columns lie anyhow, rows of B and of C side by side, num_vectors
    wide, one of `widths`. `halves`, for CPUs that have it: a number of A and of B is two of bfloat16 side by side, and
    what they give is the sum of two products. With every row of B one more line from `ahead` on is fetched.
    """
    signature = types.void(*[types.int64] * 10)

    @intrinsic
    def tile(
        typing: Any,
        halves: Any,
        num_vectors: Any,
        adds: Any,
        a: Any,
        a_row: Any,
        a_column: Any,
        b: Any,
        c: Any,
        depth: Any,
        ahead: Any,
    ) -> Any:
        def build(context: Any, builder: Any, _: Any, given: Any) -> Any:
            halves, width, adds, *operands = given
            adds = builder.icmp_signed("!=", adds, llvm.integer(0))
            for num_vectors in widths:
                with builder.if_then(builder.icmp_signed("==", width, llvm.integer(num_vectors))):
                    if not llvm.has_wide_registers():
                        _narrow_tile(builder, num_rows, num_vectors, adds, operands)
                        continue
                    all_of_it = builder, range(num_rows), range(num_vectors), num_vectors * VECTOR_BYTES, adds
                    if not llvm.has_half_products():
                        _tile(*all_of_it, llvm.fma, operands)
                        continue
                    with builder.if_else(builder.icmp_signed("!=", halves, llvm.integer(0))) as (as_halves, as_floats):
                        with as_halves:
                            _tile(*all_of_it, llvm.pair_products, operands)
                        with as_floats:
                            _tile(*all_of_it, llvm.fma, operands)
            return context.get_dummy_value()

        return signature, build

    return tile


def _narrow_tile(builder: Any, num_rows: int, num_vectors: int, adds: Any, operands: Any) -> None:
    num_pieces = -(-num_rows // _NARROW_ROWS)
    each = -(-num_rows // num_pieces)
    for at in range(num_vectors):
        for row in range(0, num_rows, each):
            rows, is_first = range(row, min(row + each, num_rows)), at == row == 0
            _tile(
                builder, rows, range(at, at + 1), num_vectors * VECTOR_BYTES, adds, llvm.fma, operands, fetches=is_first
            )


def _tile(
    builder: Any,
    rows: range,
    vectors: range,
    width: int,
    adds: Any,
    multiplied: Any,
    operands: Any,
    *,
    fetches: bool = True,
) -> None:
    """These rows and vectors of a tile whose rows have so many bytes."""
    a, a_row, a_column, b, c, depth, ahead = operands
    distances = [llvm.times(builder, a_row, row) for row in rows]
    cells = [[builder.add(c, llvm.integer(row * width + VECTOR_BYTES * at)) for at in vectors] for row in rows]
    zero = llvm.constant(0.0)
    begun = [[builder.select(adds, llvm.load(builder, cell, llvm.VECTOR), zero) for cell in row] for row in cells]
    before, loop = builder.block, builder.append_basic_block("product")
    after = builder.append_basic_block("product_done")
    builder.branch(loop)
    builder.position_at_end(loop)

    def carried(kind: Any, start: Any) -> Any:
        found = builder.phi(kind)
        found.add_incoming(start, before)
        return found

    step, at_a, at_b, at_ahead = (carried(llvm.LONG, start) for start in (llvm.integer(0), a, b, ahead))
    sums = [[carried(llvm.VECTOR, start) for start in row] for row in begun]
    if fetches:
        llvm.fetch(builder, at_ahead)
    right = [llvm.load(builder, builder.add(at_b, llvm.integer(VECTOR_BYTES * at)), llvm.VECTOR) for at in vectors]
    found = []
    for row, row_sums in zip(distances, sums, strict=True):
        left = llvm.splat(builder, llvm.load(builder, builder.add(at_a, row), llvm.FLOAT))
        found.append([multiplied(builder, left, one, sum_) for one, sum_ in zip(right, row_sums, strict=True)])
    for row_sums, row_found in zip(sums, found, strict=True):
        for one, new in zip(row_sums, row_found, strict=True):
            one.add_incoming(new, loop)
    next_step = builder.add(step, llvm.integer(1))
    step.add_incoming(next_step, loop)
    at_a.add_incoming(builder.add(at_a, a_column), loop)
    at_b.add_incoming(builder.add(at_b, llvm.integer(width)), loop)
    at_ahead.add_incoming(builder.add(at_ahead, llvm.integer(LINE_BYTES)), loop)
    builder.cbranch(builder.icmp_signed("<", next_step, depth), loop, after)
    builder.position_at_end(after)
    for row_cells, row_found in zip(cells, found, strict=True):
        for cell, new in zip(row_cells, row_found, strict=True):
            llvm.store(builder, new, cell)

"""Products of small blocks whose sums stay in registers.

A CPU with AVX-512 has 32 registers, which a tile fills: on a Zen 5 core such tiles run at 258 GF/s, where MKL's
products reach 100 and oneDNN's packed ones 235. One with AVX2 has sixteen of half the width: there a tile is made piece
by piece, of one vector of lanes and at most six rows each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numba import types
from numba.extending import intrinsic

from e2p_ray.engine import llvm
from e2p_ray.engine.vectors import LINE_BYTES, VECTOR_BYTES

TILE_ROWS = 8  # with three vectors of lanes 24 of 32 registers
_NARROW_ROWS = 6  # of a piece: sums in twelve of sixteen registers


@dataclass(frozen=True)
class _Numbers:
    """What A and B hold, and how their words are multiplied; `parts`: of words of B that hold two vectors' numbers."""

    multiplied: Callable[[Any, Any, Any, Any], Any]
    parts: tuple[Callable[[Any, Any], Any], ...] = ()

    @property
    def row_bytes(self) -> int:
        """Of a vector of B."""
        return VECTOR_BYTES // max(len(self.parts), 1)

    def of_b(self, builder: Any, row: Any, at: int) -> Any:
        """A vector of lanes of a row of B."""
        if not self.parts:
            return llvm.load(builder, builder.add(row, llvm.integer(VECTOR_BYTES * at)), llvm.VECTOR)
        word, part = divmod(at, len(self.parts))
        return self.parts[part](
            builder, llvm.load(builder, builder.add(row, llvm.integer(VECTOR_BYTES * word)), llvm.VECTOR)
        )


_FLOATS = _Numbers(llvm.fma)
_PAIRS = _Numbers(llvm.pair_products)
_WIDENED = _Numbers(llvm.fma, (llvm.low_halves, llvm.high_halves))


def product_tile(num_rows: int, widths: tuple[int, ...], *, widens: bool = False) -> Any:
    """C (num_rows, lanes) = A (num_rows, depth) B (depth, lanes), and what C holds where it `adds`; kept in registers.

    By addresses and distances in bytes: A's rows and columns lie anyhow, rows of B and of C side by side, num_vectors
    wide, one of `widths`. `halves`, for CPUs that multiply them: a number of A and of B is two of bfloat16 side by
    side, and what they give is the sum of two products. For other CPUs, where the tile `widens`: a word of B is one of
    bfloat16 for each of two vectors of lanes, and A holds float32. With every row of B one more line from `ahead` on is
    fetched, at 0 none.
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
            in_halves = _in_halves(widens=widens)
            halves, width, adds, *operands = given
            adds = builder.icmp_signed("!=", adds, llvm.integer(0))
            for num_vectors in widths:
                with builder.if_then(builder.icmp_signed("==", width, llvm.integer(num_vectors))):
                    if in_halves is None:
                        _tile(builder, num_rows, num_vectors, adds, _FLOATS, operands)
                        continue
                    with builder.if_else(builder.icmp_signed("!=", halves, llvm.integer(0))) as (as_halves, as_floats):
                        with as_halves:
                            _tile(builder, num_rows, num_vectors, adds, in_halves, operands)
                        with as_floats:
                            _tile(builder, num_rows, num_vectors, adds, _FLOATS, operands)
            return context.get_dummy_value()

        return signature, build

    return tile


def _in_halves(*, widens: bool) -> _Numbers | None:
    """What this machine makes of bfloat16."""
    if llvm.has_half_products():
        return _PAIRS
    return _WIDENED if widens and not llvm.has_half_tiles() else None


def _tile(builder: Any, num_rows: int, num_vectors: int, adds: Any, numbers: _Numbers, operands: Any) -> None:
    """At once, or piece by piece."""
    if llvm.has_wide_registers():
        _piece(builder, range(num_rows), range(num_vectors), num_vectors, adds, numbers, operands)
        return
    num_pieces = -(-num_rows // _NARROW_ROWS)
    each = -(-num_rows // num_pieces)
    for at in range(num_vectors):
        for row in range(0, num_rows, each):
            rows, is_first = range(row, min(row + each, num_rows)), at == row == 0
            _piece(builder, rows, range(at, at + 1), num_vectors, adds, numbers, operands, fetches=is_first)


def _piece(
    builder: Any,
    rows: range,
    vectors: range,
    num_vectors: int,
    adds: Any,
    numbers: _Numbers,
    operands: Any,
    *,
    fetches: bool = True,
) -> None:
    """These rows and vectors of a tile that is so many vectors wide."""
    a, a_row, a_column, b, c, depth, ahead = operands
    width = num_vectors * VECTOR_BYTES
    distances = [llvm.times(builder, a_row, row) for row in rows]
    cells = [[builder.add(c, llvm.integer(row * width + VECTOR_BYTES * at)) for at in vectors] for row in rows]
    zero = llvm.constant(0.0)
    begun = [[builder.select(adds, llvm.load(builder, cell, llvm.VECTOR), zero) for cell in row] for row in cells]
    # What is in the first-level cache costs least to fetch: lines of the second-level one, to which fetching brings
    # them, are moved up for nothing (a Zen 3 core, 64 rows of 512 x 1536: 0.70 to 0.88 of its rate, then 0.89 to 0.91).
    is_nothing = builder.icmp_signed("==", ahead, llvm.integer(0))
    line = builder.select(is_nothing, llvm.integer(0), llvm.integer(LINE_BYTES))
    ahead = builder.select(is_nothing, c, ahead)
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
    right = [numbers.of_b(builder, at_b, at) for at in vectors]
    found = []
    for row, row_sums in zip(distances, sums, strict=True):
        left = llvm.splat(builder, llvm.load(builder, builder.add(at_a, row), llvm.FLOAT))
        found.append([numbers.multiplied(builder, left, one, sum_) for one, sum_ in zip(right, row_sums, strict=True)])
    for row_sums, row_found in zip(sums, found, strict=True):
        for one, new in zip(row_sums, row_found, strict=True):
            one.add_incoming(new, loop)
    next_step = builder.add(step, llvm.integer(1))
    step.add_incoming(next_step, loop)
    at_a.add_incoming(builder.add(at_a, a_column), loop)
    at_b.add_incoming(builder.add(at_b, llvm.integer(num_vectors * numbers.row_bytes)), loop)
    at_ahead.add_incoming(builder.add(at_ahead, line), loop)
    builder.cbranch(builder.icmp_signed("<", next_step, depth), loop, after)
    builder.position_at_end(after)
    for row_cells, row_found in zip(cells, found, strict=True):
        for cell, new in zip(row_cells, row_found, strict=True):
            llvm.store(builder, new, cell)

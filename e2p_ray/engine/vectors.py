"""Vectors of sixteen float32 in numba's functions, by address: what LLVM does not find in loops by itself.

For CPUs with AVX-512, whose 32 registers the product tiles fill: on a Zen 5 core such tiles run at 258 GF/s, where
MKL's products reach 100 and oneDNN's packed ones 235.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from e2p_ray.engine.compiled import LANES

VECTOR_BYTES = 4 * LANES
LINE_BYTES = 64  # of the caches: what `fetch` brings
TILE_ROWS = 8  # with three vectors of lanes 24 of 32 registers

# exp(x) is 2^n exp(r) with Cephes' polynomial for exp(r): within two units in the last place.
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_ROUND = 12582912.0  # 1.5 * 2^23: a sum with it has no fraction, and its last bits are the integer
_LEAST = -87.0  # exp of less is 0
_MOST = 80.0  # silu of less than -80 is of -80's size, 1.4e-33

_FLOAT, _SHORT, _INT, _BYTES = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_VECTOR, _INTS, _SHORTS = (ir.VectorType(kind, LANES) for kind in (_FLOAT, _INT, _SHORT))


@cache
def has_wide_registers() -> bool:
    """Whether this machine has what this is written for."""
    return bool(binding.get_host_cpu_features().get("avx512f", False))


@cache
def has_half_products() -> bool:
    """Whether it multiplies vectors of bfloat16, and has no unit for tiles of them, with which libraries are faster."""
    return _has_half_conversion() and not binding.get_host_cpu_features().get("amx-bf16", False)


def _has_half_conversion() -> bool:
    """Whether it rounds vectors of float32 to bfloat16 itself."""
    return bool(binding.get_host_cpu_features().get("avx512bf16", False))


class _Half(ir.types.Type):
    """LLVM's bfloat, which llvmlite does not know."""

    null = "0.0"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Half)

    def __hash__(self) -> int:
        return hash(_Half)


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name="FloatVector16")


_vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, frontend_type: Any) -> None:
        super().__init__(manager, frontend_type, _VECTOR)


# -- memory ----------------------------------------------------------------------------------------------------------


@intrinsic
def load(typing: Any, address: Any) -> Any:
    """Sixteen float32 from an address."""
    return _vector(types.int64), lambda context, builder, signature, given: _load(builder, given[0], _VECTOR)


@intrinsic
def store(typing: Any, value: Any, address: Any) -> Any:
    """Sixteen float32 to an address."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        _store(builder, given[0], given[1])
        return context.get_dummy_value()

    return types.void(_vector, types.int64), build


@intrinsic
def load_bfloat16(typing: Any, address: Any) -> Any:
    """Sixteen bfloat16 from an address, as float32."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        halves = _load(builder, given[0], _SHORTS, align=2)
        return builder.bitcast(builder.shl(builder.zext(halves, _INTS), _constant(16, _INTS)), _VECTOR)

    return _vector(types.int64), build


@intrinsic
def store_bfloat16(typing: Any, value: Any, address: Any) -> Any:
    """Sixteen float32 to an address as bfloat16, rounded to the nearest, of two to the even one."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        value, address = given
        _store(builder, _rounded(builder, value), address, align=2)
        return context.get_dummy_value()

    return types.void(_vector, types.int64), build


@intrinsic
def store_pairs(typing: Any, first: Any, second: Any, address: Any) -> Any:
    """Twice sixteen float32 to an address as bfloat16, one of each in turns."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        first, second, address = given
        rounded = _rounded(builder, first), _rounded(builder, second)
        in_turns = [place for at in range(LANES) for place in (at, LANES + at)]
        _store(builder, _shuffled(builder, *rounded, in_turns), address)
        return context.get_dummy_value()

    return types.void(_vector, _vector, types.int64), build


@intrinsic
def load_float(typing: Any, address: Any) -> Any:
    """One float32 from an address."""
    return types.float32(types.int64), lambda context, builder, signature, given: _load(builder, given[0], _FLOAT)


@intrinsic
def load_one_bfloat16(typing: Any, address: Any) -> Any:
    """One bfloat16 from an address, as float32."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        half = builder.zext(_load(builder, given[0], _SHORT, align=2), _INT)
        return builder.bitcast(builder.shl(half, ir.Constant(_INT, 16)), _FLOAT)

    return types.float32(types.int64), build


@intrinsic
def store_float(typing: Any, value: Any, address: Any) -> Any:
    """One float32 to an address."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        _store(builder, given[0], given[1])
        return context.get_dummy_value()

    return types.void(types.float32, types.int64), build


@intrinsic
def load_int(typing: Any, address: Any) -> Any:
    """One int64 from an address."""
    return types.int64(types.int64), lambda context, builder, signature, given: _load(builder, given[0], _BYTES, 8)


@intrinsic
def store_int(typing: Any, value: Any, address: Any) -> Any:
    """One int64 to an address."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        _store(builder, given[0], given[1], 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@intrinsic
def fetch(typing: Any, address: Any) -> Any:
    """Have a line of memory brought to the second-level cache, for later; any address will do."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        _fetch(builder, given[0])
        return context.get_dummy_value()

    return types.void(types.int64), build


@intrinsic
def fetch_and_add(typing: Any, address: Any) -> Any:
    """Add one to the int64 at an address, whoever else does; what it was."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        pointer = builder.inttoptr(given[0], _BYTES.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(_BYTES, 1), "seq_cst")

    return types.int64(types.int64), build


# -- arithmetic ------------------------------------------------------------------------------------------------------


@intrinsic
def splat(typing: Any, value: Any) -> Any:
    """The same in all lanes."""
    return _vector(types.float32), lambda context, builder, signature, given: _splat(builder, given[0])


def _lane_by_lane(instruction: str) -> Any:
    """An operation of two vectors, by the name of LLVM's."""

    @intrinsic
    def operation(typing: Any, one: Any, other: Any) -> Any:
        signature = _vector(_vector, _vector)
        return signature, lambda context, builder, _, given: getattr(builder, instruction)(*given)

    return operation


add, subtract, multiply, divide = map(_lane_by_lane, ("fadd", "fsub", "fmul", "fdiv"))


@intrinsic
def multiply_add(typing: Any, one: Any, other: Any, added: Any) -> Any:
    """one * other + added, rounded once."""
    return _vector(_vector, _vector, _vector), lambda context, builder, signature, given: _fma(builder, *given)


@intrinsic
def maximum(typing: Any, one: Any, other: Any) -> Any:
    """Lane by lane; the first where it is not a number."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        one, other = given
        return builder.select(builder.fcmp_ordered("<", one, other), other, one)

    return _vector(_vector, _vector), build


@intrinsic
def or_minus_infinity(typing: Any, value: Any, limits: Any, limit: Any) -> Any:
    """The value in lanes whose limit is greater than this one, -inf in others."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        value, limits, limit = given
        seen = builder.fcmp_ordered(">", limits, _splat(builder, limit))
        return builder.select(seen, value, _constant(float("-inf")))

    return _vector(_vector, _vector, types.float32), build


@intrinsic
def exp(typing: Any, value: Any) -> Any:
    """Lane by lane, for what is at most 80."""

    return _vector(_vector), lambda context, builder, signature, given: _exp(builder, given[0])


@intrinsic
def silu(typing: Any, value: Any) -> Any:
    """x / (1 + exp(-x)), lane by lane."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        (x,) = given
        is_within = builder.fcmp_ordered(">", x, _constant(-_MOST))
        small = _exp(builder, builder.select(is_within, builder.fneg(x), _constant(_MOST)))
        return builder.fdiv(x, builder.fadd(small, _constant(1.0)))

    return _vector(_vector), build


@intrinsic
def rotate(typing: Any, pairs: Any, turns: Any) -> Any:
    """Eight complex numbers times eight others: real and imaginary parts in turns."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        pairs, turns = given
        real = _shuffled(builder, turns, turns, [at & ~1 for at in range(LANES)])
        imaginary = _shuffled(builder, turns, turns, [at | 1 for at in range(LANES)])
        crossed = builder.fmul(_shuffled(builder, pairs, pairs, [at ^ 1 for at in range(LANES)]), imaginary)
        signs = ir.Constant(_VECTOR, [-1.0, 1.0] * (LANES // 2))
        return _fma(builder, pairs, real, builder.fmul(crossed, signs))

    return _vector(_vector, _vector), build


@intrinsic
def total(typing: Any, value: Any) -> Any:
    """The sum of all lanes."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        (found,) = given
        for distance in (8, 4, 2, 1):
            found = builder.fadd(found, _shuffled(builder, found, found, [(at ^ distance) for at in range(LANES)]))
        return builder.extract_element(found, ir.Constant(_INT, 0))

    return types.float32(_vector), build


@intrinsic
def largest(typing: Any, value: Any) -> Any:
    """The largest of all lanes."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        (found,) = given
        for distance in (8, 4, 2, 1):
            other = _shuffled(builder, found, found, [(at ^ distance) for at in range(LANES)])
            found = builder.select(builder.fcmp_ordered("<", found, other), other, found)
        return builder.extract_element(found, ir.Constant(_INT, 0))

    return types.float32(_vector), build


# -- blocks ----------------------------------------------------------------------------------------------------------


def product_tile(num_rows: int, widths: tuple[int, ...], *, accumulate: bool) -> Any:
    """C (num_rows, lanes) = A (num_rows, depth) B (depth, lanes), or added to what C holds; kept in registers.

    By addresses and distances in bytes: A's rows and columns lie anyhow, rows of B and of C side by side, num_vectors
    wide, one of `widths`. `halves`, for CPUs that have it: a number of A and of B is two of bfloat16 side by side, and
    what they give is the sum of two products. With every row of B one more line from `ahead` on is fetched.
    """
    signature = types.void(*[types.int64] * 9)

    @intrinsic
    def tile(
        typing: Any,
        halves: Any,
        num_vectors: Any,
        a: Any,
        a_row: Any,
        a_column: Any,
        b: Any,
        c: Any,
        depth: Any,
        ahead: Any,
    ) -> Any:
        def build(context: Any, builder: Any, _: Any, given: Any) -> Any:
            halves, width, *operands = given
            for num_vectors in widths:
                with builder.if_then(builder.icmp_signed("==", width, _bytes(num_vectors))):
                    if not has_half_products():
                        _tile(builder, num_rows, num_vectors, accumulate, _fma, operands)
                        continue
                    with builder.if_else(builder.icmp_signed("!=", halves, _bytes(0))) as (as_halves, as_floats):
                        with as_halves:
                            _tile(builder, num_rows, num_vectors, accumulate, _pair_products, operands)
                        with as_floats:
                            _tile(builder, num_rows, num_vectors, accumulate, _fma, operands)
            return context.get_dummy_value()

        return signature, build

    return tile


def _tile(builder: Any, num_rows: int, num_vectors: int, accumulate: bool, multiplied: Any, operands: Any) -> None:
    a, a_row, a_column, b, c, depth, ahead = operands
    width, vectors = num_vectors * VECTOR_BYTES, range(num_vectors)
    rows = [_times(builder, a_row, row) for row in range(num_rows)]
    cells = [[builder.add(c, _bytes(row * width + VECTOR_BYTES * at)) for at in vectors] for row in range(num_rows)]
    zero = _constant(0.0)
    begun = [[_load(builder, cell, _VECTOR) if accumulate else zero for cell in row] for row in cells]
    before, loop = builder.block, builder.append_basic_block("product")
    after = builder.append_basic_block("product_done")
    builder.branch(loop)
    builder.position_at_end(loop)

    def carried(kind: Any, start: Any) -> Any:
        found = builder.phi(kind)
        found.add_incoming(start, before)
        return found

    step, at_a, at_b, at_ahead = (carried(_BYTES, start) for start in (_bytes(0), a, b, ahead))
    sums = [[carried(_VECTOR, start) for start in row] for row in begun]
    _fetch(builder, at_ahead)
    right = [_load(builder, builder.add(at_b, _bytes(VECTOR_BYTES * at)), _VECTOR) for at in vectors]
    found = []
    for row, row_sums in zip(rows, sums, strict=True):
        left = _splat(builder, _load(builder, builder.add(at_a, row), _FLOAT))
        found.append([multiplied(builder, left, one, sum_) for one, sum_ in zip(right, row_sums, strict=True)])
    for row_sums, row_found in zip(sums, found, strict=True):
        for one, new in zip(row_sums, row_found, strict=True):
            one.add_incoming(new, loop)
    next_step = builder.add(step, _bytes(1))
    step.add_incoming(next_step, loop)
    at_a.add_incoming(builder.add(at_a, a_column), loop)
    at_b.add_incoming(builder.add(at_b, _bytes(width)), loop)
    at_ahead.add_incoming(builder.add(at_ahead, _bytes(LINE_BYTES)), loop)
    builder.cbranch(builder.icmp_signed("<", next_step, depth), loop, after)
    builder.position_at_end(after)
    for row_cells, row_found in zip(cells, found, strict=True):
        for cell, new in zip(row_cells, row_found, strict=True):
            _store(builder, new, cell)


@intrinsic
def gather_transposed(typing: Any, addresses: Any, offset: Any, target: Any, target_row: Any, scale: Any) -> Any:
    """Sixteen numbers from each of sixteen addresses, `offset` behind each, scaled, as sixteen rows of lanes."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        addresses, offset, target, target_row, scale = given
        factor = _splat(builder, scale)
        rows = [
            _load(builder, builder.add(_address(builder, addresses, lane), offset), _VECTOR) for lane in range(LANES)
        ]
        for at, row in enumerate(_transposed(builder, rows)):
            _store(builder, builder.fmul(row, factor), builder.add(target, _times(builder, target_row, at)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, types.float32), build


@intrinsic
def scatter_transposed(typing: Any, source: Any, source_row: Any, addresses: Any, offset: Any, factor: Any) -> Any:
    """The other way: sixteen rows of lanes, each lane with its factor, to `offset` behind each of sixteen addresses."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        source, source_row, addresses, offset, factor = given
        rows = []
        for at in range(LANES):
            row = _load(builder, builder.add(source, _times(builder, source_row, at)), _VECTOR)
            rows.append(builder.fmul(row, factor))
        for lane, row in enumerate(_transposed(builder, rows)):
            _store(builder, row, builder.add(_address(builder, addresses, lane), offset))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, _vector), build


@intrinsic
def call_address(typing: Any, address: Any) -> Any:
    """Call the C function without arguments or result at an address."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(builder.inttoptr(given[0], kind.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), build


# -- LLVM's instructions ---------------------------------------------------------------------------------------------


def _load(builder: Any, address: Any, kind: Any, align: int = 4) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align, typ=kind)


def _store(builder: Any, value: Any, address: Any, align: int = 4) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=align)


def _fetch(builder: Any, address: Any) -> None:
    pointer = _SHORT.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, *[_INT] * 3])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    to_read, second_level, data = (ir.Constant(_INT, number) for number in (0, 2, 1))
    builder.call(function, [builder.inttoptr(address, pointer), to_read, second_level, data])


def _address(builder: Any, addresses: Any, at: int) -> Any:
    return _load(builder, builder.add(addresses, _bytes(8 * at)), _BYTES, 8)


def _bytes(number: int) -> Any:
    return ir.Constant(_BYTES, number)


def _times(builder: Any, distance: Any, number: int) -> Any:
    return builder.mul(distance, _bytes(number))


def _constant(value: float, kind: Any = _VECTOR) -> Any:
    return ir.Constant(kind, [value] * LANES)


def _rounded(builder: Any, value: Any) -> Any:
    """Bits of float32 as bfloat16, rounded to the nearest, of two to the even one."""
    if _has_half_conversion():  # numbers below 1.2e-38 become 0
        halves = ir.VectorType(_Half(), LANES)
        kind = ir.FunctionType(halves, [_VECTOR])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.cvtneps2bf16.512")
        return builder.bitcast(builder.call(function, [value]), _SHORTS)
    bits, sixteen = builder.bitcast(value, _INTS), _constant(16, _INTS)
    odd = builder.and_(builder.lshr(bits, sixteen), _constant(1, _INTS))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, _constant(0x7FFF, _INTS))), sixteen)
    not_a_number = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(not_a_number, _constant(0x7FC0, _INTS), rounded), _SHORTS)


def _shuffled(builder: Any, one: Any, other: Any, places: list[int]) -> Any:
    return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(_INT, len(places)), places))


def _splat(builder: Any, value: Any) -> Any:
    nothing = ir.Constant(_VECTOR, ir.Undefined)
    return _shuffled(builder, builder.insert_element(nothing, value, ir.Constant(_INT, 0)), nothing, [0] * LANES)


def _fma(builder: Any, one: Any, other: Any, added: Any) -> Any:
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    return builder.call(
        cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32"), [one, other, added]
    )


def _pair_products(builder: Any, one: Any, other: Any, added: Any) -> Any:
    halves = ir.VectorType(_Half(), 2 * LANES)
    kind = ir.FunctionType(_VECTOR, [_VECTOR, halves, halves])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
    return builder.call(function, [added, builder.bitcast(one, halves), builder.bitcast(other, halves)])


def _exp(builder: Any, x: Any) -> Any:
    shifted = _fma(builder, x, _constant(_LOG2_E), _constant(_ROUND))
    n = builder.fsub(shifted, _constant(_ROUND))
    r = _fma(builder, n, _constant(-_LN2_LOW), _fma(builder, n, _constant(-_LN2_HIGH), x))
    found = _constant(_POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        found = _fma(builder, found, r, _constant(coefficient))
    found = builder.fadd(_fma(builder, found, builder.fmul(r, r), r), _constant(1.0))
    exponent = builder.shl(builder.bitcast(shifted, _INTS), _constant(23, _INTS))
    found = builder.bitcast(builder.add(builder.bitcast(found, _INTS), exponent), _VECTOR)
    return builder.select(builder.fcmp_ordered("<", x, _constant(_LEAST)), _constant(0.0), found)


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Sixteen vectors with rows and columns exchanged: four perfect shuffles of the rows with those half-way on."""
    half = LANES // 2
    first = [place for at in range(half) for place in (at, LANES + at)]
    second = [place + half for place in first]
    for _ in range(LANES.bit_length() - 1):
        pairs = zip(rows[:half], rows[half:], strict=True)
        rows = [_shuffled(builder, *pair, places) for pair in pairs for places in (first, second)]
    return rows

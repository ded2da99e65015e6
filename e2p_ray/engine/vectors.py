"""Vectors of sixteen float32 in numba's functions, by address: what LLVM does not find in loops by itself."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from e2p_ray.engine import llvm
from e2p_ray.engine.compiled import LANES

VECTOR_BYTES = 4 * LANES
LINE_BYTES = 64  # of the caches: what `fetch` brings

# exp(x) is 2^n exp(r) with Cephes' polynomial for exp(r): within two units in the last place.
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_ROUND = 12582912.0  # 1.5 * 2^23: a sum with it has no fraction, and its last bits are the integer
_LEAST = -87.0  # exp of less is 0
_MOST = 80.0  # silu of less than -80 is of -80's size, 1.4e-33


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name="FloatVector16")


_vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, frontend_type: Any) -> None:
        super().__init__(manager, frontend_type, llvm.VECTOR)


# -- memory ----------------------------------------------------------------------------------------------------------


@intrinsic
def load(typing: Any, address: Any) -> Any:
    """Sixteen float32 from an address."""
    return _vector(types.int64), lambda context, builder, signature, given: llvm.load(builder, given[0], llvm.VECTOR)


@intrinsic
def store(typing: Any, value: Any, address: Any) -> Any:
    """Sixteen float32 to an address."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        llvm.store(builder, given[0], given[1])
        return context.get_dummy_value()

    return types.void(_vector, types.int64), build


@intrinsic
def load_bfloat16(typing: Any, address: Any) -> Any:
    """Sixteen bfloat16 from an address, as float32."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        halves = llvm.load(builder, given[0], llvm.SHORTS, align=2)
        return builder.bitcast(builder.shl(builder.zext(halves, llvm.INTS), llvm.constant(16, llvm.INTS)), llvm.VECTOR)

    return _vector(types.int64), build


@intrinsic
def store_bfloat16(typing: Any, value: Any, address: Any) -> Any:
    """Sixteen float32 to an address as bfloat16, rounded to the nearest, of two to the even one."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        value, address = given
        llvm.store(builder, llvm.rounded(builder, value), address, align=2)
        return context.get_dummy_value()

    return types.void(_vector, types.int64), build


@intrinsic
def store_pairs(typing: Any, first: Any, second: Any, address: Any) -> Any:
    """Twice sixteen float32 to an address as bfloat16, one of each in turns."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        first, second, address = given
        rounded = llvm.rounded(builder, first), llvm.rounded(builder, second)
        in_turns = [place for at in range(LANES) for place in (at, LANES + at)]
        llvm.store(builder, llvm.shuffled(builder, *rounded, in_turns), address)
        return context.get_dummy_value()

    return types.void(_vector, _vector, types.int64), build


@intrinsic
def load_float(typing: Any, address: Any) -> Any:
    """One float32 from an address."""
    return types.float32(types.int64), lambda context, builder, signature, given: llvm.load(
        builder, given[0], llvm.FLOAT
    )


@intrinsic
def load_one_bfloat16(typing: Any, address: Any) -> Any:
    """One bfloat16 from an address, as float32."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        half = builder.zext(llvm.load(builder, given[0], llvm.SHORT, align=2), llvm.INT)
        return builder.bitcast(builder.shl(half, ir.Constant(llvm.INT, 16)), llvm.FLOAT)

    return types.float32(types.int64), build


@intrinsic
def store_float(typing: Any, value: Any, address: Any) -> Any:
    """One float32 to an address."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        llvm.store(builder, given[0], given[1])
        return context.get_dummy_value()

    return types.void(types.float32, types.int64), build


@intrinsic
def load_int(typing: Any, address: Any) -> Any:
    """One int64 from an address."""
    return types.int64(types.int64), lambda context, builder, signature, given: llvm.load(
        builder, given[0], llvm.LONG, 8
    )


@intrinsic
def load_double(typing: Any, address: Any) -> Any:
    """One float64 from an address."""
    return types.float64(types.int64), lambda context, builder, signature, given: llvm.load(
        builder, given[0], llvm.DOUBLE, 8
    )


@intrinsic
def store_int(typing: Any, value: Any, address: Any) -> Any:
    """One int64 to an address."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        llvm.store(builder, given[0], given[1], 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@intrinsic
def fetch(typing: Any, address: Any) -> Any:
    """Have a line of memory brought to the second-level cache, for later; any address will do."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        llvm.fetch(builder, given[0])
        return context.get_dummy_value()

    return types.void(types.int64), build


@intrinsic
def fetch_and_add(typing: Any, address: Any) -> Any:
    """Add one to the int64 at an address, whoever else does; what it was."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        pointer = builder.inttoptr(given[0], llvm.LONG.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(llvm.LONG, 1), "seq_cst")

    return types.int64(types.int64), build


# -- arithmetic ------------------------------------------------------------------------------------------------------


@intrinsic
def splat(typing: Any, value: Any) -> Any:
    """The same in all lanes."""
    return _vector(types.float32), lambda context, builder, signature, given: llvm.splat(builder, given[0])


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
    return _vector(_vector, _vector, _vector), lambda context, builder, signature, given: llvm.fma(builder, *given)


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
        seen = builder.fcmp_ordered(">", limits, llvm.splat(builder, limit))
        return builder.select(seen, value, llvm.constant(float("-inf")))

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
        is_within = builder.fcmp_ordered(">", x, llvm.constant(-_MOST))
        small = _exp(builder, builder.select(is_within, builder.fneg(x), llvm.constant(_MOST)))
        return builder.fdiv(x, builder.fadd(small, llvm.constant(1.0)))

    return _vector(_vector), build


@intrinsic
def rotate(typing: Any, pairs: Any, turns: Any) -> Any:
    """Eight complex numbers times eight others: real and imaginary parts in turns."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        pairs, turns = given
        real = llvm.shuffled(builder, turns, turns, [at & ~1 for at in range(LANES)])
        imaginary = llvm.shuffled(builder, turns, turns, [at | 1 for at in range(LANES)])
        crossed = builder.fmul(llvm.shuffled(builder, pairs, pairs, [at ^ 1 for at in range(LANES)]), imaginary)
        signs = ir.Constant(llvm.VECTOR, [-1.0, 1.0] * (LANES // 2))
        return llvm.fma(builder, pairs, real, builder.fmul(crossed, signs))

    return _vector(_vector, _vector), build


@intrinsic
def total(typing: Any, value: Any) -> Any:
    """The sum of all lanes."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        (found,) = given
        for distance in (8, 4, 2, 1):
            found = builder.fadd(found, llvm.shuffled(builder, found, found, [(at ^ distance) for at in range(LANES)]))
        return builder.extract_element(found, ir.Constant(llvm.INT, 0))

    return types.float32(_vector), build


@intrinsic
def largest(typing: Any, value: Any) -> Any:
    """The largest of all lanes."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        (found,) = given
        for distance in (8, 4, 2, 1):
            other = llvm.shuffled(builder, found, found, [(at ^ distance) for at in range(LANES)])
            found = builder.select(builder.fcmp_ordered("<", found, other), other, found)
        return builder.extract_element(found, ir.Constant(llvm.INT, 0))

    return types.float32(_vector), build


def _exp(builder: Any, x: Any) -> Any:
    shifted = llvm.fma(builder, x, llvm.constant(_LOG2_E), llvm.constant(_ROUND))
    n = builder.fsub(shifted, llvm.constant(_ROUND))
    r = llvm.fma(builder, n, llvm.constant(-_LN2_LOW), llvm.fma(builder, n, llvm.constant(-_LN2_HIGH), x))
    found = llvm.constant(_POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        found = llvm.fma(builder, found, r, llvm.constant(coefficient))
    found = builder.fadd(llvm.fma(builder, found, builder.fmul(r, r), r), llvm.constant(1.0))
    exponent = builder.shl(builder.bitcast(shifted, llvm.INTS), llvm.constant(23, llvm.INTS))
    found = builder.bitcast(builder.add(builder.bitcast(found, llvm.INTS), exponent), llvm.VECTOR)
    return builder.select(builder.fcmp_ordered("<", x, llvm.constant(_LEAST)), llvm.constant(0.0), found)


# -- blocks ----------------------------------------------------------------------------------------------------------


@intrinsic
def gather_transposed(typing: Any, addresses: Any, offset: Any, target: Any, target_row: Any, scale: Any) -> Any:
    """Sixteen numbers from each of sixteen addresses, `offset` behind each, scaled, as sixteen rows of lanes."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        addresses, offset, target, target_row, scale = given
        factor = llvm.splat(builder, scale)
        rows = [
            llvm.load(builder, builder.add(llvm.load_address(builder, addresses, lane), offset), llvm.VECTOR)
            for lane in range(LANES)
        ]
        for at, row in enumerate(llvm.transposed(builder, rows)):
            llvm.store(builder, builder.fmul(row, factor), builder.add(target, llvm.times(builder, target_row, at)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, types.float32), build


@intrinsic
def scatter_transposed(typing: Any, source: Any, source_row: Any, addresses: Any, offset: Any, factor: Any) -> Any:
    """The other way: sixteen rows of lanes, each lane with its factor, to `offset` behind each of sixteen addresses."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        source, source_row, addresses, offset, factor = given
        rows = []
        for at in range(LANES):
            row = llvm.load(builder, builder.add(source, llvm.times(builder, source_row, at)), llvm.VECTOR)
            rows.append(builder.fmul(row, factor))
        for lane, row in enumerate(llvm.transposed(builder, rows)):
            llvm.store(builder, row, builder.add(llvm.load_address(builder, addresses, lane), offset))
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

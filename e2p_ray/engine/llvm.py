"""LLVM's instructions, as numba's intrinsics write them: of sixteen float32 at once, and by address."""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils

from e2p_ray.engine.compiled import LANES

FLOAT, DOUBLE = ir.FloatType(), ir.DoubleType()
SHORT, INT, LONG = ir.IntType(16), ir.IntType(32), ir.IntType(64)
VECTOR, INTS, SHORTS = (ir.VectorType(kind, LANES) for kind in (FLOAT, INT, SHORT))


@cache
def has_wide_registers() -> bool:
    """Whether this machine has vectors of sixteen float32, and 32 registers for them."""
    return bool(binding.get_host_cpu_features().get("avx512f", False))


@cache
def has_vectors() -> bool:
    """Whether it has vectors at least half as wide that it multiplies and adds at once."""
    features = binding.get_host_cpu_features()
    return has_wide_registers() or bool(features.get("avx2", False) and features.get("fma", False))


@cache
def has_half_tiles() -> bool:
    """Whether it has a unit for tiles of bfloat16, with which libraries are faster than loops."""
    return bool(binding.get_host_cpu_features().get("amx-bf16", False))


@cache
def has_half_products() -> bool:
    """Whether it multiplies vectors of bfloat16, and has no unit for tiles of them."""
    return has_half_conversion() and not has_half_tiles()


@cache
def has_half_conversion() -> bool:
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


def load(builder: Any, address: Any, kind: Any, align: int = 4) -> Any:
    """What lies at an address, as this kind."""
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align, typ=kind)


def store(builder: Any, value: Any, address: Any, align: int = 4) -> None:
    """A value to an address."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=align)


def fetch(builder: Any, address: Any) -> None:
    """Have a line of memory brought to the second-level cache."""
    pointer = SHORT.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, *[INT] * 3])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    to_read, second_level, data = (ir.Constant(INT, number) for number in (0, 2, 1))
    builder.call(function, [builder.inttoptr(address, pointer), to_read, second_level, data])


def load_address(builder: Any, addresses: Any, at: int) -> Any:
    """One of the addresses that lie side by side."""
    return load(builder, builder.add(addresses, integer(8 * at)), LONG, 8)


def integer(number: int) -> Any:
    """A constant that can be added to an address."""
    return ir.Constant(LONG, number)


def times(builder: Any, distance: Any, number: int) -> Any:
    """So many times a distance."""
    return builder.mul(distance, integer(number))


def constant(value: float, kind: Any = VECTOR) -> Any:
    """The same constant in all lanes."""
    return ir.Constant(kind, [value] * LANES)


def rounded(builder: Any, value: Any) -> Any:
    """Bits of float32 as bfloat16, rounded to the nearest, of two to the even one."""
    if has_half_conversion():  # numbers below 1.2e-38 become 0
        halves = ir.VectorType(_Half(), LANES)
        kind = ir.FunctionType(halves, [VECTOR])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.cvtneps2bf16.512")
        return builder.bitcast(builder.call(function, [value]), SHORTS)
    bits, sixteen = builder.bitcast(value, INTS), constant(16, INTS)
    odd = builder.and_(builder.lshr(bits, sixteen), constant(1, INTS))
    nearest = builder.lshr(builder.add(bits, builder.add(odd, constant(0x7FFF, INTS))), sixteen)
    not_a_number = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(not_a_number, constant(0x7FC0, INTS), nearest), SHORTS)


def shuffled(builder: Any, one: Any, other: Any, places: list[int]) -> Any:
    """Lanes of two vectors by their places, the second vector's behind the first's."""
    return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(INT, len(places)), places))


def splat(builder: Any, value: Any) -> Any:
    """The same in all lanes."""
    nothing = ir.Constant(VECTOR, ir.Undefined)
    return shuffled(builder, builder.insert_element(nothing, value, ir.Constant(INT, 0)), nothing, [0] * LANES)


def fma(builder: Any, one: Any, other: Any, added: Any) -> Any:
    """one * other + added, rounded once."""
    kind = ir.FunctionType(VECTOR, [VECTOR] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
    return builder.call(function, [one, other, added])


def pair_products(builder: Any, one: Any, other: Any, added: Any) -> Any:
    """`added` and, lane by lane, both products of two pairs of bfloat16."""
    halves = ir.VectorType(_Half(), 2 * LANES)
    kind = ir.FunctionType(VECTOR, [VECTOR, halves, halves])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
    return builder.call(function, [added, builder.bitcast(one, halves), builder.bitcast(other, halves)])


def low_halves(builder: Any, words: Any) -> Any:
    """The lower bfloat16 of every word, as float32."""
    bits = builder.shl(builder.bitcast(words, INTS), constant(16, INTS))
    return builder.bitcast(bits, VECTOR)


def high_halves(builder: Any, words: Any) -> Any:
    """The upper one."""
    bits = builder.and_(builder.bitcast(words, INTS), constant(-1 << 16, INTS))
    return builder.bitcast(bits, VECTOR)


def transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Sixteen vectors with rows and columns exchanged: four perfect shuffles of the rows with those half-way on."""
    half = LANES // 2
    first = [place for at in range(half) for place in (at, LANES + at)]
    second = [place + half for place in first]
    for _ in range(LANES.bit_length() - 1):
        pairs = zip(rows[:half], rows[half:], strict=True)
        rows = [shuffled(builder, *pair, places) for pair in pairs for places in (first, second)]
    return rows

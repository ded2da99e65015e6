"""Products of rows with frozen weights on a CPU as compiled loops of our own.

Weights (out, in) lie in panels of 64 outputs: for each input 64 numbers side by side. A panel is multiplied with six
rows at a time in registers, and what follows the product (bias, activation, gate, residual) is done while it is in the
first-level cache, and while the panel that comes next is on its way. The layers of a Llama of 512 on a Zen 5 core run
at 0.96 of what the tile alone makes for 512 rows (0.94 in bfloat16) and at 0.89 for 64; without fetching at 0.91, 0.88
and 0.78, oneDNN's packed products with its post-operations 6 to 12 % below that (tests/bench/LOG.md, 2026-11-23). In
bfloat16 two inputs take the place of one, on CPUs that multiply it; others make float32 of weights that they have read,
and are given states in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from e2p_ray.engine.compiled import LANES
from e2p_ray.engine.either import load_either, store_either
from e2p_ray.engine.llvm import has_half_products, has_wide_registers
from e2p_ray.engine.loop import loop
from e2p_ray.engine.panels import Behind
from e2p_ray.engine.tiles import product_tile
from e2p_ray.engine.vectors import (
    LINE_BYTES,
    VECTOR_BYTES,
    add,
    fetch,
    fetch_and_add,
    load,
    load_float,
    multiply,
    silu,
    store_float,
)

_Ints = npt.NDArray[np.int64]

_PANEL_VECTORS, _TILE_ROWS = 4, 6  # 24 of 32 registers
_FEW_ROWS = 4  # of a tile for the last ones; one of fewer would wait for the panel
PANEL = LANES * _PANEL_VECTORS
_PANEL_BYTES = _PANEL_VECTORS * VECTOR_BYTES
# A task: rows and panels. With AVX-512 rows whose products with a panel fill half of the first-level cache (96 or 192
# are level); without, where four panels fill the second-level one, twice as many, so that panels come half as often (a
# Zen 3 core, 512 rows of 512 to 3,072 outputs: 86 GF/s with 96, 90 with 192, 84 to 88 with 288).
TASK_ROWS = 96 if has_wide_registers() else 192
TASK_PANELS = 4
_ROWS_AHEAD = 8  # whose outputs are fetched: they lie too far apart for the CPU to see a row in them
# Of a panel's words at once: more would not stay in the second-level cache, which has 1 MB or more with AVX-512 and is
# half as large in many CPUs without (a Zen 3 core, 512 rows of 4,096 inputs: 68 GF/s with 2,048, 83 with 1,024).
_DEPTH = 2048 if has_wide_registers() else 1024
IS_WIDENED = not has_half_products()  # bfloat16
_WORD_BYTES = _PANEL_BYTES // 2 if IS_WIDENED else _PANEL_BYTES  # of a panel in bfloat16

_SILU, _TIMES, _PLUS, _GATED = map(int, (Behind.SILU, Behind.TIMES, Behind.PLUS, Behind.GATED))

_product, _product_of_few = (
    product_tile(num_rows, (_PANEL_VECTORS,), widens=True) for num_rows in (_TILE_ROWS, _FEW_ROWS)
)


class ProductCall(NamedTuple):
    """What multiply_panels is given, all int64, rows with distances in bytes; 0 for what there is not.

    num_words: of a state. is_half: panels, bias and others are bfloat16; gives_half: outputs are. behind: a
    panels.Behind, of which TIMES and PLUS take `others` and GATED `up_panels`.
    """

    states: int
    state_row: int
    num_rows: int
    num_words: int
    num_outputs: int
    panels: int
    up_panels: int
    bias: int
    outputs: int
    output_row: int
    others: int
    other_row: int
    behind: int
    is_half: int
    gives_half: int


@loop
def _multiply(
    is_half: int,
    are_new: bool,
    states: int,
    state_row: int,
    num_rows: int,
    last: int,
    num_words: int,
    panel: int,
    next_panel: int,
    found: int,
) -> None:
    """Rows (num_rows, num_words) times a panel; those beyond a multiple of six are at `last`, filled up.

    Fetched meanwhile: the next panel, or at 0 none, and where rows `are_new`, in every other tile, those to come.
    """
    word_bytes = _WORD_BYTES if is_half else _PANEL_BYTES
    ahead, end = next_panel, next_panel + (num_words * word_bytes if next_panel else 0)
    for first_word in range(0, num_words, _DEPTH):
        depth = min(num_words - first_word, _DEPTH)
        some, adds = panel + first_word * word_bytes, int(first_word > 0)
        for row in range(0, num_rows, _TILE_ROWS):
            a, a_row, c = states + row * state_row + 4 * first_word, state_row, found + row * _PANEL_BYTES
            if row + _TILE_ROWS > num_rows:
                a, a_row = last + 4 * first_word, 4 * num_words
            fetched = 0
            if are_new and row // _TILE_ROWS % 2 == 0:
                fetched = states + (row + _TILE_ROWS) * state_row
            elif ahead < end:
                fetched, ahead = ahead, ahead + depth * LINE_BYTES
            if row + _FEW_ROWS >= num_rows:
                _product_of_few(is_half, _PANEL_VECTORS, adds, a, a_row, 4, some, c, depth, fetched)
            else:
                _product(is_half, _PANEL_VECTORS, adds, a, a_row, 4, some, c, depth, fetched)


@loop
def _finish(
    is_half: int,
    gives_half: int,
    behind: int,
    num_rows: int,
    found: int,
    ups: int,
    bias: int,
    others: int,
    other_row: int,
    outputs: int,
    output_row: int,
) -> None:
    """A panel's products, with what follows them, to the outputs."""
    for row in range(num_rows):
        for at in range(0, _PANEL_BYTES, VECTOR_BYTES):
            value, place = load(found + row * _PANEL_BYTES + at), at // 2 if is_half else at
            target = at // 2 if gives_half else at
            fetch(outputs + (row + _ROWS_AHEAD) * output_row + target)
            if behind in (_TIMES, _PLUS):
                fetch(others + (row + _ROWS_AHEAD) * other_row + place)
            if bias:
                value = add(value, load_either(is_half, bias + place))
            if behind == _SILU:
                value = silu(value)
            elif behind == _TIMES:
                value = multiply(value, load_either(is_half, others + row * other_row + place))
            elif behind == _PLUS:
                value = add(value, load_either(is_half, others + row * other_row + place))
            elif behind == _GATED:
                value = multiply(silu(value), load(ups + row * _PANEL_BYTES + at))
            store_either(gives_half, value, outputs + row * output_row + target)


@loop
def multiply_panels(p: _Ints) -> None:
    """Tasks, one after the other as they are free: some rows times some panels."""
    num_tasks, counter, states, state_row, all_rows = p[0], p[1], p[2], p[3], p[4]
    num_words, num_outputs, panels, up_panels, bias = p[5], p[6], p[7], p[8], p[9]
    outputs, output_row, others, other_row = p[10], p[11], p[12], p[13]
    behind, is_half, gives_half = p[14], p[15], p[16]
    scratch = np.empty(2 * TASK_ROWS * PANEL + _TILE_ROWS * num_words + LANES, np.float32)
    found = (scratch.ctypes.data + VECTOR_BYTES - 1) // VECTOR_BYTES * VECTOR_BYTES
    ups = found + TASK_ROWS * _PANEL_BYTES
    last = ups + TASK_ROWS * _PANEL_BYTES
    num_panels = (num_outputs + PANEL - 1) // PANEL
    num_row_tasks = (all_rows + TASK_ROWS - 1) // TASK_ROWS
    while True:
        task = fetch_and_add(counter)
        if task >= num_tasks:
            break
        first_row, first_panel = task % num_row_tasks * TASK_ROWS, task // num_row_tasks * TASK_PANELS
        num_rows = min(all_rows - first_row, TASK_ROWS)
        some = states + first_row * state_row
        num_whole = num_rows // _TILE_ROWS * _TILE_ROWS
        if num_whole < num_rows:
            for row in range(_TILE_ROWS):
                source = some + min(num_whole + row, num_rows - 1) * state_row
                for at in range(0, 4 * num_words, 4):
                    store_float(load_float(source + at), last + 4 * row * num_words + at)
        for panel in range(first_panel, min(first_panel + TASK_PANELS, num_panels)):
            size = num_words * (_WORD_BYTES if is_half else _PANEL_BYTES)
            one, up = panels + panel * size, up_panels + panel * size
            next_one = one + size if panel + 1 < num_panels else 0
            after, are_new = up if behind == _GATED else next_one, panel == first_panel
            _multiply(is_half, are_new, some, state_row, num_rows, last, num_words, one, after, found)
            if behind == _GATED:
                _multiply(is_half, False, some, state_row, num_rows, last, num_words, up, next_one, ups)
            # The last panel begins where it ends with the outputs.
            first = min(panel * PANEL, num_outputs - PANEL)
            column = first * (2 if is_half else 4)
            _finish(
                is_half,
                gives_half,
                behind,
                num_rows,
                found,
                ups,
                bias + column if bias else 0,
                others + first_row * other_row + column,
                other_row,
                outputs + first_row * output_row + first * (2 if gives_half else 4),
                output_row,
            )
    scratch[0] = 0  # numba frees an array behind its last use, and an address is none

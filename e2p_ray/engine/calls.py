"""Compiled loops one after the other without Python in between: all layers of a pass in one call, or its choices.

A table of int64: first how many calls there are and where threads wait for each other, then for every call what its
loop is given (`torch_threads.run`), the counter of its tasks, and which loop it is.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from e2p_ray.engine.flash import attend_shared
from e2p_ray.engine.likeliest import find_likeliest
from e2p_ray.engine.loop import loop
from e2p_ray.engine.own_keys import attend_own
from e2p_ray.engine.products import multiply_panels
from e2p_ray.engine.row_norms import normalise_rows, round_rows
from e2p_ray.engine.turns import turn_heads
from e2p_ray.engine.vectors import call_address

_Table = npt.NDArray[np.int64]

MAX_NUMBERS = 32  # that a loop is given, the number of tasks and the counter's address first
COUNTER, KIND, ROW_NUMBERS = MAX_NUMBERS, MAX_NUMBERS + 1, MAX_NUMBERS + 2

KINDS = {
    normalise_rows: 0,
    multiply_panels: 1,
    turn_heads: 2,
    attend_shared: 3,
    attend_own: 4,
    round_rows: 5,
    find_likeliest: 6,
}


@loop
def run_calls(table: _Table) -> None:
    """Every call in turn; a thread begins one when all threads have done those before."""
    num_calls, barrier = table[0, 0], table[0, 1]
    for at in range(1, num_calls + 1):
        p, kind = table[at], table[at, KIND]
        if kind == 0:
            normalise_rows(p)
        elif kind == 1:
            multiply_panels(p)
        elif kind == 2:
            turn_heads(p)
        elif kind == 3:
            attend_shared(p)
        elif kind == 4:
            attend_own(p)
        elif kind == 5:
            round_rows(p)
        else:
            find_likeliest(p)
        if barrier:
            call_address(barrier)

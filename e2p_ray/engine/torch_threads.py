"""Compiled loops on torch's own threads: another pool beside them would fight them for the cores."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import carray, cfunc, types

_Ints = npt.NDArray[np.int64]
_MAX_NUMBERS = 32


def run(loop: Callable[[_Ints], None], num_tasks: int, numbers: tuple[int, ...]) -> None:
    """Call a loop on as many of torch's threads as there are tasks for.

    It is given the number of tasks, the address of a counter by which it takes one after the other, and the numbers.
    """
    given, counter = np.zeros(_MAX_NUMBERS, np.int64), np.zeros(1, np.int64)
    given[: 2 + len(numbers)] = num_tasks, counter.ctypes.data, *numbers
    num_threads = min(torch.get_num_threads(), num_tasks)
    team = _team() if num_threads > 1 else None
    if team is None:
        loop(given)
    else:
        team(_entry(loop).address, given.ctypes.data, num_threads, 0)


@cache
def _team() -> Callable[..., None] | None:
    """OpenMP's entry for a parallel region, of the library that torch itself uses; None where it uses another."""
    library = Path(torch.__file__).with_name("lib") / "libgomp.so.1"
    if not library.exists():
        return None
    # GOMP_parallel(function, its argument, threads, flags): what GCC compiles `#pragma omp parallel` into.
    entry = ctypes.CDLL(str(library)).GOMP_parallel
    entry.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    entry.restype = None
    found: Callable[..., None] = entry
    return found


@cache
def _entry(loop: Any) -> Any:
    """The loop as a C function of one address."""

    @cfunc(types.void(types.voidptr))
    def entry(numbers: Any) -> None:
        loop(carray(numbers, (_MAX_NUMBERS,), np.int64))

    return entry

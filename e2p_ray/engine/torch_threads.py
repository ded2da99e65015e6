"""Compiled loops on torch's own threads: another pool beside them would fight them for the cores."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import carray, cfunc, types

from e2p_ray.engine.calls import COUNTER, KIND, KINDS, MAX_NUMBERS, ROW_NUMBERS, run_calls

_Ints = npt.NDArray[np.int64]
# A loop, the number of its tasks, and what it is given besides.
Call = tuple[Callable[[_Ints], None], int, tuple[int, ...]]


def run(loop: Callable[[_Ints], None], num_tasks: int, numbers: tuple[int, ...]) -> None:
    """Call a loop on as many of torch's threads as there are tasks for.

    It is given the number of tasks, the address of a counter by which it takes one after the other, and the numbers.
    """
    given, counter = np.zeros(MAX_NUMBERS, np.int64), np.zeros(1, np.int64)
    given[: 2 + len(numbers)] = num_tasks, counter.ctypes.data, *numbers
    team, num_threads = _team_for(num_tasks)
    if team is None:
        loop(given)
    else:
        team.begin(_entry(loop).address, given.ctypes.data, num_threads, 0)


def run_all(calls: Sequence[Call]) -> None:
    """These calls in their order, without Python in between; each begins when the one before is done."""
    table = np.zeros((1 + len(calls), ROW_NUMBERS), np.int64)
    put_calls(table[1:], calls)
    run_table(table)


def put_calls(rows: npt.NDArray[np.int64], calls: Sequence[Call]) -> None:
    """Calls to as many rows (num_calls, ROW_NUMBERS) of a table, which hold zeros."""
    for row, (loop, num_tasks, numbers) in zip(rows, calls, strict=True):
        row[0], row[KIND] = num_tasks, KINDS[loop]
        row[2 : 2 + len(numbers)] = numbers


def run_table(table: npt.NDArray[np.int64]) -> None:
    """Run a table of calls (1 + num_calls, ROW_NUMBERS), whose first row and counters are filled in here."""
    counters = table[1:, COUNTER]
    counters[:] = 0
    table[1:, 1] = counters.ctypes.data + table.strides[0] * np.arange(len(counters))
    team, num_threads = _team_for(int(table[1:, 0].max()))
    table[0, :2] = len(counters), 0 if team is None else team.barrier
    if team is None:
        run_calls(table)
    else:
        team.begin(_table_entry().address, table.ctypes.data, num_threads, 0)


@dataclass(frozen=True, slots=True)
class _Team:
    """OpenMP's entry for a parallel region, and the address of its barrier."""

    begin: Callable[..., None]
    barrier: int


def _team_for(num_tasks: int) -> tuple[_Team | None, int]:
    num_threads = min(torch.get_num_threads(), num_tasks)
    return (_team() if num_threads > 1 else None), num_threads


@cache
def _team() -> _Team | None:
    """Of the library that torch itself uses; None where it uses another."""
    library = Path(torch.__file__).with_name("lib") / "libgomp.so.1"
    if not library.exists():
        return None
    # GOMP_parallel(function, its argument, threads, flags): what GCC compiles `#pragma omp parallel` into.
    openmp = ctypes.CDLL(str(library))
    entry, barrier = openmp.GOMP_parallel, ctypes.cast(openmp.GOMP_barrier, ctypes.c_void_p).value
    entry.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    entry.restype = None
    assert barrier is not None
    return _Team(entry, barrier)


@cache
def _entry(loop: Any) -> Any:
    """The loop as a C function of one address."""

    @cfunc(types.void(types.voidptr))
    def entry(numbers: Any) -> None:
        loop(carray(numbers, (MAX_NUMBERS,), np.int64))

    return entry


@cache
def _table_entry() -> Any:
    """run_calls as a C function of the table's address."""

    @cfunc(types.void(types.voidptr))
    def entry(table: Any) -> None:
        num_calls = carray(table, (1,), np.int64)[0]
        run_calls(carray(table, (num_calls + 1, ROW_NUMBERS), np.int64))

    return entry

"""What every bench shares: interleaved medians, the machine's own peak, a table, one JSON line."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from e2p_ray.engine.packed import onednn_packs


def hardware(num_threads: int | None = None) -> str:
    """The processor, its cores, the memory and the threads used, in words."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    memory = psutil.virtual_memory().total / 2**30
    threads = "" if num_threads is None else f", {num_threads} thread(s)"
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB{threads}"


def tell_run(case: str, system: str, rows_per_s: float, repeat: int, num_repeats: int) -> None:
    """What one run gave, at once and to stderr: a bench that is stopped before its table has said what it measured."""
    print(f"{case}, {system}: {rows_per_s:,.2f} rows/s (run {repeat + 1} of {num_repeats})", file=sys.stderr)


def interleaved(case: str, runs: Mapping[str, Callable[[], float]], num_repeats: int) -> dict[str, float]:
    """The median of each system's rows/s; systems take turns, so that a noisy minute hits all of them.

    There and back, so that none is always the one behind another. Every run is told to stderr.
    """
    figures: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(num_repeats):
        for name in list(runs)[:: -1 if repeat % 2 else 1]:
            figures[name].append(runs[name]())
            tell_run(case, name, figures[name][-1], repeat, num_repeats)
    return {name: statistics.median(values) for name, values in figures.items()}


Clock = Callable[[], float]


def matmul_peak_flops(
    num_rows: int, width: int, dtype: torch.dtype = torch.float32, *, clock: Clock = time.perf_counter
) -> float:
    """The machine's own matrix-product rate (FLOP/s) at this shape: best of several runs.

    Of torch's plain product and oneDNN's with a packed weight: on an AMD core MKL's, in fp32, reach 100 GF/s and
    oneDNN's 235; and of those in float32, which is what a CPU without products of bfloat16 is best at. `clock`: on a
    busy machine and one thread, the process's own time (time.process_time) says more.
    """
    num_flops, best = 2.0 * num_rows * width * 4 * width, 0.0
    for kind in {dtype, torch.float32}:
        left, weight = torch.randn(num_rows, width).to(kind), torch.randn(4 * width, width).to(kind)
        best = max(best, best_rate(partial(torch.matmul, left, weight.T), num_flops, clock))
        if onednn_packs(kind):
            packed = torch.ops.mkldnn._reorder_linear_weight(weight)
            product = partial(torch.ops.mkldnn._linear_pointwise, left, packed, None, "none", [], "")
            best = max(best, best_rate(product, num_flops, clock))
    return best


def memory_bytes_per_s(num_bytes: int = 256 << 20, *, clock: Clock = time.perf_counter) -> float:
    """How fast this machine reads memory that no cache holds: best of several sums over one large array."""
    array = torch.ones(num_bytes // 4)
    return best_rate(array.sum, float(num_bytes), clock, num_calls=1)


def best_rate(work: Callable[[], object], amount: float, clock: Clock, num_calls: int = 10) -> float:
    """The amount that a call does, over the seconds that it took: best of several runs of so many calls."""
    best = 0.0
    for _ in range(8):
        start = clock()
        for _ in range(num_calls):
            work()
        best = max(best, num_calls * amount / (clock() - start))
    return best


def print_results(
    bench: str, results: Sequence[Mapping[str, Any]], *, num_threads: int | None = None, gpu: str | None = None
) -> None:
    """The results as a table, then as the last line one JSON object."""
    columns = list(dict.fromkeys(name for result in results for name in result))
    rows = [[_cell(result.get(name)) for name in columns] for result in results]
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    where = hardware(num_threads) if gpu is None else f"{gpu}; {hardware(num_threads)}"
    print(json.dumps({"bench": bench, "hardware": where, "results": list(results)}, ensure_ascii=False))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.2f}" if isinstance(value, float) else str(value)

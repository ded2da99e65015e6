"""Peak memory by users per content: python -m tests.bench.memory.

Requests come in groups of a content, as from a shard, each made when it is read; texts are dropped as they come. Each
size has a process of its own; what is told is the most memory above that of the engine which has written a few rows.
The fewest are two waves, in which malloc has not come to rest; it ends with code 1 where the most users, four times as
many as the second, take a tenth more than those.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from e2p_ray.engine.model import BaseModel
from e2p_ray.schema import Group, Request
from tests.bench.harness import print_results
from tests.bench.workloads import Case, groups_of, llama_30m, make_engine
from tests.tiny_models import EMBEDDING_DIM, random_model

NUM_USERS = (512, 2048, 8192)
_USERS_PER_GROUP = 256
_MAX_GROWTH = 1.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-rows", type=int, default=256)
    parser.add_argument("--users", type=int, help="this size, in this process")
    options = parser.parse_args()
    if options.users is not None:
        torch.set_num_threads(options.threads)
        print(*measure(options.users, options.max_rows))
        return
    results: list[dict[str, Any]] = []
    for num_users in NUM_USERS:
        command = [sys.executable, "-m", __spec__.name, "--threads", str(options.threads)]
        command += ["--max-rows", str(options.max_rows), "--users", str(num_users)]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        peak_bytes, rows_per_s = map(float, said.splitlines()[-1].split())
        results.append({"case": f"1x{num_users}", "peak_mb": peak_bytes / 1e6, "rows_per_s": rows_per_s})
        results[-1]["ratio"] = results[-1]["peak_mb"] / results[0]["peak_mb"]
    print_results("memory", results, num_threads=options.threads)
    growth = results[-1]["peak_mb"] / results[-2]["peak_mb"]
    if growth > _MAX_GROWTH:
        sys.exit(f"{NUM_USERS[-1]} users of a content take {growth:.2f} times the memory of {NUM_USERS[-2]}")


def measure(num_users: int, max_rows: int) -> tuple[int, float]:
    """The most memory that so many users of one content take above the engine's, in bytes, and rows/s."""
    case = Case(1, num_users, 512)
    base = BaseModel(random_model(llama_30m()))
    base.pack()
    engine = make_engine(base, case, max_rows)
    for _ in engine.generate(groups_of(Case(1, 8, 64))):
        pass
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the most begins anew
    before = memory_bytes("VmRSS")
    start = time.perf_counter()
    num_rows = sum(1 for _ in engine.generate(lazily(case)))
    rows_per_s = num_rows / (time.perf_counter() - start)
    assert num_rows == num_users
    return memory_bytes("VmHWM") - before, rows_per_s


def lazily(case: Case) -> Iterator[Group]:
    """The case's only content with its users, some at a time."""
    (some,) = groups_of(replace(case, num_users=1))
    rng = np.random.default_rng(1)
    for first in range(0, case.num_users, _USERS_PER_GROUP):
        vectors = rng.standard_normal((_USERS_PER_GROUP, EMBEDDING_DIM)).astype(np.float32)
        keys = [some.requests[0].key._replace(user_id=f"u{first + at}") for at in range(_USERS_PER_GROUP)]
        yield replace(some, requests=tuple(map(Request, keys, vectors)))


def memory_bytes(name: str) -> int:
    """A figure of this process, as Linux tells it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(f"{name}:")))


if __name__ == "__main__":
    main()

"""How long a plan takes, and how much memory the driver needs: `python -m tests.bench.plan`.

Every case runs in a process of its own: by Ray's shuffles at growing numbers of candidates, to show that the driver's
peak does not grow, and by one polars process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from e2p_ray.config import JobConfig, PlanConfig, PromptTemplate, TaskConfig
from e2p_ray.plan import make_plan
from e2p_ray.storage import Storage

_FILE_ROWS, _GROUP_ROWS = 1_000_000, 250_000
_SPACE = "bench-1"
_OBJECT_STORE_BYTES = 2 << 30
_CANDIDATES = (1_000_000, 5_000_000, 20_000_000)


def _ids(prefix: str, numbers: npt.NDArray[np.int64]) -> pa.Array:
    return pa.array(np.char.add(prefix, np.char.zfill(numbers.astype("U10"), 9)), pa.string())


def _write(folder: Path, num_rows: int, make: Any) -> None:
    folder.mkdir(parents=True)
    for number, start in enumerate(range(0, num_rows, _FILE_ROWS)):
        rows = np.arange(start, min(start + _FILE_ROWS, num_rows))
        pq.write_table(
            make(rows), folder / f"part-{number:05d}.parquet", compression="zstd", row_group_size=_GROUP_ROWS
        )


def make_inputs(folder: Path, num_candidates: int, num_users: int, num_contents: int, dim: int) -> None:
    """Three tables of synthetic rows; popular contents have many more candidates than others."""
    random = np.random.default_rng(0)
    now = pa.scalar(datetime(2026, 11, 1, tzinfo=UTC), pa.timestamp("us", tz="UTC"))
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz      "))

    def users(rows: npt.NDArray[np.int64]) -> pa.Table:
        vectors = pa.array(random.standard_normal(len(rows) * dim, dtype=np.float32))
        return pa.table(
            {
                "user_id": _ids("u", rows),
                "embedding": pa.FixedSizeListArray.from_arrays(vectors, dim),
                "embedding_space": pa.repeat(_SPACE, len(rows)),
                "personalize": pa.array(random.random(len(rows)) > 0.02),
                "updated_at": pa.repeat(now, len(rows)),
            }
        )

    def contents(rows: npt.NDArray[np.int64]) -> pa.Table:
        texts = random.choice(letters, (len(rows), 240)).view("U240")[:, 0]
        return pa.table(
            {
                "content_id": _ids("c", rows),
                "title": pa.array([text[:40] for text in texts]),
                "body": pa.array([text[40:] for text in texts]),
                "language": pa.repeat("en", len(rows)),
                "updated_at": pa.repeat(now, len(rows)),
            }
        )

    def candidates(rows: npt.NDArray[np.int64]) -> pa.Table:
        return pa.table(
            {
                "user_id": _ids("u", random.integers(0, num_users, len(rows))),
                "content_id": _ids("c", (num_contents * random.random(len(rows)) ** 2).astype(np.int64)),
                "rank": pa.array(np.ones(len(rows), np.int32)),
                "score": pa.array(random.random(len(rows), dtype=np.float32)),
                "source": pa.repeat("bench", len(rows)),
            }
        )

    for name, num_rows, make in (("users", num_users, users), ("contents", num_contents, contents),
                                 ("candidates", num_candidates, candidates)):  # fmt: skip
        _write(folder / name, num_rows, make)


def _peak_rss_bytes() -> int:
    """Of this process since it began; unlike ru_maxrss without what its parent used. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10


def run_case(folder: Path, system: str, dim: int) -> dict[str, Any]:
    """Plan the inputs in `folder`; what it took and made."""
    inputs = {f"{name}_uri": str(folder / name) for name in ("users", "contents", "candidates")}
    config = JobConfig.model_validate(
        {
            "inputs": inputs,
            "output": {"uri": str(folder / system)},
            "base_model": {"uri": "none"},
            "projector": {"uri": "none"},
            "tasks": {"headline": TaskConfig(prompts={"default": PromptTemplate()})},
            "plan": PlanConfig(single_node_bytes=0 if system == "ray" else 1 << 60),
        }
    )
    if system == "ray":
        import ray

        ray.init(num_cpus=2, object_store_memory=_OBJECT_STORE_BYTES, include_dashboard=False, log_to_driver=False)
    before = _peak_rss_bytes()
    started = time.perf_counter()
    plan = make_plan(config, Storage(), embedding_space=_SPACE, embedding_dim=dim)
    return {
        "wall_s": round(time.perf_counter() - started, 1),
        "driver_before_mb": round(before / 1e6),
        "driver_peak_mb": round(_peak_rss_bytes() / 1e6),
        "requests": plan.counts.num_requests,
        "shards": len(plan.shards),
        "plan_mb": round(sum(shard.num_bytes for shard in plan.shards) / 1e6),
        "plan_id": plan.plan_id,
    }


def _own_process(*arguments: str) -> str:
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "tests.bench.plan", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.plan", description=__doc__)
    parser.add_argument("--candidates", type=int, action="append", help=f"may be given again; default {_CANDIDATES}")
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--contents", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where the inputs and plans go; default: a temporary folder")
    parser.add_argument("--case", nargs=2, metavar=("FOLDER", "SYSTEM"), help=argparse.SUPPRESS)
    parser.add_argument("--make", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    candidates, sizes = options.candidates or _CANDIDATES, [options.users, options.contents, options.dim]
    if options.make:
        make_inputs(Path(options.make), *candidates, *sizes)
    elif options.case:
        print(json.dumps(run_case(Path(options.case[0]), options.case[1], options.dim)))
    else:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            _bench(Path(folder), candidates, *sizes)


def _bench(folder: Path, nums_candidates: Sequence[int], num_users: int, num_contents: int, dim: int) -> None:
    from tests.bench.harness import hardware  # not in the measured processes: it brings torch, and torch is memory

    results = []
    columns = ("wall_s", "driver_before_mb", "driver_peak_mb", "requests", "shards", "plan_mb")
    print(f"{'case':>28} {'system':>7} " + " ".join(f"{column:>16}" for column in columns), flush=True)
    for candidates in nums_candidates:
        inputs = folder / str(candidates)
        sizes = [f"--candidates={candidates}", f"--users={num_users}", f"--contents={num_contents}", f"--dim={dim}"]
        _own_process("--make", str(inputs), *sizes)
        plan_ids = set()
        for system in ("ray", "polars"):
            figures = json.loads(_own_process("--case", str(inputs), system, *sizes).splitlines()[-1])
            plan_ids.add(figures.pop("plan_id"))
            case = f"{candidates:,}x{num_users:,}x{num_contents:,}"
            print(f"{case:>28} {system:>7} " + " ".join(f"{figures[column]:>16,}" for column in columns), flush=True)
            results.append({"case": case, "system": system, **figures})
        assert len(plan_ids) == 1, "both ways must make the same plan"
    print(json.dumps({"bench": "plan", "hardware": hardware(), "results": results}))


if __name__ == "__main__":
    main()

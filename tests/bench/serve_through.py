"""What a batch through a live replica costs its online users: python -m tests.bench.serve_through.

One replica of `jobs.serve` on one core (a Llama of 29 M parameters, fp32, contents of 256 tokens, 16 new tokens), its
users and the batch's driver on the others. By turns the same kind of load is asked alone and while
`jobs.generate --through-serve` sends shards of other contents, 64 users each. `ratio` is p99 over that of the same
load alone. At the end every text that the batch committed is compared with the one its pool's own worker writes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import pyarrow as pa
import ray
import torch
import yaml

from e2p_ray.batch import BatchProgress, ShardWorker, run_batch
from e2p_ray.commit import Run, open_run, pending_shards
from e2p_ray.config import JobConfig, ServeConfig
from e2p_ray.engine.manifest import load_manifest
from e2p_ray.plan import make_plan
from e2p_ray.serve.front import front_of_local_ray
from e2p_ray.serve.replica import APP_NAME
from e2p_ray.storage import Storage
from jobs.serve import serve_until
from tests.bench.harness import print_results
from tests.bench.serve_load import Load, load
from tests.bench.serve_site import NUM_PUBLISHED_USERS, NUM_USERS, TASK, Bench, write_bench
from tests.test_serve_replica import until

LEVELS = (1, 4, 16)
REQUESTS = {1: 100, 4: 128, 16: 256}
QUICK_REQUESTS = {1: 8, 4: 12, 16: 32}
NUM_SHARED = 8  # contents of one load, which nobody has asked for before
_SHARD_S = 8.0  # longer than one of them takes
NUM_BATCH_CONTENTS, USERS_A_CONTENT, REQUESTS_PER_SHARD = 256, 64, 256


class Stopped(BaseException):
    """Ends a batch as Ctrl-C does."""


def written_job(bench: Bench, folder: Path, values: dict[str, Any]) -> JobConfig:
    """The batch: the service's own texts for other pairs, to another place."""
    job = {name: part for name, part in values.items() if name not in ("api", "replica")}
    job |= {
        "output": {"uri": f"{folder}/batch"},
        "inputs": values["inputs"] | {"candidates_uri": f"{folder}/in/batch.parquet"},
        "plan": {"requests_per_shard": REQUESTS_PER_SHARD},
    }
    contents = bench.content_ids[-NUM_BATCH_CONTENTS:]
    users = [f"u{at:04d}" for at in range(NUM_PUBLISHED_USERS, NUM_PUBLISHED_USERS + USERS_A_CONTENT)]
    pairs = pl.DataFrame([(u, c) for c in contents for u in users], schema=["user_id", "content_id"], orient="row")
    pairs = pairs.with_columns(rank=pl.lit(0, pl.Int32), score=pl.lit(0.5, pl.Float32), source=pl.lit("bench"))
    config = JobConfig.model_validate(job)
    Storage().write_table(config.inputs.candidates_uri, pairs.to_arrow())
    return config


def opened(config: JobConfig, run_id: str) -> Run:
    storage = Storage()
    manifest, base = load_manifest(config, storage)
    plan = make_plan(config, storage, embedding_space=manifest.embedding_space, embedding_dim=manifest.embedding_dim)
    uri, shard_ids = f"{config.output.uri}/runs/{run_id}", tuple(shard.shard_id for shard in plan.shards)
    ids = (manifest.embedding_space, manifest.projector_id, base.base_model_id)
    run = Run(run_id, uri, config.output.table_uri, plan.uri, *ids, shard_ids)
    open_run(storage, run, config.resolved())
    return run


class Batch:
    """A run that goes through the service while this is entered."""

    def __init__(self, config: JobConfig, run: Run) -> None:
        self._config, self._run = config, run
        self._stop, self._begun = threading.Event(), threading.Event()
        self.last: BatchProgress | None = None
        self._thread = threading.Thread(target=self._go)

    def __enter__(self) -> Batch:
        self._began_s = time.perf_counter()
        self._thread.start()
        assert self._begun.wait(120), "no shard was done"
        return self

    def __exit__(self, *error: object) -> None:
        assert self._thread.is_alive(), "the batch was over before its load was: give it more contents"
        self.seconds = time.perf_counter() - self._began_s
        self._stop.set()
        self._thread.join(300)
        before = -1  # what the replica had begun it finishes
        while before != (before := len(pending_shards(Storage(), self._run))):
            time.sleep(_SHARD_S)

    def _go(self) -> None:
        def told(progress: BatchProgress) -> None:
            self.last = progress
            if progress.num_done_here:
                self._begun.set()
            if self._stop.is_set():
                raise Stopped

        with suppress(Stopped):
            run_batch(self._config, Storage(), self._run, on_progress=told, through_serve=APP_NAME)

    @property
    def rows_per_s(self) -> float:
        assert self.last is not None, "it has begun"
        return self.last.num_requests / self.seconds


def bodies(bench: Bench, at: int, number: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    shared = bench.content_ids[at * NUM_SHARED : (at + 1) * NUM_SHARED]
    users = rng.permutation(np.arange(NUM_PUBLISHED_USERS, NUM_USERS))[:number]
    contents = rng.permutation(number) % NUM_SHARED
    return [
        {"user_id": f"u{user:04d}", "content_id": shared[place], "task": TASK}
        for user, place in zip(users, contents, strict=True)
    ]


def measure(bench: Bench, config: JobConfig, run: Run, options: argparse.Namespace) -> list[dict[str, Any]]:
    requests, rng = QUICK_REQUESTS if options.quick else REQUESTS, np.random.default_rng(11)
    seen: dict[tuple[int, str], list[dict[str, float]]] = {}
    at = 0
    load(bench.port, "/v1/generations", bodies(bench, at, 16, rng), 4)
    for number in range(options.repeats):
        for level in options.levels:
            for name in ("alone", "beside a batch")[:: 1 - 2 * (number % 2)]:
                at += 1
                asked = bodies(bench, at, requests[level], rng)
                if name == "alone":
                    figures = figures_of(load(bench.port, "/v1/generations", asked, level))
                else:
                    with Batch(config, run) as batch:
                        figures = figures_of(load(bench.port, "/v1/generations", asked, level))
                    figures["batch_rows_per_s"] = batch.rows_per_s
                seen.setdefault((level, name), []).append(figures)
    with Batch(config, run) as batch:
        time.sleep(2 if options.quick else 15)
    lines = list[dict[str, Any]]()
    for (level, name), rounds in seen.items():
        lines.append(
            {"case": str(level), "system": name}
            | {figure: statistics.median(one[figure] for one in rounds) for figure in rounds[0]}
        )
    bases = {line["case"]: line for line in lines if line["system"] == "alone"}
    for line in lines:
        line["ratio"] = line["p99_ms"] / bases[line["case"]]["p99_ms"]
        line["p50_ratio"] = line["p50_ms"] / bases[line["case"]]["p50_ms"]
    return [*lines, {"case": "0", "system": "beside a batch", "batch_rows_per_s": batch.rows_per_s}]


def figures_of(seen: Load) -> dict[str, float]:
    assert {answer.body["status"] for answer in seen.answers} == {"ok"}
    assert {answer.body["source"] for answer in seen.answers} == {"generated"}
    return {"p50_ms": seen.percentile_ms(50), "p99_ms": seen.percentile_ms(99), "texts_per_s": seen.texts_per_s}


def compared(config: JobConfig, run: Run) -> tuple[int, int, float]:
    """Of the shards that came through: texts, those of them that the pool writes alike, and its rows a second."""
    storage, done = Storage(), sorted(set(run.shard_ids) - set(pending_shards(Storage(), run)))[:4]
    pool = replace(run, run_id="pool", uri=f"{config.output.uri}/runs/pool")
    worker = ShardWorker(config, storage, pool, None)
    num_texts = num_equal = 0
    seconds = 0.0
    for shard_id in done:
        began_s = time.perf_counter()
        worker(pa.table({"shard_id": [shard_id], "first": [None], "end": [None]}))
        seconds += time.perf_counter() - began_s
        own, through = (storage.read_table(one.data_uri(shard_id)).to_pylist() for one in (pool, run))
        num_texts += len(own)
        num_equal += sum(a["text"] == b["text"] for a, b in zip(own, through, strict=True))
    return num_texts, num_equal, num_texts / seconds


@contextmanager
def service(values: dict[str, Any], bench: Bench) -> Iterator[None]:
    """One replica on the first core; what else this process starts is on the others."""
    from e2p_ray.serve.client import Client
    from tests.bench.serve_site import TOKEN

    cores = sorted(os.sched_getaffinity(0))
    with front_of_local_ray():  # as of a Ray that jobs.serve starts
        os.sched_setaffinity(0, cores[:1])
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
        os.sched_setaffinity(0, cores[1:] or cores)
        config, stop = ServeConfig.model_validate(values), threading.Event()
        job = threading.Thread(target=serve_until, args=(config, stop))
        job.start()
        try:
            with Client(f"http://127.0.0.1:{bench.port}", TOKEN) as client:
                until(client, lambda models: True)
            yield
        finally:
            stop.set()
            job.join(60)
            ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", type=int, nargs="+", default=LEVELS, help="users at once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of few requests")
    parser.add_argument("--shard-rows", type=int, help="replica.shard_rows")
    parser.add_argument("--shard-prefill-tokens", type=int, help="replica.shard_prefill_tokens")
    options = parser.parse_args()
    options.repeats = 1 if options.quick else options.repeats
    torch.set_num_threads(1)
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false",
                   "RAY_worker_niceness": "0"}  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_loads = 1 + 2 * options.repeats * len(options.levels)
        bench = write_bench(folder, num_loads * NUM_SHARED + NUM_BATCH_CONTENTS)
        values = yaml.safe_load(bench.config_path.read_text(encoding="utf-8"))
        given = {"shard_rows": options.shard_rows, "shard_prefill_tokens": options.shard_prefill_tokens}
        values["replica"] = {key: value for key, value in given.items() if value is not None}
        config = written_job(bench, folder, values)
        run = opened(config, "through")
        with service(values, bench):
            results = measure(bench, config, run, options)
        num_texts, num_equal, rows_per_s = compared(config, run)
    results.append({"case": "0", "system": "the pool's own worker", "batch_rows_per_s": rows_per_s})
    print(f"load of the machine: {psutil.getloadavg()}")
    print(f"texts through replicas that are the pool's: {num_equal:,} of {num_texts:,}")
    print_results("serve_through", results, num_threads=1)


if __name__ == "__main__":
    main()

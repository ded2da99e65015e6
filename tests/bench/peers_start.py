"""The processes of `tests.bench.peers`: what each system is told, and a loaded worker for each."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from e2p_ray.engine.model import BaseModel
from tests.bench.peers_torch import Setting
from tests.bench.worker import Worker, WorkerError
from tests.bench.workloads import LIVELY, Case, kv_bytes_per_token, llama_30m, soft_tokens, wide_tokenizer
from tests.tiny_models import random_model

BASELINE = "hf_generate"
SYSTEMS = (BASELINE, "hf_continuous", "hf_cache_copy", "vllm_ids", "vllm_embeds", "e2p_ray")
# Most rows that a system runs, and the same with --quick. 2048x1 has nothing to share: an eighth tells as much.
MAX_ROWS = {BASELINE: (64, 16), "hf_continuous": (64, 16), "hf_cache_copy": (256, 32)}
MAX_ROWS_UNSHARED = (256, 64)
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Options:
    """The command line."""

    systems: tuple[str, ...]
    vllm_python: str | None
    vllm_engine: dict[str, Any]
    dtype: str
    num_threads: int
    max_rows: int  # rows decoded together by the engine
    vllm_rows: int  # and by vLLM
    num_repeats: int
    quick: bool
    clock: str
    pin: bool


def save_model(folder: Path) -> float:
    """The random Llama and its tokenizer; returns the root mean square of its token embeddings."""
    model = random_model(llama_30m(LIVELY), attention="sdpa")
    model.save_pretrained(folder)
    wide_tokenizer().save_pretrained(folder)
    with torch.no_grad():
        return BaseModel(model).token_embedding_rms


def num_rows_of(system: str, case: Case, options: Options) -> int:
    total = case.num_contents * case.num_users
    at = int(options.quick)
    most = MAX_ROWS[system][at] if system in MAX_ROWS else total
    return min(most, MAX_ROWS_UNSHARED[at] if case.num_users == 1 else total, total)


def command_of(system: str, setting: Setting, scratch: Path, options: Options) -> tuple[list[str], dict[str, str]]:
    """A worker's command line and environment."""
    environment = {"OMP_NUM_THREADS": str(options.num_threads), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    if not system.startswith("vllm"):
        values = asdict(setting) | {"folder": str(setting.folder), "dtype": options.dtype}
        return [sys.executable, "-m", "tests.bench.peers_torch", system, json.dumps(values)], environment
    assert options.vllm_python is not None
    setting = replace(setting, max_rows=options.vllm_rows)
    request = scratch / f"{system}.npz"
    write_request(setting, request)
    environment |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, so that its cores and memory are all there is
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib(setting)),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    weights = (setting.folder / "model.safetensors").stat().st_size
    values = {
        "model": str(setting.folder),
        "dtype": options.dtype,
        "mode": system.removeprefix("vllm_"),
        "model_bytes": weights * setting.dtype.itemsize // 4,
        "engine": {"max_num_seqs": options.vllm_rows, "max_model_len": 2048} | options.vllm_engine,
    }
    return [options.vllm_python, str(ROOT / "tests/bench/peers_vllm.py"), str(request), json.dumps(values)], environment


def write_request(setting: Setting, path: Path) -> None:
    """The same pairs for a process that cannot import the engine."""
    names = [pair.content.content_id for pair in setting.pairs]
    lefts = dict(zip(names, setting.lefts, strict=True))
    index = {name: at for at, name in enumerate(lefts)}
    projector = setting.projector(llama_30m().hidden_size)
    rows = slice(0, setting.num_rows)
    np.savez(
        path,
        ids=np.concatenate([np.array(left) for left in lefts.values()]),
        starts=np.cumsum([0, *map(len, lefts.values())]),
        content=np.array([index[name] for name in names[rows]]),
        soft=soft_tokens(setting.pairs[rows], projector).numpy(),
        new_tokens=np.array([pair.new_tokens for pair in setting.pairs[rows]]),
    )


def kv_gib(setting: Setting) -> int:
    """Room for a wave's keys and values, and for half as much again; vLLM takes whole GiB."""
    case = setting.case
    token_bytes = kv_bytes_per_token(llama_30m(), setting.dtype.itemsize)
    longest = max(map(len, setting.lefts))
    num_contents = min(case.num_contents, -(-setting.max_rows // case.num_users) + 1)
    num_tokens = num_contents * longest + setting.max_rows * (case.new_tokens + 64)
    return max(-(-3 * num_tokens * token_bytes // 2 >> 30), 1)


@contextmanager
def workers(case: Case, options: Options, folder: Path, rms: float) -> Iterator[dict[str, Worker | str]]:
    """A loaded worker a system, or what it said instead of loading."""
    cores = sorted(os.sched_getaffinity(0))
    found: dict[str, Worker | str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for system in options.systems:
                setting = setting_of(system, case, options, folder, rms)
                command, environment = command_of(system, setting, Path(scratch), options)
                log = Path(tempfile.gettempdir()) / f"peers-{system}.log"
                try:
                    found[system] = Worker(
                        command,
                        environment=environment,
                        cores=cores[: options.num_threads] if options.pin else cores,
                        log=log,
                    )
                except WorkerError as error:
                    found[system] = str(error)
            yield found
        finally:
            for worker in found.values():
                if isinstance(worker, Worker):
                    worker.stop()


def setting_of(system: str, case: Case, options: Options, folder: Path, rms: float) -> Setting:
    return Setting(
        case=case,
        folder=folder,
        dtype=getattr(torch, options.dtype),
        output_rms=rms,
        max_rows=options.max_rows,
        num_rows=num_rows_of(system, case, options),
        num_threads=options.num_threads,
    )

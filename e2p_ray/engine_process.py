"""What a process that is to load a configuration's engine is begun with: its variables, and what it is forked from.

Apart from what loads the engine, so that a job can begin its workers' imports before its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

from e2p_ray.config import JobConfig
from e2p_ray.fork_server import NO_FORKS, own_forks

# For glibc's malloc, where that is the allocator: up to 512 MiB that are free are kept, and only what is larger than
# 32 MiB, the most it takes there, is asked for apart. By its own rules a worker gave memory back and asked for it again
# step by step: 12,700 page faults a second, 3 % of its core and more of the machine's below (with this 620, with the
# same peak of memory; 2026-11-23, one actor, 10,240 requests).
_ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(512 * 2**20), "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20)}

_MODULES = ("torch", "e2p_ray.engine.engine")


def engine_variables(config: JobConfig) -> dict[str, str]:
    """The environment of a process that is to load a configuration's engine."""
    num_threads = config.engine.num_threads or max(int(config.workers.num_cpus), 1)
    return _ALLOCATOR | {
        "OMP_NUM_THREADS": str(num_threads),
        "POLARS_MAX_THREADS": str(num_threads),
        "TOKENIZERS_PARALLELISM": "false",
    }


def engine_forks(config: JobConfig) -> AbstractContextManager[Mapping[str, str]]:
    """`own_forks` of workers that load a configuration's engine; none for vLLM, which begins processes of its own."""
    if config.engine.kind == "vllm":
        return nullcontext(NO_FORKS)
    workers = config.workers
    return own_forks(workers.ray_address, _MODULES, engine_variables(config), on_gpus=workers.num_gpus > 0)

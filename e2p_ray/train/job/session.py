"""The Ray session of a training: its variables, whether it is large enough, its errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import ray

from e2p_ray.config import TrainWorkersConfig
from e2p_ray.environment import variables_set
from e2p_ray.errors import ConfigError, E2PError, RunError
from e2p_ray.fork_server import own_forks
from e2p_ray.plan.dataflow import typed_error
from e2p_ray.ray_session import only_machine, ray_session

# Read by Ray Train in the driver. Its default of a minute for the workers to start is short for a busy machine.
_VARIABLES = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600", "RAY_CHDIR_TO_TRIAL_DIR": "0"}
_MODULES = ("torch", "e2p_ray.engine.model")


@contextmanager
def train_session(workers: TrainWorkersConfig) -> Iterator[None]:
    """A Ray session with the variables that Ray Train reads."""
    with (
        own_forks(workers.ray_address, _MODULES, {}, on_gpus=workers.num_gpus > 0) as forks,
        variables_set(_VARIABLES, replace=False),
        ray_session(workers.ray_address, forks=forks),
    ):
        yield


def check_resources(workers: TrainWorkersConfig) -> None:
    """Refuse more workers than a machine of fixed size can hold; Ray would wait for the rest without a word."""
    machine = only_machine(workers.ray_address)
    if machine is None:
        return
    wanted = {"CPU": workers.num_cpus * workers.num_workers, "GPU": workers.num_gpus * workers.num_workers}
    here = {name: machine.get(name, 0) for name in wanted}
    if any(here[name] < value for name, value in wanted.items()):
        raise ConfigError(
            f"{workers.num_workers} workers of workers.num_cpus {workers.num_cpus:g} and workers.num_gpus "
            f"{workers.num_gpus:g} need {wanted['CPU']:g} CPUs and {wanted['GPU']:g} GPUs, this machine has "
            f"{here['CPU']:g} and {here['GPU']:g}. Lower them, or set workers.ray_address to a cluster"
        )


@contextmanager
def typed_errors() -> Iterator[None]:
    """A task's own typed error instead of Ray's around it."""
    try:
        yield
    except ray.exceptions.RayError as error:
        raise typed_error(error) or _unexpected(error) from error


def _unexpected(error: ray.exceptions.RayError) -> E2PError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return RunError(f"a Ray task failed: {lines[-1][:300] if lines else type(error).__name__}")

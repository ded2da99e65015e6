"""Fixtures that several test files share."""

from __future__ import annotations

import os

# Before anything imports ray: the tests' clusters talk to no client outside, and nobody reads their progress bars.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
# An actor of Ray Train's that looks for nodes about to go: 2 s of CPU time a training, and no test drains one's node.
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("POLARS_MAX_THREADS", "1")  # tables of some hundred rows: its threads cost more than they do
os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
# Before anything imports Triton, whose own functions are made for one or the other: without a GPU its interpreter runs
# the GPU's kernels. (Set later it failed whenever a file before had imported transformers' way to it.)
if not os.path.exists("/proc/driver/nvidia"):
    os.environ["TRITON_INTERPRET"] = "1"

import gc
import logging
from collections.abc import Iterator

import pytest

from e2p_ray.serve.front import front_of_local_ray
from tests.s3 import s3_server

__all__ = ["ray_cluster", "s3_server"]

# Of more than some 40 s on two cores, the longest first: neither of two processes shall be left with one at the end.
_LONG_FILES = (
    "test_train_job.py",
    "test_batch.py",
    "test_nodes.py",
    "test_demo_job.py",
    "test_commit.py",
    "test_storage_faults.py",
    "test_serve_through.py",
    "test_resume.py",
    "test_evaluate.py",
    "test_backfill_job.py",
    "test_mind_job.py",
    "test_cluster_submit.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first."""
    rank = {name: at for at, name in enumerate(_LONG_FILES)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_collection_finish() -> None:
    """What is imported by now stays: Python need not look through it for garbage again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray of 2 CPUs for the whole session; what is served on it has the front that jobs.serve starts."""
    import ray
    from ray._private import services
    from ray._private.node import Node

    from e2p_ray.fork_server import fork_server
    from e2p_ray.ray_session import raylet_of_forked_workers

    with (
        front_of_local_ray(),
        fork_server(("torch", "e2p_ray.engine.engine"), {}) as found,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in found.items():
            patch.setenv(name, value)
        patch.setattr(services, "start_raylet", raylet_of_forked_workers())
        patch.setattr(Node, "start_log_monitor", lambda _: None)  # nobody reads what it would bring to the driver
        ray.init(
            num_cpus=2,
            object_store_memory=200 * 2**20,
            include_dashboard=False,
            # Processes of tasks that have ended do the next test's: each of them imports for 2 to 6 s of CPU time.
            _system_config={"idle_worker_killing_time_threshold_ms": 60_000},
            log_to_driver=False,
            logging_level=logging.WARNING,
            configure_logging=True,
        )
        for name in [name for name in os.environ if name.startswith("RAY_SERVE_") or name in found]:
            patch.delenv(name)  # processes that tests start have Rays of their own
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield
        ray.shutdown()

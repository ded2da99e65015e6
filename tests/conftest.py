"""Fixtures that several test files share."""

from __future__ import annotations

import os

# Before anything imports ray: the tests' clusters talk to no client outside, and nobody reads their progress bars.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")

import logging
from collections.abc import Iterator

import pytest

from tests.s3 import s3_server

__all__ = ["ray_cluster", "s3_server"]

# Seconds on two cores: 250, 240, 90, 60. Two processes share the files, and neither shall be left with one at the end.
_LONG_FILES = ("test_demo_job.py", "test_train_job.py", "test_batch.py", "test_mind_job.py", "test_cluster_submit.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first."""
    rank = {name: at for at, name in enumerate(_LONG_FILES)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray of 2 CPUs for the whole session."""
    import ray

    ray.init(
        num_cpus=2,
        object_store_memory=200 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        configure_logging=True,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()

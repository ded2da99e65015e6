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

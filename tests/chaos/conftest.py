"""Fixtures that several files of faults share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.forks import Forks


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """One warm process for all jobs that need no model."""
    with Forks(tmp_path_factory.mktemp("forks")) as warm:
        yield warm

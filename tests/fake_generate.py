"""`python -m tests.fake_generate --config FILE`: jobs.generate with a slow engine that needs no model."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

from e2p_ray.config import JobConfig
from e2p_ray.downstream.report import render_terminal
from e2p_ray.engine.fake import FakeEngine
from e2p_ray.schema import Completion, Group
from e2p_ray.storage import Storage
from jobs.cli import run_job
from jobs.generate import JOB, generate_run
from tests.small_job import fake_engine

_PAUSE_S = 0.05


def slow_engine(config: JobConfig, storage: Storage) -> FakeEngine:
    """The fake engine, slow enough to be killed in the middle of a shard."""
    engine = fake_engine(config, storage)
    generate = engine.generate

    def slowly(groups: Iterable[Group], *, attempt: int = 0) -> Iterator[Completion]:
        for completion in generate(groups, attempt=attempt):
            time.sleep(_PAUSE_S / 10)
            yield completion
        time.sleep(_PAUSE_S)

    engine.generate = slowly  # type: ignore[method-assign]
    return engine


def _generate(config: JobConfig, options: argparse.Namespace) -> None:
    print(render_terminal(generate_run(config, publish_it=not options.no_publish, engine_factory=slow_engine)))


if __name__ == "__main__":
    sys.exit(run_job(replace(JOB, call=_generate)))

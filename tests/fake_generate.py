"""`python -m tests.fake_generate --config FILE`: jobs.generate with a slow engine that needs no model.

Each call of the engine leaves an object beside the output, so that a test can tell what was written more than once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from e2p_ray.config import JobConfig
from e2p_ray.downstream.report import render_terminal
from e2p_ray.engine.fake import FakeEngine
from e2p_ray.schema import Completion, Group
from e2p_ray.storage import Storage
from jobs.cli import run_job
from jobs.generate import JOB
from jobs.whole_run import generate_run
from tests.small_job import fake_engine, first_groups

_PAUSE_S = 0.05


def calls_uri(config: JobConfig) -> str:
    """Where the engine's calls are written down, by every worker of every run of the job."""
    return f"{config.output.uri}-calls"


def slow_engine(config: JobConfig, storage: Storage) -> FakeEngine:
    """The fake engine, slow enough to be killed in the middle of a shard."""
    engine = fake_engine(config, storage)
    generate = engine.generate

    def note(attempt: int, groups: Sequence[Group]) -> None:
        keys = [request.key for group in groups for request in group.requests if request.key.user_id]
        call = json.dumps({"attempt": attempt, "keys": keys}).encode()
        storage.write_bytes(f"{calls_uri(config)}/{time.time_ns()}-{uuid.uuid4().hex}.json", call)

    def noted(groups: Iterable[Group | None]) -> Iterator[Group | None]:
        known, groups = first_groups(groups)
        note(0, known)
        for number, group in enumerate(groups):
            if number >= len(known) and group is not None:
                note(group.attempt, [group])
            yield group

    def slowly(groups: Iterable[Group | None]) -> Iterator[Completion]:
        for completion in generate(noted(groups)):
            time.sleep(_PAUSE_S / 10)
            yield completion
        time.sleep(_PAUSE_S)

    engine.generate = slowly  # type: ignore[method-assign]
    return engine


def _generate(config: JobConfig, options: argparse.Namespace) -> None:
    print(render_terminal(generate_run(config, publish_it=not options.no_publish, engine_factory=slow_engine)))


if __name__ == "__main__":
    sys.exit(run_job(replace(JOB, call=_generate)))

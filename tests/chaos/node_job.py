"""`python -m tests.chaos.node_job --config FILE`: jobs.generate with a slow engine that counts what it writes.

Every actor leaves a file beside the cache of base models, named by its node and process, with a line for each
personalised text that it wrote. While the folder of these files has one called `hold`, nobody writes any further.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import ray

from e2p_ray.config import JobConfig
from e2p_ray.downstream.report import render_terminal
from e2p_ray.engine.fake import FakeEngine
from e2p_ray.schema import Completion, Group, RequestKey
from e2p_ray.storage import Storage
from jobs.cli import run_job
from jobs.generate import JOB
from jobs.whole_run import generate_run
from tests.small_job import fake_engine

HOLD = "hold"
_PAUSE_S = 0.01


@dataclass(frozen=True)
class Actor:
    """One process that had its engine, and the keys that it wrote, again and again where it did."""

    node_id: str
    pid: int
    keys: tuple[tuple[str, ...], ...]


def actors(config: JobConfig) -> list[Actor]:
    """All actors of a job so far, in the order in which they had their engines."""
    found = []
    for path in sorted(actors_folder(config).glob("*.jsonl")):
        _, node_id, pid = path.stem.split("-")
        # The last line of an actor that was killed may be cut.
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        found.append(Actor(node_id, int(pid), tuple(tuple(json.loads(line)) for line in lines)))
    return found


def counted_engine(config: JobConfig, storage: Storage) -> FakeEngine:
    """The fake engine, slow enough to be killed in the middle of a shard."""
    folder = actors_folder(config)
    name = f"{time.time_ns()}-{ray.get_runtime_context().get_node_id()}-{os.getpid()}.jsonl"
    out = (folder / name).open("x", encoding="utf-8", buffering=1)
    engine = fake_engine(config, storage)
    generate = engine.generate

    def counted(groups: Iterable[Group | None]) -> Iterator[Completion]:
        # One unpersonalised text is written in every shard that needs it; a personalised one in a single shard.
        first = set[RequestKey]()

        def seen() -> Iterator[Group | None]:
            for group in groups:
                if group is not None and group.attempt == 0:
                    first.update(request.key for request in group.requests if request.user_embedding is not None)
                yield group

        for completion in generate(seen()):
            while (folder / HOLD).exists():
                time.sleep(_PAUSE_S)
            time.sleep(_PAUSE_S)
            if completion.key in first:
                first.remove(completion.key)
                out.write(json.dumps(completion.key) + "\n")
            yield completion

    engine.generate = counted  # type: ignore[method-assign]
    return engine


def actors_folder(config: JobConfig) -> Path:
    """Where actors leave their files: on this machine, wherever the output is."""
    assert config.base_model.cache_folder is not None
    return Path(config.base_model.cache_folder).with_name("actors")


def _generate(config: JobConfig, options: argparse.Namespace) -> None:
    print(render_terminal(generate_run(config, publish_it=not options.no_publish, engine_factory=counted_engine)))


if __name__ == "__main__":
    sys.exit(run_job(replace(JOB, call=_generate)))

"""Engines that end badly, as factories for workers. Apart from the tests: a worker imports what defines its engine, and
a test module brings 3 s of CPU time with it (torch, transformers, every job)."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from e2p_ray.batch import write
from e2p_ray.config import JobConfig
from e2p_ray.engine.fake import FakeEngine
from e2p_ray.plan import read_shard
from e2p_ray.schema import Completion, ErrorCode, FinishReason, Group
from e2p_ray.storage import Storage
from tests.small_job import fake_engine, first_groups


class Waiting:
    """An engine factory whose engines write nothing until a second worker has its engine, too."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, config: JobConfig, storage: Storage) -> FakeEngine:
        (self._folder / str(os.getpid())).touch()
        engine = fake_engine(config, storage)
        generate = engine.generate

        def waiting(groups: Iterable[Group | None]) -> Iterator[Completion]:
            for _ in range(1200):
                if len(list(self._folder.iterdir())) > 1:
                    break
                time.sleep(0.05)
            return generate(groups)

        engine.generate = waiting  # type: ignore[method-assign]
        return engine


class Following:
    """An engine factory that says how far its worker is: each shard that is read leaves a file, `read-` and its id, and
    the first one is written when a second one has been read (`ahead`), or after `max_wait_s` (`alone`).

    Two that are written at once leave a file `both`.
    """

    def __init__(self, folder: Path, max_wait_s: float) -> None:
        self._folder, self._max_wait_s = folder, max_wait_s

    def __call__(self, config: JobConfig, storage: Storage) -> FakeEngine:
        engine = fake_engine(config, storage)
        generate, read, busy = engine.generate, read_shard, threading.Lock()
        is_second = threading.Event()

        def reading(storage: Storage, plan_uri: str, shard_id: str) -> Any:
            groups = read(storage, plan_uri, shard_id)
            (self._folder / f"read-{shard_id}").touch()
            if len(list(self._folder.glob("read-*"))) > 1:
                is_second.set()
            return groups

        def following(groups: Iterable[Group | None]) -> Iterator[Completion]:
            if not busy.acquire(blocking=False):
                (self._folder / "both").touch()
            if not any((self._folder / name).exists() for name in ("ahead", "alone")):
                (self._folder / ("ahead" if is_second.wait(self._max_wait_s) else "alone")).touch()
            yield from generate(groups)
            busy.release()

        write.read_shard = reading  # type: ignore[attr-defined]
        engine.generate = following  # type: ignore[method-assign]
        return engine


class Poisoned:
    """An engine factory whose engine meets shards that end badly: by an exception, or by the death of its process.

    A shard is known by one of its keys; each bad end leaves a file, so that tries can be counted across processes.
    """

    def __init__(self, folder: Path, *, raising: tuple[str, ...] = (), killing: tuple[str, ...] = (), times: int = 99):
        self._folder, self._raising, self._killing, self._times = folder, raising, killing, times

    def __call__(self, config: JobConfig, storage: Storage) -> FakeEngine:
        engine = fake_engine(config, storage)
        generate, bad = engine.generate, {*self._raising, *self._killing}

        def poisoned(groups: Iterable[Group | None]) -> Iterator[Completion]:
            known, groups = first_groups(groups)
            for key in {"/".join(request.key) for group in known for request in group.requests} & bad:
                if self._num_tries_of(key) >= self._times:
                    continue
                (self._folder / f"{time.time_ns()}-{key.replace('/', '-')}").touch()
                if key in self._killing:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ValueError(f"the vector [0.25, 0.5] of {key} is bad")
            yield from generate(groups)

        engine.generate = poisoned  # type: ignore[method-assign]
        return engine

    def _num_tries_of(self, key: str) -> int:
        return len(list(self._folder.glob(f"*-{key.replace('/', '-')}")))

    def num_tries(self) -> int:
        return len(list(self._folder.iterdir()))


class Hanging:
    """An engine factory whose engine stops for ever at one request, once, holding Python's lock or not."""

    def __init__(self, folder: Path, key: str, *, with_lock: bool):
        self._mark, self._key, self._with_lock = folder / "hung", key, with_lock

    def __call__(self, config: JobConfig, storage: Storage) -> FakeEngine:
        engine = fake_engine(config, storage)
        generate = engine.generate

        def hanging(groups: Iterable[Group | None]) -> Iterator[Completion]:
            known, groups = first_groups(groups)
            keys = {"/".join(request.key) for group in known for request in group.requests}
            if self._key in keys and not self._mark.exists():
                self._mark.touch()
                if self._with_lock:
                    ctypes.PyDLL(None).sleep(600)  # PyDLL keeps the lock: no Python thread runs any more
                time.sleep(600)
            yield from generate(groups)

        engine.generate = hanging  # type: ignore[method-assign]
        return engine


def without_logits(config: JobConfig, storage: Storage) -> FakeEngine:
    """An engine whose every answer is an error."""
    engine = fake_engine(config, storage)
    generate = engine.generate

    def erring(groups: Iterable[Group | None]) -> Iterator[Completion]:
        for completion in generate(groups):
            yield replace(completion, text="", finish_reason=FinishReason.ERROR, error_code=ErrorCode.NON_FINITE_LOGITS)

    engine.generate = erring  # type: ignore[method-assign]
    return engine


class WithoutEnd:
    """An engine factory whose engines are not done in any time that a test waits for; with `num_first`, only those of
    the first so many workers that write."""

    def __init__(self, folder: Path, num_first: int | None = None) -> None:
        self._folder, self._num_first = folder, num_first

    def __call__(self, config: JobConfig, storage: Storage) -> FakeEngine:
        engine = fake_engine(config, storage)
        generate = engine.generate

        def sleeping(groups: Iterable[Group | None]) -> Iterator[Completion]:
            if self._num_first is None or len(list(self._folder.iterdir())) < self._num_first:
                (self._folder / str(os.getpid())).touch()
                time.sleep(600)
            return generate(groups)

        engine.generate = sleeping  # type: ignore[method-assign]
        return engine

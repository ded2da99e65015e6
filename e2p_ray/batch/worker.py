"""One worker of the pool: the engine, loaded once, and one shard at a time."""

from __future__ import annotations

import math
import os
import re
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime

import pyarrow as pa

from e2p_ray.batch.tally import OUTCOME, ShardOutcome
from e2p_ray.commit import Run, ShardStats, commit_shard
from e2p_ray.config import JobConfig
from e2p_ray.engine.contract import TextEngine
from e2p_ray.errors import E2PError, RunError
from e2p_ray.generate import Generator
from e2p_ray.plan import read_shard
from e2p_ray.schema import Generation, Group
from e2p_ray.storage import Storage

EngineFactory = Callable[[JobConfig, Storage], TextEngine]

_NUMBERS = re.compile(r"[\[(][^\[\]()]*\d\.\d[^\[\]()]*[\])]?")


class ShardWorker:
    """An actor's state: the engine, loaded once. Called with one shard id, returns one `ShardOutcome` as a row."""

    def __init__(
        self,
        config: JobConfig,
        storage: Storage,
        run: Run,
        engine_factory: EngineFactory | None,
        max_seconds: float | None = None,
    ) -> None:
        self._storage, self._run = storage, run
        self._max_seconds, self._began_s = max_seconds, math.inf  # the time counts from the worker's first shard
        self._worker = f"{socket.gethostname()}:{os.getpid()}"
        self._refusal: RunError | None = None
        try:
            self._engine = (engine_factory or _load_engine)(config, storage)
            self._generator = Generator(self._engine, config, run.run_id)
        except RunError as error:  # the same on every node: said once instead of tried again
            self._refusal = error

    def __call__(self, batch: pa.Table) -> pa.Table:
        shard_id = batch.column("shard_id")[0].as_py()
        started_at = datetime.now(UTC)
        try:
            if self._refusal is not None:
                raise self._refusal
            if self._is_over():
                return _as_row(ShardOutcome(shard_id, late=True))
            outcome = self._write(shard_id, started_at)
        except Exception as error:  # noqa: BLE001 - one shard's trouble must not become the trouble of the others
            outcome = _failed(shard_id, error, started_at)
        return _as_row(outcome)

    def _is_over(self) -> bool:
        """Whether the time is over; a worker's first shard is always begun, so that every run gets on."""
        now_s = time.monotonic()
        self._began_s = min(self._began_s, now_s)
        return self._max_seconds is not None and now_s > self._began_s + max(self._max_seconds, 0.0)

    def _write(self, shard_id: str, started_at: datetime) -> ShardOutcome:
        groups = read_shard(self._storage, self._run.plan_uri, shard_id)
        before, clock = self._engine.stats, time.perf_counter()
        generations, dead_letters = self._generator.generate(groups, shard_id=shard_id)
        work = self._engine.stats - before
        finished_at = datetime.now(UTC)
        stats = ShardStats(
            num_requests=len(generations) + len(dead_letters),
            num_prompt_tokens=work.num_prompt_tokens,
            num_computed_tokens=work.num_computed_tokens,
            num_output_tokens=work.num_output_tokens,
            num_truncated=work.num_truncated,
            seconds_s=time.perf_counter() - clock,
            started_at=started_at,
            finished_at=finished_at,
            worker=self._worker,
            num_draft_tokens=work.num_draft_tokens,
            num_accepted_tokens=work.num_accepted_tokens,
            **_drafts(groups, generations),
        )
        commit_shard(self._storage, self._run, shard_id, generations, dead_letters, stats)
        return ShardOutcome(
            shard_id=shard_id,
            num_requests=stats.num_requests,
            num_dead_letters=len(dead_letters),
            num_prompt_tokens=stats.num_prompt_tokens,
            num_computed_tokens=stats.num_computed_tokens,
            num_output_tokens=stats.num_output_tokens,
            started_at_s=started_at.timestamp(),
            finished_at_s=finished_at.timestamp(),
        )


def _as_row(outcome: ShardOutcome) -> pa.Table:
    return pa.table({name: [value] for name, value in asdict(outcome).items()}, schema=OUTCOME)


def _drafts(groups: Sequence[Group], generations: Sequence[Generation]) -> dict[str, int]:
    """How many texts had a draft, and how many of them came out the same."""
    drafts = {r.key: r.draft for group in groups for r in group.requests if r.draft is not None}
    num_kept = sum(drafts.get(row.key) == row.text for row in generations)
    return {"num_drafts": sum(row.key in drafts for row in generations), "num_texts_kept": num_kept}


def _load_engine(config: JobConfig, storage: Storage) -> TextEngine:
    # torch is loaded in the workers, not in the driver
    if config.engine.kind == "vllm":
        from e2p_ray.engine.vllm_engine import load_vllm_engine

        return load_vllm_engine(config, storage)
    from e2p_ray.engine.engine import load_engine

    return load_engine(config, storage)


def _failed(shard_id: str, error: Exception, started_at: datetime) -> ShardOutcome:
    return ShardOutcome(
        shard_id=shard_id,
        started_at_s=started_at.timestamp(),
        finished_at_s=time.time(),
        error_type=type(error).__name__,
        message=_said(error),
        fatal=isinstance(error, RunError),
    )


def _said(error: Exception) -> str:
    """An error's message. Ours name no user data; of others, only what cannot hold a text or a user embedding."""
    if os.environ.get("E2P_DEBUG"):
        return "".join(traceback.format_exception(error))
    if isinstance(error, E2PError):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    first = (str(error).splitlines() or [""])[0][:200]
    return f"{_NUMBERS.sub('[numbers]', first)} ({os.path.basename(frame.filename)}:{frame.lineno})"


def last_line(error: Exception) -> str:
    """What a Ray error is about, without its remote traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _NUMBERS.sub("[numbers]", f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300])

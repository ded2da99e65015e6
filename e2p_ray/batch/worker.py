"""One worker of the pool: the engine, loaded once, and one shard, or one piece of a shard, at a time."""

from __future__ import annotations

import math
import os
import re
import socket
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime

import pyarrow as pa

from e2p_ray.batch.logs import ActorLog
from e2p_ray.batch.metrics import BatchMetrics
from e2p_ray.batch.pieces import Piece, write_piece
from e2p_ray.batch.tally import OUTCOME, ShardOutcome
from e2p_ray.batch.watchdog import Watchdog
from e2p_ray.commit import Run, ShardStats, commit_shard
from e2p_ray.config import JobConfig
from e2p_ray.engine.contract import TextEngine
from e2p_ray.errors import E2PError, IncompatibleError, RunError
from e2p_ray.loaded import EngineFactory, LoadedGenerator
from e2p_ray.plan import read_shard
from e2p_ray.schema import DeadLetter, Generation, Group
from e2p_ray.storage import Storage

_MAX_CHARS = 200  # of a stranger's message
_NUMBERS = re.compile(r"[\[(][^\[\]()]*\d\.\d[^\[\]()]*[\])]?")


class ShardWorker:
    """An actor's state: the engine, loaded once. Called with one `Piece` as a row, returns one `ShardOutcome` as a row.

    A piece without ends is its whole shard.
    """

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
        self._max_step_s = config.workers.max_step_s
        self._worker = f"{socket.gethostname()}:{os.getpid()}"
        self._refusal: RunError | None = None
        self._metrics = BatchMetrics()
        self._log = ActorLog(on=config.workers.log_shards, run_id=run.run_id, worker=self._worker)
        clock = time.perf_counter()
        try:
            self._generator = LoadedGenerator(config, storage, run.run_id, engine_factory=engine_factory)
            _refuse_other_artifacts(self._generator.engine, run)
        except RunError as error:  # the same on every node: said once instead of tried again
            self._refusal = error
            self._metrics.worker_refused()
            self._log.error("worker_refused", error_type=type(error).__name__, message=str(error))
        else:
            ids = {"projector_id": self._generator.projector_id, "base_model_id": self._generator.base_model_id}
            seconds_s = time.perf_counter() - clock
            self._metrics.worker_ready(seconds_s)
            self._log.info("worker_ready", seconds_s=round(seconds_s, 3), **ids)

    def __call__(self, batch: pa.Table) -> pa.Table:
        row = batch.to_pylist()[0]
        shard_id = row["shard_id"]
        piece = Piece(**row) if row.get("end") is not None else None
        started_at = datetime.now(UTC)
        try:
            if self._refusal is not None:
                raise self._refusal
            if self._is_over():
                return _as_row(ShardOutcome(shard_id, late=True))
            outcome = self._write(shard_id, piece, started_at)
        except Exception as error:  # noqa: BLE001 - one shard's trouble must not become the trouble of the others
            outcome = replace(_failed(shard_id, error, started_at), is_piece=piece is not None, worker=self._worker)
            self._metrics.shard_failed()
            self._log.error("shard_failed", shard_id=shard_id, error_type=outcome.error_type, message=outcome.message)
        return _as_row(outcome)

    def _is_over(self) -> bool:
        """Whether the time is over; a worker's first shard is always begun, so that every run gets on."""
        now_s = time.monotonic()
        self._began_s = min(self._began_s, now_s)
        return self._max_seconds is not None and now_s > self._began_s + max(self._max_seconds, 0.0)

    def _write(self, shard_id: str, piece: Piece | None, started_at: datetime) -> ShardOutcome:
        groups = read_shard(self._storage, self._run.plan_uri, shard_id)
        if piece is not None:
            groups = piece.of(groups)
        before, clock = self._generator.stats, time.perf_counter()
        with Watchdog(self._generator.engine, self._max_step_s):
            generations, dead_letters = self._generator.generate(groups, shard_id=shard_id)
        work = self._generator.stats - before
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
        if piece is None:
            commit_shard(self._storage, self._run, shard_id, generations, dead_letters, stats)
        else:
            write_piece(self._storage, self._run, piece, generations, dead_letters, stats)
        self._tell(shard_id, piece is not None, generations, dead_letters, stats)
        return ShardOutcome(
            shard_id=shard_id,
            num_requests=stats.num_requests,
            num_dead_letters=len(dead_letters),
            num_prompt_tokens=stats.num_prompt_tokens,
            num_computed_tokens=stats.num_computed_tokens,
            num_output_tokens=stats.num_output_tokens,
            started_at_s=started_at.timestamp(),
            finished_at_s=finished_at.timestamp(),
            is_piece=piece is not None,
        )

    def _tell(
        self,
        shard_id: str,
        is_piece: bool,
        generations: Sequence[Generation],
        dead_letters: Sequence[DeadLetter],
        stats: ShardStats,
    ) -> None:
        """Metrics and log of a committed shard, or of a written piece of one."""
        self._metrics.shard_done(generations, dead_letters, stats, is_piece=is_piece)
        self._log.info(
            "piece_done" if is_piece else "shard_done",
            shard_id=shard_id,
            num_requests=stats.num_requests,
            num_dead_letters=len(dead_letters),
            num_output_tokens=stats.num_output_tokens,
            seconds_s=round(stats.seconds_s, 3),
        )


def _as_row(outcome: ShardOutcome) -> pa.Table:
    return pa.table({name: [value] for name, value in asdict(outcome).items()}, schema=OUTCOME)


def _drafts(groups: Sequence[Group], generations: Sequence[Generation]) -> dict[str, int]:
    """How many texts had a draft, and how many of them came out the same."""
    drafts = {r.key: r.draft for group in groups for r in group.requests if r.draft is not None}
    num_kept = sum(drafts.get(row.key) == row.text for row in generations)
    return {"num_drafts": sum(row.key in drafts for row in generations), "num_texts_kept": num_kept}


def _refuse_other_artifacts(engine: TextEngine, run: Run) -> None:
    """A projector or base model that was replaced since the run was opened would write texts that are not the run's."""
    for what in ("projector_id", "base_model_id", "embedding_space"):
        opened, loaded = getattr(run, what), getattr(engine, what)
        if opened != loaded:
            raise IncompatibleError(
                f"run {run.run_id} was opened with {what} {opened!r}, this worker loaded {loaded!r}: it was replaced "
                "meanwhile. What is committed stays with its run. Run the same command again: it makes a run of what "
                "is there now; or put the old one back, and it resumes"
            )


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
    first = (str(error).splitlines() or [""])[0]
    if len(first) > _MAX_CHARS:  # without a word that is cut: no purge would find half a user id
        first = first[:_MAX_CHARS].rpartition(" ")[0] + " ..."
    return f"{_NUMBERS.sub('[numbers]', first)} ({os.path.basename(frame.filename)}:{frame.lineno})"


def last_line(error: Exception) -> str:
    """What a Ray error is about, without its remote traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _NUMBERS.sub("[numbers]", f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300])

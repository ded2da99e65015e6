"""One shard, or one piece of a shard: read, written by a model, committed. What workers and replicas have in common."""

from __future__ import annotations

import os
import re
import socket
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from e2p_ray.batch.logs import ActorLog
from e2p_ray.batch.metrics import BatchMetrics
from e2p_ray.batch.pieces import Piece, write_piece
from e2p_ray.batch.tally import ShardOutcome
from e2p_ray.commit import Run, ShardStats, commit_shard
from e2p_ray.commit.failures import cut_between_words
from e2p_ray.commit.run import ARTIFACTS
from e2p_ray.config import JobConfig
from e2p_ray.engine.contract import Artifacts, EngineStats
from e2p_ray.errors import E2PError, IncompatibleError, RunError
from e2p_ray.loaded import LoadedGenerator
from e2p_ray.plan import read_shard
from e2p_ray.schema import DeadLetter, Generation, Group
from e2p_ray.storage import Storage

_MAX_CHARS = 200  # of a stranger's message
_MAX_LINE_CHARS = 300  # of Ray's
_NUMBERS = re.compile(r"[\[(][^\[\]()]*\d\.\d[^\[\]()]*[\])]?")


@dataclass(frozen=True)
class Written:
    """What a model made of groups, and what it took."""

    generations: Sequence[Generation]
    dead_letters: Sequence[DeadLetter]
    work: EngineStats
    started_at: datetime
    seconds_s: float


# Groups and the id of their shard; None where the time is over.
WriteGroups = Callable[[Sequence[Group], str], Written | None]


def written_by(generator: LoadedGenerator, groups: Sequence[Group], shard_id: str) -> Written:
    """Groups in one call of a generator."""
    before, started_at, clock = generator.stats, datetime.now(UTC), time.perf_counter()
    generations, dead_letters = generator.generate(groups, shard_id=shard_id)
    return Written(generations, dead_letters, generator.stats - before, started_at, time.perf_counter() - clock)


class ShardWriter:
    """Makes shards of a run durable. A shard's trouble becomes its outcome, never an exception."""

    def __init__(self, storage: Storage, run: Run, *, metrics: BatchMetrics, log: ActorLog, worker: str) -> None:
        self._storage, self._run = storage, run
        self._metrics, self._log, self._worker = metrics, log, worker
        self._refusal: RunError | None = None

    def refuse(self, error: RunError) -> None:
        """Write nothing from now on, and say this of every shard."""
        self._refusal = error
        self._metrics.worker_refused()
        self._log.error("worker_refused", error_type=type(error).__name__, message=str(error))

    @property
    def refuses(self) -> bool:
        return self._refusal is not None

    def write(self, row: Mapping[str, Any], write_groups: WriteGroups) -> ShardOutcome:
        """Read, write and commit what a row says: the fields of a `Piece`; without ends it is its whole shard."""
        shard_id, started_at = str(row["shard_id"]), datetime.now(UTC)
        piece = Piece(**row) if row.get("end") is not None else None
        try:
            if self._refusal is not None:
                raise self._refusal
            return self._write(shard_id, piece, write_groups)
        except Exception as error:  # noqa: BLE001 - one shard's trouble must not become the trouble of the others
            outcome = replace(_failed(shard_id, error, started_at), is_piece=piece is not None, worker=self._worker)
            self._metrics.shard_failed()
            self._log.error("shard_failed", shard_id=shard_id, error_type=outcome.error_type, message=outcome.message)
            return outcome

    def _write(self, shard_id: str, piece: Piece | None, write_groups: WriteGroups) -> ShardOutcome:
        groups = read_shard(self._storage, self._run.plan_uri, shard_id)
        if piece is not None:
            groups = piece.of(groups)
        written = write_groups(groups, shard_id)
        if written is None:
            return ShardOutcome(shard_id, late=True)
        work, generations, dead_letters = written.work, written.generations, written.dead_letters
        finished_at = datetime.now(UTC)
        stats = ShardStats(
            num_requests=len(generations) + len(dead_letters),
            num_prompt_tokens=work.num_prompt_tokens,
            num_computed_tokens=work.num_computed_tokens,
            num_output_tokens=work.num_output_tokens,
            num_truncated=work.num_truncated,
            seconds_s=written.seconds_s,
            started_at=written.started_at,
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
            started_at_s=written.started_at.timestamp(),
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


def this_process() -> str:
    """Host and process, as logs and outcomes name workers."""
    return f"{socket.gethostname()}:{os.getpid()}"


def refuse_other_artifacts(generator: LoadedGenerator, run: Run) -> None:
    """A projector or base model that was replaced since the run was opened would write texts that are not the run's."""
    if other := other_artifact(run, generator):
        what, loaded = other
        raise IncompatibleError(
            f"run {run.run_id} was opened with {what} {getattr(run, what)!r}, this worker loaded {loaded!r}: it was "
            "replaced meanwhile. What is committed stays with its run. Run the same command again: it makes a run of "
            "what is there now; or put the old one back, and it resumes"
        )


def other_artifact(run: Run, found: Artifacts) -> tuple[str, str] | None:
    """The first id that is not the run's: its name, and the id that was found."""
    for what in ARTIFACTS:
        if getattr(run, what) != (other := getattr(found, what)):
            return what, other
    return None


def _drafts(groups: Sequence[Group], generations: Sequence[Generation]) -> dict[str, int]:
    """How many texts had a draft, and how many of them came out the same."""
    drafts = {r.key: r.draft for group in groups for r in group.requests if r.draft is not None}
    num_kept = sum(drafts.get(row.key) == row.text for row in generations)
    return {"num_drafts": sum(row.key in drafts for row in generations), "num_texts_kept": num_kept}


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
    first = cut_between_words((str(error).splitlines() or [""])[0], _MAX_CHARS)
    return f"{_NUMBERS.sub('[numbers]', first)} ({os.path.basename(frame.filename)}:{frame.lineno})"


def stalled(config: JobConfig, *, others_may_have: str = "") -> TimeoutError:
    """No shard of an attempt ended for as long as one may take, perhaps because others have what a worker needs."""
    said = (
        f"no shard ended within workers.max_stall_s, {config.workers.max_stall_s:g} s. Where shards take longer, raise "
        "it, or lower plan.requests_per_shard"
    )
    return TimeoutError(f"{said}. Where none began, {others_may_have}" if others_may_have else said)


def last_line(error: Exception) -> str:
    """What a Ray error is about, without its remote traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = cut_between_words(f"{type(error).__name__}: {lines[-1] if lines else ''}", _MAX_LINE_CHARS)
    return _NUMBERS.sub("[numbers]", said)

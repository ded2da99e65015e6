"""A run's pending shards through Ray Data to a pool of generator actors, until none is left or the attempts are used.

A worker reads a shard, generates and commits it; what comes back is one small row of counts (`pool.py`). A shard that
fails is a row too, never an exception, and a shard whose worker died leaves no row at all: after each pass the markers
alone say what is left. A shard that ends its workers in every attempt is halved down to the requests that do it; these
become dead letters, and the rest of the shard is committed.

Where a running Serve application is named, its live replicas take the place of the pool (`through.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from e2p_ray import errors
from e2p_ray.batch.failures import FailureNotes
from e2p_ray.batch.limit import DeadLetterLimit
from e2p_ray.batch.poison import PoisonSearch
from e2p_ray.batch.tally import BatchProgress, BatchSummary, ShardOutcome, Tally
from e2p_ray.batch.worker import ShardWorker
from e2p_ray.batch.write import last_line
from e2p_ray.commit import Run, pending_shards
from e2p_ray.config import JobConfig
from e2p_ray.config.uris import absolute
from e2p_ray.engine_process import engine_variables
from e2p_ray.errors import E2PError, IncompleteRunError, RunError
from e2p_ray.fork_server import NO_FORKS
from e2p_ray.loaded import EngineFactory
from e2p_ray.plan import largest_first
from e2p_ray.ray_session import ray_session
from e2p_ray.storage import Storage

__all__ = ["BatchProgress", "BatchSummary", "EngineFactory", "ShardOutcome", "ShardWorker", "run_batch"]

_MAX_NAMED_SHARDS = 5
Outcomes = Callable[[Sequence[Mapping[str, Any]]], Generator[ShardOutcome]]


def run_batch(
    config: JobConfig,
    storage: Storage,
    run: Run,
    *,
    engine_factory: EngineFactory | None = None,
    on_progress: Callable[[BatchProgress], None] | None = None,
    max_seconds: float | None = None,
    max_dead_letters: int | None = None,
    through_serve: str | None = None,
    forks: Mapping[str, str] = NO_FORKS,
) -> BatchSummary:
    """Generate and commit every pending shard of an opened run.

    `through_serve` names a running Serve application whose replicas write the shards, in place of a pool of its own.
    `forks` names a fork server for its workers, see `engine_process.engine_forks`.
    `max_dead_letters` is how many dead letters its shards may have and the run still be published: with more it stops
    at once, by GateError. No shard is begun after `max_seconds` of generation, counted by each worker from its first
    one; the summary says which were left, and shards that failed and could not be tried again are among them.

    Raises IncompleteRunError when shards are left after `workers.max_shard_attempts` tries each and the search for what
    ends their workers, or the RunError that a worker met when no shard can be generated at all. Either way, what is
    committed stays, and calling again resumes.
    """
    pending = at_first = pending_shards(storage, run)
    if pending and max_seconds is None:  # else an update's own order says what is left when the time is over
        pending = largest_first(storage, run.plan_uri, pending)
    tally = Tally(len(run.shard_ids), len(run.shard_ids) - len(pending), on_progress)
    limit = DeadLetterLimit(storage, run, max_dead_letters)
    notes = FailureNotes(storage, run, tally)
    limit.check(tally)
    variables, is_alone = engine_variables(config), False  # variables: that workers are still to be given
    order = config.with_absolute_places(), storage, _with_absolute_places(run)

    def outcomes(pieces: Sequence[Mapping[str, Any]]) -> Generator[ShardOutcome]:
        left_s = None if max_seconds is None else max_seconds - tally.progress().generating_s
        if through_serve is not None:
            return _replicas()(through_serve, order, pieces, left_s)
        arguments = *order, engine_factory, left_s
        return _pool()(config, arguments, tally, pieces, variables, is_alone=is_alone)

    def still_pending() -> list[str]:
        left = pending_shards(storage, run)
        tally.found_committed(set(at_first).difference(left))
        return left

    def one_pass(pieces: Sequence[Mapping[str, Any]]) -> None:
        _one_pass(pieces, outcomes, tally, limit, notes)

    if pending:
        # A Ray of its own would have no service.
        address = config.workers.ray_address or (None if through_serve is None else "auto")
        needed = _pool if through_serve is None else _replicas
        with ray_session(address, variables=variables, meanwhile=needed, forks=forks) as is_alone:
            if is_alone:
                variables = {}
            while pending and tally.attempt < config.workers.max_shard_attempts:
                tally.next_attempt()
                one_pass([{"shard_id": shard_id, "first": None, "end": None} for shard_id in pending])
                pending = still_pending()
                if tally.late:
                    break
            # A pass that Ray Data gave up on says nothing of single shards: no worker started, or none got on.
            # And a service that answers people is not what to search with: the search ends processes.
            if pending and not tally.late and not tally.pass_failure and through_serve is None:
                search = PoisonSearch(storage, run, config.workers.max_poison_requests, tally, one_pass)
                search.among(pending)
                pending = still_pending()
    notes.forget_all_but(pending)
    if pending and not (tally.late and tally.done):
        raise IncompleteRunError(_what_is_left(run, pending, tally))
    return tally.summary(pending)


def _with_absolute_places(run: Run) -> Run:
    return replace(run, uri=absolute(run.uri), table_uri=absolute(run.table_uri), plan_uri=absolute(run.plan_uri))


def _pool() -> Callable[..., Generator[ShardOutcome]]:
    """It brings Ray Data: a second of CPU time that a run with nothing to do need not spend."""
    from e2p_ray.batch.pool import pool_outcomes

    return pool_outcomes


def _replicas() -> Callable[..., Generator[ShardOutcome]]:
    """They bring Ray Serve: a second that every worker of a pool would spend in vain."""
    from e2p_ray.batch.through import replica_outcomes

    return replica_outcomes


def _one_pass(
    pieces: Sequence[Mapping[str, Any]], outcomes: Outcomes, tally: Tally, limit: DeadLetterLimit, notes: FailureNotes
) -> None:
    """Each of these shards or pieces once."""
    tally.pass_failure = ""
    silent = Counter(str(piece["shard_id"]) for piece in pieces)
    try:
        with closing(outcomes(pieces)) as found:
            for outcome in found:
                tally.add(outcome)
                silent[outcome.shard_id] -= 1
                if outcome.error_type:
                    notes.said(outcome)
                if outcome.fatal:
                    raise _as_raised(outcome)
                limit.check(tally)
    except E2PError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever the pass was given up for, the markers know what is left
        tally.pass_failure = last_line(error)
    notes.unsaid(+silent)


def _as_raised(outcome: ShardOutcome) -> RunError:
    """The worker's error again, of the same class, so that the exit code is right."""
    kind: Any = getattr(errors, outcome.error_type, RunError)
    error: RunError = kind.__new__(kind)
    error.args = (outcome.message,)
    return error


def _what_is_left(run: Run, pending: list[str], tally: Tally) -> str:
    said = {outcome.shard_id: f"{outcome.error_type}: {outcome.message}" for outcome in tally.failures}
    said = dict.fromkeys(tally.late, "not begun, as the time was over") | said
    died = tally.pass_failure or "its worker died each time (out of memory?)"
    lines = [f"  {shard_id}: {said.get(shard_id, died)}" for shard_id in pending[:_MAX_NAMED_SHARDS]]
    if len(pending) > _MAX_NAMED_SHARDS:
        lines.append(f"  ... and {len(pending) - _MAX_NAMED_SHARDS} more")
    return "\n".join(
        [
            f"run {run.run_id}: {len(pending)} of {len(run.shard_ids)} shards are left after attempt {tally.attempt}",
            *lines,
            "The others are committed. Run the same command again: it resumes with what is left",
        ]
    )

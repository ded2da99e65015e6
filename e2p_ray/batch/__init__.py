"""A run's pending shards through Ray Data to a pool of generator actors, until none is left or the attempts are used.

Ray Data gets one row a shard, each its own block. A worker reads the shard, generates and commits it; what comes back
is one small row of counts. A shard that fails is a row too, never an exception, and a shard whose worker died leaves no
row at all: after each pass the markers alone say what is left. A shard that ends its workers in every attempt is halved
down to the requests that do it; these become dead letters, and the rest of the shard is committed.

Where a running Serve application is named, its live replicas take the place of the pool (`through.py`).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy, DataContext

from e2p_ray import errors
from e2p_ray.batch.failures import FailureNotes
from e2p_ray.batch.limit import DeadLetterLimit
from e2p_ray.batch.pace import Pace, steps_wait_for_nothing
from e2p_ray.batch.poison import PoisonSearch
from e2p_ray.batch.session import check_resources
from e2p_ray.batch.tally import BatchProgress, BatchSummary, ShardOutcome, Tally
from e2p_ray.batch.worker import ShardWorker
from e2p_ray.batch.write import last_line
from e2p_ray.commit import Run, pending_shards
from e2p_ray.config import JobConfig
from e2p_ray.errors import ConfigError, E2PError, IncompleteRunError, RunError
from e2p_ray.loaded import EngineFactory, engine_variables
from e2p_ray.plan import largest_first
from e2p_ray.ray_session import quiet_ray_data_log, ray_session
from e2p_ray.storage import Storage

__all__ = ["BatchProgress", "BatchSummary", "EngineFactory", "ShardOutcome", "ShardWorker", "run_batch"]

_MAX_INIT_FAILURES = 2  # of workers in a row, each after one more try in its own process
# A worker reads its next shard and commits its last one while it writes: where storage takes 0.15 s a call, 1.0 for
# 1.7 s a shard that is written in one (2026-11-28). Where a pass is to find out whose death takes which shard, it does
# not, nor where workers have so few shards each that one which waits at a busy worker is missed at an idle one.
_LEAST_SHARDS_TO_READ_AHEAD = 16
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
) -> BatchSummary:
    """Generate and commit every pending shard of an opened run.

    `through_serve` names a running Serve application whose replicas write the shards, in place of a pool of its own.
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
    variables = engine_variables(config)  # that workers are still to be given

    def outcomes(pieces: Sequence[Mapping[str, Any]]) -> Generator[ShardOutcome]:
        left_s = None if max_seconds is None else max_seconds - tally.progress().generating_s
        if through_serve is not None:
            # It brings Ray Serve: a second of CPU time that every worker of a pool would spend in vain.
            from e2p_ray.batch.through import replica_outcomes

            return replica_outcomes(through_serve, (config, storage, run), pieces, left_s)
        return _pool_outcomes(config, (config, storage, run, engine_factory, left_s), tally, pieces, variables)

    def still_pending() -> list[str]:
        left = pending_shards(storage, run)
        tally.found_committed(set(at_first).difference(left))
        return left

    def one_pass(pieces: Sequence[Mapping[str, Any]]) -> None:
        _one_pass(pieces, outcomes, tally, limit, notes)

    if pending:
        # A Ray of its own would have no service.
        address = config.workers.ray_address or (None if through_serve is None else "auto")
        with ray_session(address, variables=variables) as all_have_them:
            if all_have_them:
                variables = {}
            while pending and tally.attempt < config.workers.max_shard_attempts:
                tally.next_attempt()
                one_pass([{"shard_id": shard_id, "first": None, "end": None} for shard_id in pending])
                pending = still_pending()
                if tally.num_late:
                    break
            # A pass that Ray Data gave up on says nothing of single shards: no worker started, or none got on.
            # And a service that answers people is not what to search with: the search ends processes.
            if pending and not tally.num_late and not tally.pass_failure and through_serve is None:
                search = PoisonSearch(storage, run, config.workers.max_poison_requests, tally, one_pass)
                search.among(pending)
                pending = still_pending()
    notes.forget_all_but(pending)
    if pending and not (tally.num_late and tally.done):
        raise IncompleteRunError(_what_is_left(run, pending, tally))
    return tally.summary(pending)


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


def _pool_outcomes(
    config: JobConfig,
    arguments: tuple[Any, ...],
    tally: Tally,
    pieces: Sequence[Mapping[str, Any]],
    variables: Mapping[str, str],
) -> Generator[ShardOutcome]:
    """What a pool of actors says of each; `arguments` make a worker, in a process with these variables."""
    tally.wait_for(check_resources(config))
    context = DataContext.get_current().copy()
    with DataContext.current(_configured(context, config)), quiet_ray_data_log(), steps_wait_for_nothing():
        rows = _dataset(config, pieces, arguments, variables, may_read_ahead=tally.attempt == 1)
        try:
            for block in rows.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
                for row in pa.table(block).to_pylist():
                    yield ShardOutcome(**row)
        except Exception:
            if tally.waits_for and (missing := check_resources(config)):
                raise ConfigError(
                    f"{missing}, and none that has came within workers.max_stall_s, {config.workers.max_stall_s:g} s. "
                    "Lower them, or add such a node"
                ) from None
            raise


def _configured(context: DataContext, config: JobConfig) -> DataContext:
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A shard whose worker died is an errored block: the next pass has it again, the others go on.
    context.max_errored_blocks = -1
    context.actor_init_retry_on_errors = True
    context.actor_init_max_retries = 1
    context.max_consecutive_actor_init_deaths = _MAX_INIT_FAILURES
    # With one shard at an actor at a time, a pool is never more than busy: the default threshold would not let it grow.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, Pace]
    # When the restarts below are used up, Ray Data waits on a pool without actors: this ends the pass.
    context.execution_no_progress_timeout_s = config.workers.max_stall_s
    return context


def _dataset(
    config: JobConfig,
    pieces: Sequence[Mapping[str, Any]],
    arguments: tuple[Any, ...],
    variables: Mapping[str, str],
    *,
    may_read_ahead: bool,
) -> ray.data.Dataset:
    """The outcomes of these shards or pieces."""
    workers = config.workers
    max_size = min(workers.max_size, len(pieces))
    num_at_once = 2 if may_read_ahead and len(pieces) >= _LEAST_SHARDS_TO_READ_AHEAD * max_size else 1
    items = ray.data.from_items([dict(piece) for piece in pieces], override_num_blocks=len(pieces))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # max_restarts and max_task_retries have no named parameter in this Ray
        return items.map_batches(
            ShardWorker,
            fn_constructor_args=arguments,
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=min(workers.min_size, max_size),
                max_size=max_size,
                max_tasks_in_flight_per_actor=num_at_once,
                max_concurrent_calls_per_actor=num_at_once,
                enable_true_multi_threading=True,  # the worker itself writes one shard at a time
            ),
            num_cpus=workers.num_cpus,
            num_gpus=workers.num_gpus,
            # A process of its own, begun when it is asked for: without, it may be one that Ray has begun already.
            runtime_env={"env_vars": dict(variables)} if variables else None,
            # A shard is not tried twice within a pass, so each kills an actor once at most; a few more for spot nodes.
            max_task_retries=0,
            max_restarts=len(pieces) + 2 * max_size,
        )


def _as_raised(outcome: ShardOutcome) -> RunError:
    """The worker's error again, of the same class, so that the exit code is right."""
    kind: Any = getattr(errors, outcome.error_type, RunError)
    error: RunError = kind.__new__(kind)
    error.args = (outcome.message,)
    return error


def _what_is_left(run: Run, pending: list[str], tally: Tally) -> str:
    said = {outcome.shard_id: f"{outcome.error_type}: {outcome.message}" for outcome in tally.failures}
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

"""Shards through Ray Data to a pool of generator actors.

Ray Data gets one row a shard, each its own block. What comes back of it is one small row of counts; nothing, where the
worker died.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.data.exceptions import ExecutionTimeoutError

from e2p_ray.batch.alone import no_actors_for_others
from e2p_ray.batch.pace import Pace, steps_wait_for_nothing
from e2p_ray.batch.session import check_resources, what_others_may_have
from e2p_ray.batch.tally import ShardOutcome, Tally
from e2p_ray.batch.worker import ShardWorker
from e2p_ray.batch.write import stalled
from e2p_ray.config import JobConfig
from e2p_ray.errors import ConfigError
from e2p_ray.ray_session import quiet_ray_data_log

_MAX_INIT_FAILURES = 2  # of workers in a row, each after one more try in its own process
LEAST_SHARDS_TO_READ_AHEAD = 16


def pool_outcomes(
    config: JobConfig,
    arguments: tuple[Any, ...],
    tally: Tally,
    pieces: Sequence[Mapping[str, Any]],
    variables: Mapping[str, str],
    *,
    is_alone: bool,
) -> Generator[ShardOutcome]:
    """What a pool of actors says of each; `arguments` make a worker, in a process with these variables.

    is_alone: on a Ray that was started for this job.
    """
    tally.wait_for(check_resources(config))
    is_silent = True
    context = DataContext.get_current().copy()
    with (
        DataContext.current(_configured(context, config)),
        quiet_ray_data_log(),
        steps_wait_for_nothing(),
        no_actors_for_others() if is_alone else nullcontext(),
    ):
        rows = _dataset(config, pieces, arguments, variables, may_read_ahead=_may_read_ahead(tally, pieces))
        try:
            for block in rows.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
                for row in pa.table(block).to_pylist():
                    is_silent = False
                    yield ShardOutcome(**row)
        except Exception as error:
            if tally.waits_for and (missing := check_resources(config)):
                raise ConfigError(
                    f"{missing}, and none that has came within workers.max_stall_s, {config.workers.max_stall_s:g} s. "
                    "Lower them, or add such a node"
                ) from None
            if isinstance(error, ExecutionTimeoutError):  # it names an option of Ray Data
                raise stalled(config, others_may_have=what_others_may_have(config) if is_silent else "") from None
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


def reads_ahead(num_pieces: int, max_size: int) -> bool:
    """Whether workers read their next shard and commit their last one while they write.

    Where storage takes 0.15 s a call, 1.0 for 1.7 s a shard that is written in one (2026-11-28). Not where several
    workers have so few each that one which waits at a busy worker is missed at an idle one.
    """
    return max_size == 1 or num_pieces >= LEAST_SHARDS_TO_READ_AHEAD * max_size


def _may_read_ahead(tally: Tally, pieces: Sequence[Mapping[str, Any]]) -> bool:
    """Not where a pass is to find out whose death takes which shard, or which piece: a death takes what is read, too.

    A request that is lost beside a poisonous one, alone and again, would be given up as poison itself.
    """
    return tally.attempt == 1 and all(piece["end"] is None for piece in pieces)


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
    num_at_once = 2 if may_read_ahead and reads_ahead(len(pieces), max_size) else 1
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

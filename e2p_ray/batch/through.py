"""Shards through the live replicas of a running Serve application: one copy of the model serves both.

A replica is sent ids; it reads, writes and commits the shard as a worker of the pool does, in the pauses that online
requests leave. A shard that a replica has begun is finished even where this process ends.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from e2p_ray.batch.tally import ShardOutcome
from e2p_ray.batch.write import last_line, other_artifact, stalled
from e2p_ray.commit import Run
from e2p_ray.config import JobConfig
from e2p_ray.errors import ConfigError, IncompatibleError
from e2p_ray.storage import Storage

_PER_REPLICA = 2  # one is written while the next one is read and the one before is committed
_MAX_THREADS = 512  # that wait for replicas, each for one shard


@dataclass(frozen=True)
class ServedTexts:
    """What determines the texts of an application besides content and user."""

    projector_id: str
    base_model_id: str
    embedding_space: str
    text_hash: str  # see JobConfig.text_hash


def refuse_other_texts(served: ServedTexts, config: JobConfig, run: Run, who: str) -> None:
    """Raise IncompatibleError where `who` would write texts that are not the run's."""
    if other := other_artifact(run, served):
        what, found = other
        raise IncompatibleError(
            f"run {run.run_id} was opened with {what} {getattr(run, what)!r}, {who} serves {found!r}. "
            "Deploy the run's first, or generate without --through-serve"
        )
    if served.text_hash != config.text_hash():
        raise IncompatibleError(
            f"{who} serves other tasks or checks than run {run.run_id}, or with another base_model.dtype. Deploy this "
            "job's configuration first, or generate without --through-serve"
        )


def replica_outcomes(
    app: str, order: tuple[JobConfig, Storage, Run], pieces: Sequence[Mapping[str, Any]], max_seconds: float | None
) -> Generator[ShardOutcome]:
    """What replicas say of each of these shards; one whose replica died says nothing.

    No shard is sent after `max_seconds`, but one always is. Raises ConfigError where there is no such application,
    IncompatibleError where it would write other texts, TimeoutError where no shard ends within workers.max_stall_s.
    """
    config, storage, run = order
    handle = _handle_of(app, config, run)
    # The ids of a large run are megabytes, and a replica needs one at a time.
    sent = (config, storage, replace(run, shard_ids=()))
    waiting, began_s = deque(pieces), time.monotonic()
    running: dict[Future[dict[str, Any]], tuple[str, Any]] = {}  # shard id and the handle's response
    pool = ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="shards")
    try:
        while waiting or running:
            while waiting and len(running) < _max_running(app):
                is_over = max_seconds is not None and time.monotonic() > began_s + max(max_seconds, 0.0)
                if is_over and len(waiting) < len(pieces):
                    yield ShardOutcome(str(waiting.popleft()["shard_id"]), late=True)
                    continue
                piece = dict(waiting.popleft())
                response = handle.write_shard.remote(piece, *sent)
                running[pool.submit(response.result)] = piece["shard_id"], response
            done, _ = wait(running, config.workers.max_stall_s, FIRST_COMPLETED)
            if not done and running:
                raise stalled(config)
            for future in done:
                shard_id, _ = running.pop(future)
                try:
                    yield ShardOutcome(**future.result())
                except RayTaskError as error:
                    yield ShardOutcome(shard_id, error_type=type(error.cause).__name__, message=last_line(error))
                except RayError:
                    continue  # its replica died: the next attempt has it again
    finally:
        for _, response in running.values():
            response.cancel()
        pool.shutdown(wait=False, cancel_futures=True)


def _handle_of(app: str, config: JobConfig, run: Run) -> Any:
    try:
        handle: Any = serve.get_app_handle(app)
        # Where it is scaled to zero, this starts a replica.
        served = handle.served_texts.remote().result(timeout_s=config.workers.max_stall_s)
    except (RayServeException, RayError, TimeoutError) as error:
        raise ConfigError(f"--through-serve {app}: it takes no shards ({last_line(error)})") from error
    refuse_other_texts(ServedTexts(**served), config, run, f"application {app!r}")
    return handle


def _max_running(app: str) -> int:
    """As many shards as the replicas of now can be busy with."""
    status = serve.status().applications.get(app)
    if status is None:
        raise ConfigError(f"--through-serve {app}: it was deleted. Deploy it, and run the same command again")
    states = [found.replica_states for found in status.deployments.values()]
    num_running = max((number for found in states for state, number in found.items() if state == "RUNNING"), default=0)
    return _PER_REPLICA * max(num_running, 1)

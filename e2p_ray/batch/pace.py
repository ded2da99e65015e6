"""How Ray Data's loop goes on while shards are written (Ray 2.60, whose version is pinned: none of this is public)."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import ray
from ray.data._internal.execution import streaming_executor_state
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.metadata_fetcher import InlineMetadataFetcher
from ray.data._internal.execution.operators.actor_pool_map_operator import _ACTOR_STATE_DEAD, ActorPoolMapOperator

from e2p_ray.ray_session import in_place

if TYPE_CHECKING:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

_SHORTEST_S = 0.02
_LONGEST_S = 0.5


class Pace(ExecutionCallback):
    """Waits between two steps of the loop for the first task that has something to say, and a little in any case.

    While there is no task, because the one worker died and its successor loads, the loop takes a whole core: the one
    that the successor could load with. With a pause, two cores had a hung worker replaced and its run done after 15 s,
    not 38, and a killed one after 13, not 28.

    Workers of a pass that is given up are ended. Ray Data leaves them to finish what they do, on the CPUs and GPUs that
    the next pass needs: where they hang, it had no worker.

    A worker that died and does not come back leaves the pool, which then begins another. Ray restarts no process whose
    engine fails to load, and Ray Data counts it as one of its workers for good.
    """

    def __init__(self) -> None:
        self._workers = list[Any]()

    def before_execution_starts(self, executor: StreamingExecutor) -> None:
        # What a task says is read in the step that sees its end, not by a thread for a later step. The thread is for
        # metadata that take long to come; an outcome of ours is some hundred bytes, which come with the task's reply.
        executor._metadata_fetcher = InlineMetadataFetcher()

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        time.sleep(_SHORTEST_S)
        operators = [each for each in executor._topology or () if isinstance(each, ActorPoolMapOperator)]
        pools: list[Any] = [operator._actor_pool for operator in operators]
        for pool in pools:
            for worker, state in list(pool._running_actors.items()):
                if state.num_tasks_in_flight == 0 and worker._get_local_state() == _ACTOR_STATE_DEAD:
                    pool._release_running_actor(worker)
        self._workers = [worker for pool in pools for worker in [*pool._running_actors, *pool._pending_actors.values()]]
        running = [task.get_waitable() for operator in executor._topology or () for task in operator.get_active_tasks()]
        if running:
            ray.wait(running, num_returns=1, timeout=_LONGEST_S, fetch_local=False)

    def after_execution_succeeds(self, executor: StreamingExecutor) -> None:
        self._workers.clear()

    def after_execution_fails(self, executor: StreamingExecutor, error: Exception) -> None:
        for worker in self._workers:
            ray.kill(worker)
        self._workers.clear()


def steps_wait_for_nothing() -> AbstractContextManager[None]:
    """A step of the loop looks at what is there; by itself it waits 0.1 s for all tasks. For where `Pace` waits."""
    return in_place([(streaming_executor_state, "WAIT_FOR_TASK_COMPLETION_TIMEOUT_S", 0.0)])

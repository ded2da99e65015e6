"""One worker of the pool: the engine, loaded once, and one shard, or one piece of a shard, at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pyarrow as pa

from e2p_ray.batch.logs import ActorLog
from e2p_ray.batch.metrics import BatchMetrics
from e2p_ray.batch.tally import OUTCOME, ShardOutcome
from e2p_ray.batch.watchdog import Watchdog
from e2p_ray.batch.write import ShardWriter, Written, refuse_other_artifacts, this_process, written_by
from e2p_ray.commit import Run
from e2p_ray.config import JobConfig
from e2p_ray.errors import RunError
from e2p_ray.loaded import EngineFactory, LoadedGenerator
from e2p_ray.schema import Group
from e2p_ray.storage import Storage


class ShardWorker:
    """An actor's state: the engine, loaded once. Called with one `Piece` as a row, returns one `ShardOutcome` as a row.

    A piece without ends is its whole shard. On several threads it reads and commits shards while another is written:
    that one thread does, the engine's, one shard after the other.
    """

    def __init__(
        self,
        config: JobConfig,
        storage: Storage,
        run: Run,
        engine_factory: EngineFactory | None,
        max_seconds: float | None = None,
    ) -> None:
        self._max_seconds, self._began_s = max_seconds, math.inf  # the time counts from the worker's first shard
        self._engine_thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._max_step_s = config.workers.max_step_s
        worker, metrics = this_process(), BatchMetrics()
        log = ActorLog(on=config.workers.log_shards, run_id=run.run_id, worker=worker)
        self._writer = ShardWriter(storage, run, metrics=metrics, log=log, worker=worker)
        clock = time.perf_counter()
        try:
            self._generator = LoadedGenerator(config, storage, run.run_id, engine_factory=engine_factory)
            refuse_other_artifacts(self._generator, run)
        except RunError as error:  # the same on every node: said once instead of tried again
            self._writer.refuse(error)
        else:
            ids = {"projector_id": self._generator.projector_id, "base_model_id": self._generator.base_model_id}
            seconds_s = time.perf_counter() - clock
            metrics.worker_ready(seconds_s)
            log.info("worker_ready", seconds_s=round(seconds_s, 3), **ids)

    def __call__(self, batch: pa.Table) -> pa.Table:
        (row,) = batch.to_pylist()
        late = not self._writer.refuses and self._is_over()
        outcome = ShardOutcome(row["shard_id"], late=True) if late else self._writer.write(row, self._written)
        return pa.table({name: [value] for name, value in asdict(outcome).items()}, schema=OUTCOME)

    def _is_over(self) -> bool:
        """Whether the time is over; a worker's first shard is always begun, so that every run gets on."""
        return self._max_seconds is not None and time.monotonic() > self._began_s + max(self._max_seconds, 0.0)

    def _written(self, groups: Sequence[Group], shard_id: str) -> Written | None:
        return self._engine_thread.submit(self._write, groups, shard_id).result()

    def _write(self, groups: Sequence[Group], shard_id: str) -> Written | None:
        if self._is_over():  # while the shard waited for the one before it
            return None
        self._began_s = min(self._began_s, time.monotonic())
        with Watchdog(self._generator.engine, self._max_step_s):
            return written_by(self._generator, groups, shard_id)

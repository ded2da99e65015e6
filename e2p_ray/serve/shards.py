"""A batch's shards, written by a replica's model while no online request waits for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from e2p_ray.batch.logs import ActorLog
from e2p_ray.batch.metrics import BatchMetrics
from e2p_ray.batch.tally import ShardOutcome
from e2p_ray.batch.through import ServedTexts, refuse_other_texts
from e2p_ray.batch.write import ShardWriter, Written, this_process, written_by
from e2p_ray.commit import Run
from e2p_ray.config import JobConfig
from e2p_ray.errors import IncompatibleError
from e2p_ray.loaded import LoadedGenerator
from e2p_ray.schema import DeadLetter, Generation, Group
from e2p_ray.serve.pauses import Pauses
from e2p_ray.serve.service import Service
from e2p_ray.storage import Storage

_THREADS = 2  # one shard is read or committed while another one is written
_WAVES_A_CALL = 4  # between two calls of the generator its texts are checked, which no online request can interrupt


class ShardDesk:
    """Takes shards of runs. Reading and committing is done by threads of its own, writing by the model's."""

    def __init__(self, service: Service) -> None:
        self._service, self._metrics = service, BatchMetrics()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="shards")
        self._one_at_a_time = threading.Lock()

    @property
    def served_texts(self) -> ServedTexts:
        """What texts of now are made with."""
        return _texts_of(self._service.loaded)

    def write(self, row: dict[str, Any], config: JobConfig, storage: Storage, run: Run) -> Future[ShardOutcome]:
        """Read, write and commit the shard, or the piece of one, that a row of `run_batch` names."""
        return self._threads.submit(self._write, row, config, storage, run)

    def close(self) -> None:
        """Take no more of them; those that were taken fail with their model's thread."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _write(self, row: dict[str, Any], config: JobConfig, storage: Storage, run: Run) -> ShardOutcome:
        worker = this_process()
        log = ActorLog(on=config.workers.log_shards, run_id=run.run_id, worker=worker)
        writer = ShardWriter(storage, run, metrics=self._metrics, log=log, worker=worker)
        # The whole shard with one projector, whatever is swapped meanwhile.
        loaded = self._service.loaded
        try:
            refuse_other_texts(_texts_of(loaded), config, run, worker)
        except IncompatibleError as error:
            writer.refuse(error)
        replica = self._service.config.replica

        def write_groups(groups: Sequence[Group], shard_id: str) -> Written:
            generator = loaded.for_run(config, run.run_id, replica.shard_rows, replica.shard_prefill_tokens)
            return self._written(generator, groups, shard_id)

        return writer.write(row, write_groups)

    def _written(self, generator: LoadedGenerator, groups: Sequence[Group], shard_id: str) -> Written:
        """The shard's texts, call by call: what a text is does not depend on the others of its call."""
        rows, dead_letters, seconds_s = list[Generation](), list[DeadLetter](), 0.0
        max_requests = _WAVES_A_CALL * self._service.config.replica.shard_rows
        with self._one_at_a_time:
            before, started_at = generator.stats, datetime.now(UTC)
            for part in parts(groups, max_requests):

                def call(pauses: Pauses, part: Sequence[Group] = part) -> Written:
                    with generator.followed_by(pauses):
                        done = written_by(generator, part, shard_id)
                    return replace(done, seconds_s=done.seconds_s - pauses.paused_s)

                written = self._service.loop.run_behind(call, part[0].requests[0].key).result()
                rows += written.generations
                dead_letters += written.dead_letters
                seconds_s += written.seconds_s
            return Written(rows, dead_letters, generator.stats - before, started_at, seconds_s)


def _texts_of(loaded: LoadedGenerator) -> ServedTexts:
    return ServedTexts(loaded.projector_id, loaded.base_model_id, loaded.embedding_space, loaded.config.text_hash())


def parts(groups: Sequence[Group], max_requests: int) -> Iterator[list[Group]]:
    """The groups' requests in their order, so many at a time."""
    part, num_requests = list[Group](), 0
    for group in groups:
        rest = group.requests
        while rest:
            taken, rest = rest[: max_requests - num_requests], rest[max_requests - num_requests :]
            part.append(replace(group, requests=taken))
            num_requests += len(taken)
            if num_requests == max_requests:
                yield part
                part, num_requests = [], 0
    if part:
        yield part

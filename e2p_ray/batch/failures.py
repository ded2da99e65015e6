"""The driver's notes of why shards are not done, kept beside the run for `jobs.status`."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from datetime import UTC, datetime

from e2p_ray.batch.tally import ShardOutcome, Tally
from e2p_ray.commit import Run, pending_shards
from e2p_ray.commit.failures import ShardFailure, forget_failures, write_failure
from e2p_ray.commit.run import map_ahead
from e2p_ray.errors import StorageError
from e2p_ray.storage import Storage

WORKER_DIED = "WorkerDied"
_ENDED = "its worker ended without a word: killed, out of memory, or a step that took longer than workers.max_step_s"


class FailureNotes:
    """Writes failures as they come. A note that cannot be written fails no run; it is the last that is tried."""

    def __init__(self, storage: Storage, run: Run, tally: Tally) -> None:
        self._storage, self._run, self._tally = storage, run, tally
        self._can_write = True

    def said(self, outcome: ShardOutcome) -> None:
        """A worker told of a failure itself."""
        # With E2P_DEBUG a message is a whole traceback, which may quote anything: that is told, but never kept.
        message = outcome.message if "Traceback (most" not in outcome.message else "see what the job says (E2P_DEBUG)"
        self._write(outcome.shard_id, outcome.error_type, message, outcome.worker)

    def unsaid(self, shard_ids: Collection[str]) -> None:
        """After a pass: of these, or of pieces of these, a worker said nothing."""
        if not shard_ids:
            return
        silent = sorted(set(shard_ids) & set(pending_shards(self._storage, self._run)))
        # All that are left, where a pass was given up: some at once.
        for _ in map_ahead(lambda one: self._write(one, WORKER_DIED, self._tally.pass_failure or _ENDED, ""), silent):
            pass

    def forget_all_but(self, pending: Collection[str]) -> None:
        """Shards that are done did not fail."""
        with suppress(StorageError):
            forget_failures(self._storage, self._run, pending)

    def _write(self, shard_id: str, error_type: str, message: str, worker: str) -> None:
        if not self._can_write:
            return
        failure = ShardFailure(shard_id, self._tally.attempt, error_type, message, datetime.now(UTC), worker)
        try:
            write_failure(self._storage, self._run, failure)
        except StorageError:
            self._can_write = False

"""The stop of a run that its gates would not let through any more."""

from __future__ import annotations

from collections import Counter

from e2p_ray.batch.tally import Tally
from e2p_ray.commit import Run, pending_shards
from e2p_ray.commit.run import dead_letter_codes, dead_letter_files
from e2p_ray.errors import GateError
from e2p_ray.schema import ErrorCode
from e2p_ray.storage import Storage


class DeadLetterLimit:
    """More dead letters than a run may have and still be published, counted from its first shard on."""

    def __init__(self, storage: Storage, run: Run, max_dead_letters: int | None) -> None:
        self._storage, self._run, self._max = storage, run, max_dead_letters
        self._num_before = 0 if max_dead_letters is None else self._codes().total()

    def check(self, tally: Tally) -> None:
        """Raise GateError, naming the commonest codes, once there are too many."""
        if self._max is None or self._num_before + tally.num_dead_letters <= self._max:
            return
        codes = ", ".join(f"{code} {number:,}" for code, number in self._codes().most_common(3))
        num_found = self._num_before + tally.num_dead_letters
        raise GateError(
            f"run {self._run.run_id} is stopped: {num_found:,} requests of its shards have no text ({codes}); "
            f"gates.max_dead_letter_share forbids to publish more than {self._max:,}. "
            f"Look at {self._run.dead_letters_uri}; nothing was published, and what is committed stays"
        )

    def _codes(self) -> Counter[str]:
        """The dead letters of all committed shards by code.

        One that is not committed yet may have its file already: it would count again when it is.
        """
        pending = set(pending_shards(self._storage, self._run))
        files = dead_letter_files(self._storage, self._run)
        found = dead_letter_codes(self._storage, [info for shard, info in files.items() if shard not in pending])
        found.pop(ErrorCode.DEFERRED, None)  # nothing is wrong with those
        return found

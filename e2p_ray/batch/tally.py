"""What workers say of shards, and the counts of one call of `run_batch`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields

import pyarrow as pa

from e2p_ray import errors


@dataclass(frozen=True, slots=True)
class ShardOutcome:
    """What one worker says of one shard."""

    shard_id: str
    num_requests: int = 0
    num_dead_letters: int = 0
    num_prompt_tokens: int = 0
    num_computed_tokens: int = 0
    num_output_tokens: int = 0
    started_at_s: float = 0.0
    finished_at_s: float = 0.0
    error_type: str = ""  # empty: the shard is committed
    message: str = ""
    fatal: bool = False  # no other shard will fare better
    late: bool = False  # not begun, because the run's time was over
    is_piece: bool = False  # of a part of the shard: the shard is not done with it
    worker: str = ""  # host:pid of who failed

    @property
    def is_ours(self) -> bool:
        """Whether the failure is one of storage or data, which no smaller piece would escape."""
        return hasattr(errors, self.error_type)


_KINDS = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
OUTCOME = pa.schema([pa.field(field.name, _KINDS[str(field.type)]) for field in fields(ShardOutcome)])


@dataclass(frozen=True, slots=True)
class BatchProgress:
    """Where a run stands. Rates count from the first worker's start on a shard, not from the start of Ray."""

    num_shards: int
    num_done: int
    num_done_here: int  # by this call, as its workers said; the next three are of these
    num_requests: int
    num_output_tokens: int
    num_failures: int  # failed tries; a shard may be done in a later one
    attempt: int
    generating_s: float
    waits_for: str = ""  # what the cluster lacks for any worker to start

    @property
    def rows_per_s(self) -> float:
        return self.num_requests / self.generating_s if self.generating_s > 0 else 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.num_output_tokens / self.generating_s if self.generating_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """What a call of `run_batch` did; shards done by earlier calls are in `num_done_before` only."""

    num_shards: int
    num_done_before: int
    num_done: int
    num_requests: int
    num_dead_letters: int
    num_prompt_tokens: int
    num_computed_tokens: int
    num_output_tokens: int
    num_attempts: int
    generating_s: float
    failures: tuple[ShardOutcome, ...]
    left: tuple[str, ...] = ()  # shards that the time did not suffice for


class Tally:
    """Counts of one call of `run_batch`, kept by its driver."""

    def __init__(
        self, num_shards: int, num_done_before: int, on_progress: Callable[[BatchProgress], None] | None
    ) -> None:
        self.num_shards, self.num_done_before = num_shards, num_done_before
        self.attempt = 0
        self.done: dict[str, ShardOutcome] = {}
        self.num_unsaid = 0
        self.late = set[str]()
        self.failures: list[ShardOutcome] = []
        self.pass_failure = ""
        self.waits_for = ""
        self._on_progress = on_progress

    def next_attempt(self) -> None:
        self.attempt += 1
        self._report()

    def wait_for(self, missing: str) -> None:
        """Tell what the cluster lacks, until a worker says something; nothing where it lacks nothing."""
        self.waits_for = missing
        if missing:
            self._report()

    def add(self, outcome: ShardOutcome) -> None:
        self.waits_for = ""
        if outcome.late:
            self.late.add(outcome.shard_id)
        elif outcome.error_type:
            self.failures.append(outcome)
        elif not outcome.is_piece:
            self.done[outcome.shard_id] = outcome
        self._report()

    def found_committed(self, shard_ids: Collection[str]) -> None:
        """What storage says is done, by this call: a worker may have died before it could say so.

        Such a shard counts as done; its requests and tokens are in no total.
        """
        self.num_unsaid = len(set(shard_ids) - self.done.keys())
        if self.num_unsaid:
            self._report()

    def _report(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self.progress())

    @property
    def num_dead_letters(self) -> int:
        return self._total("num_dead_letters")

    def _total(self, name: str) -> int:
        return sum(getattr(outcome, name) for outcome in self.done.values())

    def progress(self) -> BatchProgress:
        started = min((outcome.started_at_s for outcome in self.done.values()), default=0.0)
        finished = max((outcome.finished_at_s for outcome in self.done.values()), default=0.0)
        return BatchProgress(
            num_shards=self.num_shards,
            num_done=self.num_done_before + len(self.done) + self.num_unsaid,
            num_done_here=len(self.done),
            num_requests=self._total("num_requests"),
            num_output_tokens=self._total("num_output_tokens"),
            num_failures=len(self.failures),
            attempt=self.attempt,
            generating_s=finished - started,
            waits_for=self.waits_for,
        )

    def summary(self, left: Sequence[str] = ()) -> BatchSummary:
        return BatchSummary(
            num_shards=self.num_shards,
            num_done_before=self.num_done_before,
            num_done=len(self.done) + self.num_unsaid,
            num_requests=self._total("num_requests"),
            num_dead_letters=self.num_dead_letters,
            num_prompt_tokens=self._total("num_prompt_tokens"),
            num_computed_tokens=self._total("num_computed_tokens"),
            num_output_tokens=self._total("num_output_tokens"),
            num_attempts=self.attempt,
            generating_s=self.progress().generating_s,
            failures=tuple(self.failures),
            left=tuple(left),
        )

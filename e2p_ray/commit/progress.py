"""How far a run is, from storage alone: markers, data files, failures, the plan's manifest, the table's history."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from e2p_ray.commit.failures import ShardFailure, read_failures
from e2p_ray.commit.history import commits_of, is_published
from e2p_ray.commit.published import open_table
from e2p_ray.commit.run import Run, dead_letter_codes, pending_shards, read_markers, summed
from e2p_ray.errors import ObjectNotFoundError
from e2p_ray.storage import Storage

_PAUSE_S = 30.0  # no worker was at any shard for this long: the job was not running


@dataclass(frozen=True)
class PendingShard:
    """A shard without a marker."""

    shard_id: str
    num_requests: int | None  # None when the plan's manifest is gone
    has_data: bool  # its writer stopped between data and marker; the next try ends with this data
    num_pieces: int  # written of it, because it ended its workers in every attempt and is being halved
    is_planned: bool  # False: its planned file is gone, so that nobody can generate it
    failure: ShardFailure | None = None  # of its last try; None before one failed


@dataclass(frozen=True)
class RunProgress:
    """A run as its objects show it. Counts are of committed shards; rates of those that workers generated."""

    run_id: str
    num_shards: int
    pending: tuple[PendingShard, ...]
    num_requests: int  # of committed shards
    num_pending_requests: int | None
    statuses: Mapping[str, int]
    reasons: Mapping[str, int]
    error_codes: Mapping[str, int]  # dead letters of committed shards
    plan_error_codes: Mapping[str, int]  # dead letters of the plan
    num_generated: int  # requests; the others were carried over or deferred
    generating_s: float  # without pauses between calls of the job
    num_workers: int
    started_at: datetime | None
    last_finished_at: datetime | None
    looked_at: datetime
    versions: tuple[int, ...]  # of the table, that made this run visible
    is_current: bool  # the newest of them is what the last publish or rollback shows

    @property
    def num_done(self) -> int:
        return self.num_shards - len(self.pending)

    @property
    def num_failed(self) -> int:
        """Pending shards whose last try failed."""
        return sum(shard.failure is not None for shard in self.pending)

    @property
    def rows_per_s(self) -> float | None:
        """None while nothing is generated."""
        return self.num_generated / self.generating_s if self.num_generated and self.generating_s else None

    @property
    def left_s(self) -> float | None:
        """Seconds of generation that are left at this rate; None when nothing tells."""
        if self.num_pending_requests is None or (self.num_pending_requests and self.rows_per_s is None):
            return None
        return self.num_pending_requests / self.rows_per_s if self.rows_per_s else 0.0

    @property
    def idle_s(self) -> float | None:
        """Seconds since the last shard was finished."""
        return None if self.last_finished_at is None else (self.looked_at - self.last_finished_at).total_seconds()


def run_progress(storage: Storage, run: Run, now: datetime | None = None) -> RunProgress:
    """Look at a recorded run; one small read a committed shard."""
    pending = _pending(storage, run)
    markers = read_markers(storage, run)
    generated = [marker["stats"] for marker in markers if marker["stats"]["worker"]]
    spans = [(_moment(stats["started_at"]), _moment(stats["finished_at"])) for stats in generated]
    sizes = [shard.num_requests for shard in pending]
    versions, is_current = _versions(storage, run)
    return RunProgress(
        run_id=run.run_id,
        num_shards=len(run.shard_ids),
        pending=pending,
        num_requests=sum(marker["num_requests"] for marker in markers),
        num_pending_requests=None if None in sizes else sum(size or 0 for size in sizes),
        statuses=_sorted(summed(markers, "statuses")),
        reasons=_sorted(summed(markers, "reasons")),
        error_codes=_sorted(summed(markers, "error_codes")),
        plan_error_codes=_sorted(dead_letter_codes(storage, storage.list_objects(f"{run.plan_uri}/dead_letters"))),
        num_generated=sum(_num_generated(stats) for stats in generated),
        generating_s=_covered_s(spans),
        num_workers=len({stats["worker"] for stats in generated}),
        started_at=min((start for start, _ in spans), default=None),
        last_finished_at=max((stop for _, stop in spans), default=None),
        looked_at=now or datetime.now(UTC),
        versions=versions,
        is_current=is_current,
    )


def _pending(storage: Storage, run: Run) -> tuple[PendingShard, ...]:
    left = pending_shards(storage, run)
    if not left:
        return ()
    with_data = _stems(storage, f"{run.table_uri}/data/{run.run_id}")
    planned = _stems(storage, f"{run.plan_uri}/shards")
    sizes = _planned_sizes(storage, run)
    pieces = Counter(info.uri.split("/")[-2] for info in storage.list_objects(f"{run.uri}/pieces"))
    failures = read_failures(storage, run, left)
    return tuple(
        PendingShard(
            shard_id=shard_id,
            num_requests=sizes.get(shard_id),
            has_data=shard_id in with_data,
            num_pieces=pieces[shard_id],
            is_planned=shard_id in planned,
            failure=failures.get(shard_id),
        )
        for shard_id in left
    )


def _stems(storage: Storage, uri: str) -> set[str]:
    return {info.name.removesuffix(".parquet") for info in storage.list_objects(uri)}


def _planned_sizes(storage: Storage, run: Run) -> dict[str, int]:
    """Requests by shard, from the manifest that a plan or an update ends with."""
    try:
        manifest = json.loads(storage.read_bytes(f"{run.plan_uri}/manifest.json"))
    except ObjectNotFoundError:
        return {}
    return {shard_id: num_requests for shard_id, num_requests, *_ in manifest["shards"]}


def _versions(storage: Storage, run: Run) -> tuple[tuple[int, ...], bool]:
    table = open_table(storage, run.table_uri)
    shown = {v: str(c["run_id"]) for v, c in commits_of(table).items() if is_published(c)} if table else {}
    mine = tuple(sorted(version for version, run_id in shown.items() if run_id == run.run_id))
    return mine, bool(mine) and mine[-1] == max(shown)


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def _num_generated(stats: Mapping[str, Any]) -> int:
    return int(stats["num_requests"] - stats.get("num_carried", 0) - stats.get("num_deferred", 0))


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _covered_s(spans: Sequence[tuple[datetime, datetime]]) -> float:
    """Seconds in which a worker was at a shard, short gaps between shards included."""
    covered_s, end = 0.0, None
    for start, stop in sorted(spans):
        if end is None or (start - end).total_seconds() > _PAUSE_S:
            covered_s += (stop - start).total_seconds()
        elif stop > end:
            covered_s += (stop - end).total_seconds()
        end = stop if end is None else max(end, stop)
    return covered_s

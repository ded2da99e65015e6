"""An update's folder: shards of the requests that need a new text, and the rows that are carried over, in place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import polars as pl

from e2p_ray.commit import PublishedTable, Run, pending_shards
from e2p_ray.commit.spool import HashSpool
from e2p_ray.errors import ConservationError
from e2p_ray.plan import Plan, load_plan
from e2p_ray.plan.plan import manifest_of, manifest_uri
from e2p_ray.schema import checked_id
from e2p_ray.storage import Storage
from e2p_ray.update.compare import Comparison, UpdateJob
from e2p_ray.update.limits import Limits
from e2p_ray.update.survey import Changes, Order, count
from e2p_ray.update.write import ShardWriter, write_carried

_FORMAT = 2  # counts up when the same plan and table give another update


@dataclass(frozen=True)
class Update:
    """A finished update; `plan` is like a plan, of the requests that need a new text alone, in the order they run in.

    `carried_ids` are shards as well, but committed already: the rows that stay, and what is deferred.
    """

    plan: Plan
    changes: Changes
    carried_ids: tuple[str, ...]

    @property
    def shard_ids(self) -> tuple[str, ...]:
        return (*(shard.shard_id for shard in self.plan.shards), *self.carried_ids)


def update_id_of(
    source_id: str, table: PublishedTable | None, limits: Limits, priorities: str = "", after: str = ""
) -> str:
    """The id of the update of these, 16 hex digits. How many seconds a run may take is no part of it.

    `priorities` is the digest of what `limits.priority` reads: a plan, and so its id, knows nothing of it. `after` is
    the id of the run that it goes on from in place of the table.
    """
    parts = [
        _FORMAT,
        source_id,
        [table.uri, table.table_id, table.version] if table else None,
        limits.max_requests,
        limits.max_seconds is not None,
        [limits.priority.column, limits.priority.descending, priorities] if limits.priority else None,
        *([after] if after else []),  # without: the names that updates had before
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def make_update(
    job: UpdateJob, run: Run, limits: Limits, say: Callable[[str], None], before_writing: Callable[[], object]
) -> Update | None:
    """Write the update at `run.plan_uri` and commit what it carries over, or return the finished one.

    `run` has no shards yet. None when a table that we published needs no change. `before_writing` raises where it is
    known that the update could not be published. ConservationError when a request of the plan would be neither written
    nor carried over nor deferred, or more than one of these.
    """
    if job.storage.exists(manifest_uri(run.plan_uri)):
        update = load_update(job.storage, run.plan_uri)
        if not pending_shards(job.storage, replace(run, shard_ids=update.carried_ids)):
            say(f"the update {run.plan_uri} is finished already")
            return update
        say(f"the update {run.plan_uri} is written again: what it carries over is not there any more")
    with Comparison(job, run, limits) as comparison:
        changes, order = count(comparison, limits, say)
        if shows_already(job.table, changes):
            return None
        before_writing()
        update = _write(comparison, run, limits, changes, order)
    say(
        f"{changes.num_to_write:,} requests need a new text, {changes.num_carried:,} rows are carried over, "
        f"{changes.num_removed:,} removed, {changes.num_deferred:,} deferred"
        + (f", {changes.num_settled:,} stay dead letters" if changes.num_settled else "")
    )
    return update


def shows_already(table: PublishedTable | None, changes: Changes) -> bool:
    """Whether the table is what an update would make of it, by a publish of ours."""
    return table is not None and table.shown is not None and not (changes.num_changed or changes.num_removed)


def load_update(storage: Storage, update_uri: str) -> Update:
    """A finished update; ObjectNotFoundError when there is none."""
    manifest = json.loads(storage.read_bytes(manifest_uri(update_uri)))
    return Update(
        load_plan(storage, update_uri), Changes(**manifest["changes"]), tuple(map(checked_id, manifest["carried_ids"]))
    )


def _write(comparison: Comparison, run: Run, limits: Limits, changes: Changes, order: Order) -> Update:
    job = comparison.job
    _copy_dead_letters(job, run)
    with HashSpool() as planned, HashSpool() as results:
        size = job.shard_size.among(changes.num_to_write)
        writers = [
            ShardWriter(job, run, results, requests_per_shard=size, keep_old=bool(limits.max_seconds))
            for _ in range(order.num_tiers)
        ]
        carried_ids, start = list[str](), 0
        for bucket in comparison.buckets(planned):
            tiers = order.of(start, bucket.changed.height)
            start += bucket.changed.height
            for number, writer in enumerate(writers):
                writer.add(bucket, bucket.changed.filter(tiers == number))
            carried_ids += write_carried(job, run, bucket, bucket.changed.filter(tiers < 0), results)
        shards = [shard for writer in writers for shard in writer.finish()]
        _require_same(planned, results, run)
    update_id = checked_id(run.plan_uri.rpartition("/")[2])
    counts = replace(job.plan.counts, num_groups=sum(shard.num_groups for shard in shards))
    plan = replace(job.plan, plan_id=update_id, uri=run.plan_uri, shards=tuple(shards), counts=counts)
    manifest = manifest_of(plan) | {"changes": changes.to_json(), "carried_ids": carried_ids}
    job.storage.write_bytes(manifest_uri(run.plan_uri), json.dumps(manifest, ensure_ascii=False).encode())
    return Update(plan, changes, tuple(carried_ids))


def _copy_dead_letters(job: UpdateJob, run: Run) -> None:
    """Requests that cannot be planned are part of every run of the plan.

    A plan of the same requests that was cut elsewhere, whose update was not finished, left them in other files.
    """
    found = {info.name: info.uri for info in job.storage.list_objects(f"{job.plan.uri}/dead_letters")}
    folder = f"{run.plan_uri}/dead_letters"
    for info in job.storage.list_objects(folder):
        if info.name not in found:
            job.storage.delete(info.uri)
    for name, uri in found.items():
        job.storage.write_bytes(f"{folder}/{name}", job.storage.read_bytes(uri))


def _require_same(planned: HashSpool, results: HashSpool, run: Run) -> None:
    """Every planned key once, and no other; a key is known by its hash."""
    for wanted, found in zip(planned.frames(), results.frames(), strict=True):
        joined = wanted.join(found, on=["a", "b"], how="full", suffix="_found")
        wrong = joined.filter(~((pl.col("count") == 1) & (pl.col("count_found") == 1)).fill_null(False))
        if wrong.height:
            problem = f"the update {run.plan_uri}: {wrong.height} key(s) of the plan are missing, foreign or repeated"
            raise ConservationError(f"{problem}. Delete the plans and updates folders of the output and run again")

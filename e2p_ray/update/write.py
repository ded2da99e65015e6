"""Requests of an update as shards like a plan's; rows that are carried over as shards that are committed already."""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from e2p_ray.commit import Run
from e2p_ray.commit.run import CARRIED
from e2p_ray.commit.spool import HashSpool, hash_rows
from e2p_ray.plan import ShardEntry
from e2p_ray.plan.shards import Slice, pack, shard_uri, slices_of, text_bytes_of, write_shard
from e2p_ray.schema import RequestKey
from e2p_ray.update.compare import Bucket, UpdateJob
from e2p_ray.update.failed import letters_of
from e2p_ray.update.kept import commit_kept, failed_uri, old_rows_uri
from e2p_ray.update.planned import CONTENTS

_KEY = list(RequestKey._fields)
_CARRIED_COLUMNS = [*_KEY, "title", "language"]  # what verify, consent and the report read of a planned file
_NOT_IN_SHARDS = ["priority", "cause", "fingerprint", "prompt_id", "content_hash", "generated_at"]
_CARRIED_ROWS = 1 << 17  # of one carried shard at most: a hot content is one bucket


class ShardWriter:
    """Gathers changed requests over the buckets and writes a shard whenever one is full: no slivers but the last."""

    def __init__(self, job: UpdateJob, run: Run, keys: HashSpool, *, requests_per_shard: int, keep_old: bool) -> None:
        self._job, self._run, self._keys, self._keep_old = job, run, keys, keep_old
        self._requests_per_shard = requests_per_shard
        self._requests: list[pl.DataFrame] = []
        self._contents: list[pl.DataFrame] = []
        self._old: list[pa.Table] = []
        self._shards: list[tuple[int, ShardEntry]] = []

    def add(self, bucket: Bucket, changed: pl.DataFrame) -> None:
        """Requests of one bucket; buckets come in the order of their contents' hashes."""
        if changed.is_empty():
            return
        self._requests.append(changed.drop(_NOT_IN_SHARDS))
        self._contents.append(bucket.contents.join(changed, on="content_id", how="semi"))
        if self._keep_old:
            self._old.append(bucket.published.take(changed["at"].drop_nulls().to_arrow()))
        if sum(rows.height for rows in self._requests) > 2 * self._requests_per_shard:
            self._write(last=False)

    def finish(self) -> list[ShardEntry]:
        """All shards in the order of their contents; with old rows, those that have the oldest first.

        Where the time ends before the last one, other inputs would otherwise have the same ones written again.
        """
        if self._requests:
            self._write(last=True)
        return [shard for _, shard in sorted(self._shards, key=itemgetter(0))]

    def _write(self, *, last: bool) -> None:
        contents = pl.concat([CONTENTS.to_frame(), *self._contents]).sort("content_hash", "content_id")
        contents = contents.with_row_index("content")
        requests = pl.concat(self._requests).join(contents.select("content_id", "content"), on="content_id")
        requests = requests.sort("content", "task", "user_id")
        old = pa.concat_tables(self._old) if self._old else None
        if old is not None:
            places = pl.DataFrame(pl.from_arrow(old.select(_KEY))).with_row_index("old")
            requests = requests.join(places, on=_KEY, how="left", maintain_order="left")
        packs = list(pack(list(self._slices(requests, text_bytes_of(contents))), self._requests_per_shard))
        for slices in packs if last else packs[:-1]:
            self._write_one(requests, contents, slices, old)
        rest = requests[packs[-1][0].start :]
        self._requests = [] if last else [rest.drop("content", "old", strict=False)]
        self._contents = [] if last else [contents.join(rest, on="content_id", how="semi").select(CONTENTS.names())]
        self._old = [] if last or old is None else [_old_rows(old, rest)]

    def _slices(self, requests: pl.DataFrame, text_bytes: list[int]) -> Iterator[Slice]:
        """Groups: one content and task each, capped."""
        cap = min(self._job.max_group_requests, self._requests_per_shard)
        start = 0
        for content, task, size in requests.group_by("content", "task", maintain_order=True).len().iter_rows():
            yield from slices_of(content, task, start, start + size, cap, text_bytes[content])
            start += size

    def _write_one(
        self, requests: pl.DataFrame, contents: pl.DataFrame, slices: list[Slice], old: pa.Table | None
    ) -> None:
        storage, update_uri = self._job.storage, self._run.plan_uri
        shard = write_shard(storage, update_uri, requests, contents, slices, self._job.plan.embedding_dim)
        rows = requests[slices[0].start : slices[-1].stop]
        since = 0
        if old is not None:
            old = _old_rows(old, rows)
            since = pc.min(old["generated_at"].cast(pa.int64())).as_py() or 0
            storage.write_table(old_rows_uri(update_uri, shard.shard_id), old)
            if (failed := letters_of(rows)).num_rows:
                storage.write_table(failed_uri(update_uri, shard.shard_id), failed)
        self._keys.add(hash_rows(*(rows[name].to_arrow() for name in _KEY)))
        self._shards.append((since, shard))


def _old_rows(old: pa.Table, requests: pl.DataFrame) -> pa.Table:
    """Published rows of these requests, which know their places in `old`."""
    return old.take(requests["old"].drop_nulls().sort().to_arrow())


def write_carried(job: UpdateJob, run: Run, bucket: Bucket, deferred: pl.DataFrame, keys: HashSpool) -> list[str]:
    """Commit the rows of a bucket that stay as they are, and its deferred requests; the ids of their shards.

    A deferred request keeps its old row; one that has none becomes a dead letter, or stays the one that it was.
    """
    carried = bucket.carried.to_frame("at").with_columns(old=pl.lit(False))
    stays = pl.concat([carried, deferred.select("at", old=pl.lit(True)).drop_nulls("at")])
    keys_of = pl.DataFrame(pl.from_arrow(bucket.published.select(_KEY)))[stays["at"]]
    stays = stays.hstack(keys_of).sort("content_id", "task", "user_id")
    rows = bucket.published.take(stays["at"].to_arrow())
    waiting = deferred.filter(pl.col("at").is_null()).select(*_KEY, "letter")
    keys.add(hash_rows(*(rows[name] for name in _KEY)))
    keys.add(hash_rows(*(waiting[name].to_arrow() for name in _KEY)))
    ids = []
    for start in range(0, max(rows.num_rows, waiting.height), _CARRIED_ROWS):
        shard_id = f"{CARRIED}{bucket.number:04d}-{start // _CARRIED_ROWS:03d}"
        part, letters = rows.slice(start, _CARRIED_ROWS), waiting[start : start + _CARRIED_ROWS]
        _write_planned(job, run, shard_id, bucket.contents, part, letters)
        num_old = int(stays["old"][start : start + _CARRIED_ROWS].sum())
        commit_kept(job.storage, run, shard_id, part, letters, num_carried=part.num_rows - num_old)
        ids.append(shard_id)
    return ids


def _write_planned(
    job: UpdateJob, run: Run, shard_id: str, contents: pl.DataFrame, rows: pa.Table, waiting: pl.DataFrame
) -> None:
    """What stands for a planned file: keys and titles."""
    planned = pl.concat([pl.DataFrame(pl.from_arrow(rows.select(_KEY))), waiting.select(_KEY)])
    planned = planned.join(contents, on="content_id", how="left", maintain_order="left").select(_CARRIED_COLUMNS)
    table = planned.to_arrow(compat_level=pl.CompatLevel.oldest())
    job.storage.write_table(shard_uri(run.plan_uri, shard_id), table)

"""A finished plan against the published rows: which requests need a new text, and why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from e2p_ray.commit import PublishedTable, Run
from e2p_ray.commit.run import map_ahead
from e2p_ray.commit.spool import HashSpool, hash_rows
from e2p_ray.fingerprint import FINGERPRINT_CHARS, PART_CHARS
from e2p_ray.plan import Plan, ShardEntry, ShardSize
from e2p_ray.plan.pairs import bucket_of, num_buckets
from e2p_ray.plan.plan import plan_buckets
from e2p_ray.schema import GENERATIONS, Arm, RequestKey
from e2p_ray.storage import Storage
from e2p_ray.update.buckets import BucketSpool, spool_published
from e2p_ray.update.failed import FAILED, LETTER, spool_failed, with_letters
from e2p_ray.update.limits import Limits
from e2p_ray.update.planned import CONTENTS, REQUESTS, PlannedRows, SettingsOf, read_planned_rows
from e2p_ray.update.priorities import PRIORITIES, spool_priorities

_KEY = list(RequestKey._fields)
_BUCKET_ROWS = 1 << 16  # aimed at; a bucket is in memory with its user embeddings
_MAX_BUCKETS = 256  # each is an open file while rows are spooled


class Cause(StrEnum):
    """Why a request needs a new text: the first of these that applies."""

    NEW_CONTENT = "new_content"  # no published row is about this content
    NEW_USER = "new_user"  # no published row is this user's
    NEW_CANDIDATE = "new_candidate"  # both are known, but not together, or the row was deleted or failed
    SUPPRESSED_BEFORE = "suppressed_before"  # consent put the title in its place when it was published
    CONTENT_CHANGED = "content_changed"
    USER_CHANGED = "user_changed"  # user embedding, its space, or the user's switch
    BASE_MODEL_CHANGED = "base_model_changed"  # and with it the projector, which is bound to one
    PROJECTOR_CHANGED = "projector_changed"
    PROMPT_CHANGED = "prompt_changed"
    SETTINGS_CHANGED = "settings_changed"  # sampling, limits, checks or dtype


@dataclass(frozen=True)
class UpdateJob:
    """What is compared with what. `table` is None when nothing has been published yet."""

    storage: Storage
    plan: Plan
    table: PublishedTable | None
    settings_of: SettingsOf
    projector_id: str
    base_model_id: str
    candidates_uri: str
    shard_size: ShardSize
    max_group_requests: int
    bucket_rows: int = _BUCKET_ROWS

    def num_buckets(self) -> int:
        """No more than the plan was cut along, so that every shard of it belongs to one of them."""
        num_rows = max(self.plan.counts.num_requests, self.table.num_rows if self.table else 0)
        wanted = min(num_buckets(num_rows, self.bucket_rows), _MAX_BUCKETS)
        return min(wanted, plan_buckets(self.plan, self.shard_size))


class Bucket(NamedTuple):
    """The plan and the table, as far as they are about the contents of one bucket.

    `changed` has the columns of `REQUESTS` and `at` (the row of `published` with its key, or null), `cause` (null where
    only the known users can tell), `draft`, `generated_at`, `priority`, `letter` (see failed.py); `carried` are rows of
    `published`.
    """

    number: int
    contents: pl.DataFrame
    changed: pl.DataFrame
    carried: pl.Series
    published: pa.Table
    num_removed: int


class Comparison:
    """Goes through plan and table bucket by bucket, as often as it is asked; use it in a `with`."""

    def __init__(self, job: UpdateJob, run: Run | None = None, limits: Limits | None = None) -> None:
        """`run` is the one to come; what comes first and last in it matters under limits only."""
        self.job = job
        priority = limits.priority if limits else None
        self.num_buckets = job.num_buckets()
        with ExitStack() as stack:
            self.users = stack.enter_context(HashSpool())  # of all published rows
            self._published = stack.enter_context(BucketSpool(GENERATIONS, self.num_buckets))
            self._priorities = stack.enter_context(BucketSpool(PRIORITIES, self.num_buckets)) if priority else None
            self._failed = stack.enter_context(BucketSpool(FAILED, self.num_buckets)) if limits else None
            if job.table is not None:
                spool_published(job.storage, job.table, self._published, self.users)
            if priority is not None and self._priorities is not None:
                spool_priorities(job.storage, job.candidates_uri, priority, self._priorities)
            if job.table is not None and run is not None and self._failed is not None:
                spool_failed(job.storage, job.table, run, self._failed)
            self._stack = stack.pop_all()

    def __enter__(self) -> Comparison:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def buckets(self, planned_keys: HashSpool | None = None) -> Iterator[Bucket]:
        """In the order of their contents' hashes; `planned_keys` collects the keys of the plan's shards."""
        shards = sorted(self.job.plan.shards, key=lambda shard: (shard.first_hash, shard.shard_id))
        by_bucket = {number: list(found) for number, found in groupby(shards, key=lambda shard: self._bucket_of(shard))}
        for number in range(self.num_buckets):
            planned = self._planned(number, by_bucket.get(number, []))
            if planned_keys is not None:
                planned_keys.add(hash_rows(*(planned.requests[name].to_arrow() for name in _KEY)))
            yield self._compared(number, planned, self._published.rows(number))

    def _bucket_of(self, shard: ShardEntry) -> int:
        return int(bucket_of(np.array([shard.first_hash], dtype=np.uint64), self.num_buckets)[0])

    def _planned(self, number: int, shards: list[ShardEntry]) -> PlannedRows:
        job = self.job

        def rows_of(shard: ShardEntry) -> PlannedRows:
            return read_planned_rows(job.storage, job.plan.uri, shard.shard_id, job.settings_of)

        read = list(map_ahead(rows_of, shards))
        requests = pl.concat([REQUESTS.to_frame(), *(rows.requests for rows in read)])
        contents = pl.concat([CONTENTS.to_frame(), *(rows.contents for rows in read)])
        buckets = bucket_of(contents["content_hash"].to_numpy(), self.num_buckets)
        assert (buckets == number).all(), "a shard of the plan holds contents of two buckets"
        return PlannedRows(requests, contents.unique("content_id", keep="first", maintain_order=True))

    def _compared(self, number: int, planned: PlannedRows, published: pa.Table) -> Bucket:
        old = pl.DataFrame(pl.from_arrow(published.select([*_KEY, "fingerprint"]))).with_row_index("at")
        single = old.unique(_KEY, keep="last").rename({"fingerprint": "old"})
        if single.height < old.height:
            # Of a key that somebody wrote twice no row can be trusted: one stays until it is written anew.
            trusted = old.select(pl.when(~pl.struct(_KEY).is_duplicated()).then("fingerprint")).to_series()
            single = single.with_columns(old=trusted.gather(single["at"]))
            published = _with_fingerprints(published, trusted.fill_null(""))
        rows = planned.requests.join(single, on=_KEY, how="left", maintain_order="left")
        is_carried = (pl.col("old") == pl.col("fingerprint")).fill_null(False)
        changed = self._with_cause(rows.filter(~is_carried), old["content_id"], published)
        changed = changed.join(planned.contents.select("content_id", "content_hash"), on="content_id")
        changed = changed.sort("content_hash", "content_id", "task", "user_id")
        return Bucket(
            number=number,
            contents=planned.contents,
            changed=self._with_letters(number, self._with_priority(number, changed)),
            carried=rows.filter(is_carried)["at"].sort(),
            published=published,
            num_removed=single.join(planned.requests, on=_KEY, how="anti").height,
        )

    def _with_cause(self, rows: pl.DataFrame, known_contents: pl.Series, published: pa.Table) -> pl.DataFrame:
        columns = ["text", "arm", "projector_id", "base_model_id", "prompt_id", "generated_at"]
        old = pl.DataFrame(pl.from_arrow(published.select(columns))).rename({"prompt_id": "old_prompt_id"})
        rows = rows.hstack(old.select(pl.all().gather(rows["at"])) if old.height else old.clear(rows.height))
        unpersonalized = pl.col("user_embedding").is_null()
        own_arm = pl.when(unpersonalized).then(pl.lit(str(Arm.NO_SOFT_TOKEN))).otherwise(pl.lit(str(Arm.SOFT_TOKEN)))
        known = pl.col("content_id").is_in(known_contents.unique().implode())
        rows = rows.with_columns(
            cause=pl.when(pl.col("old").is_not_null()).then(self._cause_of_known())
            .when(~known).then(pl.lit(str(Cause.NEW_CONTENT))),
            draft=pl.when(pl.col("arm") == own_arm).then("text"),
        )  # fmt: skip
        return rows.select(*REQUESTS.names(), "at", "cause", "draft", "generated_at")

    def _cause_of_known(self) -> pl.Expr:
        def differs(part: int) -> pl.Expr:
            return pl.col("old").str.slice(part * PART_CHARS, PART_CHARS) != pl.col("fingerprint").str.slice(
                part * PART_CHARS, PART_CHARS
            )

        comparable = pl.col("old").str.len_chars() == FINGERPRINT_CHARS
        return (
            pl.when(pl.col("old") == "").then(pl.lit(str(Cause.SUPPRESSED_BEFORE)))
            .when(comparable & differs(0)).then(pl.lit(str(Cause.CONTENT_CHANGED)))
            .when(comparable & differs(1)).then(pl.lit(str(Cause.USER_CHANGED)))
            .when(pl.col("base_model_id") != self.job.base_model_id).then(pl.lit(str(Cause.BASE_MODEL_CHANGED)))
            .when(pl.col("projector_id") != self.job.projector_id).then(pl.lit(str(Cause.PROJECTOR_CHANGED)))
            .when(pl.col("old_prompt_id") != pl.col("prompt_id")).then(pl.lit(str(Cause.PROMPT_CHANGED)))
            .otherwise(pl.lit(str(Cause.SETTINGS_CHANGED)))
        )  # fmt: skip

    def _with_priority(self, number: int, changed: pl.DataFrame) -> pl.DataFrame:
        """Of repeated candidates the best counts."""
        if self._priorities is None:
            return changed.with_columns(priority=pl.lit(0.0))
        found = pl.DataFrame(pl.from_arrow(self._priorities.rows(number)))
        best = found.group_by("user_id", "content_id").agg(pl.col("priority").min())
        return changed.join(best, on=["user_id", "content_id"], how="left", maintain_order="left")

    def _with_letters(self, number: int, changed: pl.DataFrame) -> pl.DataFrame:
        if self._failed is None:
            return changed.with_columns(letter=pl.lit(None, dtype=LETTER))
        return with_letters(changed, self._failed.rows(number))


def _with_fingerprints(rows: pa.Table, fingerprints: pl.Series) -> pa.Table:
    place = rows.schema.get_field_index("fingerprint")
    field = rows.schema.field(place)
    return rows.set_column(place, field, fingerprints.to_arrow().cast(field.type))

"""Shards that nobody generates: rows that stay as they were published, and requests that wait for a later run."""

from __future__ import annotations

from datetime import UTC, datetime

import polars as pl
import pyarrow as pa

from e2p_ray.commit import Run, ShardStats, commit_rows
from e2p_ray.schema import GENERATIONS, DeadLetter, ErrorCode
from e2p_ray.storage import Storage

_DEFERRED = "left for a later run by this run's limit; run the same command again"


def old_rows_uri(update_uri: str, shard_id: str) -> str:
    """The published rows of a shard's requests, for when the run's time is over before the shard is begun."""
    return f"{update_uri}/old/{shard_id}.parquet"


def commit_kept(
    storage: Storage, run: Run, shard_id: str, rows: pa.Table, waiting: pl.DataFrame, *, num_carried: int
) -> None:
    """Commit published rows as they are, and a dead letter for every key of `waiting`.

    `num_carried` of the rows still hold; the others are deferred, as those that wait are.
    """
    letters = [
        DeadLetter(user_id, content_id, task, ErrorCode.DEFERRED, _DEFERRED, shard_id, run.run_id)
        for user_id, content_id, task in waiting.select("user_id", "content_id", "task").iter_rows()
    ]
    now, num_requests = datetime.now(UTC), rows.num_rows + len(letters)
    stats = ShardStats(
        num_requests=num_requests,
        num_prompt_tokens=0,
        num_computed_tokens=0,
        num_output_tokens=0,
        num_truncated=0,
        seconds_s=0.0,
        started_at=now,
        finished_at=now,
        worker="",
        num_carried=num_carried,
        num_deferred=num_requests - num_carried,
    )
    commit_rows(storage, run, shard_id, rows.combine_chunks().cast(GENERATIONS), letters, stats)

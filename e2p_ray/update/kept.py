"""Shards that nobody generates: rows that stay as they were published, and requests that wait for a later run."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import polars as pl
import pyarrow as pa

from e2p_ray.commit import Run, ShardStats, commit_rows
from e2p_ray.schema import GENERATIONS, DeadLetter, ErrorCode, RequestKey
from e2p_ray.storage import Storage
from e2p_ray.update.failed import is_settled

_KEY = list(RequestKey._fields)
_DEFERRED = "left for a later run by this run's limit; run the same command again"


def old_rows_uri(update_uri: str, shard_id: str) -> str:
    """The published rows of a shard's requests, for when the run's time is over before the shard is begun."""
    return f"{update_uri}/old/{shard_id}.parquet"


def failed_folder(update_uri: str) -> str:
    """Where the dead letters lie, as `FAILED`, of shards with requests that failed before: for the same case."""
    return f"{update_uri}/failed"


def failed_uri(update_uri: str, shard_id: str) -> str:
    """Those of one shard."""
    return f"{failed_folder(update_uri)}/{shard_id}.parquet"


def commit_kept(
    storage: Storage, run: Run, shard_id: str, rows: pa.Table, waiting: pl.DataFrame, *, num_carried: int
) -> int:
    """Commit published rows as they are, and a dead letter for every key of `waiting`: its `letter`, if it has one.

    `num_carried` of the rows still hold, and so do settled dead letters; the others are deferred: how many.
    """
    letters = [
        _letter(RequestKey(*key), letter, shard_id, run) for *key, letter in waiting.select(*_KEY, "letter").iter_rows()
    ]
    num_settled = int(waiting.select(is_settled().sum()).item())
    num_carried += num_settled
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
        num_failed_before=int(waiting["letter"].is_not_null().sum()) - num_settled,
    )
    commit_rows(storage, run, shard_id, rows.combine_chunks().cast(GENERATIONS), letters, stats)
    return stats.num_deferred


def _letter(key: RequestKey, failed: dict[str, Any] | None, shard_id: str, run: Run) -> DeadLetter:
    if failed is None:
        return DeadLetter(*key, ErrorCode.DEFERRED, _DEFERRED, shard_id, run.run_id)
    return DeadLetter(*key, ErrorCode(failed["error_code"]), failed["message"], failed["shard_id"], failed["run_id"])

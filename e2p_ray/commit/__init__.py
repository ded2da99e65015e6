"""Durable results: a shard's data then its marker; verify; gates; the one step that makes a run visible."""

from e2p_ray.commit.publish import PublishedVersion, publish
from e2p_ray.commit.published import PublishedTable, Shown, as_of_last_change, read_published
from e2p_ray.commit.run import Run, load_run, open_run, pending_shards, read_markers, run_id_of
from e2p_ray.commit.shard import ShardStats, commit_rows, commit_shard
from e2p_ray.commit.verify import RunSummary, check_gates, verify

__all__ = [
    "PublishedTable",
    "PublishedVersion",
    "Run",
    "RunSummary",
    "ShardStats",
    "Shown",
    "as_of_last_change",
    "check_gates",
    "commit_rows",
    "commit_shard",
    "load_run",
    "open_run",
    "pending_shards",
    "publish",
    "read_markers",
    "read_published",
    "run_id_of",
    "verify",
]

"""The versions of the published table: what made each, and whether it can still be read."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from deltalake import DeltaTable

from e2p_ray.commit.data_files import data_files, paths_there
from e2p_ray.commit.published import UPKEEP, open_table
from e2p_ray.errors import StorageError
from e2p_ray.storage import Storage

_OF_OURS = "files_digest"  # what every publish and every rollback writes into its commit


@dataclass(frozen=True)
class TableVersion:
    """One version of the table; the ids are empty where it was not made by a publish or a rollback."""

    version: int
    committed_at: datetime  # UTC
    made_by: str
    run_id: str
    source_id: str
    projector_id: str
    base_model_id: str
    num_rows: int | None  # None, and the next as well, when the table's log no longer reaches back to it
    num_files: int | None
    num_deferred: int
    missing_files: tuple[str, ...]  # relative to the table
    is_current: bool

    @property
    def is_published(self) -> bool:
        """Whether `rollback` can be asked to go back to it."""
        return bool(self.run_id)

    @property
    def is_readable(self) -> bool:
        return self.num_files is not None and not self.missing_files


def read_history(storage: Storage, table_uri: str, max_versions: int) -> tuple[TableVersion, ...]:
    """The newest versions that changed rows, newest first; empty when nothing is published. Upkeep is left out."""
    table = open_table(storage, table_uri)
    if table is None:
        return ()
    commits = commits_of(table)
    present = paths_there(storage, table_uri)
    rows = [version for version in sorted(commits, reverse=True) if commits[version].get("operation") not in UPKEEP]
    return tuple(_version(storage, table, table_uri, commits, version, present) for version in rows[:max_versions])


def commits_of(table: DeltaTable) -> dict[int, dict[str, Any]]:
    """What every commit that is still in the table's log says of itself, by version."""
    return {entry["version"]: entry for entry in table.history()}


def is_published(commit: dict[str, Any]) -> bool:
    """Whether a commit made a run visible: a publish, or a rollback to one."""
    return _OF_OURS in commit


def _version(
    storage: Storage,
    table: DeltaTable,
    table_uri: str,
    commits: dict[int, dict[str, Any]],
    version: int,
    present: set[str],
) -> TableVersion:
    commit = commits[version]
    ours = commit if is_published(commit) else {}
    try:
        files = data_files(open_table(storage, table_uri, version) or table)
    except StorageError:
        files = None
    return TableVersion(
        version=version,
        committed_at=datetime.fromtimestamp(commit["timestamp"] / 1000, UTC),
        made_by=_made_by(commits, version),
        run_id=ours.get("run_id", ""),
        source_id=ours.get("source_id", ""),
        projector_id=ours.get("projector_id", ""),
        base_model_id=ours.get("base_model_id", ""),
        num_rows=None if files is None else sum(file.num_rows for file in files),
        num_files=None if files is None else len(files),
        num_deferred=int(ours.get("num_deferred", 0)),
        missing_files=tuple(file.path for file in files or () if file.path not in present),
        is_current=not any(later > version and commits[later].get("operation") not in UPKEEP for later in commits),
    )


def _made_by(commits: dict[int, dict[str, Any]], version: int) -> str:
    """A publish does not say which job it belongs to: another projector than before makes it a backfill."""
    commit = commits[version]
    if "action" in commit:
        goal = commit.get("rolled_back_to")
        return str(commit["action"]) + (f" to {goal}" if goal is not None else "")
    if not is_published(commit):
        return str(commit.get("operation", "unknown")).lower()
    earlier = [commits[v] for v in sorted(commits) if v < version and is_published(commits[v])]
    if not earlier or earlier[-1].get("projector_id") == commit.get("projector_id"):
        again = earlier and earlier[-1]["run_id"] == commit["run_id"]
        return "publish again" if again else "generate"
    return "backfill"

"""Back to a version that was published before, in one commit, with the users' consent as it is now."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, Schema
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction

from e2p_ray.commit.consent import suppress, without_consent
from e2p_ray.commit.data_files import add_actions, data_files, paths_there
from e2p_ray.commit.history import commits_of, is_published
from e2p_ray.commit.publish import digest_of
from e2p_ray.commit.published import open_table, shown_by
from e2p_ray.commit.run import load_run, map_ahead
from e2p_ray.commit.spool import HashSpool, hash_rows
from e2p_ray.commit.verify import DataFile
from e2p_ray.errors import ConfigError, InputError, ObjectNotFoundError, PublishConflictError, StorageError
from e2p_ray.schema import GENERATIONS, Status
from e2p_ray.storage import PassingError, Storage
from e2p_ray.storage.delta import has_deletion_vectors, said

_MAX_NAMED = 3
_MERGE_DELETED = ("num_target_rows_deleted", "numTargetRowsDeleted")  # as deltalake counts, and as Spark does
_CARRIED_METADATA = ("run_id", "source_id", "projector_id", "base_model_id", "embedding_space", "num_deferred")


@dataclass(frozen=True)
class RolledBack:
    """What readers see after a rollback."""

    version: int  # of the table now
    goal: int  # the version that it was rolled back to
    run_id: str
    num_rows: int
    num_files: int
    num_files_suppressed: int  # files that consent changed since that version was current
    already: bool  # nothing was committed: the table shows this already


@dataclass(frozen=True)
class _Goal:
    """The version to go back to, with its files as they are to be shown now."""

    version: int
    commit: dict[str, Any]
    files: tuple[DataFile, ...]
    num_changed: int  # of the files, those that consent changed since

    @property
    def run_id(self) -> str:
        return str(self.commit["run_id"])

    @property
    def digest(self) -> str:
        # Files that one commit could not name as they were lie under other names: the version knows what it is made of.
        return digest_of(self.files) if self.num_changed else str(self.commit["files_digest"])

    def result(self, version: int, *, already: bool) -> RolledBack:
        num_rows = sum(file.num_rows for file in self.files)
        return RolledBack(version, self.version, self.run_id, num_rows, len(self.files), self.num_changed, already)


def rollback(
    storage: Storage,
    output_uri: str,
    users_uri: str,
    *,
    version: int | None = None,
    run_id: str | None = None,
    restore_deleted: bool = False,
) -> RolledBack:
    """Make a published version, given by number or as the newest one of a run, what readers see again.

    Rows of users who want no personalisation now, or are no longer in the users table, become the original titles, as
    at publish. When the table shows exactly this already, nothing is committed. Raises ConfigError when there is no
    such published version, InputError when files that it takes are gone, and PublishConflictError when rows that were
    deleted since would come back (unless `restore_deleted`), or when somebody else commits meanwhile.
    """
    table_uri = f"{output_uri}/generations"
    base = open_table(storage, table_uri)
    if base is None:
        raise ConfigError(f"{table_uri}: nothing is published here, so there is nothing to go back to")
    commits = commits_of(base)
    number = _chosen(commits, base, table_uri, version, run_id)
    goal = _goal(storage, output_uri, users_uri, number, commits[number])
    shown = shown_by(base)
    if shown and (shown.run_id, shown.files_digest) == (goal.run_id, goal.digest) and not shown.rows_deleted:
        return goal.result(base.version(), already=True)
    if not restore_deleted:
        _refuse_deleted(commits, goal.version, base, table_uri)
    return _commit(storage, base, table_uri, goal)


def _chosen(
    commits: dict[int, dict[str, Any]], base: DeltaTable, table_uri: str, version: int | None, run_id: str | None
) -> int:
    """The number of the version that is asked for, one that a publish or a rollback made."""
    published = sorted(number for number, commit in commits.items() if is_published(commit))
    listed = "jobs.history lists the versions"
    if run_id is not None:
        of_run = [number for number in published if commits[number]["run_id"] == run_id]
        if not of_run:
            raise ConfigError(f"{table_uri}: no version shows run {run_id}; {listed}")
        return of_run[-1]
    assert version is not None, "a version or a run"
    if version < 0 or version > base.version():
        raise ConfigError(f"{table_uri}: there is no version {version}; the newest is {base.version()}, {listed}")
    if version not in commits:
        raise ConfigError(f"{table_uri}: version {version} is no longer in the table's log; {listed}")
    if version not in published:
        made = commits[version].get("operation", "another writer")
        raise ConfigError(f"{table_uri}: version {version} is no published version ({made} made it); {listed}")
    return version


def _goal(storage: Storage, output_uri: str, users_uri: str, version: int, commit: dict[str, Any]) -> _Goal:
    table_uri = f"{output_uri}/generations"
    try:
        table = open_table(storage, table_uri, version)
    except StorageError as error:
        remedy = "Its log is not whole; choose another version."
        raise InputError(f"version {version} cannot be read", uri=table_uri, remedy=remedy) from error
    assert table is not None, "it was there a moment ago"
    if has_deletion_vectors(table):
        remedy = "Choose a version before them, or one after they were purged and the feature dropped."
        raise InputError(f"version {version} may have deletion vectors", uri=table_uri, remedy=remedy)
    before = data_files(table)
    _refuse_missing(storage, table_uri, version, before)
    after = _with_consent(storage, output_uri, users_uri, str(commit["run_id"]), before)
    pairs = list(zip(before, after, strict=True))
    files = tuple(new for old, new in pairs if new.num_rows or new == old)  # of some nothing is left
    return _Goal(version, commit, files, sum(old != new for old, new in pairs))


def _refuse_missing(storage: Storage, table_uri: str, version: int, files: Sequence[DataFile]) -> None:
    present = paths_there(storage, table_uri)
    missing = [file.path for file in files if file.path not in present]
    if missing:
        named = ", ".join(missing[:_MAX_NAMED]) + (", ..." if len(missing) > _MAX_NAMED else "")
        problem = f"{len(missing)} of the {len(files)} data files of version {version} are gone: {named}"
        remedy = "A vacuum or a purge removed them; jobs.history says which versions can be read."
        raise InputError(problem, uri=table_uri, remedy=remedy)


def _with_consent(
    storage: Storage, output_uri: str, users_uri: str, run_id: str, files: tuple[DataFile, ...]
) -> tuple[DataFile, ...]:
    """What publish does with the rows of users who opted out, done to a version that was published before."""
    table_uri = f"{output_uri}/generations"
    with HashSpool() as users:
        for hashes in map_ahead(partial(_shown_users, storage), [f"{table_uri}/{file.path}" for file in files]):
            users.add(hashes)
        refused = without_consent(storage, users, users_uri)
    if not len(refused):
        return files
    try:
        return suppress(storage, load_run(storage, output_uri, run_id), files, refused)
    except (ConfigError, ObjectNotFoundError) as error:
        problem = f"{len(refused)} users opted out since run {run_id}, and the titles that they would be shown are gone"
        remedy = "Choose another version, or run jobs.generate: it starts from the consent of now."
        raise InputError(f"{problem} ({error})", uri=table_uri, remedy=remedy) from error


def _shown_users(storage: Storage, uri: str) -> Any:
    """The hashes of the users of rows that are not suppressed: (n, 2)."""
    rows: pa.Table = storage.read_table(uri, ["user_id", "status"])
    return hash_rows(rows.filter(pc.not_equal(rows["status"], str(Status.SUPPRESSED)))["user_id"])


def _refuse_deleted(commits: dict[int, dict[str, Any]], goal: int, base: DeltaTable, table_uri: str) -> None:
    """Who deleted rows after the goal was published does not expect them back."""
    later = {number: commits.get(number, {}) for number in range(goal + 1, base.version() + 1)}
    deleting = [str(version) for version, commit in later.items() if _deletes(commit)]
    if deleting:
        problem = f"rows that were deleted from {table_uri} in version {', '.join(deleting)} would come back"
        raise PublishConflictError(f"{problem}. Give --restore-deleted if that is meant")


def _deletes(commit: dict[str, Any]) -> bool:
    """Whether somebody may have taken rows out of the table; a merge says how many, or is taken for one that did."""
    operation = commit.get("operation")
    if operation == "MERGE":
        metrics = commit.get("operationMetrics") or {}
        counts = [int(metrics[name]) for name in _MERGE_DELETED if name in metrics]
        return not counts or counts[0] > 0
    if operation == "WRITE":
        return commit.get("operationParameters", {}).get("mode") == "Overwrite" and not is_published(commit)
    if operation is None or "REPLACE TABLE" in operation:  # by SQL: all rows may be others
        return not is_published(commit)
    # What a purge removed is gone from the older versions' files too.
    return operation in ("DELETE", "TRUNCATE", "FSCK") and commit.get("action") != "purge"


def _commit(storage: Storage, base: DeltaTable, table_uri: str, goal: _Goal) -> RolledBack:
    actions = add_actions(storage, table_uri, base, goal.files) if goal.num_changed else []
    # A commit is bound to the version after `base`: made twice, the second finds the first there and is refused.
    once = partial(_try_commit, storage, base, table_uri, goal, actions, _metadata(base, goal))
    return storage.patiently(once, "roll back", table_uri)


def _try_commit(
    storage: Storage,
    base: DeltaTable,
    table_uri: str,
    goal: _Goal,
    actions: Sequence[AddAction],
    metadata: dict[str, str],
) -> RolledBack:
    before = int(metadata["rolled_back_from"])
    properties = CommitProperties(custom_metadata=metadata, max_commit_retries=0)
    try:
        if goal.num_changed:
            schema = Schema.from_arrow(GENERATIONS)
            base.create_write_transaction([*actions], "overwrite", schema, commit_properties=properties)
        else:
            base.restore(goal.version, commit_properties=properties)
    except (DeltaError, OSError) as error:
        return _after_failure(storage, table_uri, before, goal, metadata, error)
    return goal.result(before + 1, already=False)


def _metadata(base: DeltaTable, goal: _Goal) -> dict[str, str]:
    """What a publish of these files would say, and what this is."""
    values = {name: goal.commit.get(name, "") for name in _CARRIED_METADATA}
    values |= {
        "action": "rollback",
        "rolled_back_to": goal.version,
        "rolled_back_from": base.version(),
        "num_rows": sum(file.num_rows for file in goal.files),
        "num_files_suppressed": int(goal.commit.get("num_files_suppressed", 0)) + goal.num_changed,
        "files_digest": goal.digest,
        "token": uuid.uuid4().hex,  # tells this commit from another rollback to the same version
    }
    return {name: str(value) for name, value in values.items()}


def _after_failure(
    storage: Storage, table_uri: str, before: int, goal: _Goal, metadata: Mapping[str, str], error: Exception
) -> RolledBack:
    """Find out who was first: another commit, or ourselves before an answer was lost."""
    now = open_table(storage, table_uri)
    shown = shown_by(now) if now else None
    if now is not None and shown and shown.files_digest == goal.digest and not shown.rows_deleted:
        is_ours = now.version() == before + 1 and metadata.items() <= now.history(1)[0].items()
        return goal.result(now.version(), already=not is_ours)
    changed = now is not None and now.version() > before
    if changed or isinstance(error, CommitFailedError):
        problem = f"{table_uri} was changed while it was being rolled back to version {goal.version}"
        raise PublishConflictError(f"{problem}. Look at jobs.history, then do it again if it should follow") from error
    raise PassingError(said(error)) from error

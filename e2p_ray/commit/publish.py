"""The one step that makes a run visible: a single Delta Lake commit of files that are already there."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from deltalake import CommitProperties, DeltaTable, Schema
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, create_table_with_add_actions

from e2p_ray.commit.consent import suppress, without_consent
from e2p_ray.commit.run import Run
from e2p_ray.commit.spool import HashSpool
from e2p_ray.commit.verify import DataFile, check_gates, verify
from e2p_ray.config import GatesConfig
from e2p_ray.errors import PublishConflictError, StorageError
from e2p_ray.schema import GENERATIONS
from e2p_ray.storage import Storage

_MAX_HISTORY = 200
_UPKEEP = frozenset({"OPTIMIZE", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES", "FSCK", "ADD FEATURE"})


@dataclass(frozen=True)
class PublishedVersion:
    """A run as readers see it."""

    version: int
    num_rows: int
    num_files: int
    already_published: bool


@dataclass(frozen=True)
class _Current:
    """What the table shows now, as far as it was published by us."""

    run_id: str
    files_digest: str
    rows_deleted: bool  # since then, by anybody


def publish(storage: Storage, run: Run, gates: GatesConfig, users_uri: str) -> PublishedVersion:
    """Verify a run, check its gates and its users' consent as it is now, and make it what readers see.

    The old version stays as it was until the commit, and readable by number after it. Publishing again what is there
    changes nothing. Raises IncompleteRunError, ConservationError, GateError, or PublishConflictError when the table
    changed since this call began.
    """
    base = _open_table(storage, run.table_uri)
    with HashSpool() as users:
        summary = verify(storage, run, users=users)
        check_gates(summary, gates)
        refused = without_consent(storage, users, users_uri)
    files = [file for file in suppress(storage, run, summary.files, refused) if file.num_rows]
    digest = _digest(files)
    published = _published(base, run, files, digest)
    return published or _commit(storage, run, base, files, digest)


def _published(table: DeltaTable | None, run: Run, files: list[DataFile], digest: str) -> PublishedVersion | None:
    """The version that shows exactly these files already, if it does."""
    current = _current(table) if table else None
    if table is None or current is None or current.run_id != run.run_id:
        return None
    if current.files_digest == digest:
        return PublishedVersion(table.version(), sum(file.num_rows for file in files), len(files), True)
    if current.rows_deleted:
        problem = f"rows were deleted from {run.table_uri} since run {run.run_id} was published, and would come back"
        raise PublishConflictError(f"{problem}. Plan and generate a new run")
    return None


def _commit(
    storage: Storage, run: Run, base: DeltaTable | None, files: list[DataFile], digest: str
) -> PublishedVersion:
    now_ms = int(time.time() * 1000)
    actions = [AddAction(file.path, file.size_bytes, {}, now_ms, True, file.statistics) for file in files]
    num_rows = sum(file.num_rows for file in files)
    metadata = {
        "run_id": run.run_id,
        "projector_id": run.projector_id,
        "base_model_id": run.base_model_id,
        "embedding_space": run.embedding_space,
        "num_rows": num_rows,
        "files_digest": digest,
    }
    # Without retries the library cannot put our files beside those of a publisher that came first.
    properties = CommitProperties(custom_metadata=metadata, max_commit_retries=0)
    schema = Schema.from_arrow(GENERATIONS)
    try:
        if base is None:
            options = storage.delta_options(run.table_uri)
            create_table_with_add_actions(
                run.table_uri, schema, actions, storage_options=options, commit_properties=properties
            )
        else:
            base.create_write_transaction([*actions], "overwrite", schema, commit_properties=properties)
    except (DeltaError, OSError) as error:
        return _after_failure(storage, run, base, files, digest, error)
    return PublishedVersion(base.version() + 1 if base else 0, num_rows, len(files), False)


def _after_failure(
    storage: Storage,
    run: Run,
    base: DeltaTable | None,
    files: list[DataFile],
    digest: str,
    error: Exception,
) -> PublishedVersion:
    """Find out who was first: another publisher of this run, of another run, or ourselves before an answer was lost."""
    now = _open_table(storage, run.table_uri)
    if published := _published(now, run, files, digest):
        return published
    changed = now is not None and (base is None or now.version() > base.version())
    if changed or isinstance(error, CommitFailedError):
        problem = f"{run.table_uri} was changed while run {run.run_id} was being published"
        raise PublishConflictError(f"{problem}. Look at its history, then publish again if it should follow") from error
    raise StorageError(f"could not publish to {run.table_uri}: {error}") from error


def _open_table(storage: Storage, table_uri: str) -> DeltaTable | None:
    try:
        return DeltaTable(table_uri, storage_options=storage.delta_options(table_uri))
    except TableNotFoundError:
        return None
    except (DeltaError, OSError) as error:
        raise StorageError(f"could not open the Delta table {table_uri}: {error}") from error


def _current(table: DeltaTable) -> _Current | None:
    """Walk back, through restores and upkeep, to the publish whose rows the table shows; None when it is not ours."""
    history: dict[int, dict[str, Any]] = {entry["version"]: entry for entry in table.history(_MAX_HISTORY)}
    version, rows_deleted = table.version(), False
    while (entry := history.get(version)) is not None:
        if "files_digest" in entry:
            return _Current(entry["run_id"], entry["files_digest"], rows_deleted)
        operation = entry.get("operation")
        if operation == "RESTORE":
            version = int(entry["operationParameters"].get("version") or -1)
            rows_deleted = False
        elif operation == "DELETE" or operation in _UPKEEP:
            rows_deleted |= operation == "DELETE"
            version -= 1
        else:
            return None
    return None


def _digest(files: Iterable[DataFile]) -> str:
    lines = sorted(f"{file.path} {file.size_bytes}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:32]

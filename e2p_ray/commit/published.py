"""The published table as it is now: its version, its files, and which of our runs it shows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from urllib.parse import unquote

import polars as pl
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from e2p_ray.commit.run import Run, read_markers
from e2p_ray.errors import StorageError
from e2p_ray.storage import Storage, is_s3
from e2p_ray.storage.delta import has_deletion_vectors, said

_MAX_HISTORY = 200
UPKEEP = frozenset({"OPTIMIZE", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES", "ADD FEATURE"})
_DELETING = frozenset({"DELETE", "FSCK"})  # a repair takes files out of the table that are gone


@dataclass(frozen=True)
class Shown:
    """The publish whose rows the table shows, as far as it was one of ours."""

    run_id: str
    source_id: str  # names plan, settings, projector and base model that the rows are of; "" from an older release
    files_digest: str
    num_deferred: int  # requests that a limit left for a later run
    num_files_suppressed: int  # files that consent changed at the moment of publishing
    rows_deleted: bool  # since then, by anybody


@dataclass(frozen=True)
class PublishedTable:
    """One version of the published table, with all its active files."""

    uri: str
    table_id: str
    version: int
    file_uris: tuple[str, ...]
    num_rows: int
    shown: Shown | None  # None when the rows are not those of a publish
    has_deletion_vectors: bool = False  # the files alone do not say which rows there are

    def shows_all_of(self, source_id: str) -> bool:
        """Whether a complete run of this source is what the table shows, unchanged."""
        shown = self.shown
        if shown is None or shown.source_id != source_id:
            return False
        return not (shown.num_deferred or shown.num_files_suppressed or shown.rows_deleted)


def read_published(storage: Storage, table_uri: str) -> PublishedTable | None:
    """The table as it is now, None when there is none."""
    table = open_table(storage, table_uri)
    if table is None:
        return None
    files = pl.DataFrame(table.get_add_actions(flatten=True))
    uris = table.file_uris()
    return PublishedTable(
        uri=table_uri,
        table_id=str(table.metadata().id),
        version=table.version(),
        file_uris=tuple(sorted(uris if is_s3(table_uri) else map(unquote, uris))),
        num_rows=int(files["num_records"].sum()) if "num_records" in files.columns else 0,
        shown=shown_by(table),
        has_deletion_vectors=has_deletion_vectors(table),
    )


def as_if_published(storage: Storage, run: Run, table: PublishedTable | None) -> PublishedTable:
    """A complete run that no gate let through, as the version that it would have been: an update can begin from it."""
    markers = read_markers(storage, run)
    return PublishedTable(
        uri=run.table_uri,
        table_id=table.table_id if table else "",
        version=table.version + 1 if table else 0,
        file_uris=tuple(run.data_uri(shard_id) for shard_id in run.shard_ids),
        num_rows=sum(marker["num_rows"] for marker in markers),
        shown=Shown(run.run_id, run.source_id, "", 0, 0, rows_deleted=False),
    )


class _Table(DeltaTable):
    """A table whose log is read as patiently as everything else on S3."""

    def __init__(self, storage: Storage, uri: str, version: int | None, options: dict[str, str]) -> None:
        super().__init__(uri, version=version, storage_options=options)
        self._storage, self._uri = storage, uri

    def history(self, limit: int | None = None) -> list[dict[str, Any]]:
        """See DeltaTable.history; StorageError when it cannot be read."""
        try:
            return self._storage.patiently(partial(super().history, limit), "read the history of", self._uri)
        except (DeltaError, OSError) as error:
            raise StorageError(f"could not read the history of {self._uri}: {said(error)}") from error


def open_table(storage: Storage, table_uri: str, version: int | None = None) -> DeltaTable | None:
    """The Delta table as it is now or was at a version, or None when there is none.

    StorageError when it cannot be opened, or not at this version, or when there is no such bucket.
    """
    options = storage.delta_options(table_uri, with_retries=True)
    try:
        return storage.patiently(partial(_Table, storage, table_uri, version, options), "open the table", table_uri)
    except TableNotFoundError:
        return None
    except (DeltaError, OSError) as error:
        raise StorageError(f"could not open the Delta table {table_uri}: {said(error)}") from error


def shown_by(table: DeltaTable) -> Shown | None:
    """Walk back, through restores and upkeep, to the publish whose rows the table shows; None when it is not ours."""
    history = _history(table)
    version, rows_deleted = table.version(), False
    while (entry := history.get(version)) is not None:
        if "files_digest" in entry:
            return Shown(
                run_id=entry["run_id"],
                source_id=entry.get("source_id", ""),
                files_digest=entry["files_digest"],
                num_deferred=int(entry.get("num_deferred", 0)),
                num_files_suppressed=int(entry.get("num_files_suppressed", 0)),
                rows_deleted=rows_deleted,
            )
        operation = entry.get("operation")
        if operation == "RESTORE":
            version = int(entry["operationParameters"].get("version") or -1)
        elif operation in _DELETING or operation in UPKEEP:
            rows_deleted |= operation in _DELETING
            version -= 1
        else:
            return None
    return None


def same_rows_since(table: DeltaTable, version: int) -> bool:
    """Whether nothing but upkeep happened to the table since a version."""
    history = _history(table)
    later = range(version + 1, table.version() + 1)
    return version <= table.version() and all(history.get(v, {}).get("operation") in UPKEEP for v in later)


def as_of_last_change(storage: Storage, table: PublishedTable) -> PublishedTable:
    """The table, by the version that its rows are of: upkeep since then throws no unfinished run away."""
    opened = open_table(storage, table.uri, table.version)
    assert opened is not None, "it was read before"
    history, version = _history(opened), table.version
    while version > 0 and history.get(version, {}).get("operation") in UPKEEP:
        version -= 1
    return replace(table, version=version)


def _history(table: DeltaTable) -> dict[int, dict[str, Any]]:
    return {entry["version"]: entry for entry in table.history(_MAX_HISTORY)}

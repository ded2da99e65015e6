"""The Delta table's part of a purge: the visible version by one commit, then its log and checkpoints.

Every version stays readable. Files of the visible version are replaced by others under new names, in one commit, so
that readers see the old rows or the new ones. All other files are rewritten where they are, and the log's sizes and
statistics of them with them: the log's past is changed on purpose, because these users are in it.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from e2p_ray.commit.data_files import data_files
from e2p_ray.commit.publish import digest_of
from e2p_ray.commit.published import open_table, said, shown_by
from e2p_ray.commit.users_in import PURGED, Rewritten, Users
from e2p_ray.commit.verify import DataFile, file_statistics
from e2p_ray.errors import IncompatibleError, PublishConflictError, StorageError
from e2p_ray.storage import Storage

_COMMIT = re.compile(r"\d{20}\.json")
_CHECKPOINT = re.compile(r"(\d{20})\.checkpoint.*\.parquet")
_CARRIED_KEYS = ("projector_id", "base_model_id", "embedding_space")
_HISTORY = 200


@dataclass(frozen=True)
class TableState:
    """The table as it is visible now; `active` are its files by their path below the table."""

    uri: str
    table: DeltaTable | None
    active: Mapping[str, DataFile]

    def path_of(self, uri: str) -> str:
        return uri[len(self.uri) + 1 :]


def read_state(storage: Storage, table_uri: str) -> TableState:
    """Raises IncompatibleError for a table that holds more than files and rows."""
    table = open_table(storage, table_uri)
    if table is None:
        return TableState(table_uri, None, {})
    protocol = table.protocol()
    features = [*(protocol.reader_features or ()), *(protocol.writer_features or ())]
    if features or table.metadata().partition_columns:
        found = ", ".join(features) or "partition columns"
        remedy = (
            "Take them off (REORG, then DROP FEATURE), or delete the users there and vacuum by the tool that set them"
        )
        raise IncompatibleError(f"{table_uri} has {found}, with which users cannot be purged here. {remedy}")
    return TableState(table_uri, table, {file.path: file for file in data_files(table)})


def swap_files(storage: Storage, state: TableState, files: Iterable[Rewritten]) -> int:
    """Show these in place of the visible files they were made from; the new version.

    Raises PublishConflictError when somebody else changed the table meanwhile.
    """
    assert state.table is not None, "without a table there is no visible file"
    now_ms = int(time.time() * 1000)
    removed, added = list[dict[str, Any]](), list[dict[str, Any]]()
    as_published = dict(state.active)
    for file in files:
        old = as_published.pop(state.path_of(file.uri))
        common = {"partitionValues": {}, "dataChange": True}
        removed.append(common | {"path": old.path, "size": old.size_bytes, "deletionTimestamp": now_ms})
        removed[-1]["extendedFileMetadata"] = True
        if file.table.num_rows:
            name = f"{old.shard_id}-{hashlib.sha256(file.data).hexdigest()[:16]}.parquet"
            new = str(PurePosixPath(old.path).parent / name)
            storage.write_bytes(f"{state.uri}/{new}", file.data)
            added.append(common | {"path": new, "size": len(file.data), "modificationTime": now_ms})
            added[-1]["stats"] = _statistics(file)
            # Once it is rewritten under its own name as well, publishing its run again finds the same.
            as_published[old.path] = replace(old, size_bytes=len(file.data), num_rows=file.table.num_rows)
    version = state.table.version() + 1
    metadata = _metadata(state.table, tuple(as_published.values()))
    operation = "WRITE" if "files_digest" in metadata else "DELETE"
    info = {"timestamp": now_ms, "operation": operation, "operationParameters": {}, "engineInfo": "e2p_ray", **metadata}
    actions = [{"commitInfo": info}, *({"remove": action} for action in removed), *({"add": a} for a in added)]
    lines = "".join(json.dumps(action, ensure_ascii=False) + "\n" for action in actions)
    if not storage.put_if_absent(f"{state.uri}/_delta_log/{version:020d}.json", lines.encode()):
        raise PublishConflictError(f"{state.uri} was changed while users were being purged. Run the same command again")
    return version


def _metadata(table: DeltaTable, as_published: tuple[DataFile, ...]) -> dict[str, str]:
    """What the version says of itself: still the publish that it shows, where it shows one without deleted rows."""
    metadata = {"action": "purge"}
    shown = shown_by(table)
    if shown is None or shown.rows_deleted:
        return metadata
    by_run = [entry for entry in table.history(_HISTORY) if entry.get("run_id") == shown.run_id]
    for entry in by_run[:1]:
        metadata |= {name: str(entry[name]) for name in _CARRIED_KEYS if name in entry}
    return metadata | {
        "run_id": shown.run_id,
        "source_id": shown.source_id,
        "num_rows": str(sum(file.num_rows for file in as_published)),
        "num_deferred": str(shown.num_deferred),
        "num_files_suppressed": str(shown.num_files_suppressed),
        "files_digest": digest_of(as_published),
    }


def drop_old_checkpoints(storage: Storage, state: TableState) -> None:
    """Leave the log's own lines as the only account of older versions: they can be put right."""
    log = storage.list_objects(f"{state.uri}/_delta_log")
    found = {info.uri: int(at[1]) for info in log if (at := _CHECKPOINT.fullmatch(info.name))}
    table = open_table(storage, state.uri)
    if table is None or all(version == table.version() for version in found.values()):
        return
    if table.version() not in found.values():
        _write_checkpoint(storage, table, state.uri)
    for uri, version in found.items():
        if version != table.version():
            storage.delete(uri)


def _write_checkpoint(storage: Storage, table: DeltaTable, table_uri: str) -> None:
    """Of the version that `table` is at; made twice, it says the same."""
    try:
        storage.patiently(table.create_checkpoint, "write a checkpoint of", table_uri)
    except (DeltaError, OSError) as error:
        raise StorageError(f"could not write a checkpoint of {table_uri}: {said(error)}") from error


def fix_log(
    storage: Storage, state: TableState, users: Users, sizes: Mapping[str, int], rewritten: Collection[str]
) -> None:
    """Put the log right: sizes and statistics of files that were rewritten, and no name of these users.

    `sizes` are those of all files below the table, `rewritten` the paths of this purge; what an earlier one that was
    killed rewrote is told by its size.
    """
    active = read_state(storage, state.uri).active
    fixes: dict[str, tuple[int, str] | None] = {}

    def fix(action: dict[str, Any]) -> None:
        path = unquote(action["path"])
        is_other = path in rewritten or action.get("size") != sizes.get(path)
        if path in active or path not in sizes or not is_other:
            return
        if path not in fixes:
            fixes[path] = _fix_of(storage, state, path)
        if (found := fixes[path]) is not None:
            action["size"] = found[0]
            if "stats" in action:
                action["stats"] = found[1]

    for info in list(storage.list_objects(f"{state.uri}/_delta_log")):
        if info.uri.endswith(".crc") and users.in_json(json.loads(storage.read_bytes(info.uri))):
            storage.delete(info.uri)  # what some engines note of a version's state; they do without
        if not _COMMIT.fullmatch(info.name):
            continue
        data = storage.read_bytes(info.uri)
        lines = [json.loads(line) for line in data.splitlines() if line.strip()]
        for action in (line[kind] for line in lines for kind in ("add", "remove") if kind in line):
            fix(action)
        lines = [users.out_of_json(line) for line in lines]
        if lines != [json.loads(line) for line in data.splitlines() if line.strip()]:
            text = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
            storage.write_bytes(info.uri, text.encode())


def _fix_of(storage: Storage, state: TableState, path: str) -> tuple[int, str] | None:
    """Size and statistics of a file as it is; None when it was not a purge that changed it."""
    uri = f"{state.uri}/{path}"
    info = storage.info(uri)
    table = storage.read_table(uri)
    if info is None or PURGED not in (table.schema.metadata or {}):
        return None
    return info.size_bytes, _statistics(Rewritten(uri, table, b""))


def _statistics(file: Rewritten) -> str:
    if file.table.num_rows:
        return file_statistics(file.table)
    return json.dumps({"numRecords": 0})

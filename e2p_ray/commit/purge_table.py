"""The Delta table's part of a purge: the visible version by one commit, then its log and checkpoints.

Every version stays readable. Files of the visible version are replaced by others under new names, in one commit, so
that readers see the old rows or the new ones. All other files are rewritten where they are, and the sizes and
statistics of them in the log and in its checkpoints with them: the log's past is changed on purpose, because these
users are in it. Of files that are gone, which nobody can look into any more, the log keeps the number of rows alone.
"""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable

from e2p_ray.commit.data_files import data_files, published_path, purged_path
from e2p_ray.commit.publish import digest_of
from e2p_ray.commit.published import open_table, shown_by
from e2p_ray.commit.users_in import PURGED, Rewritten, Users
from e2p_ray.commit.verify import DataFile, file_statistics
from e2p_ray.errors import IncompatibleError, PublishConflictError
from e2p_ray.storage import Storage

_COMMITS = re.compile(r"\d{20}(\.\d{20}\.compacted)?\.json")  # one, or several in one file
_CHECKPOINT = re.compile(r"\d{20}\.checkpoint.*\.parquet")
FILE_ACTIONS = ("add", "remove")  # of Delta's log: both have sizes and statistics
_CARRIED_KEYS = ("projector_id", "base_model_id", "embedding_space")
_HISTORY = 200


@dataclass(frozen=True)
class TableState:
    """The table as it is visible now; `active` are its files by their path below the table."""

    uri: str
    table: DeltaTable | None
    active: Mapping[str, DataFile]

    @property
    def version(self) -> int | None:
        return self.table.version() if self.table else None

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


def refuse_change(state: TableState, version: int | None) -> None:
    """PublishConflictError when the table is at another version: what was found is not what is visible now."""
    if state.version != version:
        raise _changed(state)


def _changed(state: TableState) -> PublishConflictError:
    return PublishConflictError(
        f"{state.uri} was changed while users were being purged. Let no job write there, and run the same command again"
    )


def swap_files(storage: Storage, state: TableState, files: Iterable[Rewritten]) -> int:
    """Show these in place of the visible files they were made from; the new version.

    Raises PublishConflictError when somebody else changed the table meanwhile.
    """
    assert state.table is not None, "without a table there is no visible file"
    now_ms = int(time.time() * 1000)
    removed, added = list[dict[str, Any]](), list[dict[str, Any]]()
    # By the names that publishing its run again finds: there the same rows are rewritten where they are.
    as_published = {path: replace(file, path=published_path(path)) for path, file in state.active.items()}
    for file in files:
        old = state.active[state.path_of(file.uri)]
        published = as_published.pop(old.path)
        common = {"partitionValues": {}, "dataChange": True}
        removed.append(common | {"path": old.path, "size": old.size_bytes, "deletionTimestamp": now_ms})
        removed[-1]["extendedFileMetadata"] = True
        if file.table.num_rows:
            new = purged_path(old.path, file.data)
            storage.write_bytes(f"{state.uri}/{new}", file.data)
            added.append(common | {"path": new, "size": len(file.data), "modificationTime": now_ms})
            added[-1]["stats"] = _statistics(file)
            as_published[old.path] = replace(published, size_bytes=len(file.data), num_rows=file.table.num_rows)
    version = state.table.version() + 1
    metadata = _metadata(state.table, tuple(as_published.values()))
    operation = "WRITE" if "files_digest" in metadata else "DELETE"
    info = {"timestamp": now_ms, "operation": operation, "operationParameters": {}, "engineInfo": "e2p_ray", **metadata}
    actions = [{"commitInfo": info}, *({"remove": action} for action in removed), *({"add": a} for a in added)]
    lines = "".join(json.dumps(action, ensure_ascii=False) + "\n" for action in actions)
    if not storage.put_if_absent(f"{state.uri}/_delta_log/{version:020d}.json", lines.encode()):
        raise _changed(state)
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
        if path in active:
            return
        if path not in sizes:
            if action.get("stats"):  # of a file that is gone: whose values they are, nobody can say
                action["stats"] = _num_rows_alone(action["stats"])
            return
        if path not in rewritten and action.get("size") == sizes[path]:
            return
        if path not in fixes:
            fixes[path] = _fix_of(storage, state, path)
        if (found := fixes[path]) is not None:
            action["size"] = found[0]
            if action.get("stats"):
                action["stats"] = found[1]

    log_uri = f"{state.uri}/_delta_log"
    log = {info.uri: info for info in storage.list_objects(log_uri)}
    for uri, info in log.items():
        now, is_checkpoint = None, _CHECKPOINT.fullmatch(info.name)
        if uri.endswith(".crc") and _tells_of_files(storage.read_bytes(uri), users):
            storage.delete(uri)  # what some engines note of a version's state; they do without
        elif _COMMITS.fullmatch(info.name):
            now = _fixed_commit(storage.read_bytes(uri), users, fix)
        elif is_checkpoint:
            now = _fixed_checkpoint(storage.read_table(uri), users, fix)
        if now is not None:
            if is_checkpoint:
                _forget_size(storage, f"{log_uri}/_last_checkpoint", log)
            replace_object(storage, uri, now, log)


def _tells_of_files(data: bytes, users: Users) -> bool:
    """Whether a version's checksum names users, or lists files: their sizes and statistics may be others now."""
    try:
        listed = json.loads(data).get("allFiles")
    except (ValueError, AttributeError):  # no JSON, or no object
        listed = None
    return bool(listed) or users.in_json_text(data) > 0


def replace_object(storage: Storage, uri: str, data: bytes, present: Collection[str]) -> None:
    """Write other bytes over an object, and forget the checksum that Hadoop's local files have beside them."""
    folder, _, name = uri.rpartition("/")
    if (checksum := f"{folder}/.{name}.crc") in present:
        storage.delete(checksum)
    storage.write_bytes(uri, data)


def _fixed_commit(data: bytes, users: Users, fix: Callable[[dict[str, Any]], None]) -> bytes | None:
    """A version's lines, put right; None when they are."""
    before = [json.loads(line) for line in data.splitlines() if line.strip()]
    lines = deepcopy(before)
    for action in (line[kind] for line in lines for kind in FILE_ACTIONS if kind in line):
        fix(action)
    lines = [users.out_of_json(line) for line in lines]
    if lines == before:
        return None
    return "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines).encode()


def _fixed_checkpoint(table: pa.Table, users: Users, fix: Callable[[dict[str, Any]], None]) -> bytes | None:
    """A checkpoint says of versions before it what their lines did, and they may be gone. None when it is right."""
    fixed = table
    for place, field in enumerate(table.schema):
        if field.name in FILE_ACTIONS:
            column = _fixed_actions(table.column(place).combine_chunks(), users, fix)
            fixed = fixed.set_column(place, field.with_type(column.type), column)
    if fixed.equals(table):
        return None
    buffer = io.BytesIO()
    pq.write_table(fixed.replace_schema_metadata(None), buffer, compression="snappy", store_schema=False)
    return buffer.getvalue()


def _fixed_actions(column: pa.StructArray, users: Users, fix: Callable[[dict[str, Any]], None]) -> pa.StructArray:
    """Without `stats_parsed`, which may be left out: it says what `stats` does once more."""
    fields = {field.name: (field, column.field(field.name)) for field in column.type if field.name != "stats_parsed"}
    actions = {name: fields[name][1].to_pylist() for name in ("path", "size", "stats") if name in fields}
    fixed = {name: list[Any]() for name in actions}
    for values in zip(column.is_valid().to_pylist(), *actions.values(), strict=True):
        action = dict(zip(actions, values[1:], strict=True))
        if values[0]:
            fix(action)
            action = users.out_of_json(action)
        for name in fixed:
            fixed[name].append(action[name])
    for name, column_of in fixed.items():
        fields[name] = (fields[name][0], pa.array(column_of, fields[name][0].type))
    arrays = [array for _, array in fields.values()]
    return pa.StructArray.from_arrays(arrays, fields=[field for field, _ in fields.values()], mask=column.is_null())


def _forget_size(storage: Storage, uri: str, present: Collection[str]) -> None:
    """What the pointer to the newest checkpoint may say of it: its size in bytes, and a checksum of the pointer."""
    if uri in present:
        pointer = json.loads(storage.read_bytes(uri))
        if left := pointer.keys() & {"sizeInBytes", "checksum"}:
            kept = {name: value for name, value in pointer.items() if name not in left}
            replace_object(storage, uri, json.dumps(kept).encode(), present)


def _num_rows_alone(statistics: str) -> str:
    try:
        found = json.loads(statistics)
    except ValueError:
        return "{}"
    kept = {name: found[name] for name in found if name == "numRecords"}
    return statistics if kept == found else json.dumps(kept)


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

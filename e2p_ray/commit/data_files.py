"""The data files of the published table: those of one version, and names that one commit may use."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

import polars as pl
from deltalake import DeltaTable
from deltalake.transaction import AddAction

from e2p_ray.commit.run import map_ahead
from e2p_ray.commit.verify import DataFile
from e2p_ray.schema import RequestKey
from e2p_ray.storage import Storage

_COPY = re.compile(r"-[0-9a-f]{16}$")  # what follows the shard id in the name of a file that was made at publish
_PURGED_COPY = re.compile(r"-purged-[0-9a-f]{16}$")  # what follows all that in the name of one that a purge made


def data_files(table: DeltaTable) -> tuple[DataFile, ...]:
    """The active files of a version, by path; of a file that is not a shard's, the shard id means nothing."""
    actions = pl.DataFrame(table.get_add_actions(flatten=True))
    return tuple(sorted((_data_file(row) for row in actions.iter_rows(named=True)), key=lambda file: file.path))


def paths_there(storage: Storage, table_uri: str) -> set[str]:
    """Every object of the table by its path there: what a version names and this does not is gone."""
    return {info.uri[len(table_uri) + 1 :] for info in storage.list_objects(table_uri)}


def purged_path(path: str, data: bytes) -> str:
    """A name for what is left of a file after a purge; `published_path` of both is the same."""
    published = PurePosixPath(published_path(path))
    return str(published.with_name(f"{published.stem}-purged-{hashlib.sha256(data).hexdigest()[:16]}.parquet"))


def published_path(path: str) -> str:
    """The name by which a file was published, whatever purges made of it since."""
    file = PurePosixPath(path)
    return str(file.with_name(f"{_PURGED_COPY.sub('', file.stem)}{file.suffix}"))


def add_actions(
    storage: Storage, table_uri: str, table: DeltaTable | None, files: Sequence[DataFile]
) -> list[AddAction]:
    """What an overwrite of the table by these files adds."""
    now_ms = int(time.time() * 1000)
    added = _not_in_table(storage, table_uri, table, files)
    return [AddAction(file.path, file.size_bytes, {}, now_ms, True, file.statistics) for file in added]


def _not_in_table(
    storage: Storage, table_uri: str, table: DeltaTable | None, files: Sequence[DataFile]
) -> list[DataFile]:
    """The same files, with copies in place of those that the table shows now.

    An overwrite removes all that is there; a path that one commit both adds and removes is against Delta's protocol,
    and readers other than this library's may lose the file.
    """
    if table is None:
        return list(files)
    active = {file.path for file in data_files(table)}
    version = table.version()

    def apart(file: DataFile) -> DataFile:
        if file.path not in active:
            return file
        name = hashlib.sha256(f"{file.path} {version}".encode()).hexdigest()[:16]
        path = str(PurePosixPath(file.path).parent / f"{file.shard_id}-{name}.parquet")
        storage.put_if_absent(f"{table_uri}/{path}", storage.read_bytes(f"{table_uri}/{file.path}"))
        return replace(file, path=path)

    return list(map_ahead(apart, files))


def _data_file(action: dict[str, Any]) -> DataFile:
    path, num_rows = unquote(action["path"]), int(action.get("num_records") or 0)
    # A reader skips by the keys' bounds alone; null counts are not kept.
    statistics = {
        "numRecords": num_rows,
        "minValues": {name: action[f"min.{name}"] for name in RequestKey._fields if action.get(f"min.{name}")},
        "maxValues": {name: action[f"max.{name}"] for name in RequestKey._fields if action.get(f"max.{name}")},
        "nullCount": dict.fromkeys(RequestKey._fields, 0),
    }
    text = json.dumps(statistics, ensure_ascii=False)
    shard_id = _COPY.sub("", PurePosixPath(published_path(path)).stem)
    return DataFile(shard_id, path, action["size_bytes"], num_rows, text)

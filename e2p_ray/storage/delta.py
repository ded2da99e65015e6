"""What Delta Lake says of a table: the files of its current version, and errors in one line."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import unquote

import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from e2p_ray.errors import InputError, StorageError

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_MAX_CHARS = 500


def said(error: Exception) -> str:
    """What deltalake says, in one line and without colours."""
    return " ".join(_COLOURS.sub("", str(error)).split())[:_MAX_CHARS]


def has_deletion_vectors(table: DeltaTable) -> bool:
    """Whether rows may be deleted by files of another kind, which nothing here reads, in this version or another."""
    return "deletionVectors" in (table.protocol().reader_features or ())


def _deletes_by_vectors(table: DeltaTable) -> bool:
    """Whether they are in this version: tables of some writers may always have them, and seldom do."""
    try:
        return has_deletion_vectors(table) and any(batch.num_rows for batch in table.deletion_vectors())
    except DeltaError:
        return True  # there is one that cannot be read


def current_version(open_table: Callable[[], DeltaTable], uri: str) -> tuple[int, set[str]]:
    """Number and files, by their paths in its folder, of the version of an input that a table is at.

    InputError where it cannot be read, or by its files alone; StorageError where it cannot be reached.
    """
    try:
        table = open_table()
    except DeltaError as error:
        remedy = "Write it with a Delta version that deltalake reads, or give a folder of Parquet files."
        if re.search(r"%[0-9A-Fa-f]{2}" + ("|[#?]" if "://" in uri else ""), uri):
            remedy = "Delta Lake looks elsewhere because of signs in this name: rename the folder."
        raise InputError(f"cannot be read as a Delta table: {said(error)}", uri=uri, remedy=remedy) from error
    except OSError as error:
        raise StorageError(f"could not open the Delta table {uri}: {said(error)}") from error
    try:
        deletes = _deletes_by_vectors(table)
    except OSError as error:
        raise StorageError(f"could not read deletion vectors of {uri}: {said(error)}") from error
    if deletes:
        remedy = "Purge them with the engine that wrote them (REORG TABLE ... APPLY (PURGE))."
        raise InputError(
            "has deletion vectors: its files alone do not say which rows there are", uri=uri, remedy=remedy
        )
    # Not `file_uris`: links in a table's place are followed there, and names of partitions are decoded once too often.
    paths = pa.table(table.get_add_actions(flatten=True))["path"].to_pylist()
    return table.version(), set(map(unquote, paths))

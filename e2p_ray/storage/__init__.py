"""List, read, put and put-if-absent by URI: local paths and s3://; Parquet and folders on top."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable

from e2p_ray.config import StorageConfig
from e2p_ray.errors import ConfigError, InputError, ObjectNotFoundError, StorageError
from e2p_ray.storage.delta import current_version
from e2p_ray.storage.local import LocalPlace, local_path, refuse_links_out, temp_path
from e2p_ray.storage.objects import DatedObject, ObjectInfo, PassingError, Place
from e2p_ray.storage.s3 import S3Place, split

__all__ = ["DatedObject", "ObjectInfo", "PassingError", "Storage", "TableFiles", "batches", "is_s3", "parquet_bytes"]

_T = TypeVar("_T")

_BATCH_ROWS = 1 << 16
_PART_BYTES = 64 << 20  # a download is retried in pieces of this size
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")


def is_s3(uri: str) -> bool:
    """Whether a URI is on S3; ConfigError for a scheme that is neither that nor local."""
    scheme = _SCHEME.match(uri)
    if scheme and scheme[1] not in ("s3", "file"):
        raise ConfigError(f"{uri}: unknown scheme {scheme[1]!r}. Give a local path or s3://bucket/...")
    return scheme is not None and scheme[1] == "s3"


def batches(file: pq.ParquetFile, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """These columns of a file some rows at a time; of the file no more is in memory than a row group.

    Arrow, asked for all groups at once, keeps what it has read until the last batch.
    """
    for group in range(file.num_row_groups):
        yield from file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=list(columns), use_threads=False)


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as the bytes of a Parquet file; equal tables give equal bytes.

    Without dictionaries of floats and lists: a shard's user embeddings, hardly a number of which is there twice, took
    half as much room again and two to four times as long to write (16 and 128 dimensions, 2026-11-28).
    """
    buffer = io.BytesIO()
    flat = (field for field in table.schema if not pa.types.is_nested(field.type))
    repeating = [field.name for field in flat if not pa.types.is_floating(field.type)]
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True, use_dictionary=repeating)
    return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class TableFiles:
    """The data files of a table of the inputs; of a Delta table those of its current version, and which that is."""

    files: list[ObjectInfo]
    delta_version: int | None = None


class Storage:
    """Objects by URI. Picklable and thread-safe; every process makes its own S3 client when it first needs one.

    Every method raises ObjectNotFoundError, AccessDeniedError or, when all tries failed, StorageError.
    """

    def __init__(self, config: StorageConfig | None = None) -> None:
        self.config = config or StorageConfig()
        self._open()

    def _open(self) -> None:
        self._s3, self._local = S3Place(self.config), LocalPlace()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_s3", "_local")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(endpoint_url={self.config.endpoint_url!r}, region={self.config.region!r})"

    def _place(self, uri: str) -> Place:
        return self._s3 if is_s3(uri) else self._local

    def read_bytes(self, uri: str) -> bytes:
        """All bytes of an object."""
        return self._place(uri).read(uri)

    def read_range(self, info: ObjectInfo, start: int, num_bytes: int) -> bytes:
        """Up to `num_bytes` bytes from `start` of an object as it was listed; StorageError when it has changed."""
        num_bytes = min(num_bytes, info.size_bytes - start)
        return self._place(info.uri).read_range(info, start, num_bytes) if num_bytes > 0 else b""

    def write_bytes(self, uri: str, data: bytes) -> None:
        """Write or replace an object; readers see the old bytes or the new ones, never a part."""
        self._place(uri).put(uri, data)

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        """Write an object unless there is one: True when these bytes were written, False when one was there.

        Of many writers at once one wins. Needs a server that honours `If-None-Match: *`, or hard links locally.
        """
        return self._place(uri).put_if_absent(uri, data)

    def info(self, uri: str) -> ObjectInfo | None:
        """Size and version of the object of exactly this name, None when there is none."""
        return self._place(uri).info(uri)

    def exists(self, uri: str) -> bool:
        """Whether there is an object of exactly this name."""
        return self.info(uri) is not None

    def delete(self, uri: str) -> None:
        """Remove one object; nothing happens when there is none."""
        self._place(uri).delete(uri)

    def list_objects(self, uri: str) -> Iterator[ObjectInfo]:
        """Every object below a folder, at any depth, sorted by URI; nothing when the folder is missing.

        Local folders behind links are left out, one that cannot be listed is an error.
        """
        yield from self._place(uri).list_below(uri.rstrip("/") or "/")

    def list_dated(self, uri: str) -> list[DatedObject]:
        """`list_objects` with the time of each, and with what killed writers left behind: for upkeep."""
        return self._place(uri).list_dated(uri.rstrip("/") or "/")

    def refuse_links_out(self, uri: str) -> None:
        """StorageError for a link below a local folder that leads out of it; S3 has no links."""
        if not is_s3(uri):
            refuse_links_out(local_path(uri), local_path(uri))

    @contextmanager
    def open_parquet(self, place: str | ObjectInfo) -> Iterator[pq.ParquetFile]:
        """A Parquet file that fetches only the ranges it is asked for, and checks pages that have a checksum.

        InputError, naming it, when it is no whole Parquet file or damaged, also while it is read within the `with`, and
        when it is gone since it was listed.
        """
        info = self.info(place) if isinstance(place, str) else place
        if info is None:
            raise ObjectNotFoundError(f"there is no object {place}")
        source = pa.PythonFile(io.BufferedReader(_Ranges(self, info), 1 << 16), mode="r")
        try:
            with pq.ParquetFile(source, pre_buffer=True, page_checksum_verification=True) as file:
                yield file
        except ObjectNotFoundError as error:
            if isinstance(place, str):
                raise
            remedy = "Run again once nothing writes there."
            raise InputError("gone since it was listed", uri=info.uri, remedy=remedy) from error
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # not Arrow's: of what the caller does inside
                raise
            problem = f"not a whole Parquet file, or damaged ({str(error).splitlines()[0]})"
            raise InputError(problem, uri=info.uri, remedy="Write it again.") from error

    def read_schema(self, uri: str) -> pa.Schema:
        """The Arrow schema of a Parquet file; reads its footer only."""
        with self.open_parquet(uri) as file:
            return file.schema_arrow

    def read_table(self, uri: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A Parquet file as a table; with `columns`, only their bytes are fetched."""
        with self.open_parquet(uri) as file:
            missing = [name for name in columns or () if name not in file.schema_arrow.names]
            if missing:
                remedy = f"The file has {file.schema_arrow.names}; write it again with this column."
                raise InputError("no such column", uri=uri, column=missing[0], remedy=remedy)
            return file.read(columns=columns, use_threads=False)

    def write_table(self, uri: str, table: pa.Table) -> None:
        """Write a table as one Parquet object."""
        self.write_bytes(uri, parquet_bytes(table))

    def parquet_files(self, uri: str) -> list[ObjectInfo]:
        """The data files of a table; see `table_files`."""
        return self.table_files(uri).files

    def table_files(self, uri: str) -> TableFiles:
        """The data files of a table: a folder of *.parquet at any depth, or one file; _names and .names are no data.

        Of a Delta table those of its current version: others may still lie in its folder. Links are followed, each
        folder is read once. Raises InputError when there is no file, one that Delta Lake names is not there, rows are
        deleted by deletion vectors, or the folder holds Delta tables or is one of a table's partitions: their logs
        alone know what is current; StorageError when a folder cannot be listed or a link leads nowhere.
        """
        folder = uri.rstrip("/")
        listed = self._listed(folder)
        if any(name.startswith("_delta_log/") for name in listed):
            found = self._current_files(folder, listed)
        else:
            self._refuse_parts_of_delta_tables(folder, listed)
            found = TableFiles([info for name, info in listed.items() if _is_data(name)])
            if not found.files and not (is_s3(folder) and not split(folder, folder=True)[1]):
                found = TableFiles([info for info in [self.info(folder)] if info is not None])
        if not found.files:
            if found.delta_version is not None:
                remedy = "Write rows, or give another table."
                raise InputError(f"version {found.delta_version} of this Delta table is empty", uri=uri, remedy=remedy)
            remedy = "Give a .parquet file or a folder that holds some."
            raise InputError("no Parquet file here", uri=uri, remedy=remedy)
        return found

    def _refuse_parts_of_delta_tables(self, folder: str, listed: Iterable[str]) -> None:
        """Files that a table no longer names may lie in any part of its folder."""
        remedy = "Give the folder of one Delta table."
        tables = {name.partition("/_delta_log/")[0] for name in listed if "/_delta_log/" in name}
        if within := sorted(table for table in tables if _is_data(f"{table}/part.parquet")):
            raise InputError(f"holds the Delta table {within[0]}, and is none itself", uri=folder, remedy=remedy)
        table = folder
        while "=" in table.rpartition("/")[2]:  # as writers name the folders of partitions
            table = table.rpartition("/")[0] or "."
            if any(self.list_objects(f"{table}/_delta_log")):
                raise InputError(f"is a partition of the Delta table {table}", uri=folder, remedy=remedy)

    def _current_files(self, folder: str, listed: dict[str, ObjectInfo]) -> TableFiles:
        """Of a Delta table."""
        options = self.delta_options(folder, with_retries=True)
        table = partial(DeltaTable, folder, storage_options=options)
        version, current = current_version(partial(self.patiently, table, "open the table", folder), folder)
        if not current <= listed.keys():
            listed = self._listed(folder)  # with what was written between the two
        if missing := current - listed.keys():
            raise InputError(
                f"version {version} of the Delta table {folder} names this file, but it is not there",
                uri=f"{folder}/{min(missing)}",
                remedy="Restore the file, or repair the table.",
            )
        return TableFiles([info for name, info in listed.items() if name in current], version)

    def _listed(self, folder: str) -> dict[str, ObjectInfo]:
        """What lies below a folder, by path in it."""
        listed = self._place(folder).list_below(folder, through_links=True)
        return {info.uri[len(folder) + 1 :]: info for info in listed}

    def delta_options(self, uri: str = "s3://", *, with_retries: bool = False) -> dict[str, str]:
        """Options for deltalake and polars to reach the same place: they hold secrets. Empty for a local URI.

        `with_retries`: as many as ours, in words that polars does not take.
        """
        return self._s3.delta_options(with_retries=with_retries) if is_s3(uri) else {}

    def patiently(self, call: Callable[[], _T], verb: str, uri: str) -> _T:
        """Make a call of deltalake's about a place; on S3 again, as often as our own, while its trouble may pass.

        `call` may raise PassingError for what it knows to be worth another try. Its other errors come as they are.
        """
        if is_s3(uri):
            return self._s3.patiently(call, verb, uri)
        try:
            return call()
        except PassingError as error:
            raise StorageError(f"could not {verb} {uri}: {error}") from error

    def download(self, info: ObjectInfo, path: Path) -> None:
        """An object as it was listed, as a file: all of it or nothing, also after a power cut."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = temp_path(path)
        try:
            with temp.open("wb") as file:
                for start in range(0, info.size_bytes, _PART_BYTES):
                    file.write(self.read_range(info, start, _PART_BYTES))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temp, path)
        finally:
            temp.unlink(missing_ok=True)


def _is_data(name: str) -> bool:
    parts = name.split("/")
    return name.endswith(".parquet") and not any(part.startswith(("_", ".")) for part in parts)


class _Ranges(io.RawIOBase):
    """A seekable file over ranged reads of one object."""

    def __init__(self, storage: Storage, info: ObjectInfo) -> None:
        self._storage, self._info, self._position = storage, info, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._info.size_bytes}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._storage.read_range(self._info, self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

"""Rows of Parquet files by key, from copies on the local disk: each file copied once, and found by a hash."""

from __future__ import annotations

import mmap
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from e2p_ray.commit.spool import hash_key, hash_rows
from e2p_ray.errors import ConfigError, StorageError
from e2p_ray.storage import ObjectInfo, Storage
from e2p_ray.storage.utf8 import require_utf8, without_views

_BATCH_ROWS = 16_384
_MAX_HASHES = 1 << 16
_INDEX_ROW_BYTES = 24  # two halves of a hash and a place, in memory


class Budget:
    """Bytes that all copies of a process may take on the disk. Raises ConfigError beyond."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._num_bytes, self._lock = max_bytes, 0, threading.Lock()

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def has_room(self, num_bytes: int) -> bool:
        """Whether so many more may be taken."""
        return self._num_bytes + num_bytes <= self._max_bytes

    def take(self, num_bytes: int) -> None:
        """Count what is about to be written."""
        with self._lock:
            if not self.has_room(num_bytes):
                raise ConfigError(
                    f"the local copies of users, contents and published rows need more than tables.max_bytes, "
                    f"{self._max_bytes:,}. Raise it, or serve smaller tables; a file that is written anew is there "
                    "twice while it is copied"
                )
            self._num_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        """Count what is gone."""
        with self._lock:
            self._num_bytes -= num_bytes


@dataclass(frozen=True, eq=False)
class _Copy:
    """One file's rows, mapped from the disk, and their places by the hash of their key: both halves sorted alike."""

    rows: pa.Table
    first: npt.NDArray[np.uint64]
    second: npt.NDArray[np.uint64]
    places: npt.NDArray[np.int64]
    num_bytes: int

    def find(self, first: np.uint64, second: np.uint64) -> list[int]:
        start, end = np.searchsorted(self.first, first, "left"), np.searchsorted(self.first, first, "right")
        return [int(self.places[at]) for at in range(start, end) if self.second[at] == second]


class Copies:
    """The copies of one table's files. `refresh` and `find` may run at once: a find sees one state of the table.

    A copy has no name in the file system, and is gone with its process whatever ends that.
    """

    def __init__(
        self,
        storage: Storage,
        key: Sequence[str],
        columns: Sequence[str],
        budget: Budget,
        folder: str | None,
        *,
        check: Callable[[pa.Schema, str], None] = lambda schema, uri: None,
        change: Callable[[pa.Table], pa.Table] = lambda rows: rows,
    ) -> None:
        self._storage, self._key, self._columns = storage, list(key), list(columns)
        self._budget, self._folder, self._check, self._change = budget, folder, check, change
        self._copies: dict[ObjectInfo, _Copy] = {}
        self.state = 0  # another number when the rows are others

    @property
    def num_rows(self) -> int:
        return sum(len(copy.places) for copy in self._copies.values())

    @property
    def num_bytes(self) -> int:
        """What all of them take."""
        return sum(copy.num_bytes for copy in self._copies.values())

    def refresh(self, files: Sequence[ObjectInfo], *, may_forget: bool = False) -> None:
        """Become these files: copy those that are new, forget those that are gone.

        Until then the rows are those of before; with `may_forget`, the gone ones are given up first where the new ones
        have no room beside them. Errors: ConfigError without room, StorageError where the disk does not take them.
        """
        try:
            self._become(files)
        except ConfigError:
            staying = [info for info in self._copies if info in files]
            if not may_forget or len(staying) == len(self._copies):
                raise
            self._become(staying)
            self._become(files)

    def _become(self, files: Sequence[ObjectInfo]) -> None:
        before = self._copies
        if before.keys() == set(files):
            return
        made: list[_Copy] = []
        try:
            now = {}
            for info in files:
                if info not in before:
                    made.append(self._copied(info))
                now[info] = before.get(info) or made[-1]
        except BaseException:
            self._budget.give_back(sum(copy.num_bytes for copy in made))
            raise
        self._copies = now
        self.state += 1
        self._budget.give_back(sum(copy.num_bytes for info, copy in before.items() if info not in now))

    def find(self, *key: str) -> list[pa.Table]:
        """Every row with this key, each as a table of one row."""
        first, second = _hashes_of(key)
        rows = []
        for copy in self._copies.values():
            for place in copy.find(first, second):
                row = copy.rows.slice(place, 1)
                if all(str(row[name][0].as_py()) == part for name, part in zip(self._key, key, strict=True)):
                    rows.append(row)
        return rows

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """These columns of every row, some thousands at a time."""
        for copy in self._copies.values():
            yield from copy.rows.select(list(columns)).to_batches(max_chunksize=_BATCH_ROWS)

    def _copied(self, info: ObjectInfo) -> _Copy:
        taken, num_before, hashes = 0, 0, [np.zeros((0, 2), np.uint64)]
        try:
            # A file without a name from the beginning: a process that is killed meanwhile leaves no user embeddings.
            with (
                _local_disk(self._folder),
                tempfile.TemporaryFile(dir=self._folder) as sink,
                self._storage.open_parquet(info) as file,
            ):
                self._check(file.schema_arrow, info.uri)
                plain = _plain(self._change(file.schema_arrow.empty_table().select(self._columns)).schema)
                schema = without_views(plain.empty_table()).schema
                with pa.ipc.new_file(sink, schema) as writer:
                    for group in range(file.metadata.num_row_groups):
                        rows = file.read_row_group(group, columns=self._columns, use_threads=False)
                        require_utf8(rows, info.uri, num_before)
                        num_before += len(rows)
                        rows = self._change(rows).select(self._columns).cast(schema)
                        num_bytes = rows.nbytes + _INDEX_ROW_BYTES * len(rows)
                        self._budget.take(num_bytes)
                        taken += num_bytes
                        writer.write_table(rows)
                        hashes.append(hash_rows(*(rows[name] for name in self._key)))
                sink.flush()
                mapping = mmap.mmap(sink.fileno(), 0, access=mmap.ACCESS_READ)
                mapped = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(mapping))).read_all()
        except BaseException:
            self._budget.give_back(taken)
            raise
        found = np.concatenate(hashes)
        order = np.lexsort((found[:, 1], found[:, 0]))
        return _Copy(mapped, found[order, 0], found[order, 1], order, taken)


@contextmanager
def _local_disk(folder: str | None) -> Iterator[None]:
    """A full disk, or a folder that is not there, is named with the setting that says which one it is."""
    try:
        yield
    except OSError as error:  # no storage's: theirs have names already
        place = tempfile.gettempdir() if folder is None else folder
        remedy = "Make room there, or set tables.folder to a place that can be written to"
        raise StorageError(f"local copies of tables in {place}: {error.strerror or error}. {remedy}") from error


@lru_cache(_MAX_HASHES)
def _hashes_of(key: tuple[str, ...]) -> tuple[np.uint64, np.uint64]:
    """Both halves of a key's hash, kept for who is refused and asks again."""
    first, second = hash_key(*key)
    return first, second


def _plain(schema: pa.Schema) -> pa.Schema:
    """The schema with values in place of dictionaries: these differ from row group to row group."""
    fields = (f.with_type(f.type.value_type) if pa.types.is_dictionary(f.type) else f for f in schema)
    return pa.schema(list(fields))


class Freshness:
    """How old what is known of a table can be: the time of the last look at it that succeeded."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._looked_s = clock, -float("inf")

    def now_s(self) -> float:
        return self._clock()

    def looked(self, at_s: float) -> None:
        """What was begun at this time is done: everything up to it is known."""
        self._looked_s = at_s

    @property
    def age_s(self) -> float:
        return self._clock() - self._looked_s

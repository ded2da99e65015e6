"""Tables spooled by the bucket of their content, so that one bucket at a time is in memory."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import polars as pl
import pyarrow as pa

from e2p_ray.commit import PublishedTable
from e2p_ray.commit.spool import HashSpool, hash_rows, temporary_files
from e2p_ray.errors import IncompatibleError
from e2p_ray.plan.inputs import stable_hash
from e2p_ray.plan.pairs import bucket_of
from e2p_ray.schema import GENERATIONS
from e2p_ray.storage import Storage, batches


class BucketSpool:
    """Rows in temporary files, one a bucket of contents; use it in a `with`, which removes the files."""

    def __init__(self, schema: pa.Schema, num_buckets: int) -> None:
        self.schema, self.num_buckets = schema, num_buckets
        self._stack = ExitStack()
        with temporary_files():
            self._folder = Path(self._stack.enter_context(TemporaryDirectory(prefix="e2p_ray-")))
        self._open = self._stack.enter_context(ExitStack())  # files and their writers, until all is written
        self._writers: dict[int, pa.RecordBatchStreamWriter] = {}

    def __enter__(self) -> BucketSpool:
        return self

    def __exit__(self, *_: object) -> None:
        with temporary_files():
            self._stack.close()

    def add(self, rows: pa.Table) -> None:
        """Put rows of the spool's schema in; they have a column `content_id`."""
        buckets = bucket_of(stable_hash(pl.Series(rows["content_id"], dtype=pl.String)), self.num_buckets)
        ordered = rows.take(np.argsort(buckets, kind="stable"))
        start = 0
        with temporary_files():
            for bucket, size in enumerate(np.bincount(buckets, minlength=self.num_buckets).tolist()):
                if size:
                    self._writer(bucket).write_table(ordered.slice(start, size))
                start += size

    def _writer(self, bucket: int) -> pa.RecordBatchStreamWriter:
        if bucket not in self._writers:
            file = self._open.enter_context(pa.OSFile(str(self._path(bucket)), "wb"))
            options = pa.ipc.IpcWriteOptions(compression="lz4")
            self._writers[bucket] = self._open.enter_context(pa.ipc.new_stream(file, self.schema, options=options))
        return self._writers[bucket]

    def _path(self, bucket: int) -> Path:
        return self._folder / f"{bucket}.arrows"

    def close(self) -> None:
        """End writing, so that rows can be read."""
        with temporary_files():
            self._open.close()

    def rows(self, bucket: int) -> pa.Table:
        """All rows of one bucket."""
        if bucket not in self._writers:
            return self.schema.empty_table()
        with temporary_files(), pa.OSFile(str(self._path(bucket)), "rb") as file:
            return pa.ipc.open_stream(file).read_all()


def spool_published(storage: Storage, table: PublishedTable, spool: BucketSpool, users: HashSpool) -> None:
    """Every row of the published table, once, and the hashes of its users."""
    if table.has_deletion_vectors:
        remedy = "Purge them (REORG TABLE ... APPLY (PURGE)) and drop the feature, or give --full"
        raise IncompatibleError(f"{table.uri} has deletion vectors, which cannot be read here. {remedy}")
    for uri in table.file_uris:
        with storage.open_parquet(uri) as file:
            missing = [name for name in GENERATIONS.names if name not in file.schema_arrow.names]
            if missing:
                problem = (
                    f"{uri}: the published table has no column {missing[0]!r}, so nothing of it can be carried over"
                )
                raise IncompatibleError(f"{problem}. Give --full to write it anew")
            for batch in batches(file, GENERATIONS.names):
                rows = pa.Table.from_batches([batch]).select(GENERATIONS.names).cast(GENERATIONS)
                users.add(hash_rows(rows["user_id"]))
                spool.add(rows)
    spool.close()

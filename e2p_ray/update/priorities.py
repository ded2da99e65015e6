"""What a run with limits is to write first: a numeric column of the candidates table."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl
import pyarrow as pa

from e2p_ray.errors import InputError
from e2p_ray.plan.inputs import stable_hash
from e2p_ray.storage import Storage, batches
from e2p_ray.update.buckets import BucketSpool
from e2p_ray.update.limits import Priority

PRIORITIES = pa.schema([("user_id", pa.string()), ("content_id", pa.string()), ("priority", pa.float64())])


def _read(storage: Storage, candidates_uri: str, priority: Priority) -> Iterator[pl.DataFrame]:
    """The priority of every candidate, the lower the earlier; none where the column is null or NaN.

    Frames as `PRIORITIES`. InputError where the column is missing or holds no numbers.
    """
    for info in storage.parquet_files(candidates_uri):
        with storage.open_parquet(info) as file:
            _check_column(file.schema_arrow, priority.column, info.uri)
            columns = list(dict.fromkeys(["user_id", "content_id", priority.column]))
            for batch in batches(file, columns):
                yield pl.DataFrame(pl.from_arrow(batch)).select(
                    pl.col("user_id", "content_id").cast(pl.String).fill_null(""),
                    priority=pl.col(priority.column).cast(pl.Float64).fill_nan(None)
                    * (-1 if priority.descending else 1),
                )


def spool_priorities(storage: Storage, candidates_uri: str, priority: Priority, spool: BucketSpool) -> None:
    """The priority of every candidate, into a spool of `PRIORITIES`."""
    for frame in _read(storage, candidates_uri, priority):
        spool.add(frame.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(PRIORITIES))
    spool.close()


def priorities_digest(storage: Storage, candidates_uri: str, priority: Priority) -> str:
    """16 hex digits of all candidates with their priorities, in whatever order they lie."""
    total = 0
    for frame in _read(storage, candidates_uri, priority):
        rows = frame.select(pl.concat_str(pl.all().cast(pl.String).fill_null(""), separator="\0"))
        total += int(stable_hash(rows.to_series()).sum(dtype=np.uint64))
    return f"{total % (1 << 64):016x}"


def _check_column(schema: pa.Schema, column: str, uri: str) -> None:
    kinds = pa.types
    if column not in schema.names:
        remedy = f"--priority takes a column of the candidates table; it has {schema.names}."
        raise InputError("no such column", uri=uri, column=column, remedy=remedy)
    kind = schema.field(column).type
    if not (kinds.is_integer(kind) or kinds.is_floating(kind) or kinds.is_decimal(kind) or kinds.is_boolean(kind)):
        raise InputError(f"expected a number, found {kind}", uri=uri, column=column, remedy="Give a numeric column.")

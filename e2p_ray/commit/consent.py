"""Consent at the moment of publishing: rows of users who opted out, or are gone, become the original title.

Where there is no title the row is left out, and a dead letter says so; the next job writes an unpersonalised text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import compress

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from e2p_ray.commit.run import Run, map_ahead
from e2p_ray.commit.shard import request_keys
from e2p_ray.commit.spool import Hashes, HashSpool, hash_rows, hashes_of, is_among
from e2p_ray.commit.verify import DataFile, file_statistics
from e2p_ray.schema import (
    DEAD_LETTERS,
    GENERATIONS,
    Arm,
    DeadLetter,
    ErrorCode,
    Reason,
    Status,
    one_line,
    to_table,
    validate_schema,
)
from e2p_ray.storage import Storage, batches, parquet_bytes
from e2p_ray.storage.utf8 import require_utf8

_UNTITLED = "the user wants no personalisation and the content has no title to publish instead"
# Plain values: an Arrow scalar brings pandas, 0.4 s of CPU time (2026-11-29, a Zen 3 core); most jobs do not need it.
_SUPPRESSED: dict[str, object] = {
    "status": str(Status.SUPPRESSED),
    "reason": str(Reason.OPTED_OUT),
    "personalized": False,
    "arm": str(Arm.TITLE),
    "num_prompt_tokens": 0,
    "num_output_tokens": 0,
    "mean_logprob": None,
    "finish_reason": None,
    "fingerprint": "",  # so that no later run takes the title for its own text
}


def without_consent(storage: Storage, users: HashSpool, users_uri: str) -> Hashes:
    """The hashes of those `users` who do not want personalisation now, or are no longer in the users table: (n, 2).

    InputError where that table breaks its schema.
    """
    with HashSpool() as current:
        for info in storage.parquet_files(users_uri):
            with storage.open_parquet(info) as file:
                validate_schema("users", file.schema_arrow, info.uri)
                num_before = 0
                for batch in batches(file, ["user_id", "personalize", "updated_at"]):
                    require_utf8(batch, info.uri, num_before)
                    num_before += len(batch)
                    ids = batch["user_id"].cast(pa.string())  # Arrow filters no views
                    batch = batch.set_column(0, "user_id", ids).filter(pc.is_valid(ids))
                    current.add(hash_rows(batch["user_id"]), _consent_ranks(batch))
        pairs = zip(users.frames(), current.frames(), strict=True)
        return hashes_of(mine.join(its.filter(_WANTS_IT), on=["a", "b"], how="anti") for mine, its in pairs)


def refusing(storage: Storage, user_ids: Iterable[str], users_uri: str) -> frozenset[str]:
    """Those of a few users who do not want personalisation now, or are no longer in the users table.

    Reads the columns of the whole table that it needs, once.
    """
    ids = sorted(set(user_ids))
    if not ids:
        return frozenset()
    hashes = hash_rows(pa.array(ids, pa.string()))
    with HashSpool() as asked:
        asked.add(hashes)
        return frozenset(compress(ids, is_among(hashes, without_consent(storage, asked, users_uri))))


def suppress(storage: Storage, run: Run, files: tuple[DataFile, ...], refused: Hashes) -> tuple[DataFile, ...]:
    """The same files, with new ones in place of those that hold rows of these users, given by hash.

    One that nothing is left of has no rows, and is not there.
    """
    if not len(refused):
        return files
    return tuple(map_ahead(partial(_suppress_in_file, storage, run, refused), files))


_WANTS_IT = pl.col("rank") % 2 == 0


def _consent_ranks(batch: pa.RecordBatch) -> npt.NDArray[np.uint64]:
    """Even: personalisation is wanted. Of a user's copies the latest ranks highest, of equals the refusal."""
    moments = pc.cast(batch["updated_at"], pa.timestamp("us"), safe=False).cast(pa.int64())
    ages = pc.fill_null(moments, -(1 << 61)).to_numpy(zero_copy_only=False) + (1 << 61)
    wanted = pc.fill_null(batch["personalize"], False).to_numpy(zero_copy_only=False)
    ranks: npt.NDArray[np.uint64] = ages.astype(np.uint64) * np.uint64(2) + (~wanted.astype(bool)).astype(np.uint64)
    return ranks


def _suppress_in_file(storage: Storage, run: Run, refused: Hashes, file: DataFile) -> DataFile:
    rows = pq.read_table(pa.BufferReader(storage.read_bytes(f"{run.table_uri}/{file.path}")), use_threads=False)
    theirs = pa.array(is_among(hash_rows(rows["user_id"]), refused))
    theirs = pc.and_(theirs, pc.not_equal(rows["status"], str(Status.SUPPRESSED)))
    if not pc.any(theirs).as_py():
        return file
    titles = _titles(storage, run, file.shard_id, rows)
    untitled = pc.and_(theirs, pc.equal(titles, ""))
    changed = rows.replace_schema_metadata(None)
    values = {name: pa.scalar(value, rows[name].type) for name, value in _SUPPRESSED.items()}
    for name, value in (values | {"text": titles}).items():
        field = GENERATIONS.field(name)
        column = pc.if_else(theirs, value, rows[name]).cast(field.type)
        changed = changed.set_column(changed.schema.get_field_index(name), field, column)
    changed = changed.filter(pc.invert(untitled))
    _keep_untitled(storage, run, file.shard_id, rows.filter(untitled))
    if not changed.num_rows:
        return replace(file, num_rows=0)
    data = parquet_bytes(changed)
    path = f"data/{run.run_id}/{file.shard_id}-{hashlib.sha256(data).hexdigest()[:16]}.parquet"
    storage.put_if_absent(f"{run.table_uri}/{path}", data)
    statistics = file_statistics(changed)
    return replace(file, path=path, size_bytes=len(data), num_rows=changed.num_rows, statistics=statistics)


def _titles(storage: Storage, run: Run, shard_id: str, rows: pa.Table) -> pa.Array:
    """What stands in place of each row's text; empty where there is nothing."""
    planned = storage.read_table(run.planned_uri(shard_id), ["content_id", "title"])
    titles = dict(zip(planned["content_id"].to_pylist(), planned["title"].to_pylist(), strict=True))
    return pa.array([one_line(titles[content_id]) for content_id in rows["content_id"].to_pylist()], pa.string())


def _keep_untitled(storage: Storage, run: Run, shard_id: str, rows: pa.Table) -> None:
    """A dead letter a row, beside those of earlier publishes of the shard."""
    if not rows.num_rows:
        return
    uri = run.untitled_uri(shard_id)
    said = DeadLetter("", "", "", ErrorCode.EMPTY_CONTENT, _UNTITLED, shard_id, run.run_id)
    letters = {key: replace(said, **key._asdict()) for key in request_keys(rows)}
    if storage.exists(uri):
        letters |= {key: replace(said, **key._asdict()) for key in request_keys(storage.read_table(uri))}
    storage.write_table(uri, to_table([letters[key] for key in sorted(letters)], DEAD_LETTERS))

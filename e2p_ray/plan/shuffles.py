"""Ray shuffles around polars: Ray carries few rows, each a whole polars frame on its way to one partition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import BytesIO

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from e2p_ray.plan.dataflow import Job, Outcome, write_dead, write_part
from e2p_ray.plan.inputs import FRAMES, InputTable, Piece, read_pieces, stable_hash
from e2p_ray.plan.pairs import PAIRS, bucket_of, check_space, join_contents, join_users
from e2p_ray.plan.shards import Cutting
from e2p_ray.ray_session import quiet_ray_data

_BLOB = pa.schema([("part", pa.int64()), ("kind", pa.string()), ("rows", pa.large_binary())])
_KINDS = {**FRAMES, "pairs": PAIRS}


def plan_by_shuffles(
    job: Job, inputs: dict[str, InputTable], num_partitions: int, say: Callable[[str], None]
) -> Outcome:
    """For tables that no one machine holds; rows never come to this process, only what each partition came to."""
    with quiet_ray_data():
        return _shuffle(job.absolute(), inputs, num_partitions, say)


def _shuffle(job: Job, inputs: dict[str, InputTable], num_partitions: int, say: Callable[[str], None]) -> Outcome:
    by_user = partial(_read_by_user, job, num_partitions)
    rows = _map(_pieces([*inputs["candidates"].pieces, *inputs["users"].pieces]), by_user)
    joined = _map_partitions(rows, num_partitions, partial(_join_users, job)).materialize()
    users = _outcome(_map(joined, _only_outcomes))
    check_space(users.counts, job.space.name)
    say(f"joined {users.counts['num_pairs']:,} pairs with users")

    cutting = job.cutting(users.counts["num_pairs"])
    rows = _map(joined, partial(_pairs_by_content, num_partitions, cutting.num_buckets))
    if inputs["contents"].pieces:
        by_content = partial(_read_by_content, job, num_partitions, cutting.num_buckets)
        rows = rows.union(_map(_pieces(inputs["contents"].pieces), by_content))
    shards = _outcome(_map_partitions(rows, num_partitions, partial(_cut, job, cutting, num_partitions)))
    return Outcome(shards.shards, users.counts + shards.counts, users.dead_letters + shards.dead_letters)


def _map(rows: ray.data.Dataset, function: Callable[[pa.Table], pa.Table]) -> ray.data.Dataset:
    return rows.map_batches(function, batch_size=None, batch_format="pyarrow")


def _map_partitions(
    rows: ray.data.Dataset, num_partitions: int, function: Callable[[pa.Table], pa.Table]
) -> ray.data.Dataset:
    """One call of the function for all rows of one `part`."""
    groups = rows.groupby("part", num_partitions=num_partitions)
    return groups.map_groups(function, batch_format="pyarrow")


def _pieces(pieces: Sequence[Piece]) -> ray.data.Dataset:
    rows = [{"piece": piece.absolute().to_json()} for piece in pieces]
    return ray.data.from_items(rows, override_num_blocks=len(rows))


def _read(job: Job, pieces: pa.Table) -> Iterator[tuple[str, pl.DataFrame]]:
    for text in pieces["piece"].to_pylist():
        piece = Piece.from_json(text)
        yield piece.table, read_pieces(job.storage, [piece], piece.table, job.space)


def _read_by_user(job: Job, num_partitions: int, pieces: pa.Table) -> pa.Table:
    """Candidates and users on their way to the partition of their user."""
    packed = [
        _pack(table, frame, (stable_hash(frame["user_id"]) % np.uint64(num_partitions)).astype(np.int64))
        for table, frame in _read(job, pieces)
    ]
    return pa.concat_tables(packed)


def _read_by_content(job: Job, num_partitions: int, buckets: int, pieces: pa.Table) -> pa.Table:
    """Contents on their way to the partition of their bucket."""
    packed = [
        _pack(table, frame, _content_part(frame["content_id"], num_partitions, buckets))
        for table, frame in _read(job, pieces)
    ]
    return pa.concat_tables(packed)


def _pairs_by_content(num_partitions: int, buckets: int, joined: pa.Table) -> pa.Table:
    """Pairs on their way to the partition of their content's bucket."""
    packed = [
        _pack("pairs", frame, _content_part(frame["content_id"], num_partitions, buckets))
        for frame in _frames(joined, "pairs")
    ]
    return pa.concat_tables([_BLOB.empty_table(), *packed])


def _content_part(content_ids: pl.Series, num_partitions: int, buckets: int) -> npt.NDArray[np.int64]:
    """Partitions are runs of buckets, so that how many there are does not change a shard."""
    return bucket_of(stable_hash(content_ids), buckets) * num_partitions // buckets


def _join_users(job: Job, rows: pa.Table) -> pa.Table:
    part = rows["part"][0].as_py()
    join = join_users(_frame(rows, "candidates"), _frame(rows, "users"), job.space.name)
    counts, dead_letters = write_dead(job, join.dead, part)
    blobs = [("pairs", _ipc(join.pairs)), ("outcome", Outcome([], join.counts + counts, dead_letters).to_json())]
    return _blobs(part, blobs)


def _cut(job: Job, cutting: Cutting, first_number: int, rows: pa.Table) -> pa.Table:
    part = rows["part"][0].as_py()
    join = join_contents(_frame(rows, "pairs"), _frame(rows, "contents"))
    return _blobs(part, [("outcome", write_part(job, join, cutting, first_number + part).to_json())])


def _only_outcomes(rows: pa.Table) -> pa.Table:
    return rows.filter(pc.field("kind") == "outcome")


def _outcome(rows: ray.data.Dataset) -> Outcome:
    """All partitions' outcomes as one."""
    total = Outcome([], Counter(), [])
    for row in rows.iter_rows():
        part = Outcome.from_json(row["rows"])
        total.shards.extend(part.shards)
        total.counts.update(part.counts)
        total.dead_letters.extend(part.dead_letters)
    return total


def _pack(kind: str, frame: pl.DataFrame, parts: npt.NDArray[np.int64]) -> pa.Table:
    """One row for each partition that the frame has rows for."""
    split = frame.with_columns(pl.Series("part", parts)).partition_by("part", as_dict=True, include_key=False)
    return pa.concat_tables(
        [_BLOB.empty_table(), *(_blobs(part, [(kind, _ipc(rows))]) for (part,), rows in split.items())]
    )


def _blobs(part: int, blobs: Sequence[tuple[str, bytes]]) -> pa.Table:
    kinds, rows = zip(*blobs, strict=True)
    return pa.table([[part] * len(blobs), kinds, rows], schema=_BLOB)


def _ipc(frame: pl.DataFrame) -> bytes:
    sink = BytesIO()
    frame.write_ipc(sink)
    return sink.getvalue()


def _frames(rows: pa.Table, kind: str) -> list[pl.DataFrame]:
    """The frames of one kind, from wherever they came; Arrow's own filter would copy them once more."""
    kinds = rows["kind"].to_pylist()
    return [pl.read_ipc(BytesIO(rows["rows"][row].as_buffer())) for row, found in enumerate(kinds) if found == kind]


def _frame(rows: pa.Table, kind: str) -> pl.DataFrame:
    frames = _frames(rows, kind)
    return pl.concat(frames) if frames else _KINDS[kind].to_frame()

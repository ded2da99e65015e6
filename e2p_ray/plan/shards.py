"""Shards: requests cut at stable places, written under the hash of what is in them, and read back as groups."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from e2p_ray.errors import InputError, ShardError
from e2p_ray.plan.inputs import as_matrix
from e2p_ray.plan.pairs import ContentJoin, bucket_of
from e2p_ray.schema import Content, Group, Reason, Request, RequestKey, planned_schema
from e2p_ray.storage import Storage, parquet_bytes

_WRITE_THREADS = 4
# A shard has its contents' texts once a request. Arrow's strings end at 2 GiB a column, and a shard is in memory as a
# whole. The 4,096 requests that a shard has at most by default come to this with texts of 128 KiB on average.
_MAX_TEXT_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard of a plan."""

    shard_id: str
    num_requests: int
    num_groups: int
    num_bytes: int  # of the file
    first_hash: int  # of its first content: contents lie in shards in the order of their hashes


@dataclass(frozen=True, slots=True)
class Cutting:
    """Where shards are cut."""

    tasks: tuple[str, ...]  # sorted
    num_buckets: int
    requests_per_shard: int
    max_group_requests: int
    embedding_dim: int


class Slice(NamedTuple):
    """A group to be: rows [start, stop) of the requests, all of one content, for one task.

    `content` is a row number of the contents.
    """

    content: int
    task: str
    start: int
    stop: int
    num_text_bytes: int  # title and body, once a request


def shard_uri(plan_uri: str, shard_id: str) -> str:
    return f"{plan_uri}/shards/{shard_id}.parquet"


def cut(join: ContentJoin, cutting: Cutting) -> Iterator[list[Slice]]:
    """The groups of every shard. A change in one bucket of contents leaves the others as they are."""
    buckets = bucket_of(join.contents["content_hash"].to_numpy(), cutting.num_buckets).tolist()
    counts = np.bincount(join.requests["content"], minlength=len(buckets))
    stops, text_bytes = np.cumsum(counts).tolist(), text_bytes_of(join.contents)
    cap = min(cutting.max_group_requests, cutting.requests_per_shard)
    start, slices = 0, list[Slice]()
    for content, stop in enumerate(stops):
        if content and buckets[content] != buckets[content - 1]:
            yield from _pack(slices, cutting.requests_per_shard)
            slices = []
        for task in cutting.tasks:
            slices += slices_of(content, task, start, stop, cap, text_bytes[content])
        start = stop
    yield from _pack(slices, cutting.requests_per_shard)


def text_bytes_of(contents: pl.DataFrame) -> list[int]:
    """The bytes of every content's title and body."""
    sizes = contents.select(pl.col("title").str.len_bytes().cast(pl.Int64) + pl.col("body").str.len_bytes())
    return sizes.to_series().to_list()


def slices_of(content: int, task: str, start: int, stop: int, max_requests: int, text_bytes: int) -> Iterator[Slice]:
    """The groups of one content and task; few requests each where a text is so long that more are no shard."""
    cap = max(1, min(max_requests, _MAX_TEXT_BYTES // max(1, text_bytes)))
    for first in range(start, stop, cap):
        last = min(first + cap, stop)
        yield Slice(content, task, first, last, (last - first) * text_bytes)


def _pack(slices: list[Slice], requests_per_shard: int) -> Iterator[list[Slice]]:
    """One shard, or several in a row where the bucket holds more than twice what is aimed at, or too long texts."""
    total = sum(piece.stop - piece.start for piece in slices)
    if total > 2 * requests_per_shard or sum(piece.num_text_bytes for piece in slices) > _MAX_TEXT_BYTES:
        yield from pack(slices, requests_per_shard)
    elif slices:
        yield slices


def pack(slices: Sequence[Slice], requests_per_shard: int) -> Iterator[list[Slice]]:
    """Shards of no more requests than this, in order, each as full as its groups allow; a group is never cut.

    Nor are there more than 512 MiB of titles and bodies in one, each counted once a request.
    """
    current, num_requests, num_bytes = list[Slice](), 0, 0
    for piece in slices:
        size = piece.stop - piece.start
        is_full = num_requests + size > requests_per_shard or num_bytes + piece.num_text_bytes > _MAX_TEXT_BYTES
        if current and is_full:
            yield current
            current, num_requests, num_bytes = [], 0, 0
        current.append(piece)
        num_requests, num_bytes = num_requests + size, num_bytes + piece.num_text_bytes
    if current:
        yield current


def write_shards(storage: Storage, plan_uri: str, join: ContentJoin, cutting: Cutting) -> list[ShardEntry]:
    """Cut and write; the same rows give the same names and bytes, wherever and however often this runs."""

    def write(slices: list[Slice]) -> ShardEntry:
        return write_shard(storage, plan_uri, join.requests, join.contents, slices, cutting.embedding_dim)

    with ThreadPoolExecutor(_WRITE_THREADS) as pool:
        return list(pool.map(write, cut(join, cutting)))


def write_shard(
    storage: Storage,
    plan_uri: str,
    requests: pl.DataFrame,
    contents: pl.DataFrame,
    slices: Sequence[Slice],
    embedding_dim: int,
) -> ShardEntry:
    """One shard of some slices of these requests and contents, whose columns are those of a `ContentJoin`."""
    shard_id, table = _shard(requests, contents, slices, embedding_dim)
    data = parquet_bytes(table)
    storage.write_bytes(shard_uri(plan_uri, shard_id), data)
    first_hash = int(contents["content_hash"][slices[0].content])
    return ShardEntry(shard_id, table.num_rows, len(slices), len(data), first_hash)


def count_requests(join: ContentJoin, tasks: Sequence[str]) -> Counter[str]:
    """The parts of PlanCounts that are known once contents are joined."""
    num_chars = (pl.col("title").str.len_chars() + pl.col("body").str.len_chars()).cast(pl.Int64)  # a sum is as wide
    chars = join.contents.select("content", chars=num_chars)
    pair_chars = join.requests.select("content").join(chars, on="content")["chars"].sum()
    counts = Counter(
        num_requests=join.requests.height * len(tasks),
        num_contents=join.contents.height,
        content_chars=int(chars["chars"].sum()),
        request_chars=int(pair_chars) * len(tasks),
    )
    reasons = join.requests["reason"].drop_nulls().value_counts()
    counts.update({f"reason:{reason}": number * len(tasks) for reason, number in reasons.iter_rows()})
    return counts


def _shard(
    requests: pl.DataFrame, contents: pl.DataFrame, slices: Sequence[Slice], embedding_dim: int
) -> tuple[str, pa.Table]:
    """A shard's id and its rows; `draft` is null where the requests have no such column.

    By Arrow's buffers: four threads cut shards at once, and what makes Python objects of rows they would do one by one.
    """
    sizes = [piece.stop - piece.start for piece in slices]
    rows = _rows(requests, slices)
    texts = contents[[piece.content for piece in slices]]
    groups = pa.array(np.repeat(np.arange(len(slices), dtype=np.int32), sizes))
    user_ids, reasons = _strings(rows["user_id"]), _strings(rows["reason"])
    drafts = _strings(rows["draft"]) if "draft" in rows.columns else None
    vectors, missing = _vectors(rows["user_embedding"], embedding_dim)
    schema = planned_schema(embedding_dim)
    columns = {
        "user_id": user_ids,
        "content_id": _strings(texts["content_id"]).take(groups),
        "task": pa.array([piece.task for piece in slices]).take(groups),
        "group": groups,
        "title": _strings(texts["title"]).take(groups),
        "body": _strings(texts["body"]).take(groups),
        "language": _strings(texts["language"]).take(groups),
        "user_embedding": pa.FixedSizeListArray.from_arrays(
            pa.array(vectors.ravel()), type=schema.field("user_embedding").type, mask=pa.array(missing)
        ),
        "reason": reasons,
        "draft": pa.nulls(rows.height, pa.string()) if drafts is None else drafts,
    }
    digest = hashlib.sha256(f"{embedding_dim}:{len(slices)}:".encode())
    for piece, size, text_digest in zip(slices, sizes, texts["digest"], strict=True):
        digest.update(f"{len(piece.task.encode())}:{piece.task}:{size}:".encode() + text_digest)
    lengths, id_bytes = _bytes_of(user_ids)
    ended_reasons = pc.binary_join_element_wise(reasons.fill_null(""), "", "\0")
    digest.update(lengths.astype("<u4").tobytes())
    digest.update(id_bytes)
    digest.update(_bytes_of(ended_reasons)[1])
    digest.update(missing.tobytes() + vectors.tobytes())
    if drafts is not None:
        digest.update("".join(f"{len(text)}:{text}" for text in rows["draft"].fill_null("")).encode())
    return digest.hexdigest()[:32], pa.table(columns, schema=schema)


def _rows(requests: pl.DataFrame, slices: Sequence[Slice]) -> pl.DataFrame:
    """The requests of these slices, in their order; not copied where one slice begins where the one before ends."""
    if all(before.stop == after.start for before, after in pairwise(slices)):
        return requests[slices[0].start : slices[-1].stop]
    return requests[np.concatenate([np.arange(piece.start, piece.stop) for piece in slices])]


def _strings(series: pl.Series) -> pa.Array:
    return series.rechunk().to_arrow(compat_level=pl.CompatLevel.oldest()).cast(pa.string())


def _bytes_of(strings: pa.Array) -> tuple[npt.NDArray[np.int32], pa.Buffer]:
    """How many bytes each string has, and all bytes one after the other. Without nulls and offset, as polars' are."""
    _, offsets, data = strings.buffers()
    ends = np.frombuffer(offsets, np.int32)[: len(strings) + 1]
    return np.diff(ends), data[: int(ends[-1])]


def _vectors(series: pl.Series, dim: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """User embeddings as a matrix, zeros where there is none, and for which rows that is."""
    missing = series.is_null().to_numpy()
    matrix = np.zeros((len(series), dim), "<f4")
    matrix[~missing] = as_matrix(series.drop_nulls(), dim)
    return matrix, missing


def read_planned(storage: Storage, plan_uri: str, shard_id: str) -> pa.Table:
    """The rows of one shard; ShardError when the file is not what a plan writes."""
    uri = shard_uri(plan_uri, shard_id)
    try:
        table = storage.read_table(uri)
    except InputError as error:
        raise ShardError(f"{error} Delete the plan's folder and plan again.") from error
    kind = table.schema.field("user_embedding").type if "user_embedding" in table.schema.names else None
    if kind is None or not pa.types.is_fixed_size_list(kind) or table.schema != planned_schema(kind.list_size):
        raise ShardError(f"{uri} is not a shard of a plan. Delete the plan's folder and plan again.")
    return table


def largest_first(storage: Storage, plan_uri: str, shard_ids: Sequence[str]) -> list[str]:
    """These shards by the size of their files, so that workers who take one after the other end at about one time."""
    sizes = {info.name.removesuffix(".parquet"): info.size_bytes for info in storage.list_objects(f"{plan_uri}/shards")}
    return sorted(shard_ids, key=lambda shard_id: -sizes.get(shard_id, 0))


def read_shard(storage: Storage, plan_uri: str, shard_id: str) -> list[Group]:
    """The groups of one shard; ShardError when the file is not what a plan writes."""
    table = read_planned(storage, plan_uri, shard_id)
    vectors = _user_embeddings(table["user_embedding"])
    columns = {name: table[name].to_pylist() for name in ("user_id", "reason", "draft")}
    edges = np.flatnonzero(np.diff(table["group"].to_numpy(), prepend=-1, append=-1))
    # Once a group, not once a row: a long text would be copied for each.
    heads = table.select(["content_id", "title", "body", "language", "task"]).take(edges[:-1]).to_pylist()
    groups = []
    for (start, stop), head in zip(pairwise(edges.tolist()), heads, strict=True):
        task = head.pop("task")
        content = Content(**head)
        requests = tuple(
            Request(
                RequestKey(columns["user_id"][row], content.content_id, task),
                vectors[row],
                Reason(columns["reason"][row]) if columns["reason"][row] is not None else None,
                columns["draft"][row],
            )
            for row in range(start, stop)
        )
        groups.append(Group(content, task, requests))
    return groups


def _user_embeddings(column: pa.ChunkedArray) -> list[npt.NDArray[np.float32] | None]:
    found: list[npt.NDArray[np.float32] | None] = [None] * len(column)
    array = column.combine_chunks()
    matrix = array.flatten().to_numpy().reshape(-1, array.type.list_size)  # of the rows that have one
    for row, vector in zip(np.flatnonzero(array.is_valid().to_numpy(zero_copy_only=False)), matrix, strict=True):
        found[row] = vector
    return found

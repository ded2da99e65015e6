"""The input tables: which pieces of which files there are, and every row of them brought into one form."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from e2p_ray.config import InputsConfig
from e2p_ray.config.uris import absolute
from e2p_ray.schema import Reason, validate_schema
from e2p_ray.storage import ObjectInfo, Storage
from e2p_ray.storage.utf8 import is_text, require_utf8

# What a plan reads. No request holds a candidate's rank, score or source, so any copy of a pair is as good.
COLUMNS = {
    "candidates": ["user_id", "content_id"],
    "users": ["user_id", "embedding", "embedding_space", "personalize", "updated_at"],
    "contents": ["content_id", "title", "body", "language", "updated_at"],
}
CANDIDATES = pl.Schema({"user_id": pl.String, "content_id": pl.String})
# `space` is null unless the user embedding could be used; "" stands for a space that is not named.
USERS = pl.Schema(
    {
        "user_id": pl.String,
        "updated_at": pl.Int64,
        "opted_out": pl.Boolean,
        "space": pl.String,
        "reason": pl.String,
        "user_embedding": pl.Binary,
    }
)
CONTENTS = pl.Schema(
    {
        "content_id": pl.String,
        "updated_at": pl.Int64,
        "title": pl.String,
        "body": pl.String,
        "language": pl.String,
        "digest": pl.Binary,
    }
)
FRAMES = {"candidates": CANDIDATES, "users": USERS, "contents": CONTENTS}
_PIECE_BYTES = 64 << 20
_FOOTER_THREADS = 16


class Piece(NamedTuple):
    """Some row groups of one file: what one task reads."""

    table: str
    info: ObjectInfo
    row_groups: tuple[int, ...]

    def to_json(self) -> str:
        """As a cell of Ray Data."""
        return json.dumps(self)

    @classmethod
    def from_json(cls, text: str) -> Piece:
        table, info, row_groups = json.loads(text)
        return cls(table, ObjectInfo(*info), tuple(row_groups))

    def absolute(self) -> Piece:
        """The same, found from any working folder."""
        return self._replace(info=self.info._replace(uri=absolute(self.info.uri)))


@dataclass(frozen=True, slots=True)
class InputTable:
    """One input table as it was when the plan began."""

    name: str
    files: tuple[ObjectInfo, ...]
    pieces: tuple[Piece, ...]
    num_rows: int
    num_bytes: int  # of the columns that are read, uncompressed


@dataclass(frozen=True, slots=True)
class Space:
    """What a user embedding has to be for the projector to take it."""

    name: str
    dim: int


def scan_inputs(config: InputsConfig, storage: Storage) -> dict[str, InputTable]:
    """List and validate every file of the three tables by its footer; InputError names the file and the column."""
    uris = {"users": config.users_uri, "contents": config.contents_uri, "candidates": config.candidates_uri}
    return {name: _scan(storage, name, uri) for name, uri in uris.items()}


def _scan(storage: Storage, name: str, uri: str) -> InputTable:
    files = storage.parquet_files(uri)
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        groups = list(pool.map(lambda info: _row_groups(storage, name, info), files))
    pieces = [piece for info, sizes in zip(files, groups, strict=True) for piece in pieces_of(name, info, sizes)]
    return InputTable(
        name=name,
        files=tuple(files),
        pieces=tuple(pieces),
        num_rows=sum(num_rows for sizes in groups for num_rows, _ in sizes),
        num_bytes=sum(num_bytes for sizes in groups for _, num_bytes in sizes),
    )


def _row_groups(storage: Storage, table: str, info: ObjectInfo) -> list[tuple[int, int]]:
    """Rows and uncompressed bytes of every row group."""
    with storage.open_parquet(info) as file:
        validate_schema(table, file.schema_arrow, info.uri)
        found = []
        for index in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(index)
            columns = (group.column(position) for position in range(group.num_columns))
            wanted = (c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] in COLUMNS[table])
            found.append((group.num_rows, sum(wanted)))
        return found


def pieces_of(table: str, info: ObjectInfo, sizes: Sequence[tuple[int, int]]) -> list[Piece]:
    """Row groups of one file, given their rows and bytes, gathered into pieces of about as many bytes."""
    pieces, current, room = [], list[int](), _PIECE_BYTES
    for index, (num_rows, num_bytes) in enumerate(sizes):
        if current and num_bytes > room:
            pieces.append(Piece(table, info, tuple(current)))
            current, room = [], _PIECE_BYTES
        if num_rows:
            current.append(index)
            room -= num_bytes
    return [*pieces, Piece(table, info, tuple(current))] if current else pieces


def read_pieces(storage: Storage, pieces: Iterable[Piece], table: str, space: Space) -> pl.DataFrame:
    """The rows of some pieces of one table, as `FRAMES[table]`."""
    frames = [_read_piece(storage, piece, space) for piece in pieces]
    return pl.concat(frames) if frames else FRAMES[table].to_frame()


def _read_piece(storage: Storage, piece: Piece, space: Space) -> pl.DataFrame:
    columns = COLUMNS[piece.table]
    with storage.open_parquet(piece.info) as file:
        table = file.read_row_groups(list(piece.row_groups), columns=columns, use_threads=False)
        num_before = sum(file.metadata.row_group(index).num_rows for index in range(piece.row_groups[0]))
    require_utf8(table, piece.info.uri, num_before)
    match piece.table:
        case "users":
            return user_rows(table, space)
        case "contents":
            return content_rows(table)
    return pl.DataFrame({name: _strings(table[name]) for name in columns}, schema=CANDIDATES)


def _plain(column: pa.ChunkedArray) -> pa.Array:
    # One string array ends at 2 GiB, which the bodies of one row group can pass.
    array = (column.cast(pa.large_string()) if is_text(column.type) else column).combine_chunks()
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _series(column: pa.ChunkedArray, dtype: Any) -> pl.Series:
    series = pl.from_arrow(_plain(column))
    assert isinstance(series, pl.Series)
    return series.cast(dtype) if series.dtype != dtype else series


def _strings(column: pa.ChunkedArray) -> pl.Series:
    """Null keys and texts become "": no table may hold an empty key, and no text is as good as an empty one."""
    return _series(column, pl.String).fill_null("")


def _microseconds(column: pa.ChunkedArray) -> pl.Series:
    """Since 1970 in UTC; a timestamp without a zone is taken to be UTC."""
    # Arrow, as polars knows not every zone that a file may name: +05:30, JST.
    return _series(pc.cast(column, pa.timestamp("us"), safe=False).cast(pa.int64()), pl.Int64)


def user_rows(table: pa.Table, space: Space) -> pl.DataFrame:
    """Rows of the users table as `USERS`: a user embedding that may not be used is gone, and `reason` says why."""
    sizes, flaws, vectors = _user_embeddings(_plain(table["embedding"]), space.dim)
    frame = pl.DataFrame(
        {
            "user_id": _strings(table["user_id"]),
            "updated_at": _microseconds(table["updated_at"]),
            "opted_out": ~_series(table["personalize"], pl.Boolean).fill_null(False),
            "space": _strings(table["embedding_space"]),
            "size": sizes,
            "flaw": flaws,
            "user_embedding": vectors,
        }
    )
    reason = (
        pl.when("opted_out").then(pl.lit(Reason.OPTED_OUT.value))
        .when(pl.col("size").is_null()).then(pl.lit(Reason.EMBEDDING_NULL.value))
        .when(pl.col("size") != space.dim).then(pl.lit(Reason.EMBEDDING_WRONG_SIZE.value))
        .when(pl.col("space") != space.name).then(pl.lit(Reason.EMBEDDING_OTHER_SPACE.value))
        .otherwise(pl.col("flaw"))
    )  # fmt: skip
    usable = ~pl.col("opted_out") & pl.col("size").is_not_null()
    return frame.select(
        "user_id",
        "updated_at",
        "opted_out",
        pl.when(usable).then("space").alias("space"),
        reason.alias("reason"),
        pl.when(reason.is_null()).then("user_embedding").alias("user_embedding"),
    ).match_to_schema(USERS)


def _user_embeddings(column: pa.Array, dim: int) -> tuple[pl.Series, pl.Series, pl.Series]:
    """Of every row: the length of its vector or null, the flaw of one of the right length, and its bytes as float32."""
    sizes = pc.list_value_length(column)
    right = pc.fill_null(pc.equal(sizes, dim), False)
    # Null elements become NaN, and float64 beyond float32 becomes infinite: both are flaws, found below.
    flat = pc.cast(column.filter(right).flatten(), pa.float32(), safe=False)
    matrix = np.array(pc.fill_null(flat, float("nan")), dtype="<f4").reshape(-1, dim)
    flaw = (
        pl.when(pl.Series(~np.isfinite(matrix).all(axis=1))).then(pl.lit(Reason.EMBEDDING_NON_FINITE.value))
        .when(pl.Series((matrix == 0).all(axis=1))).then(pl.lit(Reason.EMBEDDING_ZERO.value))
    )  # fmt: skip
    is_right = right.to_numpy(zero_copy_only=False)
    places = pl.Series(np.cumsum(is_right) - 1).set(pl.Series(~is_right), None)
    found = pl.DataFrame({"vector": as_binary(matrix)}).with_columns(flaw=flaw)
    found = found.select(pl.all().gather(places)) if len(matrix) else found.clear(len(places))
    return pl.Series(sizes), found["flaw"], found["vector"]


def as_binary(matrix: npt.NDArray[np.float32]) -> pl.Series:
    """The rows of a matrix as bytes."""
    num_rows, num_bytes = len(matrix), matrix.shape[1] * matrix.itemsize
    offsets = np.arange(num_rows + 1, dtype=np.int64) * num_bytes
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(matrix))]
    series = pl.from_arrow(pa.Array.from_buffers(pa.large_binary(), num_rows, buffers))
    assert isinstance(series, pl.Series)
    return series


def as_matrix(vectors: pl.Series, dim: int) -> npt.NDArray[np.float32]:
    """The way back: bytes, none of them null, as the rows of a matrix (n, dim) that cannot be written."""
    if vectors.is_empty():
        return np.zeros((0, dim), "<f4")
    _, offsets, data = vectors.rechunk().to_arrow(compat_level=pl.CompatLevel.oldest()).buffers()
    num_numbers = len(vectors) * dim
    assert np.frombuffer(offsets, np.int64)[len(vectors)] == 4 * num_numbers, "vectors of another size"
    return np.frombuffer(data, "<f4", num_numbers).reshape(-1, dim)


def content_rows(table: pa.Table) -> pl.DataFrame:
    """Rows of the contents table as `CONTENTS`."""
    frame = pl.DataFrame(
        {
            "updated_at": _microseconds(table["updated_at"]),
            **{name: _strings(table[name]) for name in ("content_id", "title", "body", "language")},
        }
    )
    texts = frame.select("content_id", "title", "body", "language").iter_rows()
    digests = pl.Series([text_digest(row) for row in texts], dtype=pl.Binary)
    return frame.with_columns(digest=digests).select(CONTENTS.names()).match_to_schema(CONTENTS)


def text_digest(texts: Iterable[str]) -> bytes:
    """16 bytes of texts in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.digest()


def latest(frame: pl.DataFrame, key: str) -> pl.DataFrame:
    """One row a key: the latest, of two as late the one that opted out, else a fixed choice by what is in them."""
    repeated = pl.col(key).is_duplicated()
    copies = frame.filter(repeated)
    if copies.is_empty():
        return frame
    first = [name for name in ("updated_at", "opted_out") if name in frame.columns]
    order: list[str] = [*first, *(name for name in frame.columns if name not in first)]
    chosen = copies.sort(order, descending=[name in first for name in order], nulls_last=True)
    return pl.concat([frame.filter(~repeated), chosen.unique(key, keep="first", maintain_order=True)])


def stable_hash(ids: pl.Series) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of every string that no library's release changes: FNV-1a over UTF-8, then mixed."""
    array = ids.rechunk().to_arrow(compat_level=pl.CompatLevel.oldest()).cast(pa.large_string())
    _, offset_buffer, data_buffer = array.buffers()
    hashes = np.full(len(array), 0xCBF29CE484222325, dtype=np.uint64)
    if not len(array):
        return hashes
    offsets = np.frombuffer(offset_buffer, np.int64)[array.offset : array.offset + len(array) + 1]
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.zeros(0, np.uint8)
    starts, lengths, prime = offsets[:-1], np.diff(offsets), np.uint64(0x100000001B3)
    num_common = int(lengths.min())
    for position in range(num_common):
        hashes = (hashes ^ data[starts + position]) * prime
    rows, position = np.flatnonzero(lengths > num_common), num_common
    while len(rows):
        hashes[rows] = (hashes[rows] ^ data[starts[rows] + position]) * prime
        position += 1
        rows = rows[lengths[rows] > position]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        hashes = (hashes ^ (hashes >> np.uint64(shift))) * np.uint64(factor)
    return hashes ^ (hashes >> np.uint64(31))

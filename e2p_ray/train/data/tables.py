"""The training tables: which pieces of which files there are, and their rows as frames. No Ray here."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from e2p_ray.config import TrainInputsConfig
from e2p_ray.errors import InputError
from e2p_ray.plan.inputs import CONTENTS, USERS, Piece, Space, content_rows, pieces_of, user_rows
from e2p_ray.schema import validate_schema
from e2p_ray.storage import ObjectInfo, Storage
from e2p_ray.storage.utf8 import require_utf8, without_views

SCHEMA_OF = {"users": "users", "contents": "contents", "targets": "targets", "validation": "targets"}
_COLUMNS = {
    "users": ("user_id", "embedding", "embedding_space", "personalize", "updated_at"),
    "contents": ("content_id", "title", "body", "language", "updated_at"),
    "targets": ("user_id", "content_id", "task", "text", "weight"),
}
TARGETS = pl.Schema(
    {"user_id": pl.String, "content_id": pl.String, "task": pl.String, "text": pl.String, "weight": pl.Float32}
)
# `dim` is the length of the vector; `space` and `reason` are the plan's.
TRAINING_USERS = pl.Schema([*USERS.items(), ("dim", pl.Int32())])
_FOOTER_THREADS = 16


@dataclass(frozen=True, slots=True)
class SourceTable:
    """One input table as it was when the job began."""

    name: str
    uri: str
    files: tuple[ObjectInfo, ...]
    pieces: tuple[Piece, ...]
    num_rows: int
    delta_version: int | None  # the snapshot that is read, where the folder is a Delta table


def scan_tables(config: TrainInputsConfig, storage: Storage) -> dict[str, SourceTable]:
    """List and validate every file of the tables by its footer; InputError names the file and the column."""
    uris = {"users": config.users_uri, "contents": config.contents_uri, "targets": config.targets_uri}
    if config.validation_uri is not None:
        uris["validation"] = config.validation_uri
    return {name: scan_table(storage, name, uri) for name, uri in uris.items()}


def scan_table(storage: Storage, name: str, uri: str) -> SourceTable:
    """List and validate every file of one table; InputError names the file and the column."""
    found = storage.table_files(uri)
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        groups = list(pool.map(lambda info: _row_groups(storage, SCHEMA_OF[name], info, uri), found.files))
    pieces = [piece for info, sizes in zip(found.files, groups, strict=True) for piece in pieces_of(name, info, sizes)]
    num_rows = sum(rows for sizes in groups for rows, _ in sizes)
    return SourceTable(name, uri, tuple(found.files), tuple(pieces), num_rows, found.delta_version)


def _row_groups(storage: Storage, schema: str, info: ObjectInfo, table_uri: str) -> list[tuple[int, int]]:
    """Rows and uncompressed bytes of every row group."""
    folders = info.uri.removeprefix(table_uri).split("/")[:-1]
    with storage.open_parquet(info) as file:
        validate_schema(schema, file.schema_arrow, info.uri)
        has_task = "task" in file.schema_arrow.names
        if schema == "targets" and not has_task and any(folder.startswith("task=") for folder in folders):
            # Without the column, all would pass for texts of the only task there is.
            raise InputError(
                "is in the name of a folder only",
                uri=info.uri,
                column="task",
                remedy="Write a column `task` into the files as well.",
            )
        groups = (file.metadata.row_group(index) for index in range(file.metadata.num_row_groups))
        return [(group.num_rows, group.total_byte_size) for group in groups]


def read_piece(storage: Storage, piece: Piece, more: tuple[str, ...] = ()) -> tuple[pa.Table, int]:
    """The rows of a piece, with these columns too where it has them, and the number of the first one in its file."""
    try:
        with storage.open_parquet(piece.info) as file:
            columns = (*_COLUMNS[SCHEMA_OF[piece.table]], *more)
            wanted = [name for name in columns if name in file.schema_arrow.names]
            table = file.read_row_groups(list(piece.row_groups), columns=wanted, use_threads=False)
            first_row = sum(file.metadata.row_group(index).num_rows for index in range(piece.row_groups[0]))
    except (pa.ArrowException, OSError) as error:
        remedy = "Write the file again; it is damaged."
        raise InputError(f"cannot be read: {error}", uri=piece.info.uri, remedy=remedy) from error
    require_utf8(table, piece.info.uri, first_row)
    return without_views(table), first_row


def read_targets(storage: Storage, piece: Piece, tasks: tuple[str, ...]) -> pl.DataFrame:
    """The rows of a piece of targets as `TARGETS`; a weight of null is 1, a task of null the only one there is."""
    table, first_row = read_piece(storage, piece)
    frame = pl.DataFrame({name: _series(table[name], TARGETS[name]) for name in table.column_names})
    if "task" not in frame.columns:
        frame = frame.with_columns(task=pl.lit(None, pl.String))
    if len(tasks) == 1:
        frame = frame.with_columns(pl.col("task").fill_null(tasks[0]))
    elif frame["task"].null_count():
        raise InputError(
            f"the configuration has {len(tasks)} tasks ({', '.join(tasks)}), and this target does not say which it is "
            "the text of",
            uri=piece.info.uri,
            column="task",
            row=first_row + int(frame["task"].is_null().arg_true()[0]),
            remedy="Write the task's name into a column `task`, or leave one task in the configuration.",
        )
    texts = pl.col("user_id", "content_id", "text").fill_null("")
    return frame.with_columns(texts, pl.col("weight").fill_null(1.0)).select(TARGETS.names()).match_to_schema(TARGETS)


def read_contents(storage: Storage, piece: Piece, wanted: pl.Series) -> pl.DataFrame:
    """The wanted contents of a piece, as the plan's `CONTENTS`."""
    table, _ = read_piece(storage, piece)
    chosen = _chosen(table, "content_id", wanted)
    return content_rows(chosen) if chosen.num_rows else CONTENTS.to_frame()


def read_users(storage: Storage, piece: Piece, wanted: pl.Series) -> pl.DataFrame:
    """The wanted users of a piece as `TRAINING_USERS`; of a user embedding that cannot be used, `reason` says why."""
    table, _ = read_piece(storage, piece)
    chosen = _chosen(table, "user_id", wanted)
    kinds = pl.DataFrame(
        {
            "space": _series(chosen["embedding_space"], pl.String).fill_null(""),
            "dim": pl.Series(pc.list_value_length(_plain(chosen["embedding"])), dtype=pl.Int32),
        }
    )
    frames = []
    # Every space and size is read as if it were the one that is wanted: which it is, all pieces together decide.
    for (space, dim), rows in kinds.with_row_index("row").partition_by("space", "dim", as_dict=True).items():
        frame = user_rows(chosen.take(rows["row"].to_arrow()), Space(space, max(dim or 1, 1)))
        frames.append(frame.with_columns(dim=pl.lit(dim, pl.Int32)))
    return pl.concat(frames) if frames else TRAINING_USERS.to_frame()


def _chosen(table: pa.Table, key: str, wanted: pl.Series) -> pa.Table:
    mask = _series(table[key], pl.String).is_in(wanted.implode()).fill_null(False)
    return table.filter(mask.to_arrow())


def _plain(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _series(column: pa.ChunkedArray, dtype: Any) -> pl.Series:
    series = pl.from_arrow(_plain(column))
    assert isinstance(series, pl.Series)
    return series.cast(dtype) if series.dtype != dtype else series

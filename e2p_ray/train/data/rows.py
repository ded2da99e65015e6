"""Rows of the training tables by Ray: read in pieces by Ray Data, and joined.

Apart from lessons, so that a worker can begin to read without torch and transformers: on an AVX2 CPU importing them
takes five seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import polars as pl
import pyarrow as pa
import ray
import ray.data

from e2p_ray.plan.inputs import Piece
from e2p_ray.storage import Storage
from e2p_ray.train.data.joins import JoinSettings, concat, join


def gather(pieces: Sequence[Piece], read: Callable[[Piece], pl.DataFrame]) -> list[ray.ObjectRef[Any]]:
    """References to the frames of all pieces, as Arrow tables in no particular order."""
    if not pieces:
        return []
    items = [{"piece": piece.to_json()} for piece in pieces]
    rows = ray.data.from_items(items, override_num_blocks=len(items))
    read_rows = rows.map_batches(partial(_read_pieces, read), batch_size=None, batch_format="pyarrow")
    return list(read_rows.to_arrow_refs())


def _read_pieces(read: Callable[[Piece], pl.DataFrame], pieces: pa.Table) -> pa.Table:
    frames = [read(Piece.from_json(text)) for text in pieces["piece"].to_pylist()]
    return pl.concat(frames).to_arrow(compat_level=pl.CompatLevel.oldest())


def read_wanted(
    read: Callable[[Storage, Piece, pl.Series], pl.DataFrame],
    storage: Storage,
    wanted: ray.ObjectRef[Any],
    piece: Piece,
) -> pl.DataFrame:
    """The rows of a piece that targets name."""
    return read(storage, piece, ray.get(wanted))


def _frames(tables: Sequence[pa.Table]) -> list[pl.DataFrame]:
    return [pl.DataFrame(pl.from_arrow(table)) for table in tables]


def named(*targets: pa.Table) -> tuple[pl.Series, pl.Series]:
    """The users and the contents that targets name."""
    frame = concat(_frames(targets), "targets")
    return frame["user_id"].unique().sort(), frame["content_id"].unique().sort()


def joined_rows(settings: JoinSettings, places: dict[str, int], *tables: pa.Table) -> Iterator[Any]:
    """`Joined` without its arrays, then the user embeddings, then every chunk: each an object of its own."""
    frames = _frames(tables)
    targets, rest = frames[: places["targets"]], frames[places["targets"] :]
    num_held = max(places["held"], 0)
    held, users, contents = rest[:num_held], rest[num_held:][: places["users"]], rest[num_held + places["users"] :]
    joined = join(
        concat(targets, "targets"),
        concat(held, "targets") if places["held"] >= 0 else None,
        concat(users, "users"),
        concat(contents, "contents"),
        settings,
    )
    yield replace(joined, user_embeddings=joined.user_embeddings[:0], chunks=())
    yield joined.user_embeddings
    yield from (chunk for chunk in joined.chunks)  # Ray sends into its generators, and a tuple takes nothing

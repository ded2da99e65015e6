"""Pieces of a shard that ends its workers: written one by one, so that only the request that does it is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime

import pyarrow as pa

from e2p_ray.commit import Run, ShardStats, commit_rows
from e2p_ray.commit.shard import ShardData, data_bytes, parse_data, planned_keys, rows_of
from e2p_ray.errors import ObjectNotFoundError
from e2p_ray.schema import DeadLetter, ErrorCode, Generation, Group
from e2p_ray.storage import Storage

_SUMMED = ("seconds_s", *(field.name for field in fields(ShardStats) if field.name.startswith("num_")))


@dataclass(frozen=True, slots=True, order=True)
class Piece:
    """The requests first .. end - 1 of a shard, in the plan's order."""

    shard_id: str
    first: int
    end: int

    @property
    def num_requests(self) -> int:
        return self.end - self.first

    def halves(self) -> tuple[Piece, Piece]:
        middle = (self.first + self.end) // 2
        return replace(self, end=middle), replace(self, first=middle)

    def uri(self, run: Run) -> str:
        """Where its results lie until its shard is whole."""
        return f"{run.uri}/pieces/{self.shard_id}/{self.first:06d}-{self.end:06d}.parquet"

    def of(self, groups: Sequence[Group]) -> list[Group]:
        """The piece of its shard's groups."""
        found, before = [], 0
        for group in groups:
            first, end = max(self.first - before, 0), max(self.end - before, 0)
            if requests := group.requests[first:end]:
                found.append(replace(group, requests=requests))
            before += len(group.requests)
        return found


def whole(storage: Storage, run: Run, shard_id: str) -> Piece:
    """A shard as a single piece."""
    return Piece(shard_id, 0, len(planned_keys(storage, run, shard_id)))


def write_piece(
    storage: Storage,
    run: Run,
    piece: Piece,
    generations: Sequence[Generation],
    dead_letters: Sequence[DeadLetter],
    stats: ShardStats,
) -> None:
    """Keep a piece's results; whoever was first is kept."""
    storage.put_if_absent(piece.uri(run), data_bytes(rows_of(generations), dead_letters, stats))


def give_up(storage: Storage, run: Run, piece: Piece, now: datetime) -> None:
    """Make the single request of a piece a dead letter."""
    assert piece.num_requests == 1, "larger pieces are cut"
    key = planned_keys(storage, run, piece.shard_id)[piece.first]
    message = "every process that wrote it ended or failed, alone as well as with others"
    letter = DeadLetter(*key, ErrorCode.POISON, message, piece.shard_id, run.run_id)
    write_piece(storage, run, piece, (), (letter,), ShardStats(1, 0, 0, 0, 0, 0.0, now, now, ""))


def read_piece(storage: Storage, run: Run, piece: Piece) -> ShardData | None:
    """A piece's results, None before it has some."""
    try:
        return parse_data(storage.read_bytes(piece.uri(run)), piece.uri(run))
    except ObjectNotFoundError:
        return None


def commit_pieces(storage: Storage, run: Run, shard_id: str, pieces: Sequence[ShardData]) -> ShardStats:
    """Commit a shard from the results of all its pieces, and remove them."""
    letters = [letter for piece in pieces for letter in piece.dead_letters]
    rows = pa.concat_tables(piece.rows for piece in pieces)
    rows = rows.sort_by([("content_id", "ascending"), ("task", "ascending"), ("user_id", "ascending")])
    times = [datetime.fromisoformat(piece.stats[name]) for piece in pieces for name in ("started_at", "finished_at")]
    sums = {name: sum(piece.stats[name] for piece in pieces) for name in _SUMMED}
    workers = sorted({piece.stats["worker"] for piece in pieces} - {""})
    stats = ShardStats(**sums, started_at=min(times), finished_at=max(times), worker=",".join(workers))
    commit_rows(storage, run, shard_id, rows, letters, stats)
    remove_pieces(storage, run, shard_id)
    return stats


def remove_pieces(storage: Storage, run: Run, shard_id: str) -> None:
    """Of a shard that is committed."""
    for info in storage.list_objects(f"{run.uri}/pieces/{shard_id}"):
        storage.delete(info.uri)

"""The search for poison, pass by pass: what a pass must not be taken for."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from e2p_ray.batch import ShardOutcome, ShardWorker
from e2p_ray.batch.pieces import Piece, give_up
from e2p_ray.batch.poison import PoisonSearch
from e2p_ray.batch.tally import Tally
from e2p_ray.commit import pending_shards, read_markers
from e2p_ray.schema import ErrorCode
from tests.small_job import fake_engine
from tests.test_batch import Opened, opened

pytestmark = pytest.mark.usefixtures("ray_cluster")

PieceRow = Mapping[str, Any]
Write = Callable[[PieceRow], None]
OnePass = Callable[[Tally, Write, Sequence[PieceRow]], None]


def _is_one(piece: PieceRow, *places: int) -> bool:
    """Whether the piece is one request alone, at one of these places."""
    return piece["end"] - piece["first"] == 1 and piece["first"] in places


def _has(piece: PieceRow, *places: int) -> bool:
    return any(piece["first"] <= place < piece["end"] for place in places)


def _search(job: Opened, one_pass: OnePass, max_poison: int = 8) -> None:
    """One search in the run's first shard; `one_pass` is given the tally and what writes a piece, too."""
    tally = Tally(len(job.run.shard_ids), 0, None)
    worker = ShardWorker(job.config, job.storage, job.run, fake_engine)

    def write(piece: PieceRow) -> None:
        (row,) = worker(pa.Table.from_pylist([dict(piece)])).to_pylist()
        tally.add(ShardOutcome(**row))

    search = PoisonSearch(job.storage, job.run, max_poison, tally, partial(one_pass, tally, write))
    search.among(job.run.shard_ids[:1])


def _killed_by(*places: int) -> OnePass:
    """Passes whose worker dies at requests at these places of the shard, and at no others."""

    def one_pass(_: Tally, write: Write, pieces: Sequence[PieceRow]) -> None:
        for piece in pieces:
            if not _has(piece, *places):
                write(piece)

    return one_pass


def _num_poison(job: Opened) -> int | None:
    """Of the first shard; None where it is not committed."""
    if job.run.shard_ids[0] in pending_shards(job.storage, job.run):
        return None
    return int(read_markers(job.storage, job.run)[0]["error_codes"].get(ErrorCode.POISON, 0))


@pytest.fixture
def job(tmp_path: Path) -> Opened:
    """Its first shard has three requests at least."""
    return opened(tmp_path, num_users=6, plan={"requests_per_shard": 4})


def test_a_pass_that_was_given_up_says_nothing_of_a_request(job: Opened) -> None:
    def giving_up(tally: Tally, write: Write, pieces: Sequence[PieceRow]) -> None:
        if any(_is_one(piece, 0, 1) for piece in pieces):
            tally.pass_failure = "no worker started"
        else:
            _killed_by(0)(tally, write, pieces)

    for _ in range(3):
        _search(job, giving_up)
        assert _num_poison(job) is None
    _search(job, _killed_by(0))
    assert _num_poison(job) == 1, "the next call goes on, and finds the one that it is"


def test_a_request_whose_storage_failed_is_not_poison(job: Opened) -> None:
    def denied(tally: Tally, write: Write, pieces: Sequence[PieceRow]) -> None:
        for piece in pieces:
            if piece["first"] == 1:
                tally.add(ShardOutcome(piece["shard_id"], error_type="StorageError", is_piece=True))
            elif not _has(piece, 0):
                write(piece)

    for _ in range(3):
        _search(job, denied)
        assert _num_poison(job) is None
    _search(job, _killed_by(0))
    assert _num_poison(job) == 1


def test_more_poison_than_a_run_may_lose_is_not_lost_by_the_same_command_again(job: Opened) -> None:
    for _ in range(3):
        _search(job, _killed_by(0, 2), max_poison=1)
        assert _num_poison(job) is None
    _search(job, _killed_by(0, 2), max_poison=2)
    assert _num_poison(job) == 2


def test_what_a_killed_search_gave_up_counts_for_the_next(job: Opened) -> None:
    give_up(job.storage, job.run, Piece(job.run.shard_ids[0], 0, 1), datetime.now(UTC))
    _search(job, _killed_by(0, 2), max_poison=1)
    assert _num_poison(job) is None
    _search(job, _killed_by(0, 2), max_poison=2)
    assert _num_poison(job) == 2


def test_a_shard_that_another_driver_commits_meanwhile_is_done(job: Opened) -> None:
    """Which removes its pieces, those of an earlier pass of this driver among them."""
    passes = itertools.count(1)

    def overtaken(tally: Tally, write: Write, pieces: Sequence[PieceRow]) -> None:
        if next(passes) == 2:
            _search(job, _killed_by(0))
        _killed_by(0)(tally, write, pieces)

    _search(job, overtaken)
    assert next(passes) > 2
    assert _num_poison(job) == 1
    assert not [*job.storage.list_objects(f"{job.run.uri}/pieces")]

"""From input tables to shard files by one polars process, and what that has in common with `shuffles`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import astuple, dataclass, replace

import polars as pl
import ray

from e2p_ray.config.uris import absolute
from e2p_ray.errors import E2PError
from e2p_ray.plan.inputs import InputTable, Piece, Space, read_pieces
from e2p_ray.plan.pairs import (
    ContentJoin,
    check_space,
    join_contents,
    join_users,
    write_dead_letters,
)
from e2p_ray.plan.shard_size import ShardSize
from e2p_ray.plan.shards import Cutting, ShardEntry, count_requests, write_shards
from e2p_ray.storage import Storage


@dataclass(frozen=True, slots=True)
class Job:
    """What the workers need to know. Picklable."""

    storage: Storage
    uri: str
    space: Space
    tasks: tuple[str, ...]
    shard_size: ShardSize
    max_group_requests: int

    def cutting(self, num_pairs: int) -> Cutting:
        num_requests = num_pairs * len(self.tasks)
        size = self.shard_size
        buckets, wanted = size.num_buckets(num_requests), size.among(num_requests)
        return Cutting(self.tasks, buckets, wanted, self.max_group_requests, self.space.dim)

    def absolute(self) -> Job:
        """The same for any working folder: the tasks of a Ray that was found have one of their own."""
        return replace(self, uri=absolute(self.uri))

    def dead_letters_uri(self, number: int) -> str:
        return f"{self.uri}/dead_letters/part-{number:05d}.parquet"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one partition, or all of them, came to."""

    shards: list[ShardEntry]
    counts: Counter[str]
    dead_letters: list[str]  # URIs

    def to_json(self) -> bytes:
        return json.dumps([[astuple(shard) for shard in self.shards], self.counts, self.dead_letters]).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Outcome:
        shards, counts, dead_letters = json.loads(data)
        return cls([ShardEntry(*row) for row in shards], Counter(counts), dead_letters)


def plan_on_one_node(job: Job, inputs: dict[str, InputTable]) -> Outcome:
    """In a worker where Ray runs, so that the driver stays small."""
    pieces = {name: table.pieces for name, table in inputs.items()}
    if not ray.is_initialized():
        return _plan_alone(job, pieces)
    placed = {name: tuple(piece.absolute() for piece in found) for name, found in pieces.items()}
    return ray.get(ray.remote(_plan_alone).remote(job.absolute(), placed))


def _plan_alone(job: Job, pieces: dict[str, tuple[Piece, ...]]) -> Outcome:
    candidates, users = (read_pieces(job.storage, pieces[name], name, job.space) for name in ("candidates", "users"))
    join = join_users(candidates, users, job.space.name)
    del candidates, users
    check_space(join.counts, job.space.name)
    counts, dead_letters = write_dead(job, join.dead, 0)
    contents = read_pieces(job.storage, pieces["contents"], "contents", job.space)
    rest = write_part(job, join_contents(join.pairs, contents), job.cutting(join.counts["num_pairs"]), 1)
    return Outcome(rest.shards, join.counts + counts + rest.counts, dead_letters + rest.dead_letters)


def write_part(job: Job, join: ContentJoin, cutting: Cutting, number: int) -> Outcome:
    """Shards and dead letters of pairs with all that is known of them."""
    dead_counts, dead_letters = write_dead(job, join.dead, number)
    shards = write_shards(job.storage, job.uri, join, cutting)
    return Outcome(shards, count_requests(join, job.tasks) + dead_counts, dead_letters)


def write_dead(job: Job, dead: pl.DataFrame, number: int) -> tuple[Counter[str], list[str]]:
    """Requests that no shard takes; their counts, and the URI of their file if there are any."""
    uri = job.dead_letters_uri(number)
    return write_dead_letters(job.storage, uri, dead, job.tasks), [] if dead.is_empty() else [uri]


def typed_error(error: ray.exceptions.RayError) -> E2PError | None:
    """The typed error of a worker, where Ray's own error wraps one."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, E2PError) else None

"""Why a shard is not done: one object a shard below its run, of its last failed try, for whoever asks for its status.

A message may name a request, so a purge deletes what names one of its users. Once the shard is committed its failure
says nothing any more: readers ignore it, the job that committed it removes it, a vacuum too.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial

from e2p_ray.commit.run import Run, map_ahead
from e2p_ray.errors import ObjectNotFoundError
from e2p_ray.schema import checked_id
from e2p_ray.storage import Storage

_FOLDER = "failures"
_MAX_CHARS = 2000


@dataclass(frozen=True)
class ShardFailure:
    """What is known of a shard's last failed try."""

    shard_id: str
    attempt: int  # of the call that ran it; the search for poison counts with the last one
    error_type: str
    message: str
    at: datetime
    worker: str  # host:pid; empty when nobody knows


def failures_uri(run: Run) -> str:
    """The folder of a run's failures."""
    return f"{run.uri}/{_FOLDER}"


def is_failure(uri: str) -> bool:
    """Whether an object below a run's folder is one of these."""
    return uri.split("/")[-2:-1] == [_FOLDER]


def write_failure(storage: Storage, run: Run, failure: ShardFailure) -> None:
    """Keep a failure in place of an earlier one of the shard."""
    values = asdict(failure) | {"message": cut_between_words(failure.message, _MAX_CHARS), "at": failure.at.isoformat()}
    uri = f"{failures_uri(run)}/{checked_id(failure.shard_id)}.json"
    storage.write_bytes(uri, json.dumps(values, ensure_ascii=False, indent=1).encode())


def read_failures(storage: Storage, run: Run, shard_ids: Collection[str]) -> dict[str, ShardFailure]:
    """The failures of these shards, those that have one."""
    wanted = set(shard_ids)
    uris = [info.uri for info in storage.list_objects(failures_uri(run)) if _shard_of(info.name) in wanted]
    found = [json.loads(data) for data in map_ahead(partial(_read, storage), uris) if data is not None]
    return {one["shard_id"]: ShardFailure(**(one | {"at": datetime.fromisoformat(one["at"])})) for one in found}


def _read(storage: Storage, uri: str) -> bytes | None:
    """None when it is gone: the job that committed the shard removed it just then."""
    try:
        return storage.read_bytes(uri)
    except ObjectNotFoundError:
        return None


def forget_failures(storage: Storage, run: Run, pending: Collection[str]) -> None:
    """Remove the failures of all shards but these."""
    left = set(pending)
    uris = [info.uri for info in storage.list_objects(failures_uri(run)) if _shard_of(info.name) not in left]
    for _ in map_ahead(storage.delete, uris):
        pass


def cut_between_words(message: str, max_chars: int) -> str:
    """A message without its end where it is longer: no purge would find half a user id."""
    return message if len(message) <= max_chars else message[:max_chars].rpartition(" ")[0] + " ..."


def _shard_of(name: str) -> str:
    return name.removesuffix(".json")

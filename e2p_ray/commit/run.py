"""A run: where its objects lie, what it is made of, and which of its shards are left."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, TypeVar

from e2p_ray.errors import ConfigError, IncompatibleError, ObjectNotFoundError
from e2p_ray.schema import checked_id
from e2p_ray.storage import ObjectInfo, Storage

_T = TypeVar("_T")
_ITEM = TypeVar("_ITEM")

_MAX_AHEAD = 8  # objects fetched at once
UNTITLED = "-untitled"  # after the shard id
CARRIED = "carried-"  # how the ids of shards begin that an update carries over
ARTIFACTS = ("projector_id", "base_model_id", "embedding_space")  # what all texts of a run are made with


@dataclass(frozen=True)
class Run:
    """All shards of one plan, or of one update of it, with one configuration, projector and base model."""

    run_id: str
    uri: str  # {output}/runs/{run_id}
    table_uri: str  # {output}/generations
    plan_uri: str  # {output}/plans/{plan_key} or {output}/updates/{update_id}
    embedding_space: str
    projector_id: str
    base_model_id: str
    shard_ids: tuple[str, ...]
    source_id: str = ""  # names plan, settings, projector and base model: that of a full run is its run id
    base_version: int | None = None  # of the table when the run began: what an update carries over is from there
    is_first: bool = False  # there was no table then; without this and a version, an older release made the run

    def __post_init__(self) -> None:
        checked_id(self.run_id)
        for shard_id in self.shard_ids:
            checked_id(shard_id)
        if len(set(self.shard_ids)) != len(self.shard_ids):
            raise ConfigError(f"run {self.run_id}: a shard id is there twice; make the plan again")

    @property
    def record_uri(self) -> str:
        return f"{self.uri}/run.json"

    @property
    def markers_uri(self) -> str:
        return f"{self.uri}/markers"

    @property
    def dead_letters_uri(self) -> str:
        return f"{self.uri}/dead_letters"

    def data_path(self, shard_id: str) -> str:
        """A shard's data file, relative to the table."""
        return f"data/{self.run_id}/{checked_id(shard_id)}.parquet"

    def data_uri(self, shard_id: str) -> str:
        return f"{self.table_uri}/{self.data_path(shard_id)}"

    def marker_uri(self, shard_id: str) -> str:
        return f"{self.markers_uri}/{checked_id(shard_id)}.json"

    def dead_letter_uri(self, shard_id: str) -> str:
        return f"{self.dead_letters_uri}/{checked_id(shard_id)}.parquet"

    def untitled_uri(self, shard_id: str) -> str:
        """Dead letters of rows that a publish left out: their users opted out and there is no title to show instead."""
        return f"{self.dead_letters_uri}/{checked_id(shard_id)}{UNTITLED}.parquet"

    def planned_uri(self, shard_id: str) -> str:
        return f"{self.plan_uri}/shards/{checked_id(shard_id)}.parquet"


def run_id_of(plan_id: str, text_hash: str, projector_id: str, base_model_id: str) -> str:
    """The id of the run of these: 16 hex digits, the same for the same parts."""
    parts = json.dumps([plan_id, text_hash, projector_id, base_model_id], ensure_ascii=False)
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def is_carried(shard_id: str) -> bool:
    """Whether a shard is of rows that an update carries over or defers: committed already, and never generated."""
    return shard_id.startswith(CARRIED)


def open_run(storage: Storage, run: Run, resolved_config: dict[str, Any]) -> None:
    """Record a run with its configuration, or find it recorded; IncompatibleError when another run has its id."""
    record = {field.name: getattr(run, field.name) for field in fields(run)}
    data = json.dumps({**record, "config": resolved_config}, ensure_ascii=False, indent=1).encode()
    if storage.put_if_absent(run.record_uri, data):
        return
    found = json.loads(storage.read_bytes(run.record_uri))
    for name in ("run_id", "embedding_space", "projector_id", "base_model_id", "shard_ids"):
        expected = list(record[name]) if name == "shard_ids" else record[name]
        if found[name] != expected:
            remedy = "Remove the run's folder or write to another output"
            raise IncompatibleError(f"{run.record_uri} was made with another {name}. {remedy}")


def load_run(storage: Storage, output_uri: str, run_id: str) -> Run:
    """A recorded run; its places are taken below `output_uri`, wherever it was written first."""
    output_uri = output_uri.rstrip("/")
    uri = f"{output_uri}/runs/{checked_id(run_id)}"
    try:
        record = json.loads(storage.read_bytes(f"{uri}/run.json"))
    except ObjectNotFoundError as error:
        raise ConfigError(f"{uri}: there is no such run. Generate it first, or give another run id") from error
    values = {field.name: record[field.name] for field in fields(Run) if field.name in record}
    values["shard_ids"] = tuple(values["shard_ids"])
    plan = "/".join(values["plan_uri"].split("/")[-2:])  # plans/{plan_key} or updates/{update_id}
    values |= {"uri": uri, "table_uri": f"{output_uri}/generations", "plan_uri": f"{output_uri}/{plan}"}
    return Run(**values)


def pending_shards(storage: Storage, run: Run) -> list[str]:
    """The shards without a marker, in the plan's order; one listing."""
    done = {info.name.removesuffix(".json") for info in storage.list_objects(run.markers_uri)}
    return [shard_id for shard_id in run.shard_ids if shard_id not in done]


def read_markers(storage: Storage, run: Run) -> list[dict[str, Any]]:
    """The markers of all committed shards, in the plan's order."""
    pending = set(pending_shards(storage, run))
    uris = [run.marker_uri(shard_id) for shard_id in run.shard_ids if shard_id not in pending]
    return [json.loads(data) for data in map_ahead(storage.read_bytes, uris)]


def summed(markers: Iterable[Mapping[str, Any]], name: str) -> Counter[str]:
    """One of the markers' counts by name, over all of them."""
    total = Counter[str]()
    for marker in markers:
        total.update(marker[name])
    return total


def dead_letter_files(storage: Storage, run: Run) -> dict[str, ObjectInfo]:
    """By shard, the file with the dead letters that writing it left; what consent leaves out at publishing has others.

    A shard may have its file and no marker: its worker ended between the two.
    """
    files = {info.name.removesuffix(".parquet"): info for info in storage.list_objects(run.dead_letters_uri)}
    return {name: info for name, info in files.items() if not name.endswith(UNTITLED)}


def dead_letter_codes(storage: Storage, files: Iterable[ObjectInfo]) -> Counter[str]:
    """How many dead letters are in these files of a run or a plan, by code."""
    found = Counter[str]()
    for letters in map_ahead(lambda info: storage.read_table(info.uri, ["error_code"]), list(files)):
        found.update(letters["error_code"].to_pylist())
    return found


def map_ahead(function: Callable[[_ITEM], _T], items: Sequence[_ITEM]) -> Iterator[_T]:
    """`map` in order with a few threads, never more than a few results ahead: memory stays flat."""
    with ThreadPoolExecutor(_MAX_AHEAD) as pool:
        rest = iter(items)
        running = [pool.submit(function, item) for item in islice(rest, _MAX_AHEAD)]
        while running:
            result = running.pop(0).result()
            running += [pool.submit(function, item) for item in islice(rest, 1)]
            yield result

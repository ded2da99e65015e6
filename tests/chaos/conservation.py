"""The check at the end of every injected fault, from the objects themselves and without the package's own verify."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

import pyarrow as pa
from deltalake import DeltaTable

from e2p_ray.config import JobConfig
from e2p_ray.storage import Storage

Key = tuple[str, str, str]
_KEY = ["user_id", "content_id", "task"]


@dataclass(frozen=True)
class Seen:
    """What a reader gets who opens the published table now."""

    version: int
    run_id: str  # whose publish it shows
    keys: Counter[Key]
    texts: dict[Key, tuple[str, str, str]]  # text, status and arm


@dataclass(frozen=True)
class Conserved:
    """A run that readers see whole."""

    seen: Seen
    num_rows: int
    num_dead_letters: int


def readers_see(config: JobConfig) -> Seen | None:
    """The published table through Delta alone; None where there is none yet."""
    storage, uri = Storage(config.storage), config.output.table_uri
    options = storage.delta_options(uri)
    if not DeltaTable.is_deltatable(uri, storage_options=options):
        return None
    table = DeltaTable(uri, storage_options=options)
    rows = table.to_pyarrow_table()
    published = [entry for entry in table.history() if "run_id" in entry]
    columns = (rows[name].to_pylist() for name in ("text", "status", "arm"))
    texts = dict(zip(_keys(rows), zip(*columns, strict=True), strict=True))
    return Seen(table.version(), published[0]["run_id"] if published else "", Counter(_keys(rows)), texts)


def assert_conserved(config: JobConfig, planned: Counter[Key] | set[Key]) -> Conserved:
    """Planned keys = rows that readers see + dead letters of the run they see, each exactly once."""
    seen = readers_see(config)
    assert seen is not None, "nothing is published"
    dead = _dead_letters(config, seen.run_id)
    found = seen.keys + Counter(dead)
    lost, extra = set(planned) - found.keys(), found.keys() - set(planned)
    twice = {key for key, count in found.items() if count > 1}
    assert not lost, f"{len(lost)} lost: {sorted(lost)[:3]}"
    assert not extra, f"{len(extra)} nobody planned: {sorted(extra)[:3]}"
    assert not twice, f"{len(twice)} there more than once: {sorted(twice)[:3]}"
    assert {status for _, status, _ in seen.texts.values()} <= {"ok", "fallback", "suppressed"}
    assert all(text for text, _, _ in seen.texts.values()), "an empty text"
    return Conserved(seen, seen.keys.total(), len(dead))


def assert_old_or_new(config: JobConfig, old: Seen | None, new: Seen) -> bool:
    """Readers see one of the two, never something between; True when it is the new one."""
    now = readers_see(config)
    if now is None:
        assert old is None, "the old run is gone"
        return False
    is_new = (now.keys, now.texts) == (new.keys, new.texts)
    assert is_new or (old is not None and (now.keys, now.texts) == (old.keys, old.texts)), "neither the old nor the new"
    return is_new


def _dead_letters(config: JobConfig, run_id: str) -> list[Key]:
    """Keys of a run's dead letters; those of its plan concern candidates that no request was planned for."""
    storage = Storage(config.storage)
    folder_uri = f"{config.output.uri}/runs/{run_id}"
    record = json.loads(storage.read_bytes(f"{folder_uri}/run.json"))
    shard_ids = set(record["shard_ids"])
    keys: list[Key] = []
    for info in storage.list_objects(f"{folder_uri}/dead_letters"):
        assert info.name.removesuffix(".parquet") in shard_ids, f"{info.uri}: of no shard of the run"
        keys += _keys(storage.read_table(info.uri, _KEY))
    return keys


def _keys(rows: pa.Table) -> list[Key]:
    return list(zip(*(rows[name].to_pylist() for name in _KEY), strict=True))

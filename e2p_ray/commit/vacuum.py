"""What nobody can need any more under an output: found, and removed.

Four folders are looked at: `generations` (the table), `runs`, `plans`, `updates`. Nothing beside them is touched, nor
what lies in a folder of the table that begins with `_` (Delta's own), but for what killed writers left there and in
`audit`. With a limit of so many hours, these are kept:

- every file of the table's newest version and of each version that was the newest within the limit: a reader may be
  at it, and `rollback` can go back to it;
- what belongs to a *live* run, one that such a version shows: its record, markers, dead letters, report and plan (the
  titles in it are what a rollback shows to users who opted out);
- what belongs to a run, plan or update of which any object was written within the limit: it can be resumed;
- the plan or update that a kept run reads, and the finished plan that was written last: the next job compares with it;
- any single object written within the limit.

All else is an orphan, of one of these kinds:

- `stray data`: files of the table that no kept version has: replaced when a user opted out, compacted, deleted, or of
  versions past the limit, of a commit that never came, or somebody else's;
- `abandoned run`: all of a run that no kept version shows and that nobody went on with: folder and shard data;
- `unused plan`: plans and updates that no kept run reads;
- `stray object`: in a kept folder, markers, dead letters and shards of no shard of that run or plan, and pieces of
  shards that are whole, and what was noted of their failures;
- `unfinished write`: what a killed writer left behind.

A run past the limit that was never published is abandoned, also a complete one. Manifests go before markers, and
these before data, so that a vacuum which is killed leaves what can be planned and generated again, never what looks
complete.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from deltalake import DeltaTable

from e2p_ray.commit.data_files import data_files
from e2p_ray.commit.history import commits_of, is_published
from e2p_ray.commit.published import open_table, shown_by
from e2p_ray.commit.run import UNTITLED, map_ahead
from e2p_ray.errors import IncompatibleError, PublishConflictError
from e2p_ray.storage import DatedObject, Storage
from e2p_ray.storage.delta import has_deletion_vectors
from e2p_ray.storage.local import is_unfinished


class OrphanKind(StrEnum):
    """Why nobody needs an object; the module's docstring says what each means."""

    STRAY_DATA = "stray data"
    ABANDONED_RUN = "abandoned run"
    UNUSED_PLAN = "unused plan"
    STRAY_OBJECT = "stray object"
    UNFINISHED_WRITE = "unfinished write"


@dataclass(frozen=True)
class Orphan:
    """An object that nobody needs."""

    kind: OrphanKind
    uri: str
    size_bytes: int


@dataclass(frozen=True)
class Live:
    """What readers of the kept versions need."""

    version: int | None  # the newest one
    paths: frozenset[str] = frozenset()  # relative to the table
    run_ids: frozenset[str] = frozenset()


def vacuum(storage: Storage, output_uri: str, *, max_age_s: float, dry_run: bool) -> tuple[Orphan, ...]:
    """Remove every orphan whose last change is more than `max_age_s` ago; with `dry_run`, only find them.

    Raises IncompatibleError for a table with deletion vectors, and PublishConflictError when the table changes while
    orphans are looked for: nothing is removed then.
    """
    table_uri = f"{output_uri}/generations"
    cutoff_s = time.time() - max_age_s
    live = _live(storage, table_uri, cutoff_s)
    orphans = tuple(_Search(storage, output_uri, live, cutoff_s).orphans())
    if dry_run:
        return orphans
    now = open_table(storage, table_uri)
    if (now.version() if now else None) != live.version:
        raise PublishConflictError(f"{table_uri} was changed meanwhile; nothing was removed. Run it again")
    for wave in _in_order(orphans):
        for _ in map_ahead(storage.delete, [orphan.uri for orphan in wave]):
            pass
    return orphans


def _in_order(orphans: Sequence[Orphan]) -> Iterator[list[Orphan]]:
    """What says that something is whole before what it is whole of: manifests, then markers, then all else.

    Without its marker a shard is generated again, without its data it would be missed at publish; without its manifest
    a plan or an update is written again, without its dead letters these would be missed.
    """
    waves: tuple[list[Orphan], ...] = [], [], []
    for orphan in orphans:
        waves[0 if orphan.uri.endswith("/manifest.json") else 1 if "/markers/" in orphan.uri else 2].append(orphan)
    yield from waves


def _live(storage: Storage, table_uri: str, cutoff_s: float) -> Live:
    table = open_table(storage, table_uri)
    if table is None:
        return Live(None)
    if has_deletion_vectors(table):
        remedy = "Purge them with the engine that wrote them and drop the feature deletionVectors, then run this again"
        raise IncompatibleError(
            f"{table_uri} has deletion vectors, whose files this cannot tell from orphans. {remedy}"
        )
    commits = commits_of(table)
    paths, run_ids = set[str](), set[str]()
    for version in _kept_versions(commits, table, cutoff_s):
        then = open_table(storage, table_uri, version)
        paths |= {file.path for file in data_files(then)} if then else set()
        if is_published(commits.get(version, {})):
            run_ids.add(commits[version]["run_id"])
    shown = shown_by(table)
    run_ids |= {shown.run_id} if shown else set()
    run_ids |= {run_id for run_id in map(_run_of_data, paths) if run_id}
    return Live(table.version(), frozenset(paths), frozenset(run_ids))


def _kept_versions(commits: Mapping[int, Mapping[str, Any]], table: DeltaTable, cutoff_s: float) -> list[int]:
    """The newest version, and those whose successor came within the limit."""
    kept = [v - 1 for v, commit in commits.items() if v and commit["timestamp"] / 1000 >= cutoff_s]
    return [version for version in kept if version in commits] + [table.version()]


def _run_of_data(path: str) -> str:
    """The run of a shard's data file, by its path in the table; empty for other files."""
    parts = path.split("/")
    return parts[1] if len(parts) == 3 and parts[0] == "data" else ""


@dataclass(frozen=True)
class _Folder:
    """All objects of one run, plan or update."""

    objects: list[DatedObject] = field(default_factory=list)

    @property
    def modified_s(self) -> float:
        return max((found.modified_s for found in self.objects), default=0.0)


def _outlived(run: _Folder) -> Iterator[DatedObject]:
    """Pieces and failures of shards that are committed: left by a kill between the marker and their removal."""
    parts = [(found, found.info.uri.split("/")) for found in run.objects]
    done = {names[-1] for _, names in parts if names[-2] == "markers"}
    for found, names in parts:
        if (names[-3] == "pieces" and f"{names[-2]}.json" in done) or (names[-2] == "failures" and names[-1] in done):
            yield found


def _is_unfinished(found: DatedObject) -> bool:
    return is_unfinished(found.info.name)


class _Search:
    """One look at all four folders."""

    def __init__(self, storage: Storage, output_uri: str, live: Live, cutoff_s: float) -> None:
        self._storage, self._uri, self._live, self._cutoff_s = storage, output_uri, live, cutoff_s
        self._data: dict[str, _Folder] = {}
        self._other_data: list[DatedObject] = []
        self._unfinished = [found for found in storage.list_dated(f"{output_uri}/audit") if _is_unfinished(found)]
        for found in storage.list_dated(f"{output_uri}/generations"):
            path = found.info.uri[len(f"{output_uri}/generations/") :]
            if any(part.startswith("_") for part in path.split("/")):
                self._unfinished += [found] if _is_unfinished(found) else []
                continue
            run_id = _run_of_data(path)
            (self._data.setdefault(run_id, _Folder()).objects if run_id else self._other_data).append(found)
        self._runs, self._plans, self._updates = (self._folders(kind) for kind in ("runs", "plans", "updates"))

    def _folders(self, kind: str) -> dict[str, _Folder]:
        start, folders = f"{self._uri}/{kind}/", dict[str, _Folder]()
        for found in self._storage.list_dated(start.rstrip("/")):
            name, _, rest = found.info.uri[len(start) :].partition("/")
            if rest:  # what lies in no run's folder is not ours
                folders.setdefault(name, _Folder()).objects.append(found)
        return folders

    def orphans(self) -> Iterator[Orphan]:
        """Every orphan once."""
        for run_id in sorted(self._runs.keys() | self._data.keys()):
            yield from self._orphans_of_run(run_id)
        yield from self._old(OrphanKind.STRAY_DATA, self._not_live(self._other_data))
        yield from self._old(OrphanKind.UNFINISHED_WRITE, self._unfinished)
        for kind, folders in (("plans", self._plans), ("updates", self._updates)):
            for name, folder in sorted(folders.items()):
                if (kind, name) in self._kept_plans or folder.modified_s >= self._cutoff_s:
                    yield from self._strays(folder, self._shards_of_plan(kind, name, folder), ("shards", "old"))
                else:
                    yield from self._old(OrphanKind.UNUSED_PLAN, folder.objects)

    def _orphans_of_run(self, run_id: str) -> Iterator[Orphan]:
        run, data = self._runs.get(run_id, _Folder()), self._data.get(run_id, _Folder())
        if run_id not in self._kept_runs:
            yield from self._old(OrphanKind.ABANDONED_RUN, [*run.objects, *data.objects])
            return
        record = self._records.get(run_id)
        shard_ids = set(record["shard_ids"]) if record else None
        yield from self._strays(run, shard_ids, ("markers", "dead_letters"))
        yield from self._old(OrphanKind.STRAY_OBJECT, _outlived(run))
        if run_id in self._live.run_ids:
            yield from self._old(OrphanKind.STRAY_DATA, self._not_live(data.objects))
        else:
            yield from self._strays(data, None, ())

    def _strays(self, folder: _Folder, shard_ids: set[str] | None, places: tuple[str, ...]) -> Iterator[Orphan]:
        """Objects of a kept folder that belong to no shard of it, and what killed writers left in it."""
        for found in folder.objects:
            *_, place, name = found.info.uri.split("/")
            shard_id = name.rpartition(".")[0].removesuffix(UNTITLED)
            is_stray = shard_ids is not None and place in places and shard_id not in shard_ids
            if is_stray or _is_unfinished(found):
                yield from self._old(OrphanKind.STRAY_OBJECT, [found])

    def _old(self, kind: OrphanKind, objects: Iterable[DatedObject]) -> Iterator[Orphan]:
        for info, modified_s in objects:
            if modified_s < self._cutoff_s:
                unfinished = is_unfinished(info.name)
                yield Orphan(OrphanKind.UNFINISHED_WRITE if unfinished else kind, info.uri, info.size_bytes)

    def _not_live(self, objects: Iterable[DatedObject]) -> list[DatedObject]:
        start = len(f"{self._uri}/generations/")
        return [found for found in objects if found.info.uri[start:] not in self._live.paths]

    @cached_property
    def _kept_runs(self) -> set[str]:
        """Live ones, and those that something was written of within the limit."""
        kept = set(self._live.run_ids)
        for folders in (self._runs, self._data):
            kept |= {run_id for run_id, folder in folders.items() if folder.modified_s >= self._cutoff_s}
        return kept

    @cached_property
    def _records(self) -> dict[str, dict[str, Any]]:
        """The records of kept runs; a run that was only begun may have none."""
        uris = {run_id: f"{self._uri}/runs/{run_id}/run.json" for run_id in sorted(self._kept_runs)}
        present = {found.info.uri for folder in self._runs.values() for found in folder.objects}
        there = [run_id for run_id, uri in uris.items() if uri in present]
        read = map_ahead(self._storage.read_bytes, [uris[run_id] for run_id in there])
        return {run_id: json.loads(data) for run_id, data in zip(there, read, strict=True)}

    @cached_property
    def _kept_plans(self) -> set[tuple[str, str]]:
        """By folder and name: what kept runs read, and the finished plan that was written last."""
        kept = {(kind, name) for kind, name in (r["plan_uri"].split("/")[-2:] for r in self._records.values())}
        finished = [
            (found.modified_s, name)
            for name, folder in self._plans.items()
            for found in folder.objects
            if found.info.uri == self._manifest_uri("plans", name)
        ]
        return kept | ({("plans", max(finished)[1])} if finished else set())

    def _manifest_uri(self, kind: str, name: str) -> str:
        return f"{self._uri}/{kind}/{name}/manifest.json"

    def _shards_of_plan(self, kind: str, name: str, folder: _Folder) -> set[str] | None:
        """Of a finished plan or update; None while it is being written."""
        uri = self._manifest_uri(kind, name)
        if not any(found.info.uri == uri for found in folder.objects):
            return None
        manifest = json.loads(self._storage.read_bytes(uri))
        return {entry[0] for entry in manifest["shards"]} | set(manifest.get("carried_ids", ()))

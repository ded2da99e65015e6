"""Removing users: every object below an output is read, and those that hold something of theirs are written without it.

What is touched: files of the visible table (one commit; see purge_table.py), of older versions and of runs, with their
markers; shards of plans and updates, with their manifests; drafts and old rows in them; dead letters; pieces of shards
that end their workers (all of them); reports; the table's log. Ids of shards, plans and runs stay: they are names now,
not hashes of what is left. All of a run's keys are still accounted for. So a pending run resumes where it was, as long
as the same inputs are planned (the plan is found again, without the users) and the visible version had nothing of them.
Otherwise the next jobs.generate starts another run, as after any other change of inputs or table.

Every step may be repeated: a purge that was killed is finished by the same call. No job should be writing meanwhile.
What a bucket with versioning keeps of replaced objects is not reached.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from e2p_ray.commit.failures import is_failure
from e2p_ray.commit.purge_table import (
    FILE_ACTIONS,
    TableState,
    fix_log,
    read_state,
    refuse_change,
    replace_object,
    swap_files,
)
from e2p_ray.commit.run import map_ahead
from e2p_ray.commit.shard import FOOTER, marker_bytes, parse_data
from e2p_ray.commit.users_in import Rewritten, Users
from e2p_ray.errors import InputError, StorageError
from e2p_ray.storage import ObjectInfo, Storage
from e2p_ray.storage.local import is_unfinished
from e2p_ray.storage.utf8 import is_text, require_utf8

VISIBLE, OTHER_FILES, LOG = "visible table", "older versions and runs", "table log"
_PLACES = {"plans": "plans", "updates": "updates", "runs": "reports and markers", "audit": "audit log"}
_MAX_NAMED = 5


@dataclass(frozen=True)
class Hit:
    """An object that holds something of these users, and how much: rows, dead letters, samples, mentions."""

    info: ObjectInfo
    place: str
    num_found: int


@dataclass(frozen=True)
class Survey:
    """Everything below an output, read."""

    objects: tuple[ObjectInfo, ...]
    hits: tuple[Hit, ...]
    unread: tuple[str, ...]  # objects of a kind that nothing here writes
    version: int | None  # of the table then

    def by_place(self) -> dict[str, int]:
        counts = Counter[str]()
        for hit in self.hits:
            counts[hit.place] += hit.num_found
        return dict(sorted(counts.items()))


@dataclass(frozen=True)
class Purge:
    """What was removed, by place, and the version that readers see now."""

    removed: Mapping[str, int]
    num_objects: int  # that were rewritten or deleted
    version: int | None  # None when the visible table held nothing of them
    num_read: int  # objects that were read again afterwards, without a hit
    unread: tuple[str, ...]


def read_user_ids(storage: Storage, uri: str) -> Users:
    """One id a line, or a Parquet file with a column `user_id`. InputError when there is none, or no plain list.

    A misread id would be found nowhere, and its user be thought removed: a line of CSV is refused. No id is said.
    """
    data = storage.read_bytes(uri)
    if data[:4] == b"PAR1":
        table = storage.read_table(uri, ["user_id"])
        require_utf8(table, uri)
        kind = table.schema.field("user_id").type
        if not (is_text(kind) or pa.types.is_integer(kind)):  # 12.0, say, is no id of any table
            remedy = "Write the ids as strings, as they are in your tables."
            raise InputError(f"is {kind}, not string", uri=uri, column="user_id", remedy=remedy)
        ids = table["user_id"].drop_null().cast("string").to_pylist()
    else:
        try:
            ids = io.StringIO(data.decode("utf-8-sig"), newline=None).read().split("\n")  # ids may hold U+2028
        except UnicodeDecodeError as error:
            raise InputError("neither Parquet nor UTF-8", uri=uri, remedy="Write one user id a line.") from error
        for line, user_id in enumerate(ids, 1):
            if problem := _misreading(user_id, is_first=line == 1):
                remedy = "Write one user id a line, as it is in your tables; ids that look like this go in Parquet."
                raise InputError(problem, uri=uri, line=line, remedy=remedy)
    users = Users(user_id for user_id in ids if user_id.strip())
    if not users:
        raise InputError("no user id here", uri=uri, remedy="Write one user id a line, or Parquet with user_id.")
    return users


def _misreading(line: str, *, is_first: bool) -> str:
    """What shows that a line is not an id alone, or ""; a comma does not: ids may hold some."""
    if not line.strip():
        return ""
    if line != line.strip():
        return "blanks before or after the id"
    if line[0] in "\"'":
        return "a quote before the id"
    if is_first and re.fullmatch(r"user_?id([,;\t].*)?", line, re.IGNORECASE):
        return "a header, not an id"
    return ""


def find_users(storage: Storage, output_uri: str, users: Users) -> Survey:
    """Read everything below an output and count what belongs to these users."""
    output_uri = output_uri.rstrip("/")
    storage.refuse_links_out(output_uri)  # what lies behind a link is neither rewritten nor proven to be clean
    state = read_state(storage, f"{output_uri}/generations")
    objects = [dated.info for dated in storage.list_dated(output_uri)]
    hits, unread = list[Hit](), list[str]()
    for info, num_found in zip(objects, map_ahead(partial(_count, storage, users), objects), strict=True):
        if num_found is None:
            unread.append(info.uri)
        elif num_found:
            hits.append(Hit(info, _place_of(output_uri, state, info.uri), num_found))
    return Survey(tuple(objects), tuple(hits), tuple(unread), state.version)


def purge_users(storage: Storage, output_uri: str, users: Users, before: Survey, say: Callable[[str], None]) -> Purge:
    """Remove them everywhere below an output, as it was found, then read everything again to prove it.

    Raises IncompatibleError for a table with features of other tools, PublishConflictError when the table was changed
    meanwhile, StorageError when something of them is still there afterwards.
    """
    output_uri = output_uri.rstrip("/")
    table_uri = f"{output_uri}/generations"
    state, version = read_state(storage, table_uri), None
    refuse_change(state, before.version)
    if before.hits:
        _forget_pieces(storage, before.objects)
    parquet = [
        hit for hit in before.hits if hit.info.uri.endswith(".parquet") and hit.place != LOG and not _is_piece(hit.info)
    ]
    if visible := [hit for hit in parquet if hit.place == VISIBLE]:
        version = swap_files(storage, state, _rewritten(storage, users, visible))
        say(f"version {version} of {table_uri} shows nothing of them")
    # What follows is written where it is: none of it may be of a version that somebody has just made visible.
    refuse_change(read_state(storage, table_uri), before.version if version is None else version)
    present = {info.uri for info in before.objects}
    for hit in before.hits:
        if hit.info.uri.endswith(".html") or is_unfinished(hit.info.name) or is_failure(hit.info.uri):
            storage.delete(hit.info.uri)  # a page is made again from its JSON, without them
        elif hit.info.uri.endswith(".json") and hit.place != LOG:
            clean = users.out_of_json_text(storage.read_bytes(hit.info.uri))
            replace_object(storage, hit.info.uri, clean, present)
    for file in _rewritten(storage, users, parquet):
        _write_marker(storage, output_uri, file)
        replace_object(storage, file.uri, file.data, present)
    _put_right(storage, output_uri, users, parquet)
    after = find_users(storage, output_uri, users)
    if after.hits:
        named = ", ".join(hit.info.uri for hit in after.hits[:_MAX_NAMED])
        problem = f"{len(after.hits)} object(s) still hold something of these users: {named}"
        raise StorageError(f"{problem}. Stop what writes there and run the same command again")
    return Purge(before.by_place(), len(before.hits), version, len(after.objects), after.unread)


def _forget_pieces(storage: Storage, objects: Iterable[ObjectInfo]) -> None:
    """Pieces of shards name their requests by place, and a shard without these users has others there: all go.

    The search that wrote them begins again. First of all, so that a purge that is killed leaves none beside new shards.
    """
    for info in objects:
        if _is_piece(info):
            storage.delete(info.uri)


def _is_piece(info: ObjectInfo) -> bool:
    """Whether it holds a part of a shard that ends its workers (batch/pieces.py)."""
    return info.uri.split("/")[-3:-2] == ["pieces"]


def _rewritten(storage: Storage, users: Users, hits: Sequence[Hit]) -> Iterator[Rewritten]:
    return map_ahead(lambda hit: users.out_of_parquet(storage, hit.info), hits)


def _count(storage: Storage, users: Users, info: ObjectInfo) -> int | None:
    """How much of an object is theirs; None when it is of no kind that is known."""
    name = info.name
    if is_unfinished(name):
        return 1  # of a writer that was killed: nobody can say what is in it
    if name.endswith(".parquet"):
        in_log = "/_delta_log/" in info.uri
        return _in_checkpoint(storage, users, info) if in_log else users.in_parquet(storage, info)
    if is_failure(info.uri):
        return users.in_text(str(json.loads(storage.read_bytes(info.uri))["message"]))
    if name.endswith((".json", ".crc")) or name == "_last_checkpoint":
        return users.in_json_text(storage.read_bytes(info.uri))
    if name.endswith(".html"):
        return users.in_html(storage.read_bytes(info.uri).decode("utf-8", "replace"))
    return None


def _in_checkpoint(storage: Storage, users: Users, info: ObjectInfo) -> int:
    """Statistics of a checkpoint that name one of them."""
    with storage.open_parquet(info) as file:
        kinds = [kind for kind in FILE_ACTIONS if kind in file.schema_arrow.names]
        table = file.read(columns=kinds, use_threads=False)
    rows = (row for kind in kinds for row in table[kind].drop_null().to_pylist())
    return sum(users.in_json(row.get("stats") or "") + users.in_json(row.get("stats_parsed")) for row in rows)


def _write_marker(storage: Storage, output_uri: str, file: Rewritten) -> None:
    """The marker of a shard's data file, if it has one: before the data, which a killed purge would find again."""
    path = PurePosixPath(file.uri.removeprefix(f"{output_uri}/"))
    if path.parts[:2] != ("generations", "data") or FOOTER not in (file.table.schema.metadata or {}):
        return
    run_id, shard_id = path.parts[-2], path.stem
    marker_uri = f"{output_uri}/runs/{run_id}/markers/{shard_id}.json"
    if storage.exists(marker_uri):
        shard = parse_data(file.data, file.uri)
        storage.write_bytes(marker_uri, marker_bytes(run_id, shard_id, shard, file.data))


def _put_right(storage: Storage, output_uri: str, users: Users, rewritten: Sequence[Hit]) -> None:
    """Manifests and the table's log say what the files are now; also where an earlier purge was killed."""
    objects = list(storage.list_objects(output_uri))
    sizes = {info.uri: info.size_bytes for info in objects}
    uris = {hit.info.uri for hit in rewritten}
    for info in objects:
        if info.uri.endswith("/manifest.json") and info.uri[len(output_uri) + 1 :].startswith(("plans/", "updates/")):
            _fix_manifest(storage, info.uri.removesuffix("/manifest.json"), sizes, uris)
    state = read_state(storage, f"{output_uri}/generations")
    if state.table is None:
        return
    prefix = f"{state.uri}/"
    below = {uri.removeprefix(prefix): size for uri, size in sizes.items() if uri.startswith(prefix)}
    paths = {uri.removeprefix(prefix) for uri in uris if uri.startswith(prefix)}
    fix_log(storage, state, users, below, paths)


def _fix_manifest(storage: Storage, folder: str, sizes: Mapping[str, int], rewritten: Iterable[str]) -> None:
    """A shard's entry is [id, requests, groups, bytes, hash]. The other counts stay those of the planning."""
    manifest = json.loads(storage.read_bytes(f"{folder}/manifest.json"))
    uris, is_changed = frozenset(rewritten), False
    for entry in manifest["shards"]:
        uri = f"{folder}/shards/{entry[0]}.parquet"
        if uri in sizes and (uri in uris or sizes[uri] != entry[3]):
            groups = storage.read_table(uri, ["group"])["group"]
            now = [len(groups), pc.count_distinct(groups).as_py(), sizes[uri]]
            is_changed |= now != entry[1:4]
            entry[1:4] = now
    if is_changed:
        storage.write_bytes(f"{folder}/manifest.json", json.dumps(manifest, ensure_ascii=False).encode())


def _place_of(output_uri: str, state: TableState, uri: str) -> str:
    """Where an object lies, in words."""
    parts = uri.removeprefix(f"{output_uri}/").split("/")
    if is_unfinished(parts[-1]):
        return "unfinished files"
    if parts[0] == "generations":
        if "_delta_log" in parts:
            return LOG
        return VISIBLE if state.path_of(uri) in state.active else OTHER_FILES
    if "dead_letters" in parts:
        return "dead letters"
    if is_failure(uri):
        return "notes of failures"
    return _PLACES.get(parts[0], "elsewhere")

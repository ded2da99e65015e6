"""The audit log: who ran what when with which ids, one small object an entry, each with the hash of the one before.

Entries lie under `{output}/audit/`, numbered from 0, and are put only if absent: of two writers at once one takes the
number, the other the next one. `head.json` beside them names the last entry that somebody saw, so that an end that was
cut off is missed; it may lag behind, never lead. Whoever can rewrite all of it, head and all, can forge it: keep the
hash that `jobs.audit` prints somewhere else, or lock the folder's objects against changes.

An entry holds ids and numbers only: no texts, user embeddings, secrets or ids of users.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime

from e2p_ray.commit.publish import PublishedVersion
from e2p_ray.commit.run import Run, map_ahead
from e2p_ray.errors import StorageError
from e2p_ray.storage import Storage

_HEAD = "head.json"
_FIRST = "0" * 64  # the hash before the first entry
_ENTRY = re.compile(r"(\d{8})\.json")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
_PLAIN = re.compile(r"[0-9A-Za-z][0-9A-Za-z@._/+-]{0,159}")
_MAX_TRIES = 1000  # numbers that others take while we look for a free one


@dataclass(frozen=True)
class Entry:
    """One line of the log."""

    number: int
    at: str  # UTC
    who: str  # the operating system's name of the user, and the machine
    action: str
    ids: Mapping[str, str | int]
    previous: str  # sha256 of the entry before

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True).encode()


@dataclass(frozen=True)
class Problem:
    """What is wrong with the log, and at which entry."""

    number: int
    kind: str  # changed | removed | inserted
    detail: str

    def __str__(self) -> str:
        return f"entry {self.number} was {self.kind}: {self.detail}"


@dataclass(frozen=True)
class AuditLog:
    """The log as it was read: its entries in order, its last hash, and what is wrong with it."""

    entries: tuple[Entry, ...]
    head: str
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class _Head:
    number: int
    digest: str


def record(storage: Storage, output_uri: str, action: str, ids: Mapping[str, str | int]) -> Entry:
    """Append one entry. What does not look like an id is recorded as its hash.

    Raises StorageError when the log cannot be written, after whatever it is about was done.
    """
    assert _NAME.fullmatch(action), f"{action!r} is no name of an action"
    assert all(_NAME.fullmatch(name) for name in ids), f"{sorted(ids)} are no names of ids"
    folder = _folder(output_uri)
    head = _last(storage, folder)
    values = {name: _plain(value) for name, value in ids.items()}
    for _ in range(_MAX_TRIES):
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        entry = Entry(head.number + 1, now, _who(), action, values, head.digest)
        data = entry.to_bytes()
        if storage.put_if_absent(_uri(folder, entry.number), data):
            _write_head(storage, folder, _Head(entry.number, _digest(data)))
            return entry
        head = _Head(entry.number, _digest(storage.read_bytes(_uri(folder, entry.number))))
    raise StorageError(f"{folder}: no free number for an audit entry after {_MAX_TRIES} tries. Look who writes there")


def verify_log(storage: Storage, output_uri: str, known: str | None = None) -> AuditLog:
    """Read the whole log and find every entry that was changed, removed or put in between.

    `known` is a hash that was noted down earlier: of the log's last entry then.
    """
    folder = _folder(output_uri)
    head, names = _look(storage, folder)
    if head is None and _HEAD in names:
        head, names = _look(storage, folder)  # the first entry came just then
    numbers = _numbers(names)
    blobs = dict(zip(numbers, map_ahead(lambda n: storage.read_bytes(_uri(folder, n)), numbers), strict=True))
    last = max([*numbers, head.number if head else -1])
    foreign = [name for name in names if not (_ENTRY.fullmatch(name) or name == _HEAD)]
    problems = [Problem(last + 1, "inserted", f"{folder}/{name} is no entry") for name in foreign]
    entries, previous = list[Entry](), _FIRST
    for number in range(last + 1):
        noted = _noted(blobs.get(number + 1))
        if noted is None and head is not None and head.number == number:
            noted = head.digest
        entry = _parsed(blobs[number], number) if number in blobs else None
        if entry is not None:
            entries.append(entry)
        digest = _digest(blobs[number]) if number in blobs else ""
        if problem := _problem(number, number in blobs, entry, digest, previous, noted):
            problems.append(problem)
        previous = noted or digest  # the next entry is not at fault for this one
    if numbers and head is None:
        problems.append(Problem(last + 1, "removed", f"{folder}/{_HEAD} is missing: later entries may be as well"))
    if known not in (None, _FIRST, *(_digest(data) for data in blobs.values())):
        kind = "changed" if numbers else "removed"
        problems.append(Problem(max(last, 0), kind, f"no entry has the known hash {known}"))
    return AuditLog(tuple(entries), previous, tuple(problems))


def _problem(
    number: int, is_there: bool, entry: Entry | None, digest: str, previous: str, noted: str | None
) -> Problem | None:
    """What is wrong with one entry; `noted` is the hash that the one after it, or the head, has of it."""
    if not is_there:
        return Problem(number, "removed", "its object is missing")
    if entry is None:
        return Problem(number, "changed", "it is not what was written")
    if noted is not None and noted != digest:
        if noted == entry.previous:
            return Problem(number, "inserted", "the entry after it follows the one before it")
        return Problem(number, "changed", "its hash is not the one that was noted of it")
    if entry.previous != previous:
        return Problem(number, "inserted", "it does not follow the entry before it")
    return None


def published_ids(run: Run, version: PublishedVersion) -> dict[str, str | int]:
    """What the log says of a publish."""
    return {
        "version": version.version,
        "run_id": run.run_id,
        "source_id": run.source_id,
        "projector_id": run.projector_id,
        "base_model_id": run.base_model_id,
        "num_rows": version.num_rows,
    }


def _folder(output_uri: str) -> str:
    return f"{output_uri.rstrip('/')}/audit"


def _uri(folder: str, number: int) -> str:
    return f"{folder}/{number:08d}.json"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _plain(value: str | int) -> str | int:
    """Numbers and what looks like an id, as they are; of everything else a hash, so that no text can come in."""
    if isinstance(value, int) or value == "" or _PLAIN.fullmatch(value):
        return value
    return f"sha256-{_digest(value.encode())[:16]}"


def _who() -> str:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = f"uid-{os.getuid()}"  # a container's user often has no name
    return f"{name}@{socket.gethostname()}"


def _last(storage: Storage, folder: str) -> _Head:
    """The last entry that is known of: appending goes on from there, also where entries were removed."""
    if (head := _read_head(storage, folder)) is not None:
        return head
    numbers = _numbers(info.name for info in storage.list_objects(folder))
    if not numbers:
        # Before the first entry, so that a writer killed after it does not look like somebody who removed the head.
        _write_head(storage, folder, start := _Head(-1, _FIRST))
        return start
    return _Head(numbers[-1], _digest(storage.read_bytes(_uri(folder, numbers[-1]))))


def _look(storage: Storage, folder: str) -> tuple[_Head | None, list[str]]:
    """The head first: a job may record meanwhile, and no head may name an entry that was not listed yet."""
    head = _read_head(storage, folder)
    return head, [info.name for info in storage.list_objects(folder)]


def _numbers(names: Iterable[str]) -> list[int]:
    """Those of the entries among these objects, in order."""
    return sorted(int(found[1]) for name in names if (found := _ENTRY.fullmatch(name)))


def _read_head(storage: Storage, folder: str) -> _Head | None:
    uri = f"{folder}/{_HEAD}"
    if not storage.exists(uri):
        return None
    try:
        return _Head(**json.loads(storage.read_bytes(uri)))
    except (ValueError, TypeError):
        return None


def _write_head(storage: Storage, folder: str, head: _Head) -> None:
    storage.write_bytes(f"{folder}/{_HEAD}", json.dumps(asdict(head)).encode())


def _parsed(data: bytes, number: int) -> Entry | None:
    """An entry from its bytes; None unless they are exactly those of an entry with this number."""
    try:
        values = json.loads(data)
        entry = Entry(**{field.name: values[field.name] for field in fields(Entry)})
        return entry if entry.number == number and entry.to_bytes() == data else None
    except (ValueError, TypeError, KeyError):
        return None


def _noted(following: bytes | None) -> str | None:
    """The hash that an entry says the one before it has."""
    if following is None:
        return None
    try:
        return str(json.loads(following)["previous"])
    except (ValueError, TypeError, KeyError):
        return None

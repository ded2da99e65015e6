"""Base models from S3 on the disk of a node: downloaded once, whoever asks, and never used when damaged.

A folder is named by what lies on S3 (names, sizes, ETags): another model there is another folder here. Beside it lie a
lock, which ends with the process that holds it, and, written last, a record of every file's sha256.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from e2p_ray.errors import ConfigError, ObjectNotFoundError, StorageError
from e2p_ray.storage import ObjectInfo, Storage


@dataclass(frozen=True, slots=True)
class HashedFolder:
    """A folder of this machine and the sha256 of each of its files, by relative name."""

    path: Path
    digests: Mapping[str, bytes]


def cached_folder(storage: Storage, uri: str, cache_folder: str | None) -> HashedFolder:
    """An s3:// folder on this machine; one process of all downloads it, the others wait and then use it.

    Reads every file once, to compare it with the record: a file that was cut or changed has the folder fetched again.
    Raises ObjectNotFoundError for an empty folder, StorageError when it cannot be read or the disk is full.
    """
    found = {_name(info, uri): info for info in storage.list_objects(uri)}
    if not found:
        raise ObjectNotFoundError(f"there is no object below {uri}")
    root = _root(cache_folder)
    path = root / f"{uri.rstrip('/').rpartition('/')[2]}-{_version(uri, found)}"
    if whole := _checked(path, found):
        return whole
    with _locked(path.with_name(f"{path.name}.lock")):
        whole = _checked(path, found)  # fetched while we waited
        if whole is None:
            _fetch(storage, found, path)
            whole = _checked(path, found)
    if whole is None:
        raise StorageError(f"{path}: is not what was written there a moment ago. Look at this disk")
    return whole


def hashed(folder: Path, names: Sequence[str]) -> HashedFolder:
    """These files of a folder of this machine; about 1 GB/s."""
    digests = {}
    for name in names:
        with (folder / name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").digest()
    return HashedFolder(folder, digests)


def _root(cache_folder: str | None) -> Path:
    """The cache, for this user alone: who may write there chooses the model."""
    root = Path(cache_folder or Path(tempfile.gettempdir(), f"e2p_ray-models-{os.getuid()}"))
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(
            f"{root}: no folder can be made here ({error.strerror}). Set base_model.cache_folder"
        ) from error
    # A link in a folder that all may write to can be another user's, wherever it leads; one that was named is meant.
    owners = {root.stat().st_uid, root.stat(follow_symlinks=cache_folder is not None).st_uid}
    if owners != {os.getuid()}:
        raise ConfigError(f"{root}: belongs to another user, who could change models. Set base_model.cache_folder")
    return root


def _name(info: ObjectInfo, uri: str) -> str:
    name = PurePosixPath(info.uri[len(uri.rstrip("/")) + 1 :])
    if name.is_absolute() or ".." in name.parts:
        raise StorageError(f"{info.uri}: a name that leads out of its folder is not downloaded")
    return str(name)


def _version(uri: str, found: Mapping[str, ObjectInfo]) -> str:
    parts = [uri, *((name, info.size_bytes, info.version) for name, info in sorted(found.items()))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _checked(path: Path, found: Mapping[str, ObjectInfo]) -> HashedFolder | None:
    """The folder as it is on this disk; None when it is not whole."""
    try:
        recorded = json.loads(_record(path).read_bytes())
        if any((path / name).stat().st_size != info.size_bytes for name, info in found.items()):
            return None
        folder = hashed(path, sorted(found))
    except (FileNotFoundError, ValueError):
        return None
    is_whole = recorded == {name: digest.hex() for name, digest in folder.digests.items()}
    return folder if is_whole else None


def _fetch(storage: Storage, found: Mapping[str, ObjectInfo], path: Path) -> None:
    """Every file anew, each replaced in one step: who loads an older one meanwhile goes on with it."""
    _record(path).unlink(missing_ok=True)
    with _disk_errors(path, sum(info.size_bytes for info in found.values())):
        for name, info in found.items():
            storage.download(info, path / name)
        for file in path.rglob("*"):  # what a killed process left
            if file.is_file() and file.relative_to(path).as_posix() not in found:
                file.unlink()
        digests = hashed(path, sorted(found)).digests
        record = json.dumps({name: digest.hex() for name, digest in digests.items()})
        storage.write_bytes(str(_record(path)), record.encode())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        file = path.open("wb")
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}. Make room, or set base_model.cache_folder") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _disk_errors(path: Path, num_bytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"{path}: {error.strerror or error}") from error
        with suppress(OSError):  # the rest of a model is of no use
            for file in path.rglob("*"):
                if file.is_file():
                    file.unlink()
        raise StorageError(
            f"{path}: the disk is full; the base model takes {num_bytes:,} bytes. Make room, or set "
            "base_model.cache_folder to a larger disk"
        ) from error

"""Objects as files: a file is there in full or not at all, also after a kill or a power cut."""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from e2p_ray.errors import AccessDeniedError, ObjectNotFoundError, StorageError
from e2p_ray.storage.objects import DatedObject, ObjectInfo, changed_error

_FULL = (errno.ENOSPC, errno.EDQUOT)
# What a killed writer leaves behind: one of ours, and one of Delta's log.
_UNFINISHED = re.compile(r"^\..*\.[0-9a-f]{32}\.tmp$|^(\d{20}\..*|_last_checkpoint)#\d+$")


def local_path(uri: str) -> Path:
    """The path of a local URI, with or without file://."""
    return Path(uri.removeprefix("file://"))


def temp_path(path: Path) -> Path:
    """A name beside `path` that no listing shows."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def is_unfinished(name: str) -> bool:
    """Whether a file of this name is what a killed writer left behind, or a writer is at."""
    return _UNFINISHED.match(name) is not None


def refuse_links_out(folder: Path, root: Path) -> None:
    """StorageError for a link below a folder that leads out of `root`; only inputs are listed through links."""
    for parent, folders, names in os.walk(folder, onerror=_refuse_unlisted):
        for path in (Path(parent, name) for name in (*folders, *names)):
            if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
                raise StorageError(
                    f"{path}: a link that leads out of {root} is not followed. Put the file itself there"
                )


class LocalPlace:
    """Files of this machine, or of a file system that all machines mount; it needs rename and hard links."""

    def read(self, uri: str) -> bytes:
        with _errors(uri):
            return local_path(uri).read_bytes()

    def read_range(self, info: ObjectInfo, start: int, num_bytes: int) -> bytes:
        with _errors(info.uri), local_path(info.uri).open("rb") as file:
            if str(os.fstat(file.fileno()).st_mtime_ns) != info.version:
                raise changed_error(info.uri)
            file.seek(start)
            data = file.read(num_bytes)
        if len(data) != num_bytes:
            raise changed_error(info.uri)
        return data

    def put(self, uri: str, data: bytes) -> None:
        path = local_path(uri)
        with _errors(uri), _written_beside(path, data) as temp:
            os.replace(temp, path)
            _sync_folder(path.parent)

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        path = local_path(uri)
        with _errors(uri), _written_beside(path, data) as temp:
            try:
                os.link(temp, path)  # unlike rename, fails when the name is taken
            except FileExistsError:
                return False
            _sync_folder(path.parent)
        return True

    def info(self, uri: str) -> ObjectInfo | None:
        with _errors(uri):
            path = local_path(uri)
            return _info(uri, path) if path.is_file() else None

    def delete(self, uri: str) -> None:
        with _errors(uri):
            local_path(uri).unlink(missing_ok=True)

    def list_below(self, uri: str, *, through_links: bool = False) -> list[ObjectInfo]:
        return [found.info for found in _walk(uri, lambda name: not is_unfinished(name), through_links=through_links)]

    def list_dated(self, uri: str) -> list[DatedObject]:
        return _walk(uri, lambda _: True)


def _info(uri: str, path: Path) -> ObjectInfo:
    return _dated(uri, path).info


def _dated(uri: str, path: Path) -> DatedObject:
    stat = path.stat()
    return DatedObject(ObjectInfo(uri, stat.st_size, str(stat.st_mtime_ns)), stat.st_mtime)


def _walk(uri: str, is_wanted: Callable[[str], bool], *, through_links: bool = False) -> list[DatedObject]:
    folder, found = local_path(uri), []
    # Folders behind links come after all others, each folder once: a loop ends, and files keep their own place's name.
    tops, seen = [folder], set[tuple[int, int]]()
    for top in tops:
        for parent, folders, names in os.walk(top, onerror=_refuse_unlisted):
            if through_links and not _is_new(parent, seen):
                folders.clear()
                continue
            if through_links:
                tops += [path for path in (Path(parent, name) for name in sorted(folders)) if path.is_symlink()]
            for path in (Path(parent, name) for name in names if is_wanted(name)):
                with _errors(str(path)), suppress(FileNotFoundError):  # a writer's, finished or removed meanwhile
                    if through_links and path.is_symlink() and not path.exists():
                        raise StorageError(f"{path}: this link leads nowhere. Mend it or take it out of {uri}")
                    found.append(_dated(f"{uri}/{path.relative_to(folder).as_posix()}", path))
    return sorted(found)


def _is_new(folder: str, seen: set[tuple[int, int]]) -> bool:
    with _errors(folder):
        stat = os.stat(folder)
    is_new = (stat.st_dev, stat.st_ino) not in seen
    seen.add((stat.st_dev, stat.st_ino))
    return is_new


def _refuse_unlisted(error: OSError) -> None:
    """A folder that cannot be listed is not an empty one; what is gone, or is a file, has nothing below it."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        with _errors(str(error.filename)):
            raise error


@contextmanager
def _written_beside(path: Path, data: bytes) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = temp_path(path)
    try:
        with temp.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temp
    finally:
        temp.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _errors(uri: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ObjectNotFoundError(f"there is no object {uri}") from error
    except PermissionError as error:
        if error.errno == errno.EPERM and error.filename2 is not None:
            raise StorageError(f"{uri}: this file system has no hard links; use another, or s3://") from error
        raise AccessDeniedError(f"{uri}: permission denied. Give this user access to it.") from error
    except OSError as error:
        remedy = ". Make room there and run the same command again" if error.errno in _FULL else ""
        raise StorageError(f"{uri}: {error.strerror or error}{remedy}") from error

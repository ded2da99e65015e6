"""What a place for objects can do, and the words both kinds share."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from e2p_ray.errors import StorageError


class PassingError(Exception):
    """Worth another try; `wait_s` is what the server asked for."""

    def __init__(self, problem: str, wait_s: float = 0.0) -> None:
        super().__init__(problem)
        self.wait_s = wait_s


class ObjectInfo(NamedTuple):
    """One object: `version` changes when its bytes do (the S3 ETag, or a local file's mtime in ns)."""

    uri: str
    size_bytes: int
    version: str

    @property
    def name(self) -> str:
        """The last part of its URI."""
        return self.uri.rpartition("/")[2]


class DatedObject(NamedTuple):
    """One object and when it was written, in seconds since 1970 by the clock of the place."""

    info: ObjectInfo
    modified_s: float


class Place(Protocol):
    """Whole objects by URI; every method raises StorageError or one of its kinds."""

    def read(self, uri: str) -> bytes: ...

    def read_range(self, info: ObjectInfo, start: int, num_bytes: int) -> bytes:
        """Bytes [start, start + num_bytes), all of them within the object as it was listed."""

    def put(self, uri: str, data: bytes) -> None: ...

    def put_if_absent(self, uri: str, data: bytes) -> bool: ...

    def info(self, uri: str) -> ObjectInfo | None: ...

    def delete(self, uri: str) -> None: ...

    def list_below(self, uri: str, *, through_links: bool = False) -> list[ObjectInfo]:
        """Every object below a folder, sorted by URI; with `through_links`, also in linked folders, each folder once.

        StorageError for a folder that cannot be listed and, with `through_links`, for a link that leads nowhere.
        """

    def list_dated(self, uri: str) -> list[DatedObject]:
        """The same with their times, and with what killed writers left behind, which no other listing shows."""


def changed_error(uri: str) -> StorageError:
    """The object is no longer the one that was listed."""
    return StorageError(f"{uri} was replaced while it was being read. Run again once nothing writes there.")

"""Where things are: what a configuration may name, and what is said of what it may not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")


def _supported(uri: str, schemes: tuple[str, ...], instead: str) -> str:
    if uri != uri.strip():
        raise ValueError("begins or ends with a blank")
    scheme = _SCHEME.match(uri)
    if scheme and scheme[1] not in schemes:
        raise ValueError(f"unknown scheme {scheme[1]!r}: give {instead}")
    if uri.startswith("s3:") and not re.match("s3://[^/]", uri):
        raise ValueError("not s3://bucket/...")
    return uri


def _storage_uri(uri: str) -> str:
    uri = _supported(uri, ("s3", "file"), "a local path or s3://bucket/...")
    uri = uri.rstrip("/")
    return "/" if uri in ("", "file:") else uri


def _same_for_delta(uri: str) -> str:
    """Readers of Delta tables take a local path for a URL, too: what means something there would lead elsewhere.

    Below `#` and `?` they find a table but no history of it, and nothing at all below `[`, `]`, `^`, `|`.
    """
    found = re.search(r"%[0-9A-Fa-f]{2}|[\\#?\[\]^|\x00-\x1f]", uri)
    if found is not None:
        raise ValueError(f"Delta Lake would look elsewhere because of {found[0]!r}; name the place without it")
    return uri


def _model_uri(uri: str) -> str:
    return _supported(uri, ("s3",), "a local folder, s3://bucket/... or a hub id")


def _http_url(url: str) -> str:
    if not re.match("https?://[^/]", url):
        raise ValueError("not http://HOST:PORT or https://HOST; leave it out for AWS")
    return url


def absolute(uri: str) -> str:
    """The same place for a process that has another working folder."""
    return uri if uri.startswith("s3://") else str(Path(uri.removeprefix("file://")).absolute())


Uri = Annotated[str, Field(min_length=1), AfterValidator(_storage_uri)]
DeltaUri = Annotated[Uri, AfterValidator(_same_for_delta)]  # of a folder with Delta tables
ModelUri = Annotated[str, Field(min_length=1), AfterValidator(_model_uri)]
HttpUrl = Annotated[str, AfterValidator(_http_url)]

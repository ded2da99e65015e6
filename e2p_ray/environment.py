"""The environment: variables that it has for a while, and whether it names a Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_LOCAL = "local"  # Ray's word for one that is started here, whatever there is


@contextmanager
def variables_set(variables: Mapping[str, str], *, replace: bool) -> Iterator[None]:
    """Within, the environment has these, in place of what it says already or only where it says nothing.

    Processes that are started within keep them.
    """
    before = {name: os.environ.get(name) for name in variables if replace or name not in os.environ}
    os.environ.update({name: variables[name] for name in before})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def names_no_cluster(address: str | None) -> bool:
    """Whether neither a configuration nor the environment names a Ray, or it is `local`: a job starts its own then."""
    return _named(address) in (None, _LOCAL)


def finds_ray(address: str | None) -> bool:
    """Whether a job finds a Ray although none is named, as `ray start` has left one; Ray itself is not imported."""
    folder = os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp"))
    return _named(address) is None and Path(folder, "ray", "ray_current_cluster").exists()


def _named(address: str | None) -> str | None:
    return address if address is not None else os.environ.get("RAY_ADDRESS") or None

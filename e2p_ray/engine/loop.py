"""What makes a function a compiled loop: without Python's lock, and kept compiled between processes.

Loops that are run on several threads take one array of int64: how many tasks there are, the address of the counter by
which a thread takes its next one, and what the loop's own call says (`torch_threads.run`). Tensors come by address.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba import config, njit

# Loops, and what they take constants from.
_SOURCES = (
    *("loop.py", "compiled.py", "panels.py", "llvm.py", "vectors.py", "tiles.py", "either.py"),
    *("flash.py", "own_keys.py", "products.py", "row_norms.py", "turns.py", "likeliest.py", "draws.py", "calls.py"),
)


def loop(function: Callable[..., Any]) -> Any:
    """Compile at the first call, or take what an earlier process compiled for this CPU."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    folder = _cache_folder()
    if folder is None:
        return njit(**options)(function)
    before = config.CACHE_DIR  # what else uses numba in this process keeps its own
    config.CACHE_DIR = str(folder)
    try:
        return njit(cache=True, **options)(function)
    finally:
        config.CACHE_DIR = before


@cache
def _cache_folder() -> Path | None:
    """The user's own cache, where one can be written: what lies there is run.

    By what all sources hold: numba itself looks at a function's own file only, and not at those it calls into.
    """
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    try:
        given = config.CACHE_DIR or os.environ.get("XDG_CACHE_HOME")
        folder = (Path(given) if given else Path.home() / ".cache") / "e2p_ray" / digest.hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or it is read-only
        return None
    return folder if os.access(folder, os.W_OK) else None

"""Compiled loops of our own: whether this machine can run them, and when they are compiled."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

LANES = 16  # float32 of a vector: heads, and what is normed, have to be a multiple
DTYPES = (torch.float32, torch.bfloat16)


@cache
def has_loops() -> bool:
    """Whether numba is installed and this CPU has the registers; nothing is imported before somebody asks."""
    if importlib.util.find_spec("numba") is None:
        return False
    from e2p_ray.engine.llvm import has_vectors

    return has_vectors()


def prepare() -> None:
    """Compile the loops, 12 s of CPU time where numba's cache does not have them: before anybody waits for a text."""
    if has_loops():
        from e2p_ray.engine.calls import KINDS, run_calls
        from e2p_ray.engine.draws import draw_tokens

        for loop in (*KINDS, draw_tokens):
            loop.compile("void(int64[::1])")
        run_calls.compile("void(int64[:, ::1])")

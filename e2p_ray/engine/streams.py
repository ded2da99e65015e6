"""One counter-based random stream a request.

The number drawn for a request at a step is a function of (seed, request, attempt, step) and of nothing else, so that a
text does not depend on its neighbours, their order, a retry or the number of workers. Philox4x32-10 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from e2p_ray.schema import RequestKey

_UInt32 = npt.NDArray[np.uint64]  # 32-bit words kept in 64 bits, so that products do not overflow
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(counter: Sequence[_UInt32], key: Sequence[_UInt32]) -> tuple[_UInt32, _UInt32, _UInt32, _UInt32]:
    """Philox4x32 with ten rounds: four counter words and two key words, each (n,), to four random words (n,)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _MASK, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def stream_key(key: RequestKey, seed: int, attempt: int) -> int:
    """The 64-bit name of a request's random stream."""
    text = "\x1f".join((*key, str(seed), str(attempt)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def uniforms(streams: npt.NDArray[np.uint64], steps: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each (stream, step), both (n,)."""
    zero = np.zeros_like(streams)
    words = philox((steps.astype(np.uint64), zero, zero, zero), (streams & _MASK, streams >> _SHIFT))
    return ((words[0] << np.uint64(21)) ^ (words[1] >> np.uint64(11))).astype(np.float64) * 2.0**-53

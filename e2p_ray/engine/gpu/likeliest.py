"""The likeliest tokens behind logits on a GPU, and what their log-probabilities need: the logits are read once."""

from __future__ import annotations

import torch
from torch import Tensor

from e2p_ray.engine.gpu.row_kernels import find_likeliest
from e2p_ray.engine.greedy import Likeliest

_BLOCK = 4096


def likeliest_of(logits: Tensor) -> Likeliest:
    """Of contiguous logits (n, V)."""
    num_rows, width = logits.shape
    found = Likeliest(
        torch.empty(num_rows, dtype=torch.int64, device=logits.device),
        *(torch.empty(num_rows, dtype=torch.float32, device=logits.device) for _ in range(2)),
    )
    if num_rows:
        grid = (num_rows,)
        find_likeliest[grid](logits, found.tokens, found.logits, found.sums, WIDTH=width, BLOCK=_BLOCK, num_warps=8)
    return found

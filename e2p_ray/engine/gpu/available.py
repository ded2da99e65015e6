"""Whether this machine runs the Triton kernels."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

# bfloat16 in the matrix units, and copies to shared memory that run beside them: from Ampere on.
_LEAST_CAPABILITY = (8, 0)


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether Triton is there, which comes with torch's builds for GPUs, and the GPU is not older than it likes."""
    if device.type != "cuda" or torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY

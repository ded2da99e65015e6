"""Whether this machine runs the Triton kernels."""

from __future__ import annotations

import importlib.util
import subprocess
import warnings
from functools import cache

import torch

# bfloat16 in the matrix units, and copies to shared memory that run beside them: from Ampere on.
_LEAST_CAPABILITY = (8, 0)


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether Triton is there, which comes with torch's builds for GPUs, and works on this one, which one kernel shows.

    Warns where it is there and does not work: texts are the same then, and take several times as long.
    """
    if device.type != "cuda" or torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    if torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return False
    try:
        from triton.errors import TritonError

        try:
            _try_one(device)
        except TritonError as error:  # such as the bundled assembler's, for a GPU that is newer
            raise RuntimeError(str(error) or type(error).__name__) from error
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        warnings.warn(
            f"Triton's kernels do not work here ({str(error) or type(error).__name__}); transformers' layers are used, "
            "which take several times as long. Triton needs a C compiler and Python's headers: on Debian, apt-get "
            "install gcc libc6-dev python3-dev",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _try_one(device: torch.device) -> None:
    from e2p_ray.engine.gpu.likeliest import likeliest_of

    likeliest_of(torch.zeros(1, 8, device=device)).tokens.cpu()

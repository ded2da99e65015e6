"""Numbers on their way to a device."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def sent(numbers: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """These as a tensor there. Nobody waits: a plain copy to a GPU begins and ends with all it has to do before."""
    return _pinned(numbers, device).to(device, non_blocking=True)


def send(numbers: npt.NDArray[np.generic], target: Tensor) -> None:
    """The same to where they belong."""
    target.copy_(_pinned(numbers, target.device), non_blocking=True)


def _pinned(numbers: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """In memory that a GPU copies from by itself, which torch gives to nobody else before it has."""
    given: Tensor = torch.from_numpy(numbers)
    return given.pin_memory() if device.type == "cuda" else given

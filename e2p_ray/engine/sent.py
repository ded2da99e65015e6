"""Numbers on their way to a device."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def sent(numbers: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """These as a tensor there. Nobody waits: a plain copy to a GPU begins and ends with all that it has to do before.

    Through pinned memory, which torch keeps and gives to nobody else before the copy is made.
    """
    given: Tensor = torch.from_numpy(numbers)
    return given.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else given.to(device)

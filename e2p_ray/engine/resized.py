"""An array with more room."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

_Number = TypeVar("_Number", bound=np.generic)


def resized(array: npt.NDArray[_Number], shape: tuple[int, ...]) -> npt.NDArray[_Number]:
    """The same values in an array of another shape, zeros where it is larger."""
    new = np.zeros(shape, array.dtype)
    both = tuple(slice(min(sizes)) for sizes in zip(array.shape, shape, strict=True))
    new[both] = array[both]
    return new

"""The calls of a pass through all layers, kept for the next one: most passes are the last one a token later."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class LayersTable:
    """A table of calls (`calls.py`), the numbers in it that differ between two passes, and the memory that it names.

    Views of rows: where the pass's rotations are, its states (which two calls of the first layer read), its normed
    states, and the most own tokens that a row has.
    Arrays (T,) that the calls read: which of its row's own tokens each is, and its place in bytes, place_bytes apart.
    """

    rows: _Ints
    turns: _Ints
    states: tuple[_Ints, _Ints]
    normed: _Ints
    max_own: _Ints
    at: _Ints
    places: _Ints
    place_bytes: int
    held: tuple[object, ...]

    def advanced(self) -> LayersTable:
        """Now of the next pass, where both have one token a row."""
        for numbers, more in ((self.max_own, 1), (self.at, 1), (self.places, self.place_bytes)):
            numbers += more
        return self

    def run(self, states: Tensor, turns: Tensor, normed: Tensor) -> None:
        """With contiguous states (T, d_model) and their rotations (T, 1, head_dim / 2), to normed states."""
        from e2p_ray.engine.torch_threads import run_table

        self.turns[:] = turns.data_ptr()
        for read in self.states:
            read[...] = states.data_ptr()
        self.normed[...] = normed.data_ptr()
        run_table(self.rows)

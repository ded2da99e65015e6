"""What a pass through the model costs by the tokens in it: weights to read, kernels to launch, Python, arithmetic."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import torch

from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.readers import Readers
from e2p_ray.engine.rows_step import RowsStep
from e2p_ray.engine.shared_prefix import SuffixSlots

# From where the reading of the weights hides all arithmetic to where it hides none.
_SIZES, _SIZES_OF_GPU = (1, 4, 16, 64), (1, 64, 256, 1024)
_NUM_REPEATS = 3
_STEPS_PER_DOUBLING = 4


@dataclass(frozen=True, slots=True)
class PassCost:
    """Costs of passes over so many tokens, in passes over one; straight lines between them and behind the last."""

    sizes: tuple[int, ...]
    costs: tuple[float, ...]

    def of(self, num_tokens: int) -> float:
        after = min(max(bisect_left(self.sizes, num_tokens), 1), len(self.sizes) - 1)
        (x0, x1), (y0, y1) = self.sizes[after - 1 : after + 1], self.costs[after - 1 : after + 1]
        return y0 + (y1 - y0) * (num_tokens - x0) / (x1 - x0)

    @classmethod
    def of_seconds(cls, sizes: tuple[int, ...], seconds: tuple[float, ...]) -> PassCost:
        """Rounded, so that one machine's measurements agree, and never falling."""
        costs, highest = [], 0
        for one in seconds:
            highest = max(highest, round(_STEPS_PER_DOUBLING * math.log2(one / seconds[0])))
            costs.append(2 ** (highest / _STEPS_PER_DOUBLING))
        return cls(sizes, tuple(costs))


@torch.inference_mode()
def measure_pass_cost(base: BaseModel) -> PassCost:
    """By passes of one token a row: 0.4 s of a 30 M model on one core."""
    sizes = _SIZES if base.device.type == "cpu" else _SIZES_OF_GPU
    slots = base.slots(sizes[-1], 1)
    return PassCost.of_seconds(sizes, tuple(_seconds(base, slots, size) for size in sizes))


def _seconds(base: BaseModel, slots: SuffixSlots, num_rows: int) -> float:
    """The fastest of a few passes of one token a row."""
    readers = Readers.of([None] * num_rows, [0] * num_rows)
    nothing, single = np.zeros(num_rows, np.int64), np.ones(num_rows, np.int64)
    embeds = base.embed(torch.zeros(1, num_rows, dtype=torch.long, device=base.device))
    found = []
    for _ in range(_NUM_REPEATS + 1):  # the first one warms up
        _wait(base.device)
        start = time.perf_counter()
        step = RowsStep(slots, 0, nothing, single, readers)
        base.logits(base.hidden(embeds, step.position_ids, step)[0]).argmax(-1)
        _wait(base.device)
        found.append(time.perf_counter() - start)
    return min(found[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

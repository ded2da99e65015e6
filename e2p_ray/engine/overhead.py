"""What a pass through the model costs besides the tokens in it: weights to read, kernels to launch, Python."""

from __future__ import annotations

import math
import time

import numpy as np
import torch

from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.readers import Readers
from e2p_ray.engine.rows_step import RowsStep
from e2p_ray.engine.shared_prefix import SuffixSlots

_MANY, _MANY_OF_GPU = 64, 1024  # beyond what the reading of the weights hides: 64 tokens take a GPU as long as one
_NUM_REPEATS = 3
_MAX_POWER = 10


@torch.inference_mode()
def measure_overhead_tokens(base: BaseModel) -> int:
    """In tokens, as a power of two, so that one machine's measurements agree: passes of one row and of many."""
    num_many = _MANY if base.device.type == "cpu" else _MANY_OF_GPU
    slots = base.slots(num_many, 1)
    one, many = _seconds(base, slots, 1), _seconds(base, slots, num_many)
    return rounded_overhead(one, many, num_many)


def rounded_overhead(seconds_of_one: float, seconds_of_many: float, num_many: int) -> int:
    """From the seconds of a pass with one token and of one with num_many."""
    per_token = max((seconds_of_many - seconds_of_one) / (num_many - 1), 1e-9)
    overhead = max(seconds_of_one / per_token - 1, 1.0)
    return int(2 ** min(round(math.log2(overhead)), _MAX_POWER))


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

"""Tokens of rows that take the likeliest one, on a CPU: the vocabulary's product and the search in it, compiled.

The logits of some rows are made and used up before the next ones', all in one call, and no memory is new: by torch and
numpy 1.3 ms of 11.8 for 512 rows of 8,192 on two cores were neither of the two (2026-11-23).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from e2p_ray.engine.packed import PackedLinear
from e2p_ray.engine.panels import Behind, Panels
from e2p_ray.engine.workspace import Workspace

if TYPE_CHECKING:
    from e2p_ray.engine.torch_threads import Call


@dataclass(frozen=True, slots=True, eq=False)
class Likeliest:
    """Of n rows the likeliest tokens (n,), their logits (n,), and sums (n,) over all tokens of exp(logit - that).

    The first one of equals; a sum is no number where a row has NaN or +Inf, or nothing above -Inf.
    """

    tokens: Tensor
    logits: Tensor
    sums: Tensor

    @classmethod
    def empty(cls, num_rows: int) -> Likeliest:
        """To be filled in by calls."""
        return cls(torch.empty(num_rows, dtype=torch.int64), torch.empty(num_rows), torch.empty(num_rows))

    def call(self, logits: Tensor, first: int = 0) -> Call:
        """The compiled loop that finds those of contiguous logits (m, V), which are the rows' from `first` on."""
        from e2p_ray.engine import likeliest

        num_rows, width = logits.shape
        call = likeliest.LikeliestCall(
            numbers=logits.data_ptr(),
            num_rows=num_rows,
            width=width,
            tokens=self.tokens[first:].data_ptr(),
            tops=self.logits[first:].data_ptr(),
            sums=self.sums[first:].data_ptr(),
            is_half=int(logits.dtype is torch.bfloat16),
        )
        return likeliest.find_likeliest, -(-num_rows // likeliest.TASK_ROWS), call


class GreedyHead:
    """A packed output layer, and the likeliest tokens behind hidden states."""

    def __init__(self, head: PackedLinear, panels: Panels) -> None:
        self._head, self._panels = head, panels
        self._workspace = Workspace()

    @classmethod
    def of(cls, head: torch.nn.Module) -> GreedyHead | None:
        """None where the compiled loops do not have its product."""
        if not isinstance(head, PackedLinear) or head.panels is None:
            return None
        return cls(head, head.panels)

    def takes(self, hidden: Tensor) -> bool:
        """Whether these are for the loops: there are some, and no plain weight is faster."""
        return len(hidden) > 0 and not self._head.takes_plain(hidden)

    def __call__(self, hidden: Tensor, max_rows: int) -> Likeliest:
        """Of contiguous hidden states (n, d_model); max_rows: whose logits are there at once."""
        from e2p_ray.engine.torch_threads import run_all

        found, num_rows = Likeliest.empty(len(hidden)), min(max_rows, len(hidden))
        logits = self._workspace.tensor("logits", num_rows, self._panels.num_outputs, dtype=hidden.dtype)
        hidden = hidden.to(self._panels.input_dtype)
        calls: list[Call] = []
        for first in range(0, len(hidden), num_rows):
            some = hidden[first : first + num_rows]
            of_some = logits[: len(some)]
            calls += [self._panels.call(some, self._head.bias, Behind.NOTHING, of_some), found.call(of_some, first)]
        run_all(calls)
        return found

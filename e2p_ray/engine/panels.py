"""A frozen weight in panels, and its products by the compiled loops of `products`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from e2p_ray.engine.compiled import has_loops

if TYPE_CHECKING:
    from e2p_ray.engine.torch_threads import Call

_WORDS = {torch.float32: 1, torch.bfloat16: 2}  # inputs that lie side by side in a word
_LINE_BYTES = 64  # of the cache: a panel's rows should not lie across two


class Behind(IntEnum):
    """What follows a product."""

    NOTHING = 0
    SILU = 1
    TIMES = 2
    PLUS = 3
    GATED = 4  # silu of it, times the product with a second weight


@dataclass(frozen=True, slots=True, eq=False)
class Panels:
    """A weight (num_outputs, num_inputs); the last panel begins where it ends with the outputs."""

    numbers: Tensor
    num_outputs: int
    num_inputs: int

    @classmethod
    def of(cls, weight: Tensor) -> Panels | None:
        """None for what the loops do not know, and on machines that do not have them."""
        if weight.dtype not in _WORDS or weight.device.type != "cpu" or not has_loops():
            return None
        from e2p_ray.engine.llvm import has_half_products
        from e2p_ray.engine.products import PANEL

        (num_outputs, num_inputs), beside = weight.shape, _WORDS[weight.dtype]
        if num_outputs < PANEL or num_inputs % beside or (beside > 1 and not has_half_products()):
            return None
        starts = [min(at, num_outputs - PANEL) for at in range(0, num_outputs, PANEL)]
        size = len(starts) * PANEL * num_inputs
        room = torch.empty(size + _LINE_BYTES // weight.itemsize, dtype=weight.dtype)
        skipped = -room.data_ptr() % _LINE_BYTES // weight.itemsize
        numbers = room[skipped : skipped + size]
        for panel, start in zip(numbers.view(len(starts), -1, PANEL, beside), starts, strict=True):
            panel.copy_(weight.detach()[start : start + PANEL].view(PANEL, -1, beside).transpose(0, 1))
        return cls(numbers, num_outputs, num_inputs)

    def product(
        self,
        states: Tensor,
        bias: Tensor | None,
        behind: Behind,
        *,
        others: Tensor | None = None,
        up: Panels | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """(..., num_inputs) to (..., num_outputs); `others` (..., num_outputs) or `up` where what follows needs it.

        out: contiguous, of the result's size, to hold it.
        """
        from e2p_ray.engine import torch_threads

        flat = states.reshape(-1, self.num_inputs)
        flat = flat if flat.stride(-1) == 1 else flat.contiguous()
        if out is None:
            out = torch.empty(*states.shape[:-1], self.num_outputs, dtype=self.numbers.dtype)
        beside = others.reshape(-1, self.num_outputs).contiguous() if others is not None else None
        torch_threads.run(*self.call(flat, bias, behind, out, others=beside, up=up))
        return out

    def call(
        self,
        states: Tensor,
        bias: Tensor | None,
        behind: Behind,
        out: Tensor,
        *,
        others: Tensor | None = None,
        up: Panels | None = None,
    ) -> Call:
        """The same of rows (n, num_inputs), to be run while all tensors are there; `others`, `out` are contiguous."""
        from e2p_ray.engine import products

        size = self.numbers.itemsize
        num_parts = -(-self.num_outputs // (products.PANEL * products.TASK_PANELS))
        call = products.ProductCall(
            states=states.data_ptr(),
            state_row=size * states.stride(0),
            num_rows=len(states),
            num_words=self.num_inputs // _WORDS[self.numbers.dtype],
            num_outputs=self.num_outputs,
            panels=self.numbers.data_ptr(),
            up_panels=up.numbers.data_ptr() if up is not None else 0,
            bias=bias.data_ptr() if bias is not None else 0,
            outputs=out.data_ptr(),
            output_row=size * self.num_outputs,
            others=others.data_ptr() if others is not None else 0,
            other_row=size * self.num_outputs,
            behind=behind,
            is_half=int(self.numbers.dtype is torch.bfloat16),
        )
        return products.multiply_panels, -(-len(states) // products.TASK_ROWS) * num_parts, call

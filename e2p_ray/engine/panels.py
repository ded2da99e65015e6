"""A frozen weight in panels, and its products by the compiled loops of `products`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from e2p_ray.engine.compiled import LANES, has_loops

if TYPE_CHECKING:
    from e2p_ray.engine.torch_threads import Call

_DTYPES = (torch.float32, torch.bfloat16)
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
    """A weight (num_outputs, num_inputs); the last panel begins where it ends with the outputs.

    input_dtype: of the states that it is multiplied with: float32 where this CPU does not multiply bfloat16.
    """

    numbers: Tensor
    num_outputs: int
    num_inputs: int
    input_dtype: torch.dtype

    @classmethod
    def of(cls, weight: Tensor) -> Panels | None:
        """None for what the loops do not know, and on machines that do not have them."""
        if weight.dtype not in _DTYPES or weight.device.type != "cpu" or not has_loops():
            return None
        from e2p_ray.engine.llvm import has_half_tiles
        from e2p_ray.engine.products import IS_WIDENED, PANEL

        (num_outputs, num_inputs), is_half = weight.shape, weight.dtype is torch.bfloat16
        are_pairs = is_half and not IS_WIDENED
        if num_outputs < PANEL or (are_pairs and num_inputs % 2) or (is_half and has_half_tiles()):
            return None
        starts = [min(at, num_outputs - PANEL) for at in range(0, num_outputs, PANEL)]
        size = len(starts) * PANEL * num_inputs
        room = torch.empty(size + _LINE_BYTES // weight.itemsize, dtype=weight.dtype)
        skipped = -room.data_ptr() % _LINE_BYTES // weight.itemsize
        numbers = room[skipped : skipped + size]
        for panel, start in zip(numbers.view(len(starts), -1), starts, strict=True):
            of_panel = weight.detach()[start : start + PANEL].t()
            if are_pairs:  # (pairs, outputs, inputs of a pair)
                of_panel = of_panel.view(-1, 2, PANEL).transpose(1, 2)
            elif is_half:  # (inputs, pairs of vectors, lanes, vectors of a pair)
                of_panel = of_panel.view(-1, PANEL // (2 * LANES), 2, LANES).transpose(2, 3)
            panel.view(of_panel.shape).copy_(of_panel)
        return cls(numbers, num_outputs, num_inputs, torch.float32 if is_half and IS_WIDENED else weight.dtype)

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

        flat = states.reshape(-1, self.num_inputs).to(self.input_dtype)
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
        """The same of rows (n, num_inputs), to be run while all tensors are there; `others`, `out` are contiguous.

        States are of `input_dtype`; outputs of float32 or the weight's dtype.
        """
        from e2p_ray.engine import products

        assert states.dtype is self.input_dtype
        size = self.numbers.itemsize
        num_parts = -(-self.num_outputs // (products.PANEL * products.TASK_PANELS))
        call = products.ProductCall(
            states=states.data_ptr(),
            state_row=states.itemsize * states.stride(0),
            num_rows=len(states),
            num_words=self.num_inputs * states.itemsize // 4,
            num_outputs=self.num_outputs,
            panels=self.numbers.data_ptr(),
            up_panels=up.numbers.data_ptr() if up is not None else 0,
            bias=bias.data_ptr() if bias is not None else 0,
            outputs=out.data_ptr(),
            output_row=out.itemsize * self.num_outputs,
            others=others.data_ptr() if others is not None else 0,
            other_row=size * self.num_outputs,
            behind=behind,
            is_half=int(self.numbers.dtype is torch.bfloat16),
            gives_half=int(out.dtype is torch.bfloat16),
        )
        return products.multiply_panels, -(-len(states) // products.TASK_ROWS) * num_parts, call

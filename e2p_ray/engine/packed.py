"""Linear layers in the layout that this CPU's matrix products like best, and gated MLPs without passes in between.

With AVX2 products are loops of our own (see `products`), but for bfloat16 with AMX; otherwise oneDNN's. It repacks a
weight on every call unless it is given a packed one (measured on an AVX-512 core, 512 x 1536: 1.8 times the speed at 8
rows, 1.3 at 32, 1.03 at 256 in fp32; 2.0, 1.8 and 1.3 in bf16 with AMX). Fusing activation and gate into the products
saves two passes over the widest activations (1.0 to 1.25 times the speed of a whole MLP, most at 512 rows and more).
torch has both operators under a private name: it is looked for, and nothing is lost without it. Weights that neither
takes are multiplied as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from e2p_ray.engine.compiled import has_loops
from e2p_ray.engine.panels import Behind, Panels
from e2p_ray.engine.workspace import Workspace

if TYPE_CHECKING:
    from e2p_ray.engine.torch_threads import Call

_DTYPES = (torch.float32, torch.bfloat16)
# Up to so many rows a packed product in fp32 waits for memory longer than a plain one (1,536 x 512 out of the
# third-level cache, packed and plain in us: 343 and 187 for 1 row, 373 and 177 for 3, 390 and 280 for 4, 414 and 389
# for 8; in bf16 packed is ahead from 1 row on).
FEW_ROWS = 4


@dataclass(frozen=True, slots=True)
class Activation:
    """A function behind a product: oneDNN's names for it, and torch's own."""

    name: str
    algorithm: str
    apply: Callable[[Tensor], Tensor]


_NONE = Activation("none", "", lambda output: output)
_SILU = Activation("swish", "", functional.silu)
_ACTIVATIONS = {
    "SiLUActivation": _SILU,
    "SiLU": _SILU,
    "GELUTanh": Activation("gelu", "tanh", partial(functional.gelu, approximate="tanh")),
}


class PackedLinear(nn.Module):
    """A frozen `nn.Linear` with its weight packed; without gradient. `keep_plain`: the plain one too, for few rows.

    input_dtype: of the states that it takes as they are; others it converts.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, keep_plain: bool = False) -> None:
        super().__init__()
        self.panels, self.packed = Panels.of(weight), None
        if self.panels is None and onednn_packs(weight.dtype):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self.bias = None if bias is None else bias.detach()
        self._is_plain = self.panels is None and self.packed is None
        is_kept = self._is_plain or (keep_plain and weight.dtype is torch.float32)
        self.plain = weight.detach() if is_kept else None
        self.input_dtype = self.panels.input_dtype if self.panels is not None else weight.dtype

    def forward(self, states: Tensor, out: Tensor | None = None) -> Tensor:
        """The product and the bias; `out`, here and below, is memory of the result's size that it may take."""
        return self.then(states, _NONE, out)

    def then(self, states: Tensor, activation: Activation, out: Tensor | None = None) -> Tensor:
        """The same with an activation behind it."""
        if (few := self._few(states)) is not None:
            return activation.apply(few)
        if self.panels is not None:
            if activation is _SILU:
                return self.panels.product(states, self.bias, Behind.SILU, out=out)
            return activation.apply(self.panels.product(states, self.bias, Behind.NOTHING, out=out))
        output: Tensor = torch.ops.mkldnn._linear_pointwise(
            states, self.packed, self.bias, activation.name, [], activation.algorithm
        )
        return output

    def times(self, states: Tensor, other: Tensor) -> Tensor:
        """The same, multiplied with `other`."""
        if (few := self._few(states)) is not None:
            return few.mul_(other)
        if self.panels is not None:
            return self.panels.product(states, self.bias, Behind.TIMES, others=other)
        output: Tensor = torch.ops.mkldnn._linear_pointwise.binary(states, other, self.packed, self.bias, "mul")
        return output

    def plus(self, states: Tensor, other: Tensor, out: Tensor | None = None) -> Tensor:
        """The same, added to `other`."""
        if (few := self._few(states)) is not None:
            return few.add_(other)
        if self.panels is not None:
            return self.panels.product(states, self.bias, Behind.PLUS, others=other, out=out)
        output: Tensor = torch.ops.mkldnn._linear_pointwise.binary(states, other, self.packed, self.bias, "add")
        return output

    def _few(self, states: Tensor) -> Tensor | None:
        """The product and the bias by the plain weight, where that is all there is, or faster."""
        if not self.takes_plain(states):
            return None
        assert self.plain is not None
        return functional.linear(states, self.plain, self.bias)

    def takes_plain(self, states: Tensor) -> bool:
        """Whether there is nothing else, or so few of them that the plain weight is faster, and it is kept."""
        return self._is_plain or (self.plain is not None and states.numel() <= FEW_ROWS * states.shape[-1])


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)) with packed weights, as Llama and its kin have it."""

    def __init__(self, gate: PackedLinear, up: PackedLinear, down: PackedLinear, activation: Activation) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down
        self._activation = activation
        # Gate and up in one loop, that knows neither biases nor other activations.
        without_bias = gate.bias is None and up.bias is None
        self._is_one = activation is _SILU and gate.panels is not None and up.panels is not None and without_bias

    def forward(self, states: Tensor) -> Tensor:
        """(..., d_model) to the same."""
        output: Tensor = self.down(self._inner(states))
        return output

    def plus(self, states: Tensor, other: Tensor, workspace: Workspace) -> Tensor:
        """The same, added to `other`, in the workspace."""
        out = workspace.tensor("after MLP", *other.shape, dtype=other.dtype)
        return self.down.plus(self._inner(states, workspace), other, out)

    @property
    def has_calls(self) -> bool:
        """Whether gate and up are one compiled loop, and down another."""
        return self._is_one and self.down.panels is not None

    def calls(self, states: Tensor, other: Tensor, workspace: Workspace) -> list[Call]:
        """The compiled loops that make `plus` of rows (n, d_model), where it `has_calls`."""
        gate, up, down = self.gate.panels, self.up.panels, self.down.panels
        assert gate is not None
        assert down is not None
        inner = workspace.tensor("inner", len(states), gate.num_outputs, dtype=down.input_dtype)
        out = workspace.tensor("after MLP", *other.shape, dtype=other.dtype)
        return [
            gate.call(states, None, Behind.GATED, inner, up=up),
            down.call(inner, self.down.bias, Behind.PLUS, out, others=other),
        ]

    def _inner(self, states: Tensor, workspace: Workspace | None = None) -> Tensor:
        gate, up = self.gate, self.up
        if self._is_one and not gate.takes_plain(states):
            assert gate.panels is not None
            size, dtype = (*states.shape[:-1], gate.panels.num_outputs), self.down.input_dtype
            out = torch.empty(size, dtype=dtype) if workspace is None else workspace.tensor("inner", *size, dtype=dtype)
            return gate.panels.product(states, None, Behind.GATED, up=up.panels, out=out)
        return up.times(states, gate.then(states, self._activation))


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this machine has loops or oneDNN for it."""
    return device.type == "cpu" and dtype in _DTYPES and (has_loops() or onednn_packs(dtype))


def onednn_packs(dtype: torch.dtype) -> bool:
    """Whether this build of torch and this CPU have oneDNN's operators for it."""
    ops = torch.ops.mkldnn
    found = hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")
    if dtype not in _DTYPES or not torch.backends.mkldnn.enabled or not found:
        return False
    # Without AVX-512 or AVX-NE-CONVERT oneDNN refuses a weight in bfloat16 (seen on a Zen 3).
    return dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def activation_of(module: nn.Module | None) -> Activation | None:
    """This activation, None if oneDNN has none such."""
    return _ACTIVATIONS.get(type(module).__name__)


def pack(module: nn.Module, *, keep_plain: bool = False) -> None:
    """Pack every linear layer below a frozen module, in place: its own weights are freed unless something shares them.

    Afterwards the module cannot be trained through, saved or hashed.
    """
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear:
            setattr(module, name, PackedLinear(child.weight, child.bias, keep_plain=keep_plain))
        elif (fused := gated_mlp(child, keep_plain=keep_plain)) is not None:
            setattr(module, name, fused)
        else:
            pack(child, keep_plain=keep_plain)


def gated_mlp(module: nn.Module, *, keep_plain: bool = False) -> GatedMLP | None:
    """The packed form of an MLP that is made of gate, up and down and an activation that oneDNN has."""
    parts = dict(module.named_children())
    activation = activation_of(parts.pop("act_fn", None))
    if activation is None or parts.keys() != {"gate_proj", "up_proj", "down_proj"}:
        return None
    linears = [part for name in ("gate_proj", "up_proj", "down_proj") if type(part := parts[name]) is nn.Linear]
    if len(linears) < len(parts):
        return None
    gate, up, down = (PackedLinear(linear.weight, linear.bias, keep_plain=keep_plain) for linear in linears)
    return GatedMLP(gate, up, down, activation)

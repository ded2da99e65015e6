"""One token each of a few rows through Llama's kin on a CPU in fp32, between the products in numpy.

Where products wait for memory, what torch takes for each of fifty small operations a layer counts: numpy takes a third
of it. A text of 16 tokens for one row, 8 layers of 512, of which products take 149 ms: 248 ms, as here 211; four rows
361 and 340, and from eight on nothing is gained. Rows that read the same prefix are not read together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from e2p_ray.engine.packed import FEW_ROWS, PackedLinear
from e2p_ray.engine.rows_step import RowsStep

if TYPE_CHECKING:
    from e2p_ray.engine.fused import FusedLayer, Norm

_Floats = npt.NDArray[np.float32]


class FewRows:
    """The layers of a `FusedDecoder` once more, over the same weights."""

    def __init__(self, layers: Sequence[FusedLayer], norm: Norm, window: int | None) -> None:
        self._layers = [_Layer(layer) for layer in layers]
        self._norm = _Norm.of(norm)
        self._window = window  # the shortest of the layers'

    def takes(self, step: RowsStep) -> bool:
        """Whether this pass is one of those: one token a row, few rows, and nothing out of a window's reach."""
        if not step.is_single or len(step.tokens.row) > FEW_ROWS:
            return False
        return step.is_within(self._window)

    def __call__(self, embeds: Tensor, turns: Tensor, step: RowsStep) -> Tensor:
        """(n, d_model) and the rotations (n, 1, head_dim / 2) as complex numbers to the last layer's normed states."""
        states, rotations = embeds.numpy(), turns.numpy()
        with np.errstate(all="ignore"):  # a row that went wrong says so by its logits
            for layer in self._layers:
                states = layer(states, rotations, step)
            return torch.from_numpy(self._norm(states))


@dataclass(frozen=True, slots=True, eq=False)
class _Norm:
    """Root-mean-square norm over the last dimension."""

    weight: _Floats
    epsilon: np.float32

    @classmethod
    def of(cls, norm: Norm) -> _Norm:
        return cls(norm.weight.numpy(), np.float32(norm.epsilon))

    def __call__(self, states: _Floats) -> _Floats:
        squares = np.square(states).mean(axis=-1, keepdims=True)
        squares += self.epsilon
        normed: _Floats = states / np.sqrt(squares, out=squares)
        normed *= self.weight
        return normed


class _Layer:
    """Attention and gated MLP with their norms and residuals."""

    def __init__(self, layer: FusedLayer) -> None:
        self._before_attention, self._before_mlp = _Norm.of(layer.before_attention), _Norm.of(layer.before_mlp)
        self._qkv, self._output, self._mlp = layer.qkv, layer.output, layer.mlp
        self._norms = [None if norm is None else _Norm.of(norm) for norm in (layer.query_norm, layer.key_norm)]
        self._num_heads, self._num_kv_heads = layer.num_heads, layer.num_kv_heads
        self._number, self._scale = layer.number, np.float32(layer.shape.scale)

    def __call__(self, states: _Floats, rotations: npt.NDArray[np.complex64], step: RowsStep) -> _Floats:
        n, num_heads, num_kv_heads = len(states), self._num_heads, self._num_kv_heads
        heads = _product(self._qkv, self._before_attention(states)).reshape(n, num_heads + 2 * num_kv_heads, -1)
        turned = heads[:, : num_heads + num_kv_heads]
        query_norm, key_norm = self._norms
        if query_norm is not None and key_norm is not None:
            turned = np.concatenate([query_norm(turned[:, :num_heads]), key_norm(turned[:, num_heads:])], axis=1)
        turned = (turned.view(np.complex64) * rotations).view(np.float32)
        queries = (turned[:, :num_heads] * self._scale).reshape(n, num_kv_heads, -1, turned.shape[-1])
        read = step.read_singly(self._number, turned[:, num_heads:], heads[:, num_heads + num_kv_heads :])
        attended = np.stack([_attended(asked, parts) for asked, parts in zip(queries, read, strict=True)])
        states = states + _product(self._output, attended.reshape(n, -1))
        states += self._mlp(torch.from_numpy(self._before_mlp(states))).numpy()
        return states


def _product(linear: PackedLinear, states: _Floats) -> _Floats:
    product: _Floats = linear(torch.from_numpy(states)).numpy()
    return product


def _attended(queries: _Floats, parts: Sequence[tuple[_Floats, _Floats]]) -> _Floats:
    """(Hkv, g, D): attention of scaled queries (Hkv, g, D) over the keys and values (Hkv, t, D) of all parts."""
    weights = np.concatenate([np.matmul(queries, keys.transpose(0, 2, 1)) for keys, _ in parts], axis=-1)
    weights -= weights.max(axis=-1, keepdims=True)
    np.exp(weights, out=weights)
    ends = np.cumsum([0, *(keys.shape[1] for keys, _ in parts)])
    output: _Floats = sum(
        np.matmul(weights[:, :, start:end], values)
        for start, end, (_, values) in zip(ends[:-1], ends[1:], parts, strict=True)
    )
    output /= weights.sum(axis=-1, keepdims=True)
    return output

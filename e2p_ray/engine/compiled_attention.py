"""Attention by the compiled loops of `flash`, on CPUs that they are written for.

On a Zen 5 core in fp32, heads of 64, with torch's kernel beside it: 64 users of a content of 256 tokens 164 and 402 us,
512 users of 512 tokens 2.7 and 6.0 ms, prefill of 8 contents of 256 tokens 3.7 and 13.3 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from e2p_ray.engine.attention import Shape
from e2p_ray.engine.compiled import DTYPES, LANES, has_loops

if TYPE_CHECKING:
    from e2p_ray.engine.torch_threads import Call

_Ints = npt.NDArray[np.int64]


def can_attend(shape: Shape, queries: Tensor, keys: Tensor) -> bool:
    """Whether the loops know how: no window, no cap on scores, no gradient."""
    if queries.device.type != "cpu" or shape.window is not None or shape.cap is not None:
        return False
    if queries.shape[-1] % LANES or keys.dtype not in DTYPES:
        return False
    return not (torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad)) and has_loops()


@dataclass(frozen=True, slots=True, eq=False)
class SharedReads:
    """Which queries read which keys: tokens `order`, those of one reading side by side.

    readings (r, 4) and tasks (num_tasks, 4) are as `flash.SharedCall` has them.
    """

    order: _Ints
    readings: _Ints
    tasks: _Ints

    @classmethod
    def of(
        cls, order: _Ints, bounds: _Ints, num_keys: Sequence[int], keys: Sequence[Tensor], group: int
    ) -> SharedReads:
        """Reading i by the tokens order[bounds[i] : bounds[i + 1]] and `group` query heads for each head of its keys.

        keys: of every reading, (Hkv, t, D); the same strides hold for its values and all layers.
        """
        from e2p_ray.engine.flash import TASK_LANES

        strides = np.array([(key.stride(0), key.stride(1)) for key in keys], np.int64) * keys[0].element_size()
        readings = np.stack([bounds[:-1], strides[:, 0], strides[:, 1], np.array(num_keys, np.int64)], axis=1)
        max_tokens = max(TASK_LANES // group, 1)
        num_parts = -(-np.diff(bounds) // max_tokens)
        reading = np.repeat(np.arange(len(keys)), num_parts)
        part = np.arange(len(reading)) - np.repeat(np.cumsum(num_parts) - num_parts, num_parts)
        first = bounds[reading] + part * max_tokens
        end = np.minimum(first + max_tokens, bounds[reading + 1])
        num_heads = keys[0].shape[0]
        heads = np.tile(np.arange(num_heads), len(reading))
        tasks = np.stack([reading.repeat(num_heads), heads, first.repeat(num_heads), end.repeat(num_heads)], axis=1)
        return cls(np.ascontiguousarray(order), np.ascontiguousarray(readings), np.ascontiguousarray(tasks))

    def attend(
        self,
        queries: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        outputs: Tensor,
        scale: float,
        *,
        causal: bool = False,
        lse: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Write attention of queries (T, H, D) over each reading's keys and values (Hkv, t, D) to outputs (T, H, D).

        queries and outputs in float32, numbers of a head side by side. `causal`: the n-th token of a reading sees n
        keys. lse: two more outputs (T, H), the largest score and the sum of weights against it.
        """
        from e2p_ray.engine import torch_threads

        addresses, scales = addresses_of(keys, values), np.array([scale], np.float32)
        torch_threads.run(*self.call(queries, keys[0], addresses, outputs, scales, causal=causal, lse=lse))

    def call(
        self,
        queries: Tensor,
        keys: Tensor,
        addresses: _Ints,
        outputs: Tensor,
        scales: npt.NDArray[np.float32],
        *,
        causal: bool = False,
        lse: tuple[Tensor, Tensor] | None = None,
    ) -> Call:
        """The same over what is at `addresses`, with the keys of one reading, to be run while all of them are there."""
        from e2p_ray.engine import flash
        from e2p_ray.engine.llvm import has_half_products

        is_half = keys.dtype is torch.bfloat16
        num_heads, dim = queries.shape[1:]
        call = flash.SharedCall(
            tasks=self.tasks.ctypes.data,
            readings=self.readings.ctypes.data,
            order=self.order.ctypes.data,
            queries=queries.data_ptr(),
            query_token=4 * queries.stride(0),
            query_head=4 * queries.stride(1),
            outputs=outputs.data_ptr(),
            output_token=4 * outputs.stride(0),
            output_head=4 * outputs.stride(1),
            out_tops=0 if lse is None else lse[0].data_ptr(),
            out_sums=0 if lse is None else lse[1].data_ptr(),
            num_heads=num_heads,
            group=num_heads // keys.shape[0],
            dim=dim,
            is_half=int(is_half),
            halves=int(is_half and has_half_products()),
            causal=int(causal),
            scale=scales.ctypes.data,
            addresses=addresses.ctypes.data,
        )
        return flash.attend_shared, len(self.tasks), call


def addresses_of(keys: Sequence[Tensor], values: Sequence[Tensor]) -> _Ints:
    """(n, 2), as the loops have them."""
    return np.array([(k.data_ptr(), v.data_ptr()) for k, v in zip(keys, values, strict=True)], np.int64)


class CompiledPrefill:
    """Causal attention of contents, right-padded to one length; of padding nothing is computed."""

    def __init__(self, lengths: Sequence[int], queries: Tensor, keys: Tensor) -> None:
        n, num_heads, longest, head_dim = queries.shape
        order = np.concatenate([np.arange(length) + at * longest for at, length in enumerate(lengths)])
        bounds = np.cumsum([0, *lengths])
        self._reads = SharedReads.of(order, bounds, lengths, list(keys), num_heads // keys.shape[1])
        # Padding stays 0 in all layers.
        self._outputs = torch.zeros(n, longest, num_heads, head_dim)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """(n, H, q, D) for queries (n, H, q, D), keys and values (n, Hkv, q, D); good until the next call."""
        asked = as_numbers(queries.transpose(1, 2)).flatten(0, 1)
        self._reads.attend(asked, list(keys), list(values), self._outputs.flatten(0, 1), scale, causal=True)
        return self._outputs.transpose(1, 2)


def as_numbers(queries: Tensor) -> Tensor:
    """In float32, the numbers of a head side by side."""
    queries = queries.float()
    return queries if queries.stride(-1) == 1 else queries.contiguous()

"""Shared prefixes: the keys and values of a content, computed once and read by all its users' rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from e2p_ray.engine.attention import Room, Shape, attention
from e2p_ray.engine.compiled_attention import CompiledPrefill, addresses_of, can_attend


@dataclass(frozen=True, slots=True, eq=False)
class PrefillBatch:
    """Keys and values of contents that were prefilled together: per layer (n, Hkv, longest, D), padding included."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def prefixes(self, lengths: Sequence[int]) -> list[Prefix]:
        """The prefix of every content, views of it all: what one of them keeps, see `Prefix.memory`."""
        found = []
        for row, length in enumerate(lengths):
            keys = tuple(k[row : row + 1, :, :length] for k in self.keys)
            values = tuple(v[row : row + 1, :, :length] for v in self.values)
            found.append(Prefix(keys, values, length, self, row))
        return found


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values of one content's shared prefix: per layer (1, Hkv, length, D). Freed with its last row.

    `batch` and its `place` there let neighbours be read in one call; a prefix that was made otherwise has none.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    length: int
    batch: PrefillBatch | None = None
    place: int = 0

    @cached_property
    def addresses(self) -> npt.NDArray[np.int64]:
        """(num_layers, 2), where keys and values are: the loops ask in every step of all that read it."""
        return addresses_of(self.keys, self.values)

    @cached_property
    def memory(self) -> tuple[int, int]:
        """Which memory it is part of, and the bytes there: a view keeps all of what it was cut from."""
        parts = {
            part.data_ptr(): part.nbytes() for part in (one.untyped_storage() for one in (*self.keys, *self.values))
        }
        return self.keys[0].untyped_storage().data_ptr(), sum(parts.values())

    def alone(self) -> Prefix:
        """A copy that keeps nothing but itself."""
        keys, values = (
            [one.clone(memory_format=torch.contiguous_format) for one in part] for part in (self.keys, self.values)
        )
        return Prefix(tuple(keys), tuple(values), self.length)


class PrefillDoneError(Exception):
    """Raised out of a prefill's last layer: of it only keys and values are wanted, not what they lead to.

    Its attention, MLP and norm are one layer's work for nothing (an eighth of the prefill in a model of eight layers).
    """


class PrefillStep:
    """Prefill of contents, right-padded to one length: a real token never sees the padding that follows it.

    The forward pass ends in PrefillDoneError.
    """

    def __init__(self, lengths: list[int], num_layers: int) -> None:
        self.lengths = lengths
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._num_layers = num_layers
        self._compiled: CompiledPrefill | None = None
        self._places: npt.NDArray[np.int64] | None = None

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any) -> tuple[Tensor, Tensor]:
        assert layer == len(self._keys), "layers come in order"
        keys, values = keys.to(values.dtype).contiguous(), values.contiguous()
        self._keys.append(keys)
        self._values.append(values)
        return keys, values

    def room(
        self, layer: int, num_rows: int, num_tokens: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> Room:
        """For the keys and values of (num_rows, num_tokens) tokens, in place of `update`."""
        size = (num_rows, num_kv_heads, num_tokens, head_dim)
        keys, values = torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype)
        self._keys.append(keys)
        self._values.append(values)
        if self._places is None:
            row, at = np.divmod(np.arange(num_rows * num_tokens), num_tokens)
            self._places = (row * keys.stride(0) + at * keys.stride(2)) * keys.element_size()
        return Room(keys, values, self._places)

    def make(
        self, size: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Room for keys and values (n, Hkv, q, D) of all layers, in place of `update`."""
        for made in (self._keys, self._values):
            made += [torch.empty(size, dtype=dtype, device=device) for _ in range(self._num_layers)]
        return self._keys, self._values

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, shape: Shape) -> Tensor:
        if layer == self._num_layers - 1:
            raise PrefillDoneError
        length = queries.shape[2]
        if shape.window is not None and length <= shape.window:
            shape = replace(shape, window=None)  # it reaches everything
        if can_attend(shape, queries, keys):
            if self._compiled is None:
                self._compiled = CompiledPrefill(self.lengths, queries, keys)
            return self._compiled.attend(queries, keys, values, shape.scale)
        if queries.device.type == "cuda" and shape.window is None and shape.cap is None:
            # The library's kernel: nobody asks for a log-sum-exp, and no score is written to memory.
            return nn.functional.scaled_dot_product_attention(
                queries.to(keys.dtype), keys, values, is_causal=True, scale=shape.scale, enable_gqa=True
            )
        visible = None
        if shape.window is not None:
            at = torch.arange(length, device=queries.device)
            visible = at[None, :] > at[:, None] - shape.window
        return attention(queries.to(keys.dtype), keys, values, shape, causal=True, visible=visible)[0]

    def prefixes(self) -> list[Prefix]:
        """The prefix of every content in the batch."""
        return PrefillBatch(tuple(self._keys), tuple(self._values)).prefixes(self.lengths)


class SuffixSlots:
    """Static keys and values of the rows' own tokens: per layer (max_rows, Hkv, max_tokens, D)."""

    def __init__(
        self,
        num_layers: int,
        max_rows: int,
        num_kv_heads: int,
        max_tokens: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.max_rows, self.max_tokens = max_rows, max_tokens
        size = (max_rows, num_kv_heads, max_tokens, head_dim)
        # Zeros, because a slot that is masked out still counts with weight 0: it must never hold NaN.
        self.keys = [torch.zeros(size, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(size, dtype=dtype, device=device) for _ in range(num_layers)]

    def grown(self, max_rows: int, max_tokens: int, num_rows: int) -> SuffixSlots:
        """Larger slots with what the first `num_rows` of these hold."""
        keys = self.keys[0]
        other = SuffixSlots(
            len(self.keys), max_rows, keys.shape[1], max_tokens, keys.shape[3], dtype=keys.dtype, device=keys.device
        )
        for old, new in zip((*self.keys, *self.values), (*other.keys, *other.values), strict=True):
            new[:num_rows, :, : self.max_tokens] = old[:num_rows]
        return other

    def clear(self, row: int) -> None:
        """Forget a row that went wrong, so that its NaN cannot reach the row that gets its slot."""
        for buffer in (*self.keys, *self.values):
            buffer[row] = 0

    def move(self, sources: Tensor, targets: Tensor, num_tokens: int) -> None:
        """Copy rows to other slots: how a wave closes the gaps that finished rows leave."""
        for buffer in (*self.keys, *self.values):
            buffer[targets, :, :num_tokens] = buffer[sources, :, :num_tokens]

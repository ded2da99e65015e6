"""Shared-prefix attention: keys and values of a content are computed once and read by all its users' rows.

One attention call per content with the queries of all its rows stacked, one over each row's own short suffix, merged
by log-sum-exp (Hydragen, arXiv 2402.05099; cascade inference). It hooks into transformers through
`AttentionInterface`: the model hands new keys and values to a `Step` in place of its cache, then its queries to
`shared_prefix_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

ATTENTION_NAME = "e2p_shared_prefix"


@dataclass(frozen=True, slots=True)
class Shape:
    """What one layer's attention is asked for: score scale, sliding window (tokens), cap on scores."""

    scale: float
    window: int | None
    cap: float | None


class Step(Protocol):
    """One forward pass: takes every layer's new keys and values, then answers its queries."""

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any) -> tuple[Tensor, Tensor]:
        """Take keys and values (n, Hkv, q, D) of one layer. The name and order are transformers' cache contract."""
        ...

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, shape: Shape) -> Tensor:
        """Attention output (n, H, q, D) for queries (n, H, q, D)."""
        ...


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that is registered with transformers; the work is done by the step."""
    step: Step = kwargs["e2p_step"]
    assert attention_mask is None, "transformers makes no mask for an attention it does not know"
    assert dropout == 0.0, "the base model is in eval mode"
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    layer = module.layer_idx
    assert isinstance(layer, int)
    output = step.attend(layer, query, key, value, Shape(scale, sliding_window, softcap))
    return output.transpose(1, 2), None


def attention(
    queries: Tensor, keys: Tensor, values: Tensor, shape: Shape, *, causal: bool = False, visible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp, grouped-query aware.

    queries (n, H, q, D), keys and values (n, Hkv, t, D); `causal` needs q == t; `visible` is a boolean mask that
    broadcasts to (n, 1, q, t). Returns output (n, H, q, D) and natural log-sum-exp of the scores (n, H, q). A row of
    queries that sees nothing gets 0 and -inf.
    """
    # The kernel's log-sum-exp carries no gradient.
    learns = torch.is_grad_enabled() and any(given.requires_grad for given in (queries, keys, values))
    if queries.device.type == "cpu" and visible is None and shape.cap is None and not learns:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, 0.0, causal, attn_mask=None, scale=shape.scale
        )
        return output, lse
    n, num_heads, q, _ = queries.shape
    num_kv_heads, t = keys.shape[1], keys.shape[2]
    if causal:
        below = torch.ones(q, t, dtype=torch.bool, device=queries.device).tril()
        visible = below if visible is None else visible & below
    # Heads that share keys are folded into the query length: the keys are never repeated.
    folded = queries.reshape(n, num_kv_heads, -1, queries.shape[-1])
    scores = torch.matmul(folded * shape.scale, keys.transpose(-1, -2)).float()
    if shape.cap is not None:
        scores = torch.tanh(scores / shape.cap) * shape.cap
    scores = scores.view(n, num_heads, q, t)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.clamp_min(torch.finfo(lse.dtype).min).unsqueeze(-1)).to(values.dtype)
    output = torch.matmul(weights.view(n, num_kv_heads, -1, t), values)
    return output.view(n, num_heads, q, -1), lse


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Join the attention over two disjoint sets of keys by their log-sum-exps: (n, H, q, D)."""
    total = torch.logaddexp(first[1], second[1])
    share = torch.exp(first[1] - total).unsqueeze(-1)
    merged = first[0].float() * share + second[0].float() * (1 - share)
    return merged.to(first[0].dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """Keys and values of one content's shared prefix: per layer (1, Hkv, length, D). Freed with its last row."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    length: int


class PrefillStep:
    """Prefill of contents, right-padded to one length: a real token never sees the padding that follows it."""

    def __init__(self, lengths: list[int], num_layers: int) -> None:
        self.lengths = lengths
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any) -> tuple[Tensor, Tensor]:
        self._keys[layer], self._values[layer] = keys, values
        return keys, values

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, shape: Shape) -> Tensor:
        length = queries.shape[2]
        visible = None
        if shape.window is not None and length > shape.window:
            at = torch.arange(length, device=queries.device)
            visible = at[None, :] > at[:, None] - shape.window
        return attention(queries, keys, values, shape, causal=True, visible=visible)[0]

    def prefixes(self) -> list[Prefix]:
        """The prefix of every content in the batch: own memory when alone, views of the batch otherwise."""
        found = []
        for row, length in enumerate(self.lengths):
            keys = tuple(k[row : row + 1, :, :length] for k in self._keys if k is not None)
            values = tuple(v[row : row + 1, :, :length] for v in self._values if v is not None)
            found.append(Prefix(keys, values, length))
        return found


@dataclass(frozen=True, slots=True, eq=False)
class PrefixRows:
    """The rows of a wave that read one prefix, up to `length` of its tokens."""

    prefix: Prefix
    length: int
    rows: Tensor  # (m,) indices into the wave's rows


def by_prefix(prefixes: Sequence[Prefix | None], visible: Sequence[int], device: torch.device) -> list[PrefixRows]:
    """Rows grouped by the prefix they read and how much of it they see; rows without a prefix are left out."""
    found: dict[tuple[int, int], list[int]] = {}
    for row, (prefix, length) in enumerate(zip(prefixes, visible, strict=True)):
        if prefix is not None and length:
            found.setdefault((id(prefix), length), []).append(row)
    items = []
    for (_, length), rows in found.items():
        prefix = prefixes[rows[0]]
        assert prefix is not None
        items.append(PrefixRows(prefix, length, torch.tensor(rows, device=device)))
    return items


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

    def clear(self, row: int) -> None:
        """Forget a row that went wrong, so that its NaN cannot reach the row that gets its slot."""
        for buffer in (*self.keys, *self.values):
            buffer[row] = 0

    def move(self, sources: Tensor, targets: Tensor, num_tokens: int) -> None:
        """Copy rows to other slots: how a wave closes the gaps that finished rows leave."""
        for buffer in (*self.keys, *self.values):
            buffer[targets, :, :num_tokens] = buffer[sources, :, :num_tokens]


class RowsStep:
    """A forward pass over rows of a wave: q new tokens each, behind their shared prefix and their own earlier tokens.

    rows: (n,) slots, or None when they are the slots 0..n-1. lengths: (n,) own tokens already in the slots.
    prefix_rows: the rows by the prefix they read, `rows` there being indices into this step's n rows.
    """

    def __init__(
        self,
        slots: SuffixSlots,
        first_slot: int,
        lengths: Tensor,
        num_new_tokens: int,
        max_length: int,
        prefix_rows: list[PrefixRows],
    ) -> None:
        n, q = len(lengths), num_new_tokens
        self._slots = slots
        self._span = slice(first_slot, first_slot + n)
        self._fresh = max_length == 0
        self._end = max_length + q
        self._prefix_rows = prefix_rows
        self._all_in_order = len(prefix_rows) == 1 and len(prefix_rows[0].rows) == n
        device = lengths.device
        self._at = lengths[:, None] + torch.arange(q, device=device)  # (n, q) own positions
        self._row_index = torch.arange(first_slot, first_slot + n, device=device)[:, None]
        key_at = torch.arange(self._end, device=device)
        self._visible = (key_at <= self._at[:, :, None])[:, None]  # (n, 1, q, end)
        self._prefix_length = torch.zeros(n, dtype=torch.long, device=device)
        for item in prefix_rows:
            self._prefix_length[item.rows] = item.length
        self._last_position = max((item.length for item in prefix_rows), default=0) + self._end

    @property
    def position_ids(self) -> Tensor:
        """(n, q) positions in the whole sequence."""
        return self._prefix_length[:, None] + self._at

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any) -> tuple[Tensor, Tensor]:
        if self._fresh:
            self._slots.keys[layer][self._span, :, : self._end] = keys
            self._slots.values[layer][self._span, :, : self._end] = values
        else:
            self._slots.keys[layer][self._row_index, :, self._at] = keys.transpose(1, 2)
            self._slots.values[layer][self._row_index, :, self._at] = values.transpose(1, 2)
        return keys, values

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, shape: Shape) -> Tensor:
        window = shape.window if shape.window is not None and self._last_position > shape.window else None
        own = self._attend_own(layer, queries, keys, values, shape, window)
        if not self._prefix_rows:
            return own[0]
        return merge(self._attend_prefixes(layer, queries, shape, window), own)

    def _attend_own(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, shape: Shape, window: int | None
    ) -> tuple[Tensor, Tensor]:
        if self._fresh and window is None:
            return attention(queries, keys, values, shape, causal=True)
        visible = self._visible
        if window is not None:
            key_at = torch.arange(self._end, device=queries.device)
            visible = visible & (key_at > self._at[:, :, None] - window)[:, None]
        keys = self._slots.keys[layer][self._span, :, : self._end]
        values = self._slots.values[layer][self._span, :, : self._end]
        return attention(queries, keys, values, shape, visible=visible)

    def _attend_prefixes(self, layer: int, queries: Tensor, shape: Shape, window: int | None) -> tuple[Tensor, Tensor]:
        n, num_heads, q, head_dim = queries.shape
        output = queries.new_zeros(n, num_heads, q, head_dim)
        lse = torch.full((n, num_heads, q), -torch.inf, dtype=torch.float32, device=queries.device)
        for item in self._prefix_rows:
            keys = item.prefix.keys[layer][:, :, : item.length]
            values = item.prefix.values[layer][:, :, : item.length]
            num_kv_heads, m = keys.shape[1], len(item.rows)
            mine = queries if self._all_in_order else queries[item.rows]
            # (m, H, q, D) -> (1, Hkv, m * group * q, D): all rows of the content in one call
            stacked = mine.reshape(m, num_kv_heads, -1, head_dim).transpose(0, 1).reshape(1, num_kv_heads, -1, head_dim)
            visible = None
            if window is not None:
                at = self._prefix_length[item.rows, None] + self._at[item.rows]  # (m, q)
                seen = torch.arange(item.length, device=queries.device) > at[:, :, None] - window
                repeat = num_heads // num_kv_heads
                visible = seen[:, None].expand(m, repeat, q, item.length).reshape(1, 1, -1, item.length)
            out, out_lse = attention(stacked, keys, values, shape, visible=visible)
            out = out.view(num_kv_heads, m, -1, q, head_dim).transpose(0, 1).reshape(m, num_heads, q, head_dim)
            out_lse = out_lse.view(num_kv_heads, m, -1, q).transpose(0, 1).reshape(m, num_heads, q)
            if self._all_in_order:
                return out, out_lse
            output[item.rows] = out
            lse[item.rows] = out_lse
        return output, lse

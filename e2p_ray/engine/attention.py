"""Attention over disjoint sets of keys, merged by log-sum-exp, and the hook that hands it to a transformers model.

The model gives new keys and values to a `Step` in place of its cache, then its queries to `step_attention`, which is
registered through transformers' `AttentionInterface`: no model code of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

ATTENTION_NAME = "e2p_shared_prefix"
# A softmax over fewer numbers than a vector register holds goes one by one (1,024 x 2 of 15: 584 us, of 16: 69 us).
_SOFTMAX_WIDTH = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """What one layer's attention is asked for: score scale, sliding window (tokens), cap on scores."""

    scale: float
    window: int | None
    cap: float | None


@dataclass(frozen=True, slots=True, eq=False)
class Room:
    """Where a pass wants one layer's new keys and values: (.., Hkv, .., D), and each token's bytes into them (T,)."""

    keys: Tensor
    values: Tensor
    places: npt.NDArray[np.int64]


class Step(Protocol):
    """One forward pass: takes every layer's new keys and values, then answers its queries."""

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any) -> tuple[Tensor, Tensor]:
        """Take keys and values (n, Hkv, q, D) of one layer. The name and order are transformers' cache contract."""
        ...

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, shape: Shape) -> Tensor:
        """Attention output (n, H, q, D) for queries (n, H, q, D)."""
        ...


def step_attention(
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
    return output.transpose(1, 2).to(query.dtype), None


def attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    shape: Shape,
    *,
    causal: bool = False,
    visible: Tensor | None = None,
    padding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp, grouped-query aware.

    queries (n, H, q, D), keys and values (n, Hkv, t, D); `causal` needs q == t; `visible` is a boolean mask that
    broadcasts to (n, 1, q, t), `padding` (n, t) is 0 for real keys and -inf for others. Returns output (n, H, q, D) and
    natural log-sum-exp of the scores (n, H, q). A row of queries that sees nothing gets 0 and -inf.
    """
    # The kernel's log-sum-exp carries no gradient.
    if queries.device.type == "cpu" and visible is None and shape.cap is None and not _learns(queries, keys, values):
        mask = None if padding is None else padding[:, None, None].to(queries.dtype).expand(*queries.shape[:3], -1)
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, 0.0, causal, attn_mask=mask, scale=shape.scale
        )
        return output, lse
    if padding is not None:
        real = (padding == 0)[:, None, None]
        visible = real if visible is None else visible & real
    if causal:
        q, t = queries.shape[2], keys.shape[2]
        below = torch.ones(q, t, dtype=torch.bool, device=queries.device).tril()
        visible = below if visible is None else visible & below
    return attention_by_products(queries, keys, values, shape, visible)


def attention_by_products(
    queries: Tensor, keys: Tensor, values: Tensor, shape: Shape, visible: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same by two batched matrix products, with gradient."""
    n, num_heads, q, _ = queries.shape
    num_kv_heads, t = keys.shape[1], keys.shape[2]
    # Heads that share keys are folded into the query length: the keys are never repeated.
    folded = queries.reshape(n, num_kv_heads, -1, queries.shape[-1])
    scores = torch.matmul(folded * shape.scale, keys.transpose(-1, -2)).float()
    if shape.cap is not None:
        scores = torch.tanh(scores / shape.cap) * shape.cap
    scores = scores.view(n, num_heads, q, t)
    if visible is not None:
        scores = scores.masked_fill_(~visible, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    least = lse.clamp_min(torch.finfo(lse.dtype).min).unsqueeze(-1)
    weights = torch.exp(scores - least) if _learns(queries, keys, values) else scores.sub_(least).exp_()
    output = torch.matmul(weights.to(values.dtype).view(n, num_kv_heads, -1, t), values)
    return output.view(n, num_heads, q, -1), lse


def joined_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    shape: Shape,
    visible: Tensor | None,
    before: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Attention of (n, H, q, D) over (n, H, t, D), joined with that over other keys: output (n, H, q, D).

    `visible` broadcasts to (n, 1, q, t). The other keys count as one more, whose score is their log-sum-exp (n, H, q)
    and whose value is their output (n, H, q, D). No query may see nothing at all. On a CPU two products are faster than
    the kernel for many rows of a few queries and keys each (256 rows of 2 queries and 17 keys: 0.8 for 0.9 ms).
    """
    n, num_heads, q, head_dim = queries.shape
    asked, t = queries.reshape(-1, q, head_dim), keys.shape[2]
    keys, values = keys.reshape(-1, t, head_dim), values.reshape(-1, t, head_dim)
    scores = torch.baddbmm(asked.new_empty(()), asked, keys.transpose(1, 2), beta=0, alpha=shape.scale).float()
    if shape.cap is not None:
        scores = torch.tanh(scores / shape.cap) * shape.cap
    if visible is not None:
        scores.view(n, num_heads, q, t).masked_fill_(~visible, -torch.inf)
    columns = [scores] if before is None else [scores, before[1].reshape(-1, q, 1)]
    if missing := -(t + len(columns) - 1) % _SOFTMAX_WIDTH:
        columns.append(scores.new_full((1, 1, 1), -torch.inf).expand(len(scores), q, missing))
    weights = torch.softmax(torch.cat(columns, dim=-1), dim=-1).to(values.dtype)
    own = torch.bmm(weights[..., :t], values).view(queries.shape)
    if before is None:
        return own
    return own.addcmul_(before[0].to(own.dtype), weights[..., t, None].view(n, num_heads, q, 1))


def _learns(*given: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Join the attention over two disjoint sets of keys by their log-sum-exps: outputs (..., D), log-sum-exps (...).

    No query may see nothing in both.
    """
    share = torch.sigmoid(first[1] - second[1]).unsqueeze(-1)
    return torch.lerp(second[0].float(), first[0].float(), share).to(first[0].dtype)

"""Attention over disjoint sets of keys, merged by log-sum-exp, and the hook that hands it to a transformers model.

The model gives new keys and values to a `Step` in place of its cache, then its queries to `step_attention`, which is
registered through transformers' `AttentionInterface`: no model code of ours.
"""

from __future__ import annotations

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
    if queries.device.type == "cpu" and visible is None and shape.cap is None and not _learns(queries, keys, values):
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, 0.0, causal, attn_mask=None, scale=shape.scale
        )
        return output, lse
    if causal:
        q, t = queries.shape[2], keys.shape[2]
        below = torch.ones(q, t, dtype=torch.bool, device=queries.device).tril()
        visible = below if visible is None else visible & below
    return attention_by_products(queries, keys, values, shape, visible)


def attention_by_products(
    queries: Tensor, keys: Tensor, values: Tensor, shape: Shape, visible: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same by two batched matrix products, with gradient.

    On a CPU it is the faster one, too, for many rows of a few queries and keys each: 256 rows of 2 queries and 17 keys
    0.8 ms in fp32 and 1.9 ms in bf16, the kernel 0.9 and 2.2 ms; of 9 keys 0.6 and 1.3 ms against 0.8 and 2.5 ms.
    """
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


def _learns(*given: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Join the attention over two disjoint sets of keys by their log-sum-exps: outputs (..., D), log-sum-exps (...).

    No query may see nothing in both.
    """
    share = torch.sigmoid(first[1] - second[1]).unsqueeze(-1)
    return torch.lerp(second[0].float(), first[0].float(), share).to(first[0].dtype)

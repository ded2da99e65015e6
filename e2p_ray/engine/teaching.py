"""Given texts under their users' soft tokens, differentiable, each content's prefix only read.

Nothing before the soft token depends on the user, so a content's keys and values are computed once, without gradient,
kept, and read by all its users' rows; only soft token, cue after and target run with gradient. Training and scoring are
this one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from e2p_ray.engine.attention import Shape, attention, merge
from e2p_ray.engine.lesson import Batch, Lesson
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.prefixes import PrefixStore
from e2p_ray.engine.projector import Projector
from e2p_ray.engine.shared_prefix import Prefix

# At once, where nothing is learned: 64 MiB in float32, and as much again for the cross-entropy. That is 128 tokens of
# a vocabulary of 128,000: products over fewer would read a head's weights too often.
_MAX_LOGITS = 1 << 24
# The same of attention scores, for where the library has no kernel that keeps none: 64 MiB, and as much of weights.
_MAX_SCORES = 1 << 24


def prefixes_of(store: PrefixStore, base: BaseModel, lefts: Sequence[tuple[int, ...]]) -> list[Prefix]:
    """Keys and values of the tokens before the soft token, of length 0 where there are none."""
    empty = torch.empty(1, base.num_kv_heads, 0, base.head_dim, dtype=base.dtype, device=base.device)
    nothing = Prefix((empty,) * base.num_layers, (empty,) * base.num_layers, 0)
    return [prefix or nothing for prefix in store.get(lefts)]


class TeachingStep:
    """A differentiable forward pass over rows of at most q own tokens behind their contents' prefixes.

    prefixes and num_rows by content, rows in the order of their contents; `real` (n, q) says which positions hold
    tokens. Those alone, T of them, go through the model, packed into one row: rows differ in length and contents in
    users, and what would fill them up cost more than half of a step (measured on PENS: tests/bench/LOG.md).
    """

    def __init__(self, prefixes: Sequence[Prefix], num_rows: Sequence[int], real: Tensor) -> None:
        self._prefixes = prefixes
        self._place = (real.flatten().cumsum(0) - 1).clamp_min(0).view(real.shape)  # in the packed row
        self._real = real.flatten().nonzero()[:, 0]
        tokens = [int(rows.sum()) for rows in torch.split(real, list(num_rows))]
        self._ends = list(accumulate(tokens))  # of every content's tokens in the packed row
        lengths = torch.tensor([prefix.length for prefix in prefixes], device=real.device)
        at = torch.arange(real.shape[1], device=real.device)
        self._causal = at[None, :] <= at[:, None]
        self._distance = at[:, None] - at[None, :]
        before = lengths.repeat_interleave(torch.tensor(num_rows, device=real.device))
        self.position_ids = (before[:, None] + at)[real][None]  # (1, T)

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any) -> tuple[Tensor, Tensor]:
        return keys.to(values.dtype), values

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, shape: Shape) -> Tensor:
        """Attention output (1, H, T, D) for packed queries; keys and values (1, Hkv, T, D)."""
        queries = queries.to(values.dtype)
        in_grid = self._unpacked(queries), self._unpacked(keys), self._unpacked(values)
        if not any(prefix.length for prefix in self._prefixes) and shape.window is None and shape.cap is None:
            # Nothing stands before: no log-sum-exp is needed, and the library's kernel has a fused backward.
            alone = nn.functional.scaled_dot_product_attention(
                *in_grid, is_causal=True, scale=shape.scale, enable_gqa=True
            )
            return self._packed(alone)
        own = self._causal if shape.window is None else self._causal & (self._distance < shape.window)
        output, lse = _in_parts(*in_grid, shape, own)
        mine = self._packed(output), self._packed(lse[..., None])[..., 0]
        return merge(self._attend_prefixes(layer, queries, shape), mine)

    def _unpacked(self, packed: Tensor) -> Tensor:
        """(1, H, T, D) to (n, H, q, D); a position without a token holds some other one's numbers."""
        return packed[0][:, self._place].transpose(0, 1)

    def _packed(self, grid: Tensor) -> Tensor:
        """(n, H, q, D) to (1, H, T, D)."""
        return grid.transpose(1, 2).flatten(0, 1)[self._real].transpose(0, 1)[None]

    def _attend_prefixes(self, layer: int, queries: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """All tokens of a content's rows ask its prefix in one call: output (1, H, T, D), log-sum-exp (1, H, T)."""
        outputs, lses, start = [], [], 0
        for prefix, end in zip(self._prefixes, self._ends, strict=True):
            asking = queries[:, :, start:end]
            if prefix.length:
                visible = self._near(prefix, start, end, shape.window)
                output, lse = _in_parts(asking, prefix.keys[layer], prefix.values[layer], shape, visible)
            else:
                output, lse = torch.zeros_like(asking), asking.new_full(asking.shape[:3], -torch.inf).float()
            outputs.append(output)
            lses.append(lse)
            start = end
        return torch.cat(outputs, dim=2), torch.cat(lses, dim=2)

    def _near(self, prefix: Prefix, start: int, end: int, window: int | None) -> Tensor | None:
        """(t, length) which of the prefix's tokens a sliding window reaches; None for all."""
        positions = self.position_ids[0, start:end]
        if window is None or int(positions.max()) < window:
            return None
        return torch.arange(prefix.length, device=positions.device) > positions[:, None] - window


def _in_parts(
    queries: Tensor, keys: Tensor, values: Tensor, shape: Shape, visible: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`attention` of (n, H, q, D) over (n, Hkv, t, D), with `visible` (q, t); without gradient some queries at a time.

    The scores of one text of a whole window, or of many short ones, are gigabytes that no bound knows.
    """
    n, num_heads, q, _ = queries.shape
    size = q if torch.is_grad_enabled() else max(_MAX_SCORES // (n * num_heads * keys.shape[2]), 1)
    if size >= q:
        return attention(queries, keys, values, shape, visible=visible)
    masks = [None] * -(-q // size) if visible is None else torch.split(visible, size)
    parts = zip(torch.split(queries, size, dim=2), masks, strict=True)
    found = [attention(part, keys, values, shape, visible=mask) for part, mask in parts]
    return torch.cat([output for output, _ in found], dim=2), torch.cat([lse for _, lse in found], dim=2)


def row_losses(base: BaseModel, soft: Tensor | None, prefixes: Sequence[Prefix], batch: Batch) -> Tensor:
    """Cross-entropy of every row's target, summed over its tokens (nats): (n,). `soft` (n, k, d_model)."""
    embedded = base.embed(batch.ids)
    if soft is not None:
        embedded = torch.cat([soft.to(base.dtype), embedded], dim=1)
    # Nothing after a row's last target is asked for.
    at = torch.arange(embedded.shape[1], device=embedded.device)
    real = at < (batch.counted * (at + 1)).amax(1, keepdim=True)
    step = TeachingStep(prefixes, batch.num_rows, real)
    hidden = base.hidden(embedded[real][None], step.position_ids, step)[0]
    losses = _token_losses(base, hidden[batch.counted[real]], batch.labels[batch.counted])
    row = torch.nonzero(batch.counted)[:, 0]
    return losses.new_zeros(len(batch.weights)).index_add(0, row, losses)


def _token_losses(base: BaseModel, hidden: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (T,) of the labels behind hidden states (T, d_model).

    Without gradient some tokens at a time: of a large vocabulary, the logits of all are gigabytes that no bound knows.
    """
    size = len(labels) if torch.is_grad_enabled() else max(_MAX_LOGITS // base.vocab_size, 1)
    parts = zip(torch.split(hidden, size), torch.split(labels, size), strict=True)
    return torch.cat([nn.functional.cross_entropy(base.logits(h).float(), at, reduction="none") for h, at in parts])


@torch.no_grad()
def lesson_losses(
    base: BaseModel, projector: Projector | None, store: PrefixStore, lessons: Sequence[Lesson]
) -> Tensor:
    """What `row_losses` gives for all rows of these lessons, without gradient: (n,) in float64 on the CPU."""
    num_soft = 0 if projector is None else projector.manifest.num_soft_tokens
    batch = Batch.of(lessons, num_soft, base.device)
    users = batch.user_embeddings
    soft = projector(users) if projector is not None and users is not None else None
    prefixes = prefixes_of(store, base, [lesson.left for lesson in lessons])
    return row_losses(base, soft, prefixes, batch).double().cpu()

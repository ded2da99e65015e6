"""The loss of targets under their users' soft tokens, differentiable, each content's prefix only read.

Nothing before the soft token depends on the user, so a content's keys and values are computed once, without gradient,
kept, and read by all its users' rows; only soft token, cue after and target run with gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.prefixes import PrefixStore
from e2p_ray.engine.shared_prefix import Prefix, Shape, attention, merge
from e2p_ray.train.lessons import Lesson, Row


def prefixes_of(store: PrefixStore, base: BaseModel, lefts: Sequence[tuple[int, ...]]) -> list[Prefix]:
    """Keys and values of the tokens before the soft token, of length 0 where there are none."""
    empty = torch.empty(1, base.num_kv_heads, 0, base.head_dim, dtype=base.dtype, device=base.device)
    nothing = Prefix((empty,) * base.num_layers, (empty,) * base.num_layers, 0)
    return [prefix or nothing for prefix in store.get(lefts)]


class TeachingStep:
    """A differentiable forward pass over C contents x m rows of q own tokens, behind prefixes padded to one length.

    `real` (C m, q) says which positions hold tokens. Those alone, T of them, go through the model, packed into one row;
    attention sees them in their grid. Measured: 1.9 CPU seconds for 2.5 where nothing but lengths differ, and less
    than half of the time where contents have unlike numbers of users.
    """

    def __init__(self, prefixes: Sequence[Prefix], rows_per_content: int, real: Tensor) -> None:
        num_tokens = real.shape[1]
        self._rows = rows_per_content
        self._prefixes = prefixes
        self._place = (real.flatten().cumsum(0) - 1).clamp_min(0).view(real.shape)  # in the packed row
        self._real = real.flatten().nonzero()[:, 0]
        device = prefixes[0].keys[0].device
        lengths = torch.tensor([prefix.length for prefix in prefixes], device=device)
        self._longest = int(lengths.max())
        self._seen = torch.arange(self._longest, device=device) < lengths[:, None]  # (C, longest)
        at = torch.arange(num_tokens, device=device)
        self._causal = at[None, :] <= at[:, None]
        self._distance = at[:, None] - at[None, :]
        self._positions = lengths.repeat_interleave(rows_per_content)[:, None] + at  # (C m, q)
        self.position_ids = self._positions[real][None]  # (1, T)

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any) -> tuple[Tensor, Tensor]:
        return keys, values

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, shape: Shape) -> Tensor:
        """Attention output (1, H, T, D) for packed queries; keys and values (1, Hkv, T, D)."""
        in_grid = self._unpacked(queries), self._unpacked(keys), self._unpacked(values)
        output = self._attend(layer, *in_grid, shape)
        return output.transpose(1, 2).flatten(0, 1)[self._real].transpose(0, 1)[None]

    def _unpacked(self, packed: Tensor) -> Tensor:
        """(1, H, T, D) to (C m, H, q, D); a position without a token holds some other one's numbers."""
        return packed[0][:, self._place].transpose(0, 1)

    def _attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, shape: Shape) -> Tensor:
        if self._longest == 0 and shape.window is None and shape.cap is None:
            # Nothing stands before: no log-sum-exp is needed, and the library's kernel has a fused backward.
            return nn.functional.scaled_dot_product_attention(
                queries, keys, values, is_causal=True, scale=shape.scale, enable_gqa=True
            )
        own = self._causal if shape.window is None else self._causal & (self._distance < shape.window)
        mine = attention(queries, keys, values, shape, visible=own[None, None])
        if self._longest == 0:
            return mine[0]
        return merge(self._attend_prefixes(layer, queries, keys.shape[1], shape), mine)

    def _attend_prefixes(self, layer: int, queries: Tensor, num_kv_heads: int, shape: Shape) -> tuple[Tensor, Tensor]:
        count, m = len(self._prefixes), self._rows
        _, num_heads, q, head_dim = queries.shape
        keys = self._padded([prefix.keys[layer] for prefix in self._prefixes])
        values = self._padded([prefix.values[layer] for prefix in self._prefixes])
        # (C m, H, q, D) -> (C, Hkv, m group q, D): the rows of a content ask in one call
        grid = queries.reshape(count, m, num_kv_heads, -1, head_dim).transpose(1, 2)
        stacked = grid.reshape(count, num_kv_heads, -1, head_dim)
        visible = self._seen[:, None, None, :]
        if shape.window is not None and self._longest + q > shape.window:
            near = torch.arange(self._longest, device=queries.device) > self._positions[..., None] - shape.window
            near = near.view(count, m, 1, q, -1).expand(count, m, num_heads // num_kv_heads, q, -1)
            visible = visible & near.reshape(count, 1, -1, self._longest)
        output, lse = attention(stacked, keys, values, shape, visible=visible)
        output = output.view(count, num_kv_heads, m, -1, head_dim).transpose(1, 2).reshape(queries.shape)
        lse = lse.view(count, num_kv_heads, m, -1).transpose(1, 2).reshape(count * m, num_heads, q)
        return output, lse

    def _padded(self, parts: Sequence[Tensor]) -> Tensor:
        missing = [self._longest - part.shape[2] for part in parts]
        return torch.cat([nn.functional.pad(p, (0, 0, 0, gap)) for p, gap in zip(parts, missing, strict=True)])


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Lessons as tensors: C contents x m rows; lessons of fewer rows are filled up with rows of weight 0.

    user_embeddings (C m, d) or None; ids (C m, q) tokens after the soft token; labels (C m, k + q) and `counted`, which
    of them belong to a target; weights (C m,).
    """

    user_embeddings: Tensor | None
    ids: Tensor
    labels: Tensor
    counted: Tensor
    weights: Tensor
    rows_per_content: int

    @classmethod
    def of(cls, lessons: Sequence[Lesson], num_soft_tokens: int, device: torch.device) -> Batch:
        """Rows must all have a user embedding, or none of them."""
        rows_per_content = max(len(lesson.rows) for lesson in lessons)
        rows = [row for lesson in lessons for row in _fill_up(lesson.rows, rows_per_content)]
        given = [row.user_embedding for row in rows if row.user_embedding is not None]
        assert len(given) in (0, len(rows)), "rows with and without a soft token do not mix"
        num_soft = num_soft_tokens if given else 0
        length = max(len(row.right) + len(row.target) - 1 for row in rows)
        ids = np.zeros((len(rows), length), np.int64)
        labels = np.zeros((len(rows), num_soft + length), np.int64)
        counted = np.zeros((len(rows), num_soft + length), np.bool_)
        for place, row in enumerate(rows):
            size, start = len(row.target), num_soft + len(row.right) - 1
            assert start >= 0, "a target follows a soft token or a token"
            ids[place, : len(row.right)] = row.right
            ids[place, len(row.right) : len(row.right) + size - 1] = row.target[:-1]
            labels[place, start : start + size] = row.target
            counted[place, start : start + size] = row.weight > 0
        weights = torch.tensor([row.weight for row in rows], dtype=torch.float32)
        return cls(
            user_embeddings=torch.from_numpy(np.stack(given)).to(device) if given else None,
            ids=torch.from_numpy(ids).to(device),
            labels=torch.from_numpy(labels).to(device),
            counted=torch.from_numpy(counted).to(device),
            weights=weights.to(device),
            rows_per_content=rows_per_content,
        )

    @property
    def num_tokens(self) -> Tensor:
        """Target tokens of every row (C m,)."""
        return self.counted.sum(1)


def _fill_up(rows: Sequence[Row], size: int) -> list[Row]:
    nobody = Row(rows[0].user_embedding, rows[0].right, rows[0].target[:1], 0.0)
    return [*rows, *[nobody] * (size - len(rows))]


def row_losses(base: BaseModel, soft: Tensor | None, prefixes: Sequence[Prefix], batch: Batch) -> Tensor:
    """Cross-entropy of every row's target, summed over its tokens (nats): (C m,). `soft` (C m, k, d_model)."""
    embedded = base.embed(batch.ids)
    if soft is not None:
        embedded = torch.cat([soft.to(base.dtype), embedded], dim=1)
    # Nothing after a row's last target is asked for: what fills the rows up never goes through the model.
    at = torch.arange(embedded.shape[1], device=embedded.device)
    real = at < (batch.counted * (at + 1)).amax(1, keepdim=True).clamp_min(1)
    step = TeachingStep(prefixes, batch.rows_per_content, real)
    hidden = base.hidden(embedded[real][None], step.position_ids, step)[0]
    logits = base.logits(hidden[batch.counted[real]])
    losses = nn.functional.cross_entropy(logits, batch.labels[batch.counted], reduction="none")
    row = torch.nonzero(batch.counted)[:, 0]
    return losses.new_zeros(len(batch.weights)).index_add(0, row, losses)


def target_loss(
    base: BaseModel, projector: nn.Module, prefixes: Sequence[Prefix], batch: Batch
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of a batch (nats), and the weight of its tokens: their quotient is the mean."""
    soft = None if batch.user_embeddings is None else projector(batch.user_embeddings)
    losses = row_losses(base, soft, prefixes, batch)
    return (losses * batch.weights).sum(), (batch.num_tokens * batch.weights).sum()

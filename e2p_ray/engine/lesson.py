"""Lessons: texts that are given rather than written, all of one content together; to learn from or to be scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from e2p_ray.schema import UserEmbedding


@dataclass(frozen=True, slots=True, eq=False)
class LessonRow:
    """One target: its user's embedding (None: no soft token), its own tokens before the text, the text's tokens."""

    user_embedding: UserEmbedding | None
    right: Sequence[int]
    target: Sequence[int]
    weight: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """Some rows of one content and task: they share the tokens before the soft token."""

    left: tuple[int, ...]
    rows: tuple[LessonRow, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Lessons as tensors, n rows in the order of their contents.

    user_embeddings (n, d) or None; ids (n, q) tokens after the soft token; labels (n, k + q) and `counted`, which of
    them belong to a target; weights (n,); num_rows by content.
    """

    user_embeddings: Tensor | None
    ids: Tensor
    labels: Tensor
    counted: Tensor
    weights: Tensor
    num_rows: tuple[int, ...]

    @classmethod
    def of(cls, lessons: Sequence[Lesson], num_soft_tokens: int, device: torch.device) -> Batch:
        """Rows must all have a user embedding, or none of them."""
        rows = [row for lesson in lessons for row in lesson.rows]
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
            counted[place, start : start + size] = True
        weights = torch.tensor([row.weight for row in rows], dtype=torch.float32)
        return cls(
            user_embeddings=torch.from_numpy(np.stack(given)).to(device) if given else None,
            ids=torch.from_numpy(ids).to(device),
            labels=torch.from_numpy(labels).to(device),
            counted=torch.from_numpy(counted).to(device),
            weights=weights.to(device),
            num_rows=tuple(len(lesson.rows) for lesson in lessons),
        )

    @property
    def num_tokens(self) -> Tensor:
        """Target tokens of every row (n,)."""
        return self.counted.sum(1)

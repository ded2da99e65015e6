"""What a projector is trained by: the weighted cross-entropy of targets."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from e2p_ray.engine.lesson import Batch
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.shared_prefix import Prefix
from e2p_ray.engine.teaching import row_losses


def target_loss(
    base: BaseModel, projector: nn.Module, prefixes: Sequence[Prefix], batch: Batch
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of a batch (nats), and the weight of its tokens: their quotient is the mean."""
    soft = None if batch.user_embeddings is None else projector(batch.user_embeddings)
    losses = row_losses(base, soft, prefixes, batch)
    return (losses * batch.weights).sum(), (batch.num_tokens * batch.weights).sum()

"""How a projector is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from e2p_ray.engine.manifest import Kind, Layout


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """Everything but the data; counts of contents and users are per worker.

    `target_prefix` by language stands before every target, as English's space does. The schedule is a linear warm-up,
    then a cosine to zero at `num_steps`. Validation runs every `validate_every` steps and at the end; after `patience`
    validations without a better loss training stops, and in any case the best projector is kept.
    """

    num_steps: int = 300
    contents_per_step: int = 8
    users_per_content: int = 16
    learning_rate: float = 1e-2  # and hidden_dim: the sweep of 2026-11-22 in tests/bench/LOG.md
    warmup_steps: int = 20
    weight_decay: float = 0.0  # of the matrices; biases are left alone
    clip_norm: float = 1.0
    seed: int = 0
    kind: Kind = "residual"
    layout: Layout = "content_first"
    hidden_dim: int = 256
    num_soft_tokens: int = 1
    dropout: float = 0.0
    output_scale: float = 1.0  # of the soft token, in units of the token embeddings' root mean square
    max_target_tokens: int = 64
    max_prefix_bytes: int = 1 << 30  # kept keys and values of contents; the least recently used are dropped
    validate_every: int = 50
    patience: int | None = None
    target_prefix: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.num_steps > 0, "training takes at least one step"
        assert self.contents_per_step > 0, "a step needs contents"
        assert self.users_per_content > 0, "a content needs users"

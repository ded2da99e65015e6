"""A user's profile of this moment: a user embedding with recent events folded in, without any training.

Events are vectors of the same embedding space: a two-tower model has its items there, and a factorisation its item
factors. With weights `w_i = weight_i * 2 ** (-age_i / half_life)`, their sum `W` and `unit(x) = x / |x|`,

    share  = min(W / (W + stored_events), max_share)
    folded = |stored| * unit((1 - share) * unit(stored) + share * sum(w_i * unit(v_i)) / W)

The length stays the stored one's, since a projector sees raw lengths and was trained on those of users; of an event
only its direction counts. Below a half, a share cannot turn a user embedding around, nor cancel it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from e2p_ray.config.serve import ProfileConfig
from e2p_ray.plan.inputs import Space
from e2p_ray.schema import UserEmbedding
from e2p_ray.serve.messages import UserPart
from e2p_ray.serve.problems import ProblemError


@dataclass(frozen=True, eq=False)
class Events:
    """What happened lately: directions (n, d) of length one, weights (n,) at the moment of the request."""

    directions: npt.NDArray[np.float64]
    weights: npt.NDArray[np.float64]

    def fold_into(self, stored: UserEmbedding, config: ProfileConfig) -> UserEmbedding:
        """A user embedding (d,) after these events; the very same where nothing counts any more.

        Raises ProblemError 422 where a component of it is too large for float32.
        """
        total = float(self.weights.sum())
        share = min(total / (total + config.stored_events), config.max_share)
        if share == 0.0:
            return stored
        vector = stored.astype(np.float64)
        length = float(np.linalg.norm(vector))
        mean = self.weights @ self.directions / total
        turned = (1 - share) * vector / length + share * mean
        return _as_float32(turned * (length / float(np.linalg.norm(turned))))


def given_embedding(asked: UserPart, space: Space) -> UserEmbedding | None:
    """The request's user embedding (d,), None where there is none; ProblemError 422 where it does not fit."""
    if asked.embedding is None:
        return None
    _check_space(asked, space)
    return _vector(asked.embedding, space)


def given_events(asked: UserPart, space: Space, config: ProfileConfig) -> Events | None:
    """The request's events, None where there are none; ProblemError 422 where one does not fit."""
    if not asked.events:
        if asked.events is not None:
            _check_space(asked, space)
        return None
    _check_space(asked, space)
    if len(asked.events) > config.max_events:
        raise ProblemError(422, "too_many", f"a user has {config.max_events} events at most")
    vectors = np.stack([_vector(event.embedding, space) for event in asked.events]).astype(np.float64)
    weights = np.array([event.weight for event in asked.events], np.float64)
    ages = np.array([event.age_s for event in asked.events], np.float64)
    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return Events(directions, weights * np.exp2(-ages / config.half_life_s))


def _check_space(asked: UserPart, space: Space) -> None:
    if asked.embedding_space != space.name:
        raise ProblemError(422, "embedding_other_space", f"this projector reads the space {space.name!r}")


def _vector(values: Sequence[float], space: Space) -> UserEmbedding:
    """Numbers of a request as a vector (d,); ProblemError 422 without a value of it."""
    if len(values) != space.dim:
        raise ProblemError(422, "embedding_wrong_size", f"this projector reads {space.dim} dimensions")
    vector = _as_float32(np.array(values, np.float64))
    if not vector.any():
        raise ProblemError(422, "embedding_zero", "all components are zero")
    return vector


def _as_float32(values: npt.NDArray[np.float64]) -> UserEmbedding:
    with np.errstate(over="ignore"):
        vector: UserEmbedding = values.astype(np.float32)
    if not np.isfinite(vector).all():
        raise ProblemError(422, "embedding_non_finite", "a component is too large for float32")
    return vector

"""A row: one request on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass

from e2p_ray.config import SamplingConfig
from e2p_ray.engine.prompt import Segments
from e2p_ray.schema import RequestKey, UserEmbedding


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One request, ready to be decoded."""

    key: RequestKey
    segments: Segments
    user_embedding: UserEmbedding | None
    sampling: SamplingConfig
    stream: int
    draft: str | None = None

    @property
    def _takes_last(self) -> bool:
        """A row without any token of its own takes over the last one of its prefix, to have something to run."""
        return self.user_embedding is None and not self.segments.right

    @property
    def right(self) -> tuple[int, ...]:
        """The token ids behind the soft token."""
        return self.segments.left[-1:] if self._takes_last else self.segments.right

    def num_suffix_tokens(self, num_soft_tokens: int) -> int:
        """Own tokens before the first new one."""
        return len(self.right) + (num_soft_tokens if self.user_embedding is not None else 0)

    def num_visible(self, num_soft_tokens: int) -> int:
        """How much of the shared prefix the row reads."""
        return len(self.segments.left) - self._takes_last

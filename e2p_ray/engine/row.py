"""A row: one request on its way through the engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from e2p_ray.config import SamplingConfig
from e2p_ray.engine.prompt import Segments
from e2p_ray.schema import Completion, RequestKey, UserEmbedding

_ROW = TypeVar("_ROW")


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


def rows_at_hand(source: Iterator[_ROW | Completion | None], room: int) -> tuple[list[_ROW], list[Completion]]:
    """As many rows as there is room for and as wait now, and the completions between them, which need no engine."""
    rows, completions = list[_ROW](), list[Completion]()
    while len(rows) < room and (row := next(source, None)) is not None:
        if isinstance(row, Completion):
            completions.append(row)
        else:
            rows.append(row)
    return rows, completions

"""A listener of an engine, for tests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Set

from e2p_ray.schema import RequestKey


class Listening:
    """A listener made of what a test gives it."""

    def __init__(
        self,
        *,
        streamed: Collection[RequestKey] = (),
        cancelled: Callable[[int], Collection[RequestKey]] = lambda step: (),
        between: Callable[[int], None] = lambda step: None,
    ) -> None:
        self._streamed, self._cancelled, self._between = frozenset(streamed), cancelled, between
        self.step = 0
        self.texts: dict[RequestKey, list[str]] = {}

    def between_steps(self) -> None:
        self.step += 1
        self._between(self.step)

    def cancelled(self) -> Set[RequestKey]:
        return frozenset(self._cancelled(self.step))

    def streamed(self) -> Set[RequestKey]:
        return self._streamed

    def on_text(self, key: RequestKey, text: str) -> None:
        self.texts.setdefault(key, []).append(text)

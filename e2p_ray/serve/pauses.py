"""How work that comes last makes room for requests between two steps of the engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Set

from e2p_ray.engine.contract import Listener
from e2p_ray.schema import RequestKey


class Pauses(Listener):
    """Who follows work that comes last: lets everybody else go first between two of its steps."""

    def __init__(self, let_others: Callable[[], None]) -> None:
        self._let_others = let_others
        self.paused_s = 0.0

    def between_steps(self) -> None:
        """See `Listener.between_steps`; raises InterruptedError where the loop is to end."""
        began_s = time.perf_counter()
        self._let_others()
        self.paused_s += time.perf_counter() - began_s

    def cancelled(self) -> Set[RequestKey]:
        """Nobody's."""
        return frozenset()

    def streamed(self) -> Set[RequestKey]:
        """Nobody's."""
        return frozenset()

    def on_text(self, key: RequestKey, text: str) -> None:
        """Nobody listens."""


def interrupted() -> InterruptedError:
    """What ends work behind when its replica ends."""
    return InterruptedError("this replica is about to end")

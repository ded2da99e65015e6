"""How often guessed tokens hold, learned from all of them, whether or not they were tried."""

from __future__ import annotations

from dataclasses import dataclass, field

_MEMORY = 2048  # observations after which older ones count half


@dataclass(slots=True, eq=False)
class Agreement:
    """How often the next guessed token was right, by how many before it were: none, few, several.

    It starts doubtful, and with few observations, so that a handful of rows decide: a guess that is not tried is
    judged by what its row writes, so to be doubtful costs the first rows' time at most.
    """

    num_right: list[float] = field(default_factory=lambda: [3.5, 8.5, 19.0])
    num_seen: list[float] = field(default_factory=lambda: [5.0, 10.0, 20.0])

    def rate(self, streak: int) -> float:
        at = _class_of(streak)
        return self.num_right[at] / self.num_seen[at]

    def chances(self, streak: int, max_ahead: int) -> list[float]:
        """That the next 0, 1, ... max_ahead guesses hold, all of them."""
        found = [1.0]
        for ahead in range(max_ahead):
            found.append(found[-1] * self.rate(streak + ahead))
        return found

    def see(self, streak: int, right: bool) -> None:
        at = _class_of(streak)
        self.num_right[at] += right
        self.num_seen[at] += 1
        if self.num_seen[at] > _MEMORY:
            self.num_right[at] /= 2
            self.num_seen[at] /= 2


def _class_of(streak: int) -> int:
    return 0 if streak == 0 else 1 if streak < 4 else 2

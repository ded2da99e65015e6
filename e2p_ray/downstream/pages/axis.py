"""A number axis: from values to places in a picture, with round ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Axis:
    """Values from `low` to `high` on places from `start` to `end`, which may lie before `start`; `tick_room` apart."""

    low: float
    high: float
    start: float
    end: float
    tick_room: float = 60.0

    def place(self, value: float) -> float:
        """Where a value lies; values beyond the ends lie on them."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    @property
    def step(self) -> float:
        """A round distance that leaves every tick its room, as far as three ticks have it."""
        return round_step((self.high - self.low) / max(abs(self.end - self.start) / self.tick_room, 3.0))

    @property
    def ticks(self) -> tuple[float, ...]:
        first = math.ceil(self.low / self.step - 1e-9)
        last = math.floor(self.high / self.step + 1e-9)
        return tuple(index * self.step for index in range(first, last + 1))

    def text(self, value: float, *, signed: bool = False) -> str:
        """A tick's figure with as many decimals as the step needs."""
        decimals = max(0, -math.floor(math.log10(self.step) + 1e-9))
        value = 0.0 if abs(value) < self.step / 1e6 else value
        return f"{value:+,.{decimals}f}" if signed and value else f"{value:,.{decimals}f}"


def axis_over(
    values: Iterable[float], start: float, end: float, *, tick_room: float = 60.0, margin: float = 0.05
) -> Axis:
    """An axis that holds all values, with some room at both ends."""
    held = list(values)
    low, high = min(held), max(held)
    room = (high - low) * margin or abs(high) * margin or 1.0
    return Axis(low - room, high + room, start, end, tick_room)


def round_step(size: float) -> float:
    """The smallest 1, 2 or 5 times a power of ten that is not below `size`, which is above zero."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= size * (1 - 1e-9))

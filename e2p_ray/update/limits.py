"""What a run may cost, and which requests come first when that is less than all of them."""

from __future__ import annotations

from dataclasses import dataclass

from e2p_ray.errors import ConfigError

_ASCENDING = ("rank",)  # columns of which the lowest value is the best unless it is said otherwise
_ORDERS = {"asc": False, "desc": True}


@dataclass(frozen=True, slots=True)
class Priority:
    """A numeric column of the candidates table; requests without a value come last."""

    column: str
    descending: bool

    @classmethod
    def parse(cls, text: str) -> Priority:
        """`score` (highest first), `rank` (lowest first), or with its order: `price:asc`, `price:desc`."""
        column, colon, order = text.partition(":")
        if not column or (colon and order not in _ORDERS):
            raise ConfigError(f"--priority {text!r}: give a column of the candidates table, as COLUMN[:asc|:desc]")
        return cls(column, _ORDERS[order] if colon else column not in _ASCENDING)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of what one run generates; the rest is deferred."""

    max_requests: int | None = None
    max_seconds: float | None = None  # of generation; no shard is started after that
    priority: Priority | None = None

    def __post_init__(self) -> None:
        if self.max_requests is not None and self.max_requests < 1:
            raise ConfigError(f"--max-requests {self.max_requests}: give 1 or more")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ConfigError(f"--max-seconds {self.max_seconds:g}: give more than 0")
        if self.priority is not None and not self:
            raise ConfigError(
                "--priority says what comes first under a limit: give --max-requests or --max-seconds too"
            )

    def __bool__(self) -> bool:
        return self.max_requests is not None or self.max_seconds is not None

"""Intervals from resampling users. Targets of one user are alike, so whole users are drawn, never single targets.

Every measure here is a ratio of sums over users: nats over tokens, hits over texts, users who gain over users. A
resample draws as many users as there are, with replacement, and takes the ratio again; the interval lies between the
percentiles of those ratios (Efron and Tibshirani 1993, chapter 13). With fewer than about ten users it is too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from e2p_ray.errors import RunError

Floats = NDArray[np.float64]

NUM_RESAMPLES = 2000
LEVEL = 0.95
NO_USERS = "nothing to measure: no user has a scored target. Check that targets and users share their ids."
_MAX_WEIGHTS = 4_000_000  # drawn at once, so that memory does not grow with users times resamples


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_above_zero(self) -> bool:
        return self.low > 0

    @property
    def is_below_zero(self) -> bool:
        return self.high < 0


def ratio_interval(
    numerators: Floats, denominators: Floats, *, seed: int, num_resamples: int = NUM_RESAMPLES, level: float = LEVEL
) -> Interval:
    """The interval of sum(numerators) / sum(denominators), one entry a user, both (num_users,)."""
    (interval,) = ratio_intervals(
        numerators[:, None], denominators, seed=seed, num_resamples=num_resamples, level=level
    )
    return interval


def ratio_intervals(
    numerators: Floats, denominators: Floats, *, seed: int, num_resamples: int = NUM_RESAMPLES, level: float = LEVEL
) -> tuple[Interval, ...]:
    """Several ratios over the same resamples; one user gives intervals without width.

    numerators (num_users, num_measures), denominators (num_users,), all above zero. Raises RunError without users.
    """
    num_users = len(numerators)
    if num_users == 0:
        raise RunError(NO_USERS)
    assert denominators.shape == (num_users,), "one denominator a user"
    assert (denominators > 0).all(), "a user without targets is left out before"
    assert np.isfinite(numerators).all(), "measures are finite"
    both = np.column_stack([numerators, denominators])
    drawn = np.empty((num_resamples, both.shape[1]))
    rng = np.random.default_rng(seed)
    shares = np.full(num_users, 1.0 / num_users)
    step = max(1, _MAX_WEIGHTS // num_users)
    for start in range(0, num_resamples, step):
        stop = min(start + step, num_resamples)
        drawn[start:stop] = rng.multinomial(num_users, shares, size=stop - start).astype(np.float64) @ both
    ratios = drawn[:, :-1] / drawn[:, -1:]
    values = numerators.sum(axis=0) / denominators.sum()
    tail = 50.0 * (1.0 - level)
    lows, highs = np.percentile(ratios, [tail, 100.0 - tail], axis=0)
    return tuple(
        Interval(float(value), float(low), float(high)) for value, low, high in zip(values, lows, highs, strict=True)
    )


def user_sums(user_ids: Sequence[str] | NDArray[np.str_], values: Floats) -> tuple[Floats, Floats]:
    """Rows (num_rows, num_measures) summed by user, and the number of rows of each: (num_users, …), (num_users,)."""
    _, codes = np.unique(np.asarray(user_ids, dtype=np.str_), return_inverse=True)
    num_users = int(codes.max()) + 1 if len(codes) else 0
    sums = np.zeros((num_users, values.shape[1]))
    np.add.at(sums, codes, values)
    return sums, np.bincount(codes, minlength=num_users).astype(np.float64)


def mean_intervals(
    user_ids: Sequence[str] | NDArray[np.str_], values: Floats, *, seed: int, num_resamples: int = NUM_RESAMPLES
) -> tuple[Interval, ...]:
    """Means over rows (num_rows, num_measures), their intervals from resampling the users of the rows."""
    return ratio_intervals(*user_sums(user_ids, values), seed=seed, num_resamples=num_resamples)

"""Does a text look like the user's own? Its length and its manner: questions, exclamations, numbers, quotations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from e2p_ray.check.script import normalize
from e2p_ray.downstream.measures.bootstrap import Floats, Interval, mean_intervals, user_sums

_HABITS = {
    "question": re.compile(r"\?"),
    "exclamation": re.compile(r"!"),
    "number": re.compile(r"\d"),
    "quotation": re.compile(r"[\"“”‘«»「」『』]|(?<!\w)'|'(?!\w)"),
    "colon": re.compile(r":"),
}


@dataclass(frozen=True, slots=True)
class Likeness:
    """Length and manner against the user's reference.

    length_difference: mean of |characters of text - of reference|; length_correlation: of users' mean lengths
    (Pearson), None with fewer than three users or when one side never varies; habits: share of agreement on whether a
    text asks, exclaims, holds a number, quotes, has a colon.
    """

    length_difference: Interval
    length_correlation: float | None
    habits: Interval


def measure_likeness(
    texts: Sequence[str], references: Sequence[str], user_ids: Sequence[str], *, seed: int
) -> Likeness:
    """Texts against references, one for one."""
    lengths = np.array([[len(text), len(own)] for text, own in zip(texts, references, strict=True)], dtype=np.float64)
    agreements = [float(np.mean(habits(a) == habits(b))) for a, b in zip(texts, references, strict=True)]
    values = np.column_stack([np.abs(lengths[:, 0] - lengths[:, 1]), agreements])
    difference, agreement = mean_intervals(user_ids, values, seed=seed)
    return Likeness(difference, _user_correlation(lengths, user_ids), agreement)


def habits(text: str) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which of the habits a text shows; full-width marks count as their plain forms."""
    plain = normalize(text)
    return np.array([pattern.search(plain) is not None for pattern in _HABITS.values()])


def _user_correlation(lengths: Floats, user_ids: Sequence[str]) -> float | None:
    sums, counts = user_sums(user_ids, lengths)
    means: Floats = sums / counts[:, None]
    if len(means) < 3 or (means.max(axis=0) - means.min(axis=0) < 1e-9).any():
        return None
    centred = means - means.mean(axis=0, keepdims=True)
    products = centred.T @ centred
    return float(products[0, 1] / np.sqrt(products[0, 0] * products[1, 1]))

"""Shares of texts whose numbers and names all occur in their contents, by the rules that guard publishing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from e2p_ray.check import check
from e2p_ray.config import ChecksConfig, LimitsConfig
from e2p_ray.downstream.measures.bootstrap import Interval, mean_intervals
from e2p_ray.schema import Content, Reason

_NO_LIMITS = 1_000_000


@dataclass(frozen=True, slots=True)
class Faithfulness:
    """faithful: share of texts without a foreign number or name; of the others, which kind was found first."""

    faithful: Interval
    foreign_numbers: float
    foreign_names: float
    num_empty: int  # empty or broken texts; they count as unfaithful


def measure_faithfulness(
    texts: Sequence[str],
    contents: Sequence[Content],
    user_ids: Sequence[str],
    *,
    allow: Sequence[str] = (),
    seed: int,
) -> Faithfulness:
    """Every text against its own content; names of `allow` may stand in any.

    Texts of one content side by side are fastest.
    """
    limits = LimitsConfig(max_chars=_NO_LIMITS, max_tokens=_NO_LIMITS, must_finish=False)
    checks = ChecksConfig(language=False, repetition=False, foreign_contacts=False, allow=tuple(allow))
    reasons = [check(text, content, None, limits, checks).reason for text, content in zip(texts, contents, strict=True)]
    (faithful,) = mean_intervals(user_ids, np.array([[float(reason is None)] for reason in reasons]), seed=seed)
    counts = Counter(reasons)
    number, name = counts.pop(Reason.FOREIGN_NUMBER, 0), counts.pop(Reason.FOREIGN_NAME, 0)
    counts.pop(None, None)
    return Faithfulness(faithful, number / len(reasons), name / len(reasons), counts.total())

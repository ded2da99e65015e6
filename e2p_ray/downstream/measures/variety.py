"""How much the texts of different users differ for one content. Without personalisation all are the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from e2p_ray.downstream.measures.bootstrap import Interval, mean_intervals
from e2p_ray.downstream.measures.overlap import rouge_scorer
from e2p_ray.downstream.measures.tokens import words

_MAX_CONTENTS = 500
_MAX_PAIRS = 20  # of one content


@dataclass(frozen=True, slots=True)
class Variety:
    """Means over contents with at least two users; intervals from resampling contents. All lie between 0 and 1.

    distinct: (different texts - 1) / (texts - 1), so 0 when all users read the same, 1 when no two do;
    distance: 1 - ROUGE-L between two users' texts; distinct_2: different pairs of neighbouring words / all pairs.
    """

    num_contents: int
    distinct: Interval
    distance: Interval
    distinct_2: Interval


def measure_variety(content_ids: Sequence[str], texts: Sequence[str], *, seed: int) -> Variety | None:
    """One text a user and content; None where no content has two users. Of more than 500 contents a sample is taken."""
    by_content: dict[str, list[str]] = {}
    for content_id, text in zip(content_ids, texts, strict=True):
        by_content.setdefault(content_id, []).append(text)
    shared = sorted(content_id for content_id, own in by_content.items() if len(own) > 1)
    if not shared:
        return None
    rng = np.random.default_rng(seed)
    if len(shared) > _MAX_CONTENTS:
        shared = sorted(rng.choice(np.array(shared), _MAX_CONTENTS, replace=False).tolist())
    scorer = rouge_scorer(["rougeL"])
    values = []
    for content_id in shared:
        own = by_content[content_id]
        distances = [
            0.0 if a == b else 1.0 - float(scorer.score(a, b)["rougeL"].fmeasure) for a, b in _some_pairs(own, rng)
        ]
        values.append([(len(set(own)) - 1) / (len(own) - 1), float(np.mean(distances)), distinct_2(own)])
    return Variety(len(shared), *mean_intervals(shared, np.array(values), seed=seed))


def _some_pairs(texts: Sequence[str], rng: np.random.Generator) -> list[tuple[str, str]]:
    """All pairs of a few texts; of many, every text beside the next in a random order, as far as the cap goes."""
    if len(texts) * (len(texts) - 1) // 2 <= _MAX_PAIRS:
        return list(combinations(texts, 2))
    order = rng.permutation(len(texts))
    neighbours = list(zip(order, np.roll(order, -1), strict=True))[:_MAX_PAIRS]
    return [(texts[a], texts[b]) for a, b in neighbours]


def distinct_2(texts: Sequence[str]) -> float:
    """Different pairs of neighbouring words over all of them; 0 when no text has two words."""
    pairs = [pair for text in texts for pair in pairwise(words(text))]
    return len(set(pairs)) / len(pairs) if pairs else 0.0

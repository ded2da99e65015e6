"""How far the written texts overlap with the users' own: ROUGE-1, -2 and -L (F), BLEU, chrF. All lie between 0 and 1.

`rouge-score` counts over our words, because its own drop every Japanese character and give 0. BLEU has sacrebleu's
`13a` words, or our words and marks where a language has no spaces; chrF (characters alone) needs neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from e2p_ray.downstream.measures.bootstrap import Interval, mean_intervals
from e2p_ray.downstream.measures.tokens import is_unspaced, words, words_and_marks

_ROUGES = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True, slots=True)
class Overlap:
    """ROUGE as means over texts with intervals over users; BLEU and chrF of the whole corpus."""

    rouge_1: Interval
    rouge_2: Interval
    rouge_l: Interval
    bleu: float
    chrf: float


class _Words:
    """What `RougeScorer` asks for its words."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def rouge_scorer(kinds: Sequence[str] = _ROUGES) -> RougeScorer:
    """`rouge-score`'s own scorer over our words."""
    return RougeScorer(list(kinds), tokenizer=_Words())


def measure_overlap(
    texts: Sequence[str], references: Sequence[str], user_ids: Sequence[str], *, language: str, seed: int
) -> Overlap:
    """Texts of one language against their references, one for one."""
    scorer = rouge_scorer()
    scores = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    values = np.array([[score[kind].fmeasure for kind in _ROUGES] for score in scores], dtype=np.float64)
    rouge_1, rouge_2, rouge_l = mean_intervals(user_ids, values.reshape(-1, len(_ROUGES)), seed=seed)
    return Overlap(rouge_1, rouge_2, rouge_l, _bleu(texts, references, language), _chrf(texts, references))


def _bleu(texts: Sequence[str], references: Sequence[str], language: str) -> float:
    if is_unspaced(language):
        texts, references = ([" ".join(words_and_marks(text)) for text in side] for side in (texts, references))
        metric = BLEU(tokenize="none")
    else:
        metric = BLEU(tokenize="13a")
    return float(metric.corpus_score(list(texts), [list(references)]).score) / 100


def _chrf(texts: Sequence[str], references: Sequence[str]) -> float:
    return float(CHRF().corpus_score(list(texts), [list(references)]).score) / 100

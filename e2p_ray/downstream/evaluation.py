"""An evaluation: every measure of every method on the same pairs, with what each method costs.

Holds sums over users, bars and a few texts; never user embeddings, user ids or content ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import polars as pl
from pydantic import TypeAdapter

from e2p_ray.downstream.measures.bootstrap import Interval
from e2p_ray.downstream.measures.likelihood import (
    ALL,
    GainHistogram,
    HistoryGain,
    MethodScore,
    check_scores,
    controls_of,
    gain_histogram,
    gains_by_history,
    parts_of,
    score_methods,
    shuffled_over_constant,
    user_totals,
)
from e2p_ray.downstream.measures.methods import in_order
from e2p_ray.downstream.measures.ranking import Ranking, measure_ranking
from e2p_ray.downstream.measures.retrieval import LikelihoodMatrix, Retrieval, measure_retrieval
from e2p_ray.downstream.measures.texts import SampleTexts, TextMeasures, choose_samples, measure_texts
from e2p_ray.downstream.measures.verdict import Conclusion, conclude
from e2p_ray.downstream.pages.evaluation_lines import evaluation_lines


@dataclass(frozen=True, slots=True)
class MethodCost:
    """What one method costs; None where it was not measured.

    num_prompt_tokens: mean of a request, of which num_own_tokens are computed for it alone; latency_ms: of one request.
    """

    method: str
    num_trainable_parameters: int | None = None
    num_prompt_tokens: float | None = None
    num_own_tokens: float | None = None
    rows_per_s: float | None = None
    latency_ms: float | None = None


@dataclass(frozen=True, slots=True)
class DriftPoint:
    """Loss of the right user's soft token after the user embeddings drifted.

    kind: what was done to them, such as noise, later, refit; amount: their root mean square change in standard
    deviations. Where only some of the users could be measured: how many, and the loss of these without drift.
    """

    kind: str
    amount: float
    nll_per_token: float
    interval: Interval | None = None
    num_users: int | None = None
    nll_without: float | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All that `summarise` found; becomes JSON, a terminal table, or a page."""

    conclusion: Conclusion
    languages: tuple[str, ...]
    num_contents: int
    scores: tuple[MethodScore, ...]
    costs: tuple[MethodCost, ...]
    history: tuple[HistoryGain, ...]
    histograms: tuple[GainHistogram, ...]
    retrieval: tuple[Retrieval, ...]
    ranking: tuple[Ranking, ...]
    texts: tuple[TextMeasures, ...]
    samples: tuple[SampleTexts, ...]
    drift: tuple[DriftPoint, ...]
    about: dict[str, str]
    seed: int

    def score(self, method: str, part: str = ALL) -> MethodScore | None:
        """The likelihoods of one method on one part."""
        return next((score for score in self.scores if (score.part, score.method) == (part, method)), None)

    def cost(self, method: str) -> MethodCost:
        """What a method costs; an empty one when nobody measured it."""
        return next((cost for cost in self.costs if cost.method == method), MethodCost(method))

    def to_json(self) -> str:
        return TypeAdapter(Evaluation).dump_json(self, indent=1).decode() + "\n"

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        return TypeAdapter(cls).validate_json(text)

    def lines(self) -> str:
        """The verdict and the table of methods for a terminal, about 100 columns wide."""
        return "\n".join(evaluation_lines(self))


def summarise(
    scores: pl.DataFrame,
    costs: Iterable[MethodCost],
    *,
    retrieval: Sequence[LikelihoodMatrix] = (),
    texts: pl.DataFrame | None = None,
    ranking: pl.DataFrame | None = None,
    drift: Iterable[DriftPoint] = (),
    allow: Sequence[str] = (),
    about: Mapping[str, str],
    seed: int,
) -> Evaluation:
    """Measure everything that is given; the same input and seed give the same evaluation.

    scores: method, task, language, user_id, content_id, num_tokens, nll (nats, summed over the target's tokens),
    history_size (null where unknown), the same pairs under every method. texts: method, task, language, user_id,
    content_id, text, reference, title, body. ranking: method, impression_id, user_id, content_id, score, clicked.
    allow: names that may stand in any text. Raises RunError when there are no pairs.
    """
    check_scores(scores)
    method_scores: list[MethodScore] = []
    for part, rows in parts_of(scores):
        totals = user_totals(rows)
        method_scores += score_methods(part, totals, seed=seed)
    totals = user_totals(scores)
    controls = controls_of(totals)
    languages = tuple(sorted(scores["language"].unique()))
    order = in_order(scores["method"])
    return Evaluation(
        conclusion=conclude(method_scores, languages, shuffled_over_constant(totals, seed=seed)),
        languages=languages,
        num_contents=scores["content_id"].n_unique(),
        scores=tuple(method_scores),
        costs=tuple(sorted(costs, key=lambda cost: (cost.method not in order, cost.method))),
        history=tuple(bin_ for control in controls for bin_ in gains_by_history(totals, control, seed=seed)),
        histograms=tuple(gain_histogram(totals, control) for control in controls),
        retrieval=_retrieval(retrieval, seed),
        ranking=measure_ranking(ranking, seed=seed) if ranking is not None else (),
        texts=measure_texts(texts, allow=allow, seed=seed) if texts is not None else (),
        samples=choose_samples(texts, seed=seed) if texts is not None else (),
        drift=tuple(drift),
        about=dict(about),
        seed=seed,
    )


def _retrieval(matrices: Sequence[LikelihoodMatrix], seed: int) -> tuple[Retrieval, ...]:
    order = in_order(matrix.method for matrix in matrices)
    ordered = sorted(matrices, key=lambda matrix: (matrix.language, order.index(matrix.method)))
    return tuple(measure_retrieval(matrix, seed=seed) for matrix in ordered)

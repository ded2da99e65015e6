"""The tables of an evaluation's page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from e2p_ray.downstream.measures.likelihood import part_label, scores_of
from e2p_ray.downstream.measures.methods import RIGHT, label_of
from e2p_ray.downstream.pages.figures import ABSENT, count_text, gain_text, level_text, percent, score_text, share_text
from e2p_ray.downstream.pages.page import table

if TYPE_CHECKING:
    from e2p_ray.downstream.evaluation import DriftPoint, Evaluation, MethodCost
    from e2p_ray.downstream.measures.likelihood import MethodScore
    from e2p_ray.downstream.measures.ranking import Ranking
    from e2p_ray.downstream.measures.retrieval import Retrieval
    from e2p_ray.downstream.measures.texts import TextMeasures


_DRIFT_WORDS = {
    "noise": "noise added",
    "later": "later user embeddings",
    "refit": "refit space, by force",
}


def drift_label(kind: str) -> str:
    """What was done to the user embeddings; an unknown kind is shown as it is."""
    return _DRIFT_WORDS.get(kind, kind)


def some_users(point: DriftPoint) -> str:
    """On how many users a point was measured, and what they lose without drift; nothing where it was on all."""
    if point.num_users is None or point.nll_without is None:
        return ""
    return f"{point.num_users:,} users, {point.nll_without:.3f} without drift"


def methods_table(evaluation: Evaluation, part: str) -> str:
    """Quality beside cost, a line a method."""
    head = ["method", "loss", "right user gains", "users who gain", "trained", "prompt tokens", "rows/s", "latency"]
    units = ["", "nats a token", "nats a token", "", "parameters", "of them own", "", "ms"]
    scores = scores_of(evaluation.scores, part)
    rows = [_method_row(score, evaluation.cost(score.method)) for score in scores]
    main = [score.method for score in scores].index(RIGHT) if RIGHT in [score.method for score in scores] else None
    return table([over(name, unit) for name, unit in zip(head, units, strict=True)], rows, num_texts=1, main=main)


def _method_row(score: MethodScore, cost: MethodCost) -> list[str]:
    own = "" if cost.num_own_tokens is None else f"{count_text(cost.num_own_tokens)} own"
    return [
        over(label_of(score.method)),
        over(*level_text(score.nll_per_token)),
        over(*gain_text(score.gain)),
        over(*share_text(score.gaining_users)),
        count_text(cost.num_trainable_parameters),
        over(count_text(cost.num_prompt_tokens), own),
        count_text(cost.rows_per_s),
        count_text(cost.latency_ms),
    ]


def over(value: str, under: str = "") -> str:
    """A value above what qualifies it, as HTML."""
    return escape(value) + (f'<span class="under">{escape(under)}</span>' if under else "")


def retrieval_table(found: Iterable[Retrieval]) -> str:
    """Centred figures with their intervals, the raw top-1 and MRR, and chance."""
    head = [
        "method",
        "part",
        "texts × users",
        "top-1",
        "top-5",
        "MRR",
        "raw top-1",
        "raw MRR",
        "chance top-1, top-5, MRR",
    ]
    rows = [
        [
            over(label_of(one.method)),
            escape(part_label(one.language)),
            f"{one.num_texts:,} × {one.num_users:,}",
            over(*share_text(one.centred.top_1)),
            over(*share_text(one.centred.top_5)),
            over(*score_text(one.centred.mrr)),
            over(*share_text(one.raw.top_1)),
            over(*score_text(one.raw.mrr)),
            f"{percent(one.chance_top_1)}, {percent(one.chance_top_5)}, {one.chance_mrr:.3f}",
        ]
        for one in found
    ]
    return table(head, rows, num_texts=2)


def ranking_table(found: Iterable[Ranking]) -> str:
    """The four measures with intervals; an AUC of 0.5 is chance."""
    head = ["method", "AUC", "MRR", "NDCG@5", "NDCG@10", "impressions"]
    rows = [
        [
            over(label_of(one.method)),
            *(over(*score_text(value)) for value in (one.auc, one.mrr, one.ndcg_5, one.ndcg_10)),
            over(f"{one.num_impressions:,}", f"{one.num_left_out:,} left out"),
        ]
        for one in found
    ]
    return table(head, rows, num_texts=1)


def text_tables(found: Sequence[TextMeasures]) -> str:
    """Two tables of each language and task: nearness to the users' own texts; variety and faithfulness."""
    parts = dict.fromkeys((one.language, one.task) for one in found)
    shown = []
    for language, task in parts:
        own = [one for one in found if (one.language, one.task) == (language, task)]
        title = f"{task}, {part_label(language)}: {own[0].num_texts:,} texts a method"
        shown.append(f"<h3>{escape(title)}</h3>{_nearness_table(own)}{_variety_table(own)}")
    return "".join(shown)


def _nearness_table(found: Sequence[TextMeasures]) -> str:
    head = [
        "method",
        "ROUGE-1",
        "ROUGE-2",
        "ROUGE-L",
        "BLEU",
        "chrF",
        over("length", "characters off"),
        over("mean lengths", "of users, correlated"),
        "habits",
    ]
    rows = []
    for one in found:
        if one.overlap is None or one.likeness is None:
            continue
        near, like = one.overlap, one.likeness
        off = (
            f"{like.length_difference.value:.1f}",
            f"{like.length_difference.low:.1f}–{like.length_difference.high:.1f}",
        )
        correlation = ABSENT if like.length_correlation is None else f"r = {like.length_correlation:.2f}"
        rouge = (over(*score_text(value)) for value in (near.rouge_1, near.rouge_2, near.rouge_l))
        figures = (f"{near.bleu:.3f}", f"{near.chrf:.3f}", over(*off), correlation, over(*share_text(like.habits)))
        rows.append([over(label_of(one.method)), *rouge, *figures])
    return table(head, rows, num_texts=1)


def _variety_table(found: Sequence[TextMeasures]) -> str:
    head = ["method", "different", "distance", "distinct-2", "faithful", "foreign number", "foreign name", "empty"]
    rows = []
    for one in found:
        variety, faithful = one.variety, one.faithfulness
        rows.append(
            [
                over(label_of(one.method)),
                over(*share_text(variety.distinct if variety else None)),
                over(*score_text(variety.distance if variety else None)),
                over(*score_text(variety.distinct_2 if variety else None)),
                over(*share_text(faithful.faithful)),
                percent(faithful.foreign_numbers),
                percent(faithful.foreign_names),
                f"{faithful.num_empty:,}",
            ]
        )
    return table(head, rows, num_texts=1)


def drift_table(points: Iterable[DriftPoint]) -> str:
    """Every point that was measured."""
    rows = [
        [
            over(drift_label(point.kind), some_users(point)),
            f"{point.amount:.3g}",
            over(f"{point.nll_per_token:.3f}", level_text(point.interval)[1] if point.interval else ""),
        ]
        for point in points
    ]
    return table(["drift", over("amount", "standard deviations"), over("loss", "nats a token")], rows, num_texts=1)

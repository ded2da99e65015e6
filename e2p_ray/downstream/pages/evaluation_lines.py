"""An evaluation as text for a terminal: the verdict, then a table a part."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from e2p_ray.downstream.measures.likelihood import part_label, scores_of
from e2p_ray.downstream.measures.methods import label_of
from e2p_ray.downstream.pages.columns import aligned
from e2p_ray.downstream.pages.evaluation_tables import some_users
from e2p_ray.downstream.pages.figures import count_text, gain_text, level_text, percent, score_text, share_text

if TYPE_CHECKING:
    from e2p_ray.downstream.evaluation import Evaluation

_WIDTH = 100


def evaluation_lines(evaluation: Evaluation) -> Iterator[str]:
    """Line by line, about 100 columns wide."""
    for sentence in evaluation.conclusion.sentences:
        yield from textwrap.wrap(sentence, _WIDTH)
    for part in shown_parts(evaluation):
        yield ""
        yield from _part_lines(evaluation, part)
    for table in (_retrieval_lines, _ranking_lines, _text_lines, _drift_lines):
        lines = table(evaluation)
        if lines:
            yield ""
            yield from lines


def shown_parts(evaluation: Evaluation) -> list[str]:
    """All pairs first; a single language is the same as all, so it is not repeated."""
    parts = list(dict.fromkeys(score.part for score in evaluation.scores))
    alone = evaluation.languages if len(evaluation.languages) == 1 else ()
    return [part for part in parts if part not in alone]


def _part_lines(evaluation: Evaluation, part: str) -> list[str]:
    scores = scores_of(evaluation.scores, part)
    first = scores[0]
    lines = [
        f"{part_label(part)}: {first.num_pairs:,} pairs, {first.num_users:,} users, {first.num_tokens:,} target tokens"
    ]
    head = ["method", "nats/token", "right gains", "95 % interval", "users", "params", "prompt", "own", "rows/s", "ms"]
    rows = []
    for score in scores:
        cost = evaluation.cost(score.method)
        gain, bounds = gain_text(score.gain)
        rows.append(
            [
                label_of(score.method),
                level_text(score.nll_per_token)[0],
                gain,
                bounds,
                share_text(score.gaining_users)[0],
                count_text(cost.num_trainable_parameters),
                count_text(cost.num_prompt_tokens),
                count_text(cost.num_own_tokens),
                count_text(cost.rows_per_s),
                count_text(cost.latency_ms),
            ]
        )
    return lines + _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others, figures, to the right."""
    return aligned([head, *rows], num_left=1)


def _retrieval_lines(evaluation: Evaluation) -> list[str]:
    rows = []
    for found in evaluation.retrieval:
        size = f"{found.num_texts:,} x {found.num_users:,}"
        shares = [share_text(found.centred.top_1), share_text(found.centred.top_5)]
        chance = f"{percent(found.chance_top_1)}, {percent(found.chance_top_5)}"
        top_1, top_5 = (f"{value} ({bounds})" for value, bounds in shares)
        cells = [label_of(found.method), found.language, size, top_1, top_5, score_text(found.centred.mrr)[0], chance]
        rows.append(cells)
    head = ("which user?", "part", "texts x users", "top-1", "top-5", "MRR", "chance")
    return _table(head, rows) if rows else []


def _ranking_lines(evaluation: Evaluation) -> list[str]:
    rows = []
    for found in evaluation.ranking:
        values = [score_text(value)[0] for value in (found.auc, found.mrr, found.ndcg_5, found.ndcg_10)]
        rows.append([label_of(found.method), *values, score_text(found.auc)[1], f"{found.num_impressions:,}"])
    head = ("ranking clicks", "AUC", "MRR", "NDCG@5", "NDCG@10", "AUC, 95 %", "impressions")
    return _table(head, rows) if rows else []


def _text_lines(evaluation: Evaluation) -> list[str]:
    rows = []
    for found in evaluation.texts:
        overlap, likeness, variety = found.overlap, found.likeness, found.variety
        rouge = [overlap.rouge_1, overlap.rouge_2, overlap.rouge_l] if overlap else [None] * 3
        scores = [overlap.bleu, overlap.chrf] if overlap else []
        rows.append(
            [
                label_of(found.method),
                f"{found.task}, {found.language}",
                *(score_text(value)[0] for value in rouge),
                *(f"{value:.3f}" for value in scores),
                *["–"] * (2 - len(scores)),
                f"{likeness.length_difference.value:.1f}" if likeness else "–",
                score_text(variety.distinct if variety else None)[0],
                percent(found.faithfulness.faithful.value),
            ]
        )
    head = ("texts", "part", "R-1", "R-2", "R-L", "BLEU", "chrF", "|chars|", "distinct", "faithful")
    return _table(head, rows) if rows else []


def _drift_lines(evaluation: Evaluation) -> list[str]:
    rows = []
    for point in evaluation.drift:
        bounds = level_text(point.interval)[1] if point.interval else "–"
        kind = ", ".join(filter(None, (point.kind, some_users(point))))
        rows.append((kind, f"{point.amount:.3g}", f"{point.nll_per_token:.3f}", bounds))
    return _table(("drift", "amount", "nats/token", "95 % interval"), rows) if rows else []

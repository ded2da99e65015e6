"""Several evaluations beside each other: layouts, sizes, recipes. What does each gain, and what does it cost?"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

from e2p_ray.downstream.measures.likelihood import ALL, part_label
from e2p_ray.downstream.measures.methods import CONSTANT, RIGHT, SHUFFLED, label_of
from e2p_ray.downstream.pages.columns import aligned
from e2p_ray.downstream.pages.evaluation_tables import over
from e2p_ray.downstream.pages.figures import ABSENT, count_text, gain_text, level_text
from e2p_ray.downstream.pages.page import figure, grid, render_page, section, table
from e2p_ray.downstream.pages.plots import IntervalRow, interval_plot

if TYPE_CHECKING:
    from e2p_ray.downstream.evaluation import Evaluation
    from e2p_ray.downstream.measures.bootstrap import Interval

_GAIN = "nats a token gained by the right user's soft token"
_LOSS = "nats a token (less is better)"


def comparison_lines(evaluations: Mapping[str, Evaluation]) -> str:
    """A terminal table: the loss of the right user, and its gains over both controls, by part."""
    rows = [["layout", "part", "nats/token", "over shuffled", "95 %", "over constant", "95 %"]]
    for name, evaluation in evaluations.items():
        for part in _parts(evaluation):
            level = _level(evaluation, part)
            rows.append(
                [
                    name,
                    part,
                    level_text(level)[0] if level else ABSENT,
                    *gain_text(_gain(evaluation, part, SHUFFLED)),
                    *gain_text(_gain(evaluation, part, CONSTANT)),
                ]
            )
    return "\n".join(aligned(rows, num_left=2))


def render_comparison(evaluations: Mapping[str, Evaluation]) -> str:
    """A page: a table, and a plot of the gain over each control and of the loss for every part."""
    sections = [f"<h1>Which layout personalises best?</h1>{section('Side by side', _table(evaluations) + _NOTE)}"]
    for part in dict.fromkeys(part for evaluation in evaluations.values() for part in _parts(evaluation)):
        sections.append(section(f"Compared on {part_label(part)}", grid(_plots(evaluations, part))))
    return render_page("Comparison of evaluations", sections)


_NOTE = (
    '<p class="note">Gain: how much better the right user\'s soft token does than the control of the column, on '
    "the same pairs. Intervals: 95 %, from resampling users. Compare losses only between evaluations of the same "
    "pairs.</p>"
)


def _plots(evaluations: Mapping[str, Evaluation], part: str) -> list[str]:
    plots = []
    for control in (SHUFFLED, CONSTANT):
        gains = {name: _gain(evaluation, part, control) for name, evaluation in evaluations.items()}
        plots.append(_plot(f"Gain over the {label_of(control)}", gains, _GAIN, from_zero=True))
    levels = {name: _level(evaluation, part) for name, evaluation in evaluations.items()}
    return [*plots, _plot("Loss of the right user", levels, _LOSS, from_zero=False)]


def _plot(title: str, values: Mapping[str, Interval | None], x_title: str, *, from_zero: bool) -> str:
    rows = [IntervalRow(name, value, "peer") for name, value in values.items() if value is not None]
    if not rows:
        return ""
    return figure(title, interval_plot(rows, label=title, x_title=x_title, from_zero=from_zero))


def _table(evaluations: Mapping[str, Evaluation]) -> str:
    head = [
        "layout",
        "part",
        over("loss", "nats a token"),
        over("over shuffled user", "nats a token"),
        over("over constant token", "nats a token"),
        over("trained", "parameters"),
        over("prompt tokens", "own"),
    ]
    rows = [
        [*_name_cells(name, evaluation, part), *_figure_cells(evaluation, part)]
        for name, evaluation in evaluations.items()
        for part in _parts(evaluation)
    ]
    return table(head, rows, num_texts=2)


def _name_cells(name: str, evaluation: Evaluation, part: str) -> tuple[str, str]:
    """A layout is named, with its verdict, in its first row only."""
    verdict = str(evaluation.conclusion.finding).replace("_", " ")
    return over(name, verdict) if part == ALL else "", escape(part_label(part))


def _figure_cells(evaluation: Evaluation, part: str) -> tuple[str, ...]:
    level, cost = _level(evaluation, part), evaluation.cost(RIGHT)
    counts = (cost.num_trainable_parameters, cost.num_own_tokens)
    return (
        over(*level_text(level)) if level else ABSENT,
        over(*gain_text(_gain(evaluation, part, SHUFFLED))),
        over(*gain_text(_gain(evaluation, part, CONSTANT))),
        *(count_text(count) if part == ALL else "" for count in counts),
    )


def _parts(evaluation: Evaluation) -> list[str]:
    return [ALL, *evaluation.languages] if len(evaluation.languages) > 1 else [ALL]


def _gain(evaluation: Evaluation, part: str, control: str) -> Interval | None:
    score = evaluation.score(control, part)
    return score.gain if score else None


def _level(evaluation: Evaluation, part: str) -> Interval | None:
    score = evaluation.score(RIGHT, part)
    return score.nll_per_token if score else None

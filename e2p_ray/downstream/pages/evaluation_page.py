"""The page of an evaluation: the verdict, quality beside cost, plots. Every text in it is data and is escaped."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

from e2p_ray.downstream.measures.likelihood import ALL, part_label, scores_of
from e2p_ray.downstream.measures.methods import CONSTANT, RIGHT, SHUFFLED, explanation_of, label_of
from e2p_ray.downstream.measures.verdict import Finding
from e2p_ray.downstream.pages.evaluation_lines import shown_parts
from e2p_ray.downstream.pages.evaluation_tables import (
    drift_label,
    drift_table,
    methods_table,
    ranking_table,
    retrieval_table,
    text_tables,
)
from e2p_ray.downstream.pages.figures import gain_text, level_text
from e2p_ray.downstream.pages.page import figure, grid, render_page, section, tiles
from e2p_ray.downstream.pages.plots import (
    IntervalRow,
    Line,
    far_off,
    interval_plot,
    line_chart,
    signed_histogram,
    too_far,
)

if TYPE_CHECKING:
    from e2p_ray.downstream.evaluation import DriftPoint, Evaluation
    from e2p_ray.downstream.measures.bootstrap import Interval
    from e2p_ray.downstream.measures.texts import SampleTexts

_PILLS = {
    Finding.PERSONALISES: ("yes", "personalises"),
    Finding.NOT_SHOWN: ("", "personalisation not shown"),
    Finding.HARMS: ("no", "does not personalise"),
    Finding.NOT_MEASURED: ("", "not measured"),
}
_LOSS = "nats a token (less is better)"
_GAIN = "nats a token gained by the right user's soft token"
_DRIFT = "change in standard deviations (root mean square)"

_LOSS_NOTE = """
Loss: negative log-likelihood of the users' own texts. Gain: how much better the right user's soft token does than the
method of the line, on the same pairs. Intervals: 95 %, from resampling users; all losses depend alike on which users
are drawn, so they overlap even where the gain is clear. Users who gain: the share of users whose
texts the right soft token makes likelier. Own tokens: those of the prompt that are computed for one request alone; the
others are shared by all users of a content.
"""
_RETRIEVAL_NOTE = """
Users are ranked by the likelihood they give the text, less their mean over all texts, so that a soft token that suits
every text does not win. Raw: without taking that mean. Equal likelihoods share their ranks.
"""
_RANKING_NOTE = """
The candidates of each impression, ranked by the mean log-likelihood of their texts a token. Gain: what a soft token
adds to that without one, since a text that is likely anyway says nothing about the user. Impressions of one class are
left out.
"""
_TEXTS_NOTE = """
ROUGE and BLEU count words; in Japanese characters, with runs of Latin letters and digits kept whole. Length: mean
difference from the user's own text, and the correlation of users' mean lengths. Habits: agreement with the user's own
text on questions, exclamations, quotations, numbers and colons. Different: 0 % when all users of a content get one
text, 100 % when no two get the same. Distance: 1 − ROUGE-L between two users' texts. Distinct-2: different pairs of
words among all of one content. Faithful: all numbers and names occur in the content, or are allowed by checks.allow.
"""
_DRIFT_NOTE = """
Dashed: the losses without drift, of all users; where a point is of some, the table has theirs. Intervals are in the
table only: they show how users differ, which is the same for all points.
"""
_SAMPLES_NOTE = "Drawn at random, at most one user a content."


def render_evaluation(evaluation: Evaluation) -> str:
    """The whole page."""
    return render_page(
        "Evaluation: does it personalise?",
        (
            _head(evaluation),
            _tiles(evaluation),
            _methods(evaluation),
            _gains(evaluation),
            _retrieval(evaluation),
            _texts(evaluation),
            _samples(evaluation),
            _drift(evaluation),
            _about(evaluation),
        ),
    )


def _head(evaluation: Evaluation) -> str:
    kind, words = _PILLS[evaluation.conclusion.finding]
    first, *others = evaluation.conclusion.sentences
    rest = "".join(f"<p>{escape(sentence)}</p>" for sentence in others)
    pill = f'<span class="pill {kind}">{escape(words)}</span>' if kind else f'<span class="pill">{escape(words)}</span>'
    return f'<h1>Does it personalise? {pill}</h1><section><p class="verdict">{escape(first)}</p>{rest}</section>'


def _tiles(evaluation: Evaluation) -> str:
    whole = scores_of(evaluation.scores, ALL)
    if not whole:
        return ""
    return tiles(
        (
            ("pairs of user and content", f"{whole[0].num_pairs:,}"),
            ("users", f"{whole[0].num_users:,}"),
            ("contents", f"{evaluation.num_contents:,}"),
            ("target tokens", f"{whole[0].num_tokens:,}"),
        )
    )


def _methods(evaluation: Evaluation) -> str:
    parts = shown_parts(evaluation)
    tables, plots = [], []
    for part in parts:
        title = part_label(part)
        heading = f"<h3>{escape(title)}</h3>" if len(parts) > 1 else ""
        tables.append(heading + methods_table(evaluation, part))
        plots += _method_plots(evaluation, part)
    body = "".join(tables) + _note(_LOSS_NOTE)
    return section("Quality beside cost", body) + section("The same as pictures", grid(plots))


def _method_plots(evaluation: Evaluation, part: str) -> list[str]:
    """Losses, and gains of the right user over the others, of one part."""
    scores = scores_of(evaluation.scores, part)
    left_out = far_off({score.method: score.gain.value for score in scores if score.gain}) - {SHUFFLED}
    far = [score for score in scores if score.method in left_out]
    near = [score for score in scores if score not in far]
    title = part_label(part)
    rows = [_row(score.method, score.nll_per_token) for score in near]
    plot = interval_plot(rows, label=f"loss by method, {title}", x_title=_LOSS)
    note = too_far(f"{label_of(score.method)} {level_text(score.nll_per_token)[0]}" for score in far)
    plots = [figure(f"Loss by method, {title}", plot, note=note)]
    gains = [
        IntervalRow(label_of(score.method), score.gain, "main" if score.method == SHUFFLED else "")
        for score in near
        if score.gain is not None
    ]
    if gains:
        plot = interval_plot(gains, label=f"gain of the right user, {title}", x_title=_GAIN, from_zero=True)
        note = too_far(f"{label_of(score.method)} {gain_text(score.gain)[0]}" for score in far)
        plots.append(figure(f"Gain of the right user over the others, {title}", plot, note=note))
    return plots


def _row(method: str, level: Interval) -> IntervalRow:
    return IntervalRow(label_of(method), level, "main" if method == RIGHT else "")


def _gains(evaluation: Evaluation) -> str:
    parts = []
    for bars in evaluation.histograms:
        rival, number = label_of(bars.control), sum(bars.counts)
        title = f"Gain of each user over the {rival}"
        plot = signed_histogram(bars.counts, bars.start, bars.width, label=title, x_title=_GAIN, y_title="users")
        parts.append(figure(title, plot, note=f"{bars.num_gaining:,} of {number:,} users gain."))
    for control in dict.fromkeys(found.control for found in evaluation.history):
        rows = [
            IntervalRow(f"{_span(found.low, found.high)} ({found.num_users:,} users)", found.gain, "peer")
            for found in evaluation.history
            if found.control == control
        ]
        title = f"Gain over the {label_of(control)} by length of history"
        plot = interval_plot(rows, label=title, x_title=_GAIN, from_zero=True)
        parts.append(figure(title, plot, note="Items that the user embedding is made of, and users with so many."))
    return section("Who gains", grid(parts)) if parts else ""


def _span(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _retrieval(evaluation: Evaluation) -> str:
    parts = []
    if evaluation.retrieval:
        table = retrieval_table(evaluation.retrieval)
        parts.append(section("Given a text: which user is it for?", table + _note(_RETRIEVAL_NOTE)))
    if evaluation.ranking:
        table = ranking_table(evaluation.ranking)
        parts.append(section("Does it rank what was clicked?", table + _note(_RANKING_NOTE)))
    return "".join(parts)


def _texts(evaluation: Evaluation) -> str:
    if not evaluation.texts:
        return ""
    return section("The written texts", text_tables(evaluation.texts) + _note(_TEXTS_NOTE))


def _samples(evaluation: Evaluation) -> str:
    if not evaluation.samples:
        return ""
    return section("Texts side by side", grid(_sample(sample) for sample in evaluation.samples) + _note(_SAMPLES_NOTE))


def _sample(sample: SampleTexts) -> str:
    language = escape(sample.language)
    written = {"the user's own": sample.reference} | {label_of(name): text for name, text in sample.texts.items()}
    rows = "".join(
        f'<tr><td class="id">{escape(name)}</td><td lang="{language}">{escape(text)}</td></tr>'
        for name, text in written.items()
    )
    return (
        f'<div class="sample"><div class="label">{escape(sample.task)} · {language}</div>'
        f'<div class="title" lang="{language}">{escape(sample.title)}</div><table>{rows}</table></div>'
    )


def _drift(evaluation: Evaluation) -> str:
    if not evaluation.drift:
        return ""
    by_kind: dict[str, list[DriftPoint]] = {}
    for point in sorted(evaluation.drift, key=lambda point: point.amount):
        by_kind.setdefault(point.kind, []).append(point)
    curves = [
        Line(drift_label(kind), tuple((point.amount, point.nll_per_token) for point in points))
        for kind, points in by_kind.items()
    ]
    levels = {
        label_of(name): score.nll_per_token.value
        for name in (RIGHT, SHUFFLED, CONSTANT)
        if (score := evaluation.score(name)) is not None
    }
    title = "Loss as user embeddings drift"
    chart = line_chart(curves, label=title, x_title=_DRIFT, y_title=_LOSS, levels=levels)
    parts = [figure(title, chart, note=" ".join(_DRIFT_NOTE.split())), drift_table(evaluation.drift)]
    return section("When user embeddings change", grid(parts))


def _note(text: str) -> str:
    return f'<p class="note">{escape(" ".join(text.split()))}</p>'


def _about(evaluation: Evaluation) -> str:
    methods = list(dict.fromkeys(score.method for score in evaluation.scores))
    said = "".join(
        f"<tr><th>{escape(label_of(method))}</th><td>{escape(explanation_of(method))}</td></tr>"
        for method in methods
        if explanation_of(method)
    )
    facts = "".join(_fact(name, value) for name, value in _facts(evaluation))
    return section("What was compared", f"<table>{said}</table>") + section(
        "Where it comes from", f"<table>{facts}</table>"
    )


def _facts(evaluation: Evaluation) -> Iterator[tuple[str, str]]:
    yield from evaluation.about.items()
    yield "seed", f"{evaluation.seed}"


def _fact(name: str, value: str) -> str:
    return f"<tr><th>{escape(name)}</th><td><code>{escape(value)}</code></td></tr>"

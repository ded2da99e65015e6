"""The page of an evaluation: the verdict, quality beside cost, plots. Every text in it is data and is escaped."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

from e2p_ray.downstream.measures.likelihood import ALL, scores_of
from e2p_ray.downstream.measures.methods import CONSTANT, RIGHT, SHUFFLED, explanation_of, label_of
from e2p_ray.downstream.measures.verdict import Finding
from e2p_ray.downstream.pages.evaluation_lines import shown_parts
from e2p_ray.downstream.pages.evaluation_tables import (
    drift_table,
    methods_table,
    ranking_table,
    retrieval_table,
    text_tables,
)
from e2p_ray.downstream.pages.page import figure, grid, render_page, section, tiles
from e2p_ray.downstream.pages.plots import IntervalRow, Line, interval_plot, line_chart, signed_histogram

if TYPE_CHECKING:
    from e2p_ray.downstream.evaluation import DriftPoint, Evaluation
    from e2p_ray.downstream.measures.texts import SampleTexts

_PILLS = {
    Finding.PERSONALISES: ("yes", "personalises"),
    Finding.NOT_SHOWN: ("", "personalisation not shown"),
    Finding.HARMS: ("no", "does not personalise"),
    Finding.NOT_MEASURED: ("", "not measured"),
}
_LOSS = "nats a token (less is better)"
_GAIN = "nats a token gained by the right user's soft token"

_LOSS_NOTE = """
Loss: negative log-likelihood of the users' own texts. Gain: how much better the right user's soft token does than the
method of the line, on the same pairs. Intervals: 95 %, from resampling users. Users who gain: the share of users whose
texts the right soft token makes likelier. Own tokens: those of the prompt that are computed for one request alone; the
others are shared by all users of a content.
"""
_RETRIEVAL_NOTE = """
Users are ranked by the likelihood they give the text, less their mean over all texts, so that a soft token that suits
every text does not win. Raw: without taking that mean. Equal likelihoods share their ranks.
"""
_RANKING_NOTE = """
The candidates of each impression, ranked by the method's own likelihood. Impressions of one class are left out.
"""
_TEXTS_NOTE = """
ROUGE and BLEU count words; in Japanese characters, with runs of Latin letters and digits kept whole. Length: mean
difference from the user's own text, and the correlation of users' mean lengths. Habits: agreement with the user's own
text on questions, exclamations, quotations, numbers and colons. Different: 0 % when all users of a content get one
text, 100 % when no two get the same. Distance: 1 − ROUGE-L between two users' texts. Distinct-2: different pairs of
words among all of one content. Faithful: all numbers and names occur in the content.
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


def _part_name(part: str) -> str:
    """How a part is called in headings."""
    if part == ALL:
        return "all pairs"
    return {"en": "English", "ja": "Japanese"}.get(part, part)


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
        title = _part_name(part)
        heading = f"<h3>{escape(title)}</h3>" if len(parts) > 1 else ""
        tables.append(heading + methods_table(evaluation, part))
        rows = [
            IntervalRow(label_of(score.method), score.nll_per_token, "main" if score.method == RIGHT else "")
            for score in scores_of(evaluation.scores, part)
        ]
        plot = interval_plot(rows, label=f"loss by method, {title}", x_title=_LOSS)
        plots.append(figure(f"Loss by method, {title}", plot))
        plots.append(_gain_plot(evaluation, part, title))
    body = "".join(tables) + _note(_LOSS_NOTE)
    return section("Quality beside cost", body) + section("The same as pictures", grid(plots))


def _gain_plot(evaluation: Evaluation, part: str, title: str) -> str:
    rows = [
        IntervalRow(f"over {label_of(score.method)}", score.gain, "main" if score.method == SHUFFLED else "")
        for score in scores_of(evaluation.scores, part)
        if score.gain is not None
    ]
    if not rows:
        return ""
    plot = interval_plot(rows, label=f"gain of the right user, {title}", x_title=_GAIN, from_zero=True)
    return figure(f"Gain of the right user, {title}", plot)


def _gains(evaluation: Evaluation) -> str:
    parts = []
    for bars in evaluation.histograms:
        rival, number = label_of(bars.control), sum(bars.counts)
        title = f"Gain of each user over the {rival}"
        plot = signed_histogram(bars.counts, bars.start, bars.width, label=title, x_title=_GAIN, y_title="users")
        parts.append(figure(title, plot, note=f"{bars.num_gaining:,} of {number:,} users gain."))
    for control in dict.fromkeys(found.control for found in evaluation.history):
        rows = [
            IntervalRow(f"{_span(found.low, found.high)} ({found.num_users:,} users)", found.gain, "main")
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
    known = [score for name in (RIGHT, SHUFFLED, CONSTANT) if (score := evaluation.score(name)) is not None]
    parts = []
    if curves := [_drift_line(kind, points) for kind, points in by_kind.items() if len(points) > 1]:
        title = "Loss as user embeddings drift"
        levels = {label_of(score.method): score.nll_per_token.value for score in known}
        chart = line_chart(curves, label=title, x_title="amount of drift", y_title=_LOSS, levels=levels)
        parts.append(figure(title, chart))
    single = [points[0] for points in by_kind.values() if len(points) == 1]
    if shown := [IntervalRow(point.kind, point.interval) for point in single if point.interval is not None]:
        title = "Loss with other user embeddings"
        rows = [
            IntervalRow(label_of(score.method), score.nll_per_token, "main" if score.method == RIGHT else "")
            for score in known
        ]
        parts.append(figure(title, interval_plot([*rows, *shown], label=title, x_title=_LOSS)))
    return section("When user embeddings change", grid([*parts, drift_table(evaluation.drift)]))


def _drift_line(kind: str, points: list[DriftPoint]) -> Line:
    bounds = tuple((point.interval.low, point.interval.high) for point in points if point.interval is not None)
    places = tuple((point.amount, point.nll_per_token) for point in points)
    return Line(kind, places, bounds if len(bounds) == len(places) else ())


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

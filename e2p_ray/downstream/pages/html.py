"""report.html: one file without scripts or anything from elsewhere. Every text in it is data and is escaped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from e2p_ray.downstream.pages.charts import bar_chart, histogram, stacked
from e2p_ray.downstream.pages.page import grid, render_page, section, tiles
from e2p_ray.schema import Status

if TYPE_CHECKING:
    from e2p_ray.downstream.report import Report, Sample

_STATUS_WORDS = {
    str(Status.OK): "personalised",
    str(Status.FALLBACK): "fallback",
    str(Status.SUPPRESSED): "suppressed: the user's own choice",
    "dead": "dead letter",
}


def render_html(report: Report) -> str:
    """The whole page."""
    sections = (
        _head(report),
        _tiles(report),
        _samples(report.samples),
        _outcome(report),
        _update(report),
        _lengths(report),
        _throughput(report),
        _origin(report),
    )
    return render_page(f"Run {report.run_id}", sections)


def _head(report: Report) -> str:
    if report.version is None:
        state = '<span class="pill">not published</span>'
    else:
        state = f'<span class="pill yes">published as version {report.version.version}</span>'
        if report.version.num_untitled:
            state += f" without {report.version.num_untitled:,} rows of users who opted out: there is no title to show"
    when = f"{_minute(report.started_at)} to {_minute(report.finished_at)} UTC" if report.started_at else ""
    return f'<h1>Run <code>{escape(report.run_id)}</code></h1><p class="soft">{escape(when)} {state}</p>'


def _minute(moment: str) -> str:
    return moment[:16].replace("T", " ")


def _tiles(report: Report) -> str:
    share = report.statuses.get(str(Status.OK), 0) / max(report.num_requests, 1)
    named = {
        "requests": f"{report.num_requests:,}",
        "personalised": f"{share:.1%}",
        "dead letters": f"{report.num_dead_letters:,}",
        "contents": f"{report.num_contents:,}",
        "users": f"{report.num_users:,}",
        "rows a second": f"{report.rows_per_s:,.1f}",
        "tokens a second": f"{report.tokens_per_s:,.0f}",
        "sharing ratio": f"{report.sharing_ratio:,.1f}x",
    }
    return tiles(named.items())


def _samples(samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    return section("One content, different users", grid(_sample(sample) for sample in samples))


def _sample(sample: Sample) -> str:
    language = escape(sample.language)
    rows = "".join(
        f'<tr><td class="id">{escape(text.user_id)}</td><td lang="{language}">{escape(text.text)}</td></tr>'
        for text in sample.texts
    )
    return (
        f'<div class="sample"><div class="label">{escape(sample.task)} · {language} · '
        f"<code>{escape(sample.content_id)}</code> · original title</div>"
        f'<div class="title" lang="{language}">{escape(sample.title)}</div><table>{rows}</table></div>'
    )


def _outcome(report: Report) -> str:
    counts = {str(status): report.statuses.get(str(status), 0) for status in Status} | {"dead": report.num_dead_letters}
    total = max(sum(counts.values()), 1)
    words = {kind: f"{_STATUS_WORDS[kind]}: {number:,} ({number / total:.1%})" for kind, number in counts.items()}
    bar = stacked(
        [(kind, words[kind], number / total) for kind, number in counts.items()], label="; ".join(words.values())
    )
    keys = "".join(f'<span><i class="{kind}"></i>{escape(said)}</span>' for kind, said in words.items())
    dead = Counter(report.plan_dead_letters) + Counter(report.run_dead_letters)
    tables = (
        _counts_table("Reasons of fallbacks and suppressed rows", "reason", report.reasons),
        _counts_table("Dead letters", "code", dead),
        _counts_table("Where the texts come from", "arm", report.arms),
        _counts_table("Tasks", "task", report.tasks),
    )
    return section("What became of the requests", f'{bar}<div class="key">{keys}</div>{grid(tables)}')


def _update(report: Report) -> str:
    """What the run changed of the table that was published before."""
    if not report.is_update:
        return ""
    causes = _counts_table("Why requests needed a new text", "cause", report.causes)
    kinds = (
        ("written", report.num_rows_generated),
        ("carried over", report.num_carried),
        ("removed", report.num_removed),
        ("deferred", report.num_deferred),
        ("written, other than before", report.num_drafts - report.num_texts_kept),
        ("written, the same as before", report.num_texts_kept),
    )
    rows = [*((name, f"{number:,}") for name, number in kinds), *_saved(report)]
    return section("What changed", grid((f"<div><h3>Rows</h3>{_table(('rows', 'number'), rows)}</div>", causes)))


def _saved(report: Report) -> list[tuple[str, str]]:
    """How drafts fared, and the time that they and carried rows saved; nothing without either."""
    rows = []
    if report.num_draft_tokens:
        accepted = f"{report.num_accepted_tokens:,} of {report.num_draft_tokens:,} ({report.acceptance:.1%})"
        rows.append(("draft tokens accepted", accepted))
    saved = {"carried rows": report.estimated_saved_by_carrying_s, "drafts": report.estimated_saved_by_drafts_s}
    for name, seconds_s in saved.items():
        if seconds_s is not None:
            rows.append((f"seconds saved by {name}, estimated at this run's pace", f"about {seconds_s:,.1f}"))
    return rows


def _counts_table(title: str, name: str, counts: Mapping[str, int]) -> str:
    if not counts:
        return ""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    body = [(key.replace("_", " "), f"{number:,}") for key, number in ordered]
    return f"<div><h3>{escape(title)}</h3>{_table((name, 'rows'), body)}</div>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose last column holds numbers."""

    def line(cells: Sequence[str], tag: str) -> str:
        *texts, number = cells
        shown = "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts)
        return f'<tr>{shown}<{tag} class="number">{escape(number)}</{tag}></tr>'

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _lengths(report: Report) -> str:
    charts = []
    for task, languages in report.lengths.items():
        for language, counts in languages.items():
            number = sum(counts.values())
            mean = sum(length * count for length, count in counts.items()) / number
            title = f"{task}, {language}: {number:,} texts, {mean:,.0f} characters on average"
            chart = histogram(counts, label=title, unit="characters")
            charts.append(f"<div><h3>{escape(title)}</h3>{chart}</div>")
    return section("Lengths", grid(charts)) if charts else ""


def _throughput(report: Report) -> str:
    if not report.rates:
        return ""
    values = [rate.rows_per_s for rate in report.rates]
    said = [f"after {rate.start_s:,.0f} s: {rate.rows_per_s:,.1f} rows/s" for rate in report.rates]
    size = report.rates[1].start_s - report.rates[0].start_s if len(report.rates) > 1 else 0.0
    end = f"{report.rates[-1].start_s + size:,.0f} s"
    chart = bar_chart(values, said, label="rows a second over the run", axis=("0 s", end))
    rows = (
        ("prompt tokens, if nothing were shared", f"{report.num_prompt_tokens:,}"),
        ("prompt tokens run through the model", f"{report.num_computed_tokens:,}"),
        ("output tokens", f"{report.num_output_tokens:,}"),
        ("completions whose content was cut, second tries and unpersonalised ones too", f"{report.num_truncated:,}"),
        ("groups / shards", f"{report.num_groups:,} / {report.num_shards:,}"),
        ("workers", f"{report.num_workers:,}"),
        ("seconds at work", f"{report.generating_s:,.1f}"),
        *(() if report.is_update else _saved(report)),
    )
    left, right = f"<div><h3>Rows a second</h3>{chart}</div>", f"<div>{_table(('work', 'number'), rows)}</div>"
    return section("Throughput and sharing", grid((left, right)))


def _origin(report: Report) -> str:
    ids = {
        "table": report.table_uri,
        "plan": report.plan_uri,
        "projector": report.projector_id,
        "base model": report.base_model_id,
        "embedding space": report.embedding_space,
        "candidates": f"{report.num_candidates:,} ({report.num_duplicates:,} duplicates)",
    }
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td><code>{escape(value)}</code></td></tr>" for name, value in ids.items()
    )
    config = escape(json.dumps(report.config, ensure_ascii=False, indent=2))
    details = f"<details><summary>Configuration</summary><pre>{config}</pre></details>"
    return section("Where it comes from", f"<table>{rows}</table>{details}")

"""A run's report as a few lines for a terminal."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from e2p_ray.schema import Status

if TYPE_CHECKING:
    from e2p_ray.downstream.report import Report


def render_terminal(report: Report) -> str:
    """The report as a compact text of a few lines."""
    written = sum(report.statuses.values())
    lines = [f"run {report.run_id}: {report.num_requests:,} requests, {report.num_contents:,} contents"]
    for status in Status:
        number = report.statuses.get(status, 0)
        lines.append(f"  {status:<12}{number:>12,}  {number / max(report.num_requests, 1):>7.1%}")
    lines.append(
        f"  {'dead letter':<12}{report.num_dead_letters:>12,}  "
        f"{report.num_dead_letters / max(report.num_requests, 1):>7.1%}"
    )
    dead = Counter(report.plan_dead_letters) + Counter(report.run_dead_letters)
    for title, counts in (("reasons", report.reasons), ("dead letters", dead), ("arms", report.arms)):
        if counts:
            ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
            lines.append(f"{title}: " + ", ".join(f"{name} {number:,}" for name, number in ordered))
    lines += _update_lines(report) + _draft_lines(report)
    lines.append(
        f"speed: {report.rows_per_s:,.1f} rows/s, {report.tokens_per_s:,.0f} tokens/s "
        f"over {report.generating_s:,.1f} s on {report.num_workers} worker(s)"
    )
    lines.append(
        f"sharing: {report.sharing_ratio:,.1f}x ({report.num_prompt_tokens:,} prompt tokens for the price of "
        f"{report.num_computed_tokens:,})"
    )
    if report.version is None:
        lines.append(f"not published: {written:,} rows wait for jobs.publish")
    else:
        lines.append(
            f"published: {report.version.num_rows:,} rows, version {report.version.version} of {report.table_uri}"
        )
        if report.version.num_untitled:
            lines.append(
                f"left out: {report.version.num_untitled:,} rows of users who opted out, without a title to show "
                "instead (dead letters of the run). Run jobs.generate again to write them"
            )
    lines.append(f"report: {report.table_uri.removesuffix('/generations')}/runs/{report.run_id}/report.html")
    return "\n".join(lines)


def _update_lines(report: Report) -> list[str]:
    """What a run changed of the table that was published before it; nothing for any other run."""
    if not report.is_update:
        return []
    parts = (
        f"{report.num_rows_generated:,} rows written, {report.num_carried:,} carried over",
        f"{report.num_removed:,} removed, {report.num_deferred:,} deferred",
    )
    lines = [f"update: {', '.join(parts)}"]
    if report.causes:
        lines.append("causes: " + ", ".join(f"{name} {number:,}" for name, number in report.causes.items()))
    if report.num_deferred:
        lines.append(f"left: {report.num_deferred:,} requests. Run the same command again to go on with them")
    return lines


def _draft_lines(report: Report) -> list[str]:
    """How drafts fared, those that other users' texts made as well, and the time saved; nothing without either."""
    lines, parts = [], []
    if report.num_drafts:
        num_changed = report.num_drafts - report.num_texts_kept
        parts.append(f"{num_changed:,} texts changed, {report.num_texts_kept:,} are the same")
    if report.num_draft_tokens:
        parts.append(f"{report.acceptance:.1%} of {report.num_draft_tokens:,} draft tokens accepted")
    if parts:
        lines.append(f"drafts: {'; '.join(parts)}")
    saved = {"carried rows": report.estimated_saved_by_carrying_s, "drafts": report.estimated_saved_by_drafts_s}
    said = [f"about {seconds_s:,.1f} s by {name}" for name, seconds_s in saved.items() if seconds_s is not None]
    if said:
        lines.append(f"time saved, estimated at this run's pace: {', '.join(said)}")
    return lines

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from e2p_ray.commit import PublishedVersion, Run, ShardStats, commit_shard, open_run, read_markers
from e2p_ray.downstream.pages.charts import histogram, number_text, stacked
from e2p_ray.downstream.report import Report, build_report, read_report, render_html, render_terminal, write_report
from e2p_ray.plan import Plan, make_plan, read_shard
from e2p_ray.schema import Arm, DeadLetter, ErrorCode, FinishReason, Generation, Group, Reason, Request, Status
from e2p_ray.storage import Storage
from jobs.tables import table_text, width
from tests.small_job import DIM, SPACE, contents_table, write_small_job

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "<script>document.title='owned'</script>\"'&<img src=x onerror=alert(1)>"
_START = datetime(2026, 3, 2, 6, 0, tzinfo=UTC)


def _generation(request: Request, group: Group, run: Run) -> Generation:
    user_id, content_id, task = request.key
    personal = request.reason is None
    text = f"{group.content.title} {int(user_id[-4:]) % 4}" if personal else group.content.title
    suppressed = request.reason is Reason.OPTED_OUT
    return Generation(
        user_id=user_id,
        content_id=content_id,
        task=task,
        text=text,
        status=Status.OK if personal else Status.SUPPRESSED if suppressed else Status.FALLBACK,
        reason=request.reason,
        personalized=personal,
        arm=Arm.SOFT_TOKEN if personal else Arm.TITLE,
        num_prompt_tokens=100,
        num_output_tokens=8,
        mean_logprob=-1.0,
        finish_reason=FinishReason.END_TOKEN,
        fingerprint="f",
        projector_id=run.projector_id,
        base_model_id=run.base_model_id,
        prompt_id="p",
        embedding_space=SPACE,
        run_id=run.run_id,
        generated_at=_START,
    )


def _commit_all(storage: Storage, run: Run, *, carries_last: bool = False, **drafts: int) -> Counter[str]:
    """Every shard with made-up texts, its first request a dead letter; what was committed, by status.

    `carries_last`: the rows of the last shard are an earlier run's. `drafts`: more of every other shard's statistics.
    """
    committed: Counter[str] = Counter()
    for number, shard_id in enumerate(run.shard_ids):
        groups = read_shard(storage, run.plan_uri, shard_id)
        rows = [_generation(request, group, run) for group in groups for request in group.requests]
        first = rows.pop(0)
        written = next(at for at, row in enumerate(rows) if row.status is Status.OK)
        rows[written] = replace(rows[written], reason=Reason.TOO_LONG)  # its first text was; its second is the row's
        letter = DeadLetter(*first.key, ErrorCode.NON_FINITE_LOGITS, "made up", shard_id, run.run_id)
        is_carried = carries_last and shard_id == run.shard_ids[-1]
        more = {"num_carried": len(rows)} if is_carried else drafts
        stats = ShardStats(
            num_requests=len(rows) + 1,
            num_prompt_tokens=100 * (len(rows) + 1),
            num_computed_tokens=20 * (len(rows) + 1),
            num_output_tokens=0 if is_carried else 8 * len(rows),
            num_truncated=1,
            seconds_s=2.0,
            started_at=_START + timedelta(seconds=number // 2),
            finished_at=_START + timedelta(seconds=number // 2 + 2),
            worker="" if is_carried else f"host:{number % 2}",
            **more,
        )
        commit_shard(storage, run, shard_id, rows, [letter], stats)
        committed.update(str(row.status) for row in rows)
        committed.update(f"reason: {row.reason}" for row in rows if row.reason and row.status is not Status.OK)
        committed["dead"] += 1
    return committed


class Finished(NamedTuple):
    run: Run
    plan: Plan
    report: Report
    committed: Counter[str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return _finish(tmp_path_factory.mktemp("report"))


def _finish(folder: Path, **committed_as: Any) -> Finished:
    """A published run of a small job."""
    config, _ = write_small_job(folder)
    storage = Storage(config.storage)
    contents = contents_table(6)
    titles = contents["title"].to_pylist()
    titles[0] = titles[2] = EVIL  # at least one of three is shown
    index = contents.schema.get_field_index("title")
    storage.write_table(config.inputs.contents_uri, contents.set_column(index, "title", [titles]))
    plan = make_plan(config, storage, embedding_space=SPACE, embedding_dim=DIM)
    run = Run(
        "0123456789abcdef",
        f"{config.output.uri}/runs/0123456789abcdef",
        config.output.table_uri,
        plan.uri,
        SPACE,
        "projector-1",
        "base@1",
        tuple(shard.shard_id for shard in plan.shards),
    )
    open_run(storage, run, config.resolved())
    committed = _commit_all(storage, run, **committed_as)
    report = build_report(storage, run, plan, config.resolved()).with_version(PublishedVersion(3, 9, 2, False))
    write_report(storage, run, report)
    return Finished(run, plan, report, committed)


def test_report_counts_what_was_committed(
    finished: Finished,
) -> None:
    run, _, report, committed = finished
    assert report.statuses == {name: n for name, n in committed.items() if name in list(Status)}
    assert report.reasons == {
        name.removeprefix("reason: "): n for name, n in committed.items() if name.startswith("reason: ")
    }
    assert sum(report.reasons.values()) == report.statuses["fallback"] + report.statuses["suppressed"]
    markers = read_markers(Storage(), run)
    assert sum(marker["reasons"][Reason.TOO_LONG] for marker in markers) == len(markers), "the control: accepted ones"
    assert sum(report.run_dead_letters.values()) == committed["dead"] == len(run.shard_ids)
    assert report.plan_dead_letters == {"missing_content": 2, "unknown_user": 2}
    assert report.num_requests == sum(report.statuses.values()) + report.num_dead_letters
    assert report.sharing_ratio == pytest.approx(5.0)
    assert report.num_workers == 2
    assert report.num_truncated == len(run.shard_ids)
    assert "<td>completions whose content was cut" in render_html(report)
    texts = sum(n for task in report.lengths.values() for counts in task.values() for n in counts.values())
    assert texts == sum(report.statuses.values())
    assert set(report.lengths) == {"headline", "explanation"}
    assert set(report.lengths["headline"]) == {"en", "ja"}


def test_throughput_adds_up_to_the_rows(finished: Finished) -> None:
    run, plan, report, _ = finished
    size = report.rates[1].start_s - report.rates[0].start_s
    assert sum(rate.rows_per_s * size for rate in report.rates) == pytest.approx(plan.counts.num_requests, rel=1e-6)
    assert report.generating_s == pytest.approx((len(run.shard_ids) - 1) // 2 + 2)


def test_samples_show_different_texts_of_different_users(
    finished: Finished,
) -> None:
    report = finished.report
    assert {(sample.task, sample.language) for sample in report.samples} == {
        (task, language) for task in ("headline", "explanation") for language in ("en", "ja")
    }
    for sample in report.samples:
        assert len({text.text for text in sample.texts}) == len(sample.texts) > 1
        assert len({text.user_id for text in sample.texts}) == len(sample.texts)


def test_written_report_is_whole_json_without_user_embeddings(
    finished: Finished,
) -> None:
    run, _, report, _ = finished
    read = json.loads(Path(run.uri, "report.json").read_text(encoding="utf-8"))
    assert read["statuses"] == report.statuses
    assert read["sharing_ratio"] == pytest.approx(5.0)
    assert read["version"]["version"] == 3
    for name in ("report.json", "report.html"):
        assert "user_embedding" not in Path(run.uri, name).read_text(encoding="utf-8")


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.languages: Counter[str] = Counter()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        values = dict(attrs)
        self.links += [value for name, value in values.items() if name in ("src", "href") and value]
        if values.get("lang"):
            self.languages[str(values["lang"])] += 1
        if tag not in ("meta", "rect", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "line"):
            assert self.open.pop() == tag


def test_page_stands_alone_and_texts_stay_texts(
    finished: Finished,
) -> None:
    report = finished.report
    page = render_html(report)
    parsed = _Tags()
    parsed.feed(page)
    assert not parsed.open
    assert EVIL not in page
    assert "&lt;script&gt;" in page
    assert not {"script", "img", "link", "iframe"} & set(parsed.tags)
    assert not parsed.links
    assert "url(" not in page
    assert "@import" not in page
    assert parsed.languages["en"] > 2
    assert parsed.languages["ja"] > 2
    assert "prefers-color-scheme:dark" in page.replace(" ", "")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_page_in_a_real_browser(finished: Finished, tmp_path: Path) -> None:
    run, _, report, _ = finished
    assert CHROMIUM is not None
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--disable-dev-shm-usage", f"--user-data-dir={tmp_path}/profile", "--dump-dom"),
    ]
    done = subprocess.run(
        [*command, Path(run.uri, "report.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    shown = re.sub(r"<[^>]+>", " ", done.stdout)
    assert f"<title>Run {run.run_id}</title>" in done.stdout, done.stderr[-2000:]
    for number in (report.num_requests, report.num_dead_letters, report.statuses["ok"]):
        assert f"{number:,}" in shown
    assert "published as version 3" in shown
    assert "<script" not in done.stdout
    assert "document.title" in shown  # the evil title is there to be read, and was not run
    assert done.stdout.count("<svg") >= 5


def test_terminal_report_is_compact(finished: Finished) -> None:
    report = finished.report
    text = render_terminal(report)
    assert len(text.splitlines()) < 15
    assert all(len(line) < 200 for line in text.splitlines())
    assert f"{report.statuses['ok']:,}" in text
    assert "5.0x" in text
    assert "version 3" in text


def test_rows_that_consent_left_out_are_named(finished: Finished) -> None:
    said = "rows of users who opted out"
    assert said not in render_terminal(finished.report) + render_html(finished.report)
    report = finished.report.with_version(PublishedVersion(3, 7, 2, False, num_untitled=2))
    assert f"left out: 2 {said}" in render_terminal(report)
    assert f"without 2 {said}" in render_html(report)


def test_time_saved_is_reckoned_from_the_markers(tmp_path: Path) -> None:
    drafts = {"num_drafts": 3, "num_texts_kept": 2, "num_draft_tokens": 40, "num_accepted_tokens": 30}
    run, _, report, _ = _finish(tmp_path, carries_last=True, **drafts)
    markers = read_markers(Storage(), run)
    ours = [marker for marker in markers if marker["stats"]["worker"]]
    assert len(ours) == len(markers) - 1 > 1
    started = min(datetime.fromisoformat(marker["stats"]["started_at"]) for marker in ours)
    finished = max(datetime.fromisoformat(marker["stats"]["finished_at"]) for marker in ours)
    seconds_s = (finished - started).total_seconds()
    num_rows = sum(marker["num_rows"] for marker in ours)
    num_carried = sum(marker["stats"]["num_carried"] for marker in markers)
    carrying_s = num_carried * seconds_s / num_rows
    drafts_s = 30 * len(ours) * seconds_s / (8 * num_rows)  # eight tokens a row
    read = json.loads(Path(run.uri, "report.json").read_text(encoding="utf-8"))
    assert read["estimated_saved_by_carrying_s"] == pytest.approx(carrying_s)
    assert read["estimated_saved_by_drafts_s"] == pytest.approx(drafts_s)
    said = f"about {carrying_s:,.1f} s by carried rows, about {drafts_s:,.1f} s by drafts"
    assert f"\ntime saved, estimated at this run's pace: {said}\n" in render_terminal(report)
    page = re.sub(r"<[^>]+>", "|", render_html(report)).replace("&#x27;", "'")
    for name, estimate_s in (("carried rows", carrying_s), ("drafts", drafts_s)):
        assert f"seconds saved by {name}, estimated at this run's pace||about {estimate_s:,.1f}|" in page


def test_a_first_run_shows_how_its_drafts_fared(tmp_path: Path) -> None:
    """Other users' texts of the same content were its drafts: nothing was published before it."""
    _, plan, report, _ = _finish(tmp_path, num_draft_tokens=40, num_accepted_tokens=30)
    assert not report.is_update
    num_tokens = 40 * len(plan.shards)
    assert f"\ndrafts: 75.0% of {num_tokens} draft tokens accepted\n" in render_terminal(report)
    page = render_html(report)
    assert page.count("draft tokens accepted") == 1
    assert f"{num_tokens * 3 // 4} of {num_tokens} (75.0%)" in page
    assert "What changed" not in page


def test_without_drafts_and_carried_rows_no_time_was_saved(finished: Finished) -> None:
    read = json.loads(Path(finished.run.uri, "report.json").read_text(encoding="utf-8"))
    assert read["estimated_saved_by_carrying_s"] is read["estimated_saved_by_drafts_s"] is None
    for shown in (render_terminal(finished.report), render_html(finished.report)):
        assert "draft tokens" not in shown
        assert "saved" not in shown
    nothing_written = replace(finished.report, num_carried=9, num_rows_generated=0)
    assert nothing_written.estimated_saved_by_carrying_s is None, "nothing to reckon by"


def test_a_report_that_is_no_json_is_nobodys(finished: Finished, tmp_path: Path) -> None:
    run = replace(finished.run, uri=str(tmp_path))
    write_report(Storage(), run, finished.report)
    assert read_report(Storage(), run) == finished.report
    for damaged in (b"", b"{", b"\xff"):
        Path(tmp_path, "report.json").write_bytes(damaged)
        assert read_report(Storage(), run) is None


def test_charts_hold_every_count() -> None:
    counts = {length: length % 7 for length in range(3, 400)}
    titles = re.findall(r"<title>[^:]+: ([\d,]+)</title>", histogram(counts, label="<l>", unit="characters"))
    assert sum(int(title.replace(",", "")) for title in titles) == sum(counts.values())
    assert "&lt;l&gt;" in histogram({4: 1}, label="<l>", unit="characters")
    widths = re.findall(r' width="([\d.]+)"', stacked([("ok", "o", 0.75), ("dead", "d", 0.25)], label="x"))
    assert [float(width) for width in widths] == [748.0, 248.0]
    assert [number_text(n) for n in (0, 3, 2.5, 1234, 12_345, 2_500_000)] == ["0", "3", "2.5", "1,234", "12.3k", "2.5M"]
    assert [number_text(n) for n in (999_700, 999_700_000, 0.04, 0.02)] == ["1M", "1G", "0.04", "0.02"]


def test_terminal_tables_know_wide_characters() -> None:
    assert width("見出し") == 6
    lines = table_text(("a", "n"), [("見出し", "1"), ("ab", "22")]).splitlines()
    assert {width(line) for line in lines} == {10}

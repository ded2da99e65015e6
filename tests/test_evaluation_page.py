"""The pages of an evaluation, of several beside each other, and of a training: whole, escaped, alone, of nobody."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e2p_ray.downstream.evaluation import Evaluation, summarise
from e2p_ray.downstream.measures.bootstrap import Interval
from e2p_ray.downstream.measures.methods import label_of
from e2p_ray.downstream.pages.axis import Axis, axis_over, round_step
from e2p_ray.downstream.pages.columns import width
from e2p_ray.downstream.pages.comparison import comparison_lines, render_comparison
from e2p_ray.downstream.pages.evaluation_page import render_evaluation
from e2p_ray.downstream.pages.figures import count_text, gain_text, percent, share_text
from e2p_ray.downstream.pages.plots import (
    IntervalRow,
    Line,
    far_off,
    interval_plot,
    line_chart,
    signed_histogram,
    too_far,
)
from e2p_ray.downstream.pages.training_page import build_report, render_html
from tests.evaluation_world import EVIL, METHODS, scores_frame, whole_evaluation

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUICK = settings(max_examples=40, deadline=None)
VOID = {"meta", "rect", "line", "circle", "polyline", "polygon", "br"}


class Parsed(HTMLParser):
    """What stands in a page: tags, the text of every cell, plots by their labels; every tag is closed in its place."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.plots: list[str] = []
        self.languages: Counter[str] = Counter()
        self.titles: list[str] = []
        self.cells: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags[tag] += 1
        self.links += [value for name, value in values.items() if name in ("src", "href", "xlink:href") and value]
        if tag == "svg":
            self.plots.append(str(values["aria-label"]))
        if values.get("lang"):
            self.languages[str(values["lang"])] += 1
        if tag in ("td", "th"):
            self.cells.append("")
        if tag in ("h1", "h2", "h3"):
            self.titles.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self.tags[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open) and self.cells:
            self.cells[-1] += data
        if {"h1", "h2", "h3"} & set(self.open):
            self.titles[-1] += data


def _training_page() -> str:
    random = np.random.default_rng(0)
    tokens, user = random.integers(3, 20, 300), random.integers(0, 60, 300).astype(np.int32)
    right = random.normal(3.2, 0.3, 300) * tokens
    nll = {"right": right, "shuffled": right + 0.02 * tokens, "mean": right + 0.03 * tokens, "none": right * 1.1}
    records: list[dict[str, Any]] = [
        {
            "step": step,
            "loss": 3.2 + 2 / step,
            "learning_rate": 0.01 * min(1, step / 40) * (1 - step / 401),
            "gradient_norm": 1 + 3 / step,
            "num_tokens": 900,
            "validation_loss": 3.3 + 1.5 / step if step % 40 == 0 else None,
        }
        for step in range(1, 401, 3)
    ]
    count = {"training": 12_000, "validation": 300}
    provenance = {
        "train_id": "abc123",
        "code": {"version": "0.1", "commit": "f" * 40},
        "inputs": {"users": {"uri": f"s3://bucket/{EVIL}"}},
        "lessons": {
            **dict.fromkeys(("num_used", "num_users", "num_contents"), count),
            "skipped": {"training": {"opted_out": 31, "missing_content": 4}, "validation": {}},
            "num_truncated": {"training": 2, "validation": 0},
            "num_contents_without_target": 12,
        },
        "base_model_hash": "0" * 64,
        "curves": {
            "num_steps": 400,
            "num_tokens": 360_000,
            "last_loss": 3.2,
            "best_validation_loss": 3.3,
            "best_step": 400,
        },
        "seconds": 81.0,
        "hardware": {"device": "cpu", "processor": "Xeon"},
        "finished_at": "2026-01-01T00:00:00+00:00",
    }
    report = build_report(
        projector_id="projector-1",
        projector_uri="s3://bucket/projector",
        provenance=provenance,
        records=records,
        nll=nll,
        num_tokens=tokens,
        user=user,
    )
    return render_html(report)


@pytest.fixture(scope="module")
def whole() -> Evaluation:
    return whole_evaluation(title=EVIL, about=EVIL)


@pytest.fixture(scope="module")
def others() -> dict[str, Evaluation]:
    found = {f"soft last, {number} token": whole_evaluation(gain=0.03 * number) for number in (0, 1)}
    return found | {
        "経歴を先に置いた長い名前のレイアウト、ソフトトークン四つ": whole_evaluation(gain=0.02),
        EVIL: whole_evaluation(gain=0.04),
    }


@pytest.fixture(scope="module")
def pages(whole: Evaluation, others: dict[str, Evaluation]) -> dict[str, str]:
    return {
        "evaluation": render_evaluation(whole),
        "comparison": render_comparison(others),
        "training": _training_page(),
    }


@pytest.mark.parametrize("name", ["evaluation", "comparison", "training"])
def test_a_page_stands_alone_and_texts_stay_texts(pages: dict[str, str], name: str) -> None:
    page = pages[name]
    parsed = Parsed(page)
    assert not {"script", "img", "link", "iframe", "object", "embed", "image", "use"} & set(parsed.tags)
    assert not parsed.links
    for outside in ("url(", "@import", "http:", "https:", "javascript:"):
        assert outside not in page
    assert not re.search(r"<[^>]*\son\w+=", page)
    assert EVIL not in page
    assert "&lt;script&gt;" in page
    assert "prefers-color-scheme:dark" in page.replace(" ", "")
    assert "default-src 'none'" in page
    assert not re.search(r"\b(nan|inf|None|Interval)\b", re.sub(r"<style>.*?</style>", "", page))
    control = Parsed(page.replace("</main>", f"{EVIL}</img></main>"))
    assert {"script", "img"} <= set(control.tags), "unescaped it would be found"


def test_nobody_is_named(pages: dict[str, str], whole: Evaluation) -> None:
    for page in pages.values():
        for part in ("reader-", "article-", "impression-", "user_id", "content_id"):
            assert part not in page
    assert "reader-" in render_evaluation(replace(whole, about={"x": "reader-0001"})), "the control would be seen"


def test_the_evaluation_page_holds_everything(pages: dict[str, str], whole: Evaluation) -> None:
    parsed = Parsed(pages["evaluation"])
    assert parsed.titles[0] == "Does it personalise? personalises"
    for sentence in whole.conclusion.sentences:
        assert sentence.replace("'", "&#x27;") in pages["evaluation"]
    for part in ("all pairs", "English", "Japanese"):
        assert f"loss by method, {part}" in parsed.plots
        assert f"gain of the right user, {part}" in parsed.plots
    for control in ("shuffled user", "constant token"):
        assert f"Gain of each user over the {control}" in parsed.plots
        assert f"Gain over the {control} by length of history" in parsed.plots
    assert "Loss as user embeddings drift" in parsed.plots
    assert len(re.findall(r'<circle class="marker', pages["evaluation"])) == len(whole.drift)
    for heading in ("Quality beside cost", "Given a text: which user is it for?", "Does it rank what was clicked?"):
        assert heading in parsed.titles
    assert parsed.languages["ja"] >= 8
    assert parsed.languages["en"] >= 8
    for method in METHODS:
        score = whole.score(method)
        assert score is not None
        row = parsed.cells.index(label_of(method))
        assert parsed.cells[row + 1].startswith(f"{score.nll_per_token.value:.3f}")
        if score.gain is not None:
            assert parsed.cells[row + 2].startswith(f"{score.gain.value:+.4f}{score.gain.low:+.4f}")
    for found in whole.retrieval:
        assert percent(found.centred.top_1.value) in " ".join(parsed.cells)


def test_a_bare_evaluation_has_no_empty_sections() -> None:
    rows = scores_frame(num_users=3)
    bare = summarise(rows.filter(language="ja"), [], about={}, seed=0)
    page = render_evaluation(bare)
    parsed = Parsed(page)
    assert "not measured" in parsed.titles[0]
    assert not {"The written texts", "Texts side by side", "When user embeddings change"} & set(parsed.titles)
    assert all(re.sub(r"<h2>.*?</h2>", "", body) for body in re.findall(r"<section>(.*?)</section>", page))
    assert [title for title in parsed.plots if "Japanese" in title] == [], "a single language is not said twice"


def test_the_comparison_holds_every_layout(pages: dict[str, str], others: dict[str, Evaluation]) -> None:
    parsed = Parsed(pages["comparison"])
    assert len(parsed.plots) == 9, "three parts: two gains and a loss"
    text = comparison_lines(others)
    lines = text.splitlines()
    assert len(lines) == 1 + 3 * len(others)
    for name, evaluation in others.items():
        shuffled = evaluation.score("shuffled")
        assert shuffled is not None
        assert shuffled.gain is not None
        verdict = str(evaluation.conclusion.finding).replace("_", " ")
        row = parsed.cells.index(f"{name}{verdict}")
        assert parsed.cells[row + 3] == "".join(gain_text(shuffled.gain))
        assert gain_text(shuffled.gain)[0] in next(line for line in lines if line.startswith(name))
    assert len({width(line) for line in lines}) == 1, "aligned, with Japanese names too"


def test_the_training_page_holds_curves_and_counts(pages: dict[str, str]) -> None:
    parsed = Parsed(pages["training"])
    assert {"loss by step", "Learning rate by step", "Gradient norm by step", "gain of the right user"} <= set(
        parsed.plots
    )
    for words in ("12,000", "opted out", "another user", "the average user"):
        assert words in parsed.cells
    assert '<i class="s1"></i>validation' in pages["training"]


# -- numbers and axes


@QUICK
@given(low=st.floats(-1e4, 1e4), size=st.floats(1e-3, 1e4))
def test_ticks_are_round_few_and_on_the_axis(low: float, size: float) -> None:
    axis = Axis(low, low + size, 50.0, 550.0)
    assert 2 <= len(axis.ticks) <= 10
    assert len({axis.text(tick) for tick in axis.ticks}) == len(axis.ticks), "every figure is another"
    for tick in axis.ticks:
        assert low - 1e-6 * size <= tick <= low + size * (1 + 1e-6)
        assert float(axis.text(tick).replace(",", "")) == pytest.approx(tick, abs=axis.step / 100)
    places = [axis.place(tick) for tick in axis.ticks]
    assert places == sorted(places)
    assert axis.place(low - size) == 50.0, "what lies beyond lies on the end"


def test_figures_are_short_and_say_their_sign() -> None:
    assert [count_text(n) for n in (None, 0, 2.5, 12, 4512, 1_247_232, 3.2e9)] == [
        *("–", "0", "2.5", "12", "4.51k", "1.25M", "3.2G"),
    ]
    assert [count_text(n) for n in (999.4, 999_400, 999_700, 999_700_000)] == ["999", "999k", "1M", "1G"]
    assert gain_text(Interval(-0.01234, -0.02, 0.001)) == ("-0.0123", "-0.0200 to +0.0010")
    assert gain_text(Interval(-0.00001, -0.0002, 0.00001)) == ("0.0000", "-0.0002 to 0.0000")
    assert share_text(Interval(0.64, 0.58, 0.7)) == ("64 %", "58–70 %")
    assert percent(0.035) == "3.5 %"
    assert [round_step(size) for size in (0.11, 0.2, 3.0, 70.0)] == pytest.approx([0.2, 0.2, 5.0, 100.0])
    axis = axis_over([2.0, 2.0], 0.0, 10.0)
    assert axis.low < 2.0 < axis.high


def test_a_dot_lies_where_its_value_is() -> None:
    rows = [IntervalRow("a", Interval(1.0, 0.5, 2.0)), IntervalRow("b", Interval(-1.0, -2.0, 3.0), "main")]
    plot = interval_plot(rows, label="<l>", x_title="nats", from_zero=True)
    assert "&lt;l&gt;" in plot
    dots = [float(x) for x in re.findall(r'<circle class="dot[^"]*" cx="([\d.]+)"', plot)]
    (zero,) = set(re.findall(r'<line class="zero" x1="([\d.]+)"', plot))
    assert (dots[0] + dots[1]) / 2 == pytest.approx(float(zero), abs=0.11)
    assert ">+2<" in plot
    assert ">-2<" in plot or ">−2<" in plot


def test_only_large_gains_are_left_out_of_a_picture() -> None:
    assert far_off({"a": 0.01, "b": 0.02, "c": -0.02, "large": 0.2, "loss": -0.9}) == {"large"}
    assert far_off({"a": 0.01, "b": 0.02}) == far_off({}) == set()
    assert too_far(["large +0.2"]) == "Too far off for the picture: large +0.2."
    assert too_far([]) == ""


def test_no_soft_token_is_named_beside_the_picture(pages: dict[str, str], whole: Evaluation) -> None:
    none = whole.score("no_soft_token")
    assert none is not None
    assert f"Too far off for the picture: no soft token {gain_text(none.gain)[0]}." in pages["evaluation"]
    assert "Too far off for the picture: no soft token" in pages["training"]


def test_a_histogram_draws_every_user_and_a_curve_every_point() -> None:
    counts = [3, 0, 7, 1]
    plot = signed_histogram(counts, -0.02, 0.01, label="l", x_title="nats", y_title="users")
    said = [int(number) for number in re.findall(r"<title>[^<]*: (\d+)</title>", plot)]
    assert said == counts
    assert plot.count('class="loss"') == plot.count('class="gain"') == 2
    curve = line_chart(
        [Line("a", ((0, 1), (1, 3), (2, 2))), Line("none", ())],
        label="l",
        x_title="x",
        y_title="y",
        levels={"zero": 0.0},
    )
    (points,) = re.findall(r'<polyline class="curve s0" points="([^"]+)"', curve)
    heights = [float(point.split(",")[1]) for point in points.split()]
    assert heights[1] < heights[2] < heights[0], "higher values lie higher"
    assert curve.count("<circle") == 3
    assert "none" not in curve


# -- a real browser

_PROBE = """<script>
addEventListener("load", () => {
function isCut(a, box) {
  return a.left < box.left - 1 || a.right > box.right + 1 || a.top < box.top - 1 || a.bottom > box.bottom + 1;
}
function lieOnEachOther(a, b) {
  return a.left + 1 < b.right && b.left + 1 < a.right && a.top + 3 < b.bottom && b.top + 3 < a.bottom;
}
for (const frame of document.querySelectorAll("iframe")) {
  const page = frame.contentDocument, wrong = [];
  for (const plot of page.querySelectorAll("svg.plot")) {
    const texts = [...plot.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
    for (const [words, place] of texts) if (isCut(place, plot.getBoundingClientRect())) wrong.push(words + " is cut");
    texts.forEach(([words, place], index) => {
      for (const [others, other] of texts.slice(index + 1))
        if (lieOnEachOther(place, other)) wrong.push(words + " lies on " + others);
    });
  }
  if (page.documentElement.scrollWidth > frame.clientWidth) wrong.push("the page is too wide");
  if (page.title === "owned" || page.querySelector("img")) wrong.push("a text was run");
  const found = document.createElement("output");
  found.id = frame.id;
  found.textContent = JSON.stringify(wrong);
  frame.after(found);
}
})
</script>"""


def _found_in_browser(pages: dict[str, str], folder: Path) -> dict[str, list[str]]:
    """What is wrong with each page at the width that its name ends in; their own policy is taken off."""
    assert CHROMIUM is not None
    frames = "".join(
        f'<iframe id="{name}" style="width:{name.split()[1]}px;height:800px" srcdoc="{escape(page)}"></iframe>'
        for name, page in pages.items()
    )
    frames = frames.replace(escape("default-src 'none'; style-src 'unsafe-inline'"), "")
    probe = folder / "probe.html"
    probe.write_text(f"<!doctype html><meta charset=utf-8><body>{frames}{_PROBE}</body>", "utf-8")
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--disable-dev-shm-usage", f"--user-data-dir={folder}/profile", "--window-size=1400,900", "--dump-dom"),
    ]
    done = subprocess.run([*command, probe.as_uri()], capture_output=True, text=True, timeout=120)
    found = dict(re.findall(r'<output id="([^"]+)">(.*?)</output>', done.stdout, re.DOTALL))
    assert set(found) == set(pages), done.stderr[-2000:]
    return {name: json.loads(unescape(wrong)) for name, wrong in found.items()}


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_in_a_browser_no_label_is_cut_and_no_page_is_too_wide(pages: dict[str, str], tmp_path: Path) -> None:
    long_title = interval_plot([IntervalRow("a", Interval(1, 0, 2))], label="l", x_title="nats " * 60)
    control = pages["comparison"].replace("</main>", f'{long_title}<p style="width:1500px">{EVIL}</p></main>', 1)
    shown = {f"{name} {size}": page for name, page in pages.items() for size in (1280, 420)}
    found = _found_in_browser({**shown, "control 1280": control}, tmp_path)
    broken = found.pop("control 1280")
    assert found == {name: [] for name in shown}
    assert {"the page is too wide", "a text was run"} < set(broken)
    assert any(wrong.startswith("nats nats") for wrong in broken)

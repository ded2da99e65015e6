"""A training's report: curves, settings, what was skipped, and what knowing the user is worth on held-out contents."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from e2p_ray.downstream.measures.bootstrap import Interval, ratio_intervals
from e2p_ray.downstream.pages.evaluation_tables import over
from e2p_ray.downstream.pages.figures import gain_text, level_text
from e2p_ray.downstream.pages.page import figure, grid, render_page, section, table, tiles
from e2p_ray.downstream.pages.plots import IntervalRow, Line, far_off, interval_plot, line_chart, too_far

CONTROLS = {
    "right": "right user",
    "shuffled": "another user",
    "mean": "the average user",
    "none": "no soft token",
}
_SEED = 0


@dataclass(frozen=True, slots=True)
class Gain:
    """Nats per token of the held-out targets by control, and how many fewer the right user needs, with intervals."""

    num_targets: int
    num_users: int
    num_tokens: int
    losses: dict[str, Interval]
    gains: dict[str, Interval]  # control minus right


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """A finished training in numbers. No user ids, no user embeddings."""

    train_id: str
    projector_id: str
    projector_uri: str
    provenance: dict[str, Any]
    records: tuple[dict[str, Any], ...]
    gain: Gain | None

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n"


def build_report(
    *,
    projector_id: str,
    projector_uri: str,
    provenance: dict[str, Any],
    records: Sequence[dict[str, Any]],
    nll: Mapping[str, npt.NDArray[np.float64]] | None,
    num_tokens: npt.NDArray[np.int64] | None,
    user: npt.NDArray[np.int32] | None,
) -> TrainingReport:
    """`nll` by control, `num_tokens` and `user` (a number) are of the held-out targets, (n,) each."""
    gain = None
    if nll is not None and num_tokens is not None and user is not None:
        gain = measure_gain(nll, num_tokens, user)
    return TrainingReport(provenance["train_id"], projector_id, projector_uri, provenance, tuple(records), gain)


def measure_gain(
    nll: Mapping[str, npt.NDArray[np.float64]], num_tokens: npt.NDArray[np.int64], user: npt.NDArray[np.int32]
) -> Gain:
    """Ratios of sums over users, their intervals from resampling users."""
    _, codes = np.unique(user, return_inverse=True)
    columns = [nll[name] for name in CONTROLS] + [nll[name] - nll["right"] for name in CONTROLS if name != "right"]
    sums = np.stack([_by_user(codes, column) for column in columns], axis=1)
    found = ratio_intervals(sums, _by_user(codes, num_tokens.astype(np.float64)), seed=_SEED)
    return Gain(
        num_targets=len(user),
        num_users=len(sums),
        num_tokens=int(num_tokens.sum()),
        losses=dict(zip(CONTROLS, found, strict=False)),
        gains=dict(zip([name for name in CONTROLS if name != "right"], found[len(CONTROLS) :], strict=True)),
    )


def _by_user(codes: npt.NDArray[np.intp], values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.bincount(codes, weights=values).astype(np.float64)


def render_terminal(report: TrainingReport) -> str:
    """The outcome in a few lines."""
    curves, lessons = report.provenance["curves"], report.provenance["lessons"]
    lines = [
        f"projector {report.projector_id} in {report.projector_uri}",
        f"{curves['num_steps']:,} steps, {curves['num_tokens']:,} target tokens, "
        f"{report.provenance['seconds']:,.0f} s; last loss {curves['last_loss']:.4f} nats a token",
    ]
    if curves["best_validation_loss"] is not None:
        lines.append(
            f"best validation loss {curves['best_validation_loss']:.4f}, at step {curves['best_step']:,}: kept"
        )
    skipped = [f"{name} {kind} {number:,}" for name, kind, number in _skips(lessons)]
    lines.append("skipped: " + ("; ".join(skipped) or "nothing"))
    if num_truncated := sum(lessons["num_truncated"].values()):
        lines.append(_truncated_said(num_truncated))
    if report.gain is None:
        lines.append("nothing was held out: whether it personalises is not measured")
        return "\n".join(lines)
    gain = report.gain
    lines.append(f"\non {gain.num_targets:,} held-out targets of {gain.num_users:,} users, nats a token:")
    size = max(map(len, CONTROLS.values()))
    for name, words in CONTROLS.items():
        said = f"  {words.ljust(size)}  {gain.losses[name].value:.4f}"
        if name in gain.gains:
            said += f"  right is better by {_said(gain.gains[name])}"
        lines.append(said)
    return "\n".join(lines)


def _said(interval: Interval) -> str:
    value, bounds = gain_text(interval)
    return f"{value} ({bounds})"


def _truncated_said(num_truncated: int) -> str:
    return f"{num_truncated:,} targets were longer than training.max_target_tokens: only their heads were learned"


def _skips(lessons: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    skipped: Mapping[str, Mapping[str, int]] = lessons["skipped"]
    return [(name, kind, number) for name, found in skipped.items() for kind, number in found.items()]


def render_html(report: TrainingReport) -> str:
    """The whole page."""
    sections = (
        _head(report),
        _tiles(report),
        _gain(report.gain),
        _curves(report.records),
        _rows(report),
        _origin(report),
    )
    return render_page(f"Training {report.train_id}", sections)


def _head(report: TrainingReport) -> str:
    finished = report.provenance["finished_at"][:16].replace("T", " ")
    return (
        f"<h1>Training <code>{escape(report.train_id)}</code></h1>"
        f'<p class="soft">finished {escape(finished)} UTC, projector <code>{escape(report.projector_id)}</code></p>'
    )


def _tiles(report: TrainingReport) -> str:
    curves, lessons = report.provenance["curves"], report.provenance["lessons"]
    best = curves["best_validation_loss"]
    named = {
        "targets trained on": f"{lessons['num_used']['training']:,}",
        "users": f"{lessons['num_users']['training']:,}",
        "steps": f"{curves['num_steps']:,}",
        "last loss": f"{curves['last_loss']:.3f}",
        "best validation loss": "–" if best is None else f"{best:.3f}",
        "target tokens a second": f"{curves['num_tokens'] / max(report.provenance['seconds'], 1e-9):,.0f}",
    }
    return tiles(named.items())


def _gain(gain: Gain | None) -> str:
    if gain is None:
        words = "Nothing was held out: set training.validation_share or inputs.validation_uri to see whether it does."
        return section("Does it personalise?", f"<p>{words}</p>")
    far = far_off({name: interval.value for name, interval in gain.gains.items()}) - {"shuffled"}
    rows = [IntervalRow(f"over {CONTROLS[name]}", own, "peer") for name, own in gain.gains.items() if name not in far]
    plot = interval_plot(rows, label="gain of the right user", x_title="nats a token, more is better", from_zero=True)
    shown = [
        (escape(words), over(*level_text(gain.losses[name])), over(*gain_text(gain.gains.get(name))))
        for name, words in CONTROLS.items()
    ]
    left_out = too_far(f"{CONTROLS[name]} {gain_text(gain.gains[name])[0]}" for name in gain.gains if name in far)
    note = (
        f"{left_out} {gain.num_targets:,} held-out targets of {gain.num_users:,} users, {gain.num_tokens:,} tokens; "
        "95 % intervals from resampling users. The best step was chosen on the same targets: jobs.evaluate on others "
        "is the proof."
    )
    head = ("soft token of", over("loss", "nats a token"), over("gain of the right user", "nats a token"))
    figures = grid([figure("Gain of the right user", plot, note=note)])
    return section("Does it personalise?", figures + table(head, shown, num_texts=1))


def _curves(records: Sequence[Mapping[str, Any]]) -> str:
    def points(name: str) -> tuple[tuple[float, float], ...]:
        return tuple((record["step"], record[name]) for record in records if record[name] is not None)

    losses = [Line("training", points("loss")), Line("validation", points("validation_loss"))]
    charts = [figure("Loss", line_chart(losses, label="loss by step", x_title="step", y_title="nats a token"))]
    for title, name in (("Learning rate", "learning_rate"), ("Gradient norm", "gradient_norm")):
        lines = [Line(title.lower(), points(name))]
        charts.append(figure(title, line_chart(lines, label=f"{title} by step", x_title="step", y_title="")))
    return section("Curves", grid(charts))


def _rows(report: TrainingReport) -> str:
    lessons = report.provenance["lessons"]
    used = [
        (escape(name), *(f"{lessons[count][name]:,}" for count in ("num_used", "num_users", "num_contents")))
        for name in lessons["num_used"]
    ]
    skipped = [(escape(name), escape(kind.replace("_", " ")), f"{number:,}") for name, kind, number in _skips(lessons)]
    parts = [table(("set", "targets", "users", "contents and tasks"), used, num_texts=1)]
    if skipped:
        parts.append(table(("set", "skipped because", "targets"), skipped, num_texts=2))
    unused = f'<p class="note">{lessons["num_contents_without_target"]:,} contents without a target were not used.</p>'
    if num_truncated := sum(lessons["num_truncated"].values()):
        unused += f'<p class="note">{_truncated_said(num_truncated)}.</p>'
    return section("What it learned from", grid(parts) + unused)


def _origin(report: TrainingReport) -> str:
    provenance = report.provenance
    code = provenance["code"]
    ids = {
        "projector": report.projector_uri,
        "base model's weights": provenance["base_model_hash"],
        "code": f"{code['version']} {code['commit'] or ''}".strip(),
        "hardware": ", ".join(f"{value}" for value in provenance["hardware"].values()),
        "seconds of training": f"{provenance['seconds']:,.1f}",
    }
    ids |= {f"{name} table": said["uri"] for name, said in provenance["inputs"].items()}
    rows = "".join(f"<tr><th>{escape(k)}</th><td><code>{escape(v)}</code></td></tr>" for k, v in ids.items())
    whole = escape(json.dumps(provenance, ensure_ascii=False, indent=2))
    details = f"<details><summary>Settings and inputs in full</summary><pre>{whole}</pre></details>"
    return section("Where it comes from", f"<table>{rows}</table>{details}")

"""Plots on number axes as inline SVG: intervals, bars of a histogram, lines. Colours come from the page's CSS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from e2p_ray.downstream.measures.bootstrap import Interval
from e2p_ray.downstream.pages.axis import Axis, axis_over

_WIDTH = 560
_CHAR = 6.6  # mean width of a letter of the labels
_ROW, _TOP, _BOTTOM = 26, 8, 44
_MAX_LABEL_CHARS = 26
_NUM_COLOURS = 6
_MAX_MARKERS = 40  # a line of more points is drawn without them


@dataclass(frozen=True, slots=True)
class IntervalRow:
    """One dot with its whiskers; `kind` is a class of the CSS: main, or nothing."""

    label: str
    interval: Interval
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """A named curve of (x, y) points, with the (low, high) bounds of each point where they are known."""

    name: str
    points: tuple[tuple[float, float], ...]
    bounds: tuple[tuple[float, float], ...] = ()


def interval_plot(rows: Sequence[IntervalRow], *, label: str, x_title: str, from_zero: bool = False) -> str:
    """A row a value, under a shared axis; with `from_zero` the axis shows signs and a line at zero."""
    left = 14 + _CHAR * max(_wide(_short(row.label)) for row in rows)
    height = _TOP + _ROW * len(rows) + _BOTTOM
    ends = [end for row in rows for end in (row.interval.low, row.interval.high, row.interval.value)]
    axis = axis_over([*ends, 0.0] if from_zero else ends, left + 6, _WIDTH - 16)
    bottom = height - _BOTTOM
    parts = [_open(height, label), _x_axis(axis, _TOP, bottom, x_title, signed=from_zero)]
    if from_zero:
        parts.append(_upright(axis.place(0.0), _TOP, bottom, "zero"))
    for index, row in enumerate(rows):
        parts.append(_whiskers(row, axis, left, _TOP + _ROW * (index + 0.5)))
    return "".join(parts) + "</svg>"


def _whiskers(row: IntervalRow, axis: Axis, left: float, y: float) -> str:
    low, high, middle = (axis.place(value) for value in (row.interval.low, row.interval.high, row.interval.value))
    said = f"{row.label}: {row.interval.value:.4g} ({row.interval.low:.4g} to {row.interval.high:.4g})"
    kind = f" {escape(row.kind)}" if row.kind else ""
    ends = "".join(_upright(x, y - 4, y + 4, f"whisker{kind}") for x in (low, high))
    return (
        f'<g><title>{escape(said)}</title><text class="name{kind}" x="{left - 8:.1f}" y="{y + 4:.1f}" '
        f'text-anchor="end">{escape(_short(row.label))}</text>'
        f'<line class="whisker{kind}" x1="{low:.1f}" y1="{y:.1f}" x2="{high:.1f}" y2="{y:.1f}"/>{ends}'
        f'<circle class="dot{kind}" cx="{middle:.1f}" cy="{y:.1f}" r="4.5"/></g>'
    )


def signed_histogram(
    counts: Sequence[int], start: float, bar_width: float, *, label: str, x_title: str, y_title: str
) -> str:
    """counts[i] from start + i * bar_width on; bars below zero have another colour."""
    height, left, top = 230, 56, 14
    bottom = height - _BOTTOM
    end = start + bar_width * len(counts)
    across = Axis(start, end, left, _WIDTH - 14)
    up = Axis(0.0, 1.05 * max(*counts, 1), bottom, top)
    parts = [_open(height, label), _y_axis(up, left, y_title), _x_axis(across, top, bottom, x_title, signed=True)]
    for index, count in enumerate(counts):
        low = start + index * bar_width
        x, right = across.place(low), across.place(low + bar_width)
        kind = "loss" if low + bar_width / 2 < 0 else "gain"
        beyond = " and below" if index == 0 else " and above" if index == len(counts) - 1 else ""
        said = f"{low:+.4g} to {low + bar_width:+.4g}{beyond}: {count:,}"
        parts.append(
            f'<rect class="{kind}" x="{x + 0.5:.1f}" y="{up.place(count):.1f}" width="{max(right - x - 1, 0.5):.1f}" '
            f'height="{bottom - up.place(count):.1f}"><title>{escape(said)}</title></rect>'
        )
    if start <= 0 <= end:
        parts.append(_upright(across.place(0.0), top, bottom, "zero"))
    return "".join(parts) + "</svg>"


def line_chart(
    lines: Sequence[Line], *, label: str, x_title: str, y_title: str, levels: Mapping[str, float] | None = None
) -> str:
    """Curves over one pair of axes, a key above, bounds as bands; `levels` are named dashed lines across."""
    height, left, top, right = 280, 60, 14, _WIDTH - 14
    bottom = height - _BOTTOM
    levels = levels or {}
    drawn = [line for line in lines if line.points]
    assert drawn, "a line chart needs points"
    across = axis_over([x for line in drawn for x, _ in line.points], left, right, margin=0.02)
    ends = [y for line in drawn for y in (*(y for _, y in line.points), *(end for two in line.bounds for end in two))]
    up = axis_over([*ends, *levels.values()], bottom, top)
    parts = [_open(height, label), _y_axis(up, left, y_title), _x_axis(across, top, bottom, x_title)]
    parts += [_level(name, value, up, left, right) for name, value in levels.items()]
    parts += [_curve(line, f"s{index % _NUM_COLOURS}", across, up) for index, line in enumerate(drawn)]
    names = "".join(
        f'<span><i class="s{index % _NUM_COLOURS}"></i>{escape(line.name)}</span>' for index, line in enumerate(drawn)
    )
    return f'<div class="key">{names}</div>{"".join(parts)}</svg>'


def _curve(line: Line, colour: str, across: Axis, up: Axis) -> str:
    places = [(across.place(x), up.place(y)) for x, y in line.points]
    parts = []
    if line.bounds:
        lows = [(across.place(x), up.place(low)) for (x, _), (low, _) in zip(line.points, line.bounds, strict=True)]
        highs = [(across.place(x), up.place(high)) for (x, _), (_, high) in zip(line.points, line.bounds, strict=True)]
        parts.append(f'<polygon class="band {colour}" points="{_joined([*lows, *reversed(highs)])}"/>')
    parts.append(f'<polyline class="curve {colour}" points="{_joined(places)}"/>')
    if len(places) <= _MAX_MARKERS:
        for (x, y), (shown_x, shown_y) in zip(line.points, places, strict=True):
            said = f"{line.name}: {y:.4g} at {x:g}"
            parts.append(
                f'<circle class="marker {colour}" cx="{shown_x:.1f}" cy="{shown_y:.1f}" r="3.5">'
                f"<title>{escape(said)}</title></circle>"
            )
    return "".join(parts)


def _level(name: str, value: float, up: Axis, left: float, right: float) -> str:
    y = up.place(value)
    return (
        f'<line class="level" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>'
        f'<text class="axis" x="{right - 4}" y="{y - 5:.1f}" text-anchor="end">{escape(name)}</text>'
    )


def _joined(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _open(height: float, label: str) -> str:
    return f'<svg class="plot" viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'


def _x_axis(axis: Axis, top: float, bottom: float, title: str, *, signed: bool = False) -> str:
    parts = []
    for tick in axis.ticks:
        x = axis.place(tick)
        parts.append(_upright(x, top, bottom, "rule"))
        said = escape(axis.text(tick, signed=signed))
        parts.append(f'<text class="axis" x="{x:.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{said}</text>')
    middle = (axis.start + axis.end) / 2
    parts.append(
        f'<text class="axis" x="{middle:.1f}" y="{bottom + 36:.1f}" text-anchor="middle">{escape(title)}</text>'
    )
    return "".join(parts)


def _y_axis(axis: Axis, left: float, title: str) -> str:
    parts = []
    for tick in axis.ticks:
        y = axis.place(tick)
        parts.append(f'<line class="rule" x1="{left}" y1="{y:.1f}" x2="{_WIDTH - 14}" y2="{y:.1f}"/>')
        said = escape(axis.text(tick))
        parts.append(f'<text class="axis" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{said}</text>')
    middle = (axis.start + axis.end) / 2
    turned = f'transform="translate(13 {middle:.1f}) rotate(-90)"'
    return "".join(parts) + f'<text class="axis" {turned} text-anchor="middle">{escape(title)}</text>'


def _upright(x: float, top: float, bottom: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x:.1f}" y1="{top:.1f}" x2="{x:.1f}" y2="{bottom:.1f}"/>'


def _short(label: str) -> str:
    return label if len(label) <= _MAX_LABEL_CHARS else f"{label[: _MAX_LABEL_CHARS - 1]}…"


def _wide(label: str) -> int:
    """Widths of letters; Japanese ones are about twice as wide."""
    return sum(1 if ord(char) < 0x1100 else 2 for char in label)

"""Plots on number axes as inline SVG: intervals, bars of a histogram, lines. Colours come from the page's CSS."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from statistics import median

from e2p_ray.downstream.measures.bootstrap import Interval
from e2p_ray.downstream.pages.axis import Axis, axis_over
from e2p_ray.downstream.pages.lettering import shortened, text_width

_WIDTH = 460  # small, so that letters stay readable where the picture is scaled down to a phone
_LETTERS, _SMALL_LETTERS = 12.5, 12.0  # as in the page's style
_ROW, _HIGH_ROW, _TOP, _BOTTOM = 26, 42, 8, 44
_MAX_BESIDE = 165  # longer labels stand above their whiskers
_TICK_ROOMS = (32, 40, 48, 60, 80)  # tried one after the other until the figures fit
_UP_TICK_ROOM = 28
_NUM_COLOURS = 6
_FAR = 4
_MAX_MARKERS = 40  # a line of more points is drawn without them


@dataclass(frozen=True, slots=True)
class IntervalRow:
    """One dot with its whiskers; `kind` is a class of the CSS: main, peer where all are alike, or nothing."""

    label: str
    interval: Interval
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """A named curve of (x, y) points, with the (low, high) bounds of each point where they are known."""

    name: str
    points: tuple[tuple[float, float], ...]
    bounds: tuple[tuple[float, float], ...] = ()


def far_off(values: Mapping[str, float]) -> set[str]:
    """Gains so large that on a common axis the others would lie on each other: over four times the median.

    Never a loss, however large: bad news stays in the picture.
    """
    middle = median(map(abs, values.values())) if values else 0.0
    return {name for name, value in values.items() if value > _FAR * middle}


def too_far(figures: Iterable[str]) -> str:
    """What a picture's note says of the values that it leaves out."""
    said = "; ".join(figures)
    return f"Too far off for the picture: {said}." if said else ""


def interval_plot(rows: Sequence[IntervalRow], *, label: str, x_title: str, from_zero: bool = False) -> str:
    """A row a value, under a shared axis; with `from_zero` the axis shows signs and a line at zero."""
    widest = max(text_width(row.label, _LETTERS, bold=row.kind == "main") for row in rows)
    is_beside = widest <= _MAX_BESIDE
    left, row_height = (widest + 14, _ROW) if is_beside else (4, _HIGH_ROW)
    bottom = _TOP + row_height * len(rows)
    ends = [end for row in rows for end in (row.interval.low, row.interval.high, row.interval.value)]
    axis = axis_over([*ends, 0.0] if from_zero else ends, left + 6, _WIDTH - 16)
    parts = [_open(bottom + _BOTTOM, label), _x_axis(axis, _TOP, bottom, x_title, signed=from_zero)]
    for index, row in enumerate(rows):
        top = _TOP + row_height * index
        if from_zero:  # beside the row's whiskers only: a line through a label above them would strike it out
            parts.append(
                _upright(axis.place(0.0), top + row_height - _ROW + 4 * (not is_beside), top + row_height, "zero")
            )
        place = (left - 8, top + _ROW / 2 + 4, "end") if is_beside else (10, top + 15, "start")
        parts.append(_whiskers(row, axis, top + row_height - _ROW / 2, place))
    return "".join(parts) + "</svg>"


def _whiskers(row: IntervalRow, axis: Axis, y: float, place: tuple[float, float, str]) -> str:
    """The row's dot at height `y`, its label at `place`: x, y and which end of it stands there."""
    low, high, middle = (axis.place(value) for value in (row.interval.low, row.interval.high, row.interval.value))
    said = f"{row.label}: {row.interval.value:.4g} ({row.interval.low:.4g} to {row.interval.high:.4g})"
    kind = f" {escape(row.kind)}" if row.kind else ""
    name = f"name{kind}" if place[2] == "end" else f"name{kind} above"
    ends = "".join(_upright(x, y - 4, y + 4, f"whisker{kind}") for x in (low, high))
    shown = shortened(row.label, _WIDTH - 24, _LETTERS, bold=row.kind == "main")
    return (
        f'<g><title>{escape(said)}</title><text class="{name}" x="{place[0]:.1f}" y="{place[1]:.1f}" '
        f'text-anchor="{place[2]}">{escape(shown)}</text>'
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
    up = Axis(0.0, 1.05 * max(*counts, 1), bottom, top, _UP_TICK_ROOM)
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
    up = axis_over([*ends, *levels.values()], bottom, top, tick_room=_UP_TICK_ROOM)
    parts = [_open(height, label), _y_axis(up, left, y_title), _x_axis(across, top, bottom, x_title)]
    heights = [up.place(value) for value in levels.values()]
    parts += [f'<line class="level" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>' for y in heights]
    parts += [_curve(line, f"s{index % _NUM_COLOURS}", across, up) for index, line in enumerate(drawn)]
    for index, (name, y) in enumerate(zip(levels, heights, strict=True)):  # side by side: levels may lie close together
        x = right - 4 - index % 3 * (right - left) / 3
        parts.append(f'<text class="axis above" x="{x:.1f}" y="{y - 5:.1f}" text-anchor="end">{escape(name)}</text>')
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


def _joined(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _open(height: float, label: str) -> str:
    return f'<svg class="plot" viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'


def _x_axis(axis: Axis, top: float, bottom: float, title: str, *, signed: bool = False) -> str:
    axis = _with_ticks(axis, signed=signed)
    parts = []
    for tick in axis.ticks:
        x = axis.place(tick)
        parts.append(_upright(x, top, bottom, "rule"))
        parts.append(_middle_text(axis.text(tick, signed=signed), x, bottom + 16))
    return "".join(parts) + _middle_text(title, (axis.start + axis.end) / 2, bottom + 36)


def _with_ticks(axis: Axis, *, signed: bool) -> Axis:
    """As many ticks as have room for their figures beside each other."""
    for room in _TICK_ROOMS:
        tried = replace(axis, tick_room=room)
        widest = max(text_width(tried.text(tick, signed=signed), _SMALL_LETTERS) for tick in tried.ticks)
        if widest + 8 <= tried.step / (axis.high - axis.low) * abs(axis.end - axis.start):
            break
    return tried


def _middle_text(text: str, x: float, y: float) -> str:
    """A text around `x`, moved where it would leave the picture."""
    half = text_width(text, _SMALL_LETTERS) / 2 + 2
    x = max(min(x, _WIDTH - half), half)
    return f'<text class="axis" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escape(text)}</text>'


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

"""Bar charts as inline SVG. Colours come from the page's CSS, so that they follow its dark mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from e2p_ray.downstream.pages.figures import short_text

_WIDTH, _HEIGHT = 520, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 12, 34
_MIN_BARS, _MAX_BARS = 16, 40


def histogram(counts: Mapping[int, int], *, label: str, unit: str) -> str:
    """Bars over whole numbers, neighbours put together when there are too many."""
    low, high = min(counts), max(counts)
    missing = max(0, _MIN_BARS - (high - low + 1))  # else two values would be two blocks
    low, high = max(0, low - missing // 2), high + missing - min(low, missing // 2)
    size = -(-(high - low + 1) // _MAX_BARS)
    bars = [0] * ((high - low) // size + 1)
    for value, number in counts.items():
        bars[(value - low) // size] += number
    starts = [low + index * size for index in range(len(bars))]
    names = [f"{start}" if size == 1 else f"{start}-{start + size - 1}" for start in starts]
    said = [f"{name} {unit}: {number:,}" for name, number in zip(names, bars, strict=True)]
    return bar_chart(bars, said, label=label, axis=(f"{low}", f"{high} {unit}"))


def bar_chart(values: Sequence[float], said: Sequence[str], *, label: str, axis: tuple[str, str]) -> str:
    """One bar a value, with what it says on hover; the axis is named at its two ends, the scale at its top."""
    top = max([*values, 1e-9])
    step = (_WIDTH - _LEFT - _RIGHT) / len(values)
    room = _HEIGHT - _TOP - _BOTTOM
    gap = min(2.0, step / 4)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">',
        *(_line(_TOP + room * share, number_text(top * (1 - share))) for share in (0.0, 0.5, 1.0)),
    ]
    for index, (value, words) in enumerate(zip(values, said, strict=True)):
        height = room * value / top
        x, y = _LEFT + index * step + gap / 2, _TOP + room - height
        parts.append(
            f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{step - gap:.1f}" height="{height:.1f}">'
            f"<title>{escape(words)}</title></rect>"
        )
    left, right = axis
    baseline = _HEIGHT - _BOTTOM + 18
    parts.append(f'<text class="axis" x="{_LEFT}" y="{baseline}">{escape(left)}</text>')
    parts.append(f'<text class="axis" x="{_WIDTH - _RIGHT}" y="{baseline}" text-anchor="end">{escape(right)}</text>')
    return "".join(parts) + "</svg>"


def _line(y: float, text: str) -> str:
    return (
        f'<line class="rule" x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>'
        f'<text class="axis" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>'
    )


def number_text(value: float) -> str:
    """A figure in a few characters."""
    if value >= 1e4:
        return short_text(value)
    if value >= 10 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def stacked(shares: Sequence[tuple[str, str, float]], *, label: str) -> str:
    """One bar of (class, words, share) parts, from left to right."""
    box = 'viewBox="0 0 1000 28" preserveAspectRatio="none"'
    parts = [f'<svg class="stacked" {box} role="img" aria-label="{escape(label)}">']
    x = 0.0
    for kind, words, share in shares:
        width = 1000 * share
        if width:
            shown = max(width - 2, 0.5)
            parts.append(
                f'<rect class="{escape(kind)}" x="{x:.2f}" y="0" width="{shown:.2f}" height="28">'
                f"<title>{escape(words)}</title></rect>"
            )
        x += width
    return "".join(parts) + "</svg>"

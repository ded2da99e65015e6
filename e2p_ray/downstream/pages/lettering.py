"""How wide a text will be drawn, without a browser: never less than in the usual sans-serif fonts."""

from __future__ import annotations

import unicodedata

_NARROW = frozenset("iljtfrI.,:;'|!()[] ·-–")
_WIDE = frozenset("mwMW@%+…—")
_BOLD = 1.12


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """In the unit of `size`, the height of the font."""
    return sum(map(_share, text)) * size * (_BOLD if bold else 1.0)


def _share(char: str) -> float:
    """A letter's width over its height, as in DejaVu Sans, the widest of the common ones."""
    if unicodedata.east_asian_width(char) in "WF":
        return 1.0
    if char in _NARROW:
        return 0.42
    if char in _WIDE:
        return 1.0
    return 0.78 if char.isupper() else 0.64


def shortened(text: str, room: float, size: float, *, bold: bool = False) -> str:
    """The text, or as much of its start as there is room for and an ellipsis."""
    if text_width(text, size, bold=bold) <= room:
        return text
    while text and text_width(f"{text}…", size, bold=bold) > room:
        text = text[:-1]
    return f"{text.rstrip()}…"

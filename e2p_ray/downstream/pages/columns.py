"""Columns of text for terminals, with Japanese counted as wide as it is shown."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def width(text: str) -> int:
    """Columns that a text takes in a terminal."""
    return sum(
        2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text if not unicodedata.combining(char)
    )


def aligned(rows: Sequence[Sequence[str]], *, num_left: int) -> list[str]:
    """Lines with their cells under each other: the first `num_left` columns to the left, the others to the right."""
    widths = [max(width(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell + " " * (size - width(cell)) if index < num_left else " " * (size - width(cell)) + cell
            for index, (cell, size) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines

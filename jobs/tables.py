"""Plain tables for terminals, with Japanese counted as wide as it is shown."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence


def width(text: str) -> int:
    """Columns that a text takes in a terminal."""
    return sum(
        2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text if not unicodedata.combining(char)
    )


def table_text(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns side by side; those of numbers to the right."""
    lines = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(width(line[i]) for line in lines) for i in range(len(head))]
    right = [len(lines) > 1 and all(line[i][:1].isdigit() for line in lines[1:]) for i in range(len(head))]
    shown = []
    for line in lines:
        cells = [
            " " * (size - width(cell)) + cell if to_right else cell + " " * (size - width(cell))
            for cell, size, to_right in zip(line, widths, right, strict=True)
        ]
        shown.append("  ".join(cells).rstrip())
    return "\n".join(shown)


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table and an empty line, on stdout."""
    print(table_text(head, rows) + "\n")


def print_pairs(pairs: Mapping[str, str]) -> None:
    """Names and values and an empty line, on stdout."""
    size = max(width(name) for name in pairs)
    print("\n".join(f"{name}{' ' * (size - width(name))}  {value}" for name, value in pairs.items()) + "\n")


def bytes_text(num_bytes: float) -> str:
    """Bytes as people say them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:,.0f} {unit}" if unit == "B" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} TiB"


def duration_text(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 10 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"

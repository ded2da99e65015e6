"""The frame of a report: one HTML file without scripts or anything from elsewhere. Callers escape what they put in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from e2p_ray.downstream.pages.style import STYLE


def render_page(title: str, sections: Iterable[str], *, language: str = "en") -> str:
    """The whole file; empty sections are left out."""
    return (
        f'<!doctype html>\n<html lang="{escape(language)}"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


def section(title: str, body: str) -> str:
    """A card with a heading; `body` is HTML."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, num_texts: int, main: int | None = None) -> str:
    """Cells are HTML: the first `num_texts` columns hold texts, the others figures; the row `main` stands out."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}>{cell}</{tag}>" if index < num_texts else f'<{tag} class="number">{cell}</{tag}>'
            for index, cell in enumerate(cells)
        )

    body = "".join(
        f'<tr class="main">{line(row, "td")}</tr>' if index == main else f"<tr>{line(row, 'td')}</tr>"
        for index, row in enumerate(rows)
    )
    return f'<div class="wide"><table><tr>{line(head, "th")}</tr>{body}</table></div>'


def figure(title: str, picture: str, *, note: str = "") -> str:
    """A picture under its title, with a line of explanation."""
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<div><h3>{escape(title)}</h3>{picture}{said}</div>"


def tiles(named: Iterable[tuple[str, str]]) -> str:
    """(name, value) pairs as tiles."""
    shown = (f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in named)
    return f'<div class="tiles">{"".join(shown)}</div>'


def grid(parts: Iterable[str]) -> str:
    """Parts side by side where there is room."""
    return f'<div class="grid">{"".join(parts)}</div>'

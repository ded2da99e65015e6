"""The editors' page at `/`: three files, and headers that let it run its own script and reach its own service only."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response

_FOLDER = Path(__file__).parent / "page"
_FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
PAGE_PATHS = frozenset(_FILES)  # open to everybody: what the page shows, it asks for with the editor's own token

# With trusted types, even a line of ours that made markup of a string would be an error.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Serve the page's files."""
    for path in _FILES:
        app.add_api_route(path, _answer_of(path), methods=["GET"], include_in_schema=False)


def _answer_of(path: str) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return Response(_read(path), headers=_HEADERS, media_type=_FILES[path][1])

    return answer


@cache
def _read(path: str) -> bytes:
    return (_FOLDER / _FILES[path][0]).read_bytes()

"""Words in braces in a prompt's texts, and braces that are meant as such."""

from __future__ import annotations

import re
from collections.abc import Mapping

# Not every brace: prompts may show JSON. A word alone in braces is what somebody takes for a placeholder.
_TOKEN = re.compile(r"\{\{|\{\s*[^\W\d]\w*\s*\}|[{}]")


def taken_apart(text: str) -> list[str]:
    """A text's pieces: at even places what is written as it is, at odd ones the words in braces between.

    `{{` and its `}}` are one brace each, as in Python's format strings. Other braces are themselves, single or not:
    JSON never has `{{`, but ends in `}}`. Raises ValueError where a `{{` is closed by a single brace.
    """
    pieces, closing, place = [""], list[str](), 0
    while found := _TOKEN.search(text, place):
        token = found[0]
        pieces[-1] += text[place : found.start()]
        place = found.end()
        if len(token) > 2:
            pieces += [token, ""]
            continue
        if token != "}":
            closing.append("}" * len(token))
        elif closing:
            expected = closing.pop()
            if not text.startswith(expected, found.start()):
                raise ValueError("'{{' is closed by '}': double both braces, or neither")
            place = found.start() + len(expected)
        pieces[-1] += token[0]
    pieces[-1] += text[place:]
    return pieces


def filled(text: str, values: Mapping[str, str] | None = None) -> str:
    """The text with its words in braces replaced; KeyError for one that has no value."""
    pieces = taken_apart(text)
    pieces[1::2] = [(values or {})[word[1:-1]] for word in pieces[1::2]]
    return "".join(pieces)

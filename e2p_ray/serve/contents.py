"""A few contents to choose from: by the beginning of their id, or words of their title."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel

from e2p_ray.schema import Content
from e2p_ray.serve.lookup import Tables

MAX_SEARCH_CHARS = 512
MAX_LISTED = 50
_MAX_READ = 200  # a content's older rows may match where its newest one does not: these are looked at in vain


class ContentSummary(BaseModel):
    """A content of the contents table, without its body."""

    content_id: str
    title: str
    language: str


class ContentsAnswer(BaseModel):
    """What was found, a content of just this id first."""

    contents: list[ContentSummary]
    complete: bool  # whether there are no more


def listed(tables: Tables, search: str, limit: int) -> ContentsAnswer:
    """At most `limit` contents whose id begins with `search` or whose title contains it, whatever the case."""
    found: dict[str, Content] = {}
    exact = tables.content(search)
    if exact is not None:
        found[search] = exact
    num_read = 0
    for content_id in _matching(tables.content_titles(), search):
        if content_id in found:
            continue
        if len(found) >= limit or num_read >= _MAX_READ:
            return _answer(found, complete=False)
        num_read += 1
        content = tables.content(content_id)
        if content is not None and _fits(content, search):
            found[content_id] = content
    return _answer(found, complete=True)


def _matching(batches: Iterator[pa.RecordBatch], search: str) -> Iterator[str]:
    """Ids that match, batch by batch: a search that finds enough at once reads no further."""
    by_title: Callable[..., pa.Array] = pc.match_substring
    for batch in batches:
        ids, titles = batch.column("content_id"), batch.column("title")
        hits = pc.or_kleene(pc.starts_with(ids, search), by_title(titles, search, ignore_case=True))
        yield from (str(found) for found in ids.filter(hits).to_pylist())


def _fits(content: Content, search: str) -> bool:
    return content.content_id.startswith(search) or search.casefold() in content.title.casefold()


def _answer(found: dict[str, Content], *, complete: bool) -> ContentsAnswer:
    contents = [
        ContentSummary(content_id=content.content_id, title=content.title, language=content.language)
        for content in found.values()
    ]
    return ContentsAnswer(contents=contents, complete=complete)

"""Written texts measured per method, task and language, and some of them side by side. No user ids leave this file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from e2p_ray.downstream.measures.faithfulness import Faithfulness, measure_faithfulness
from e2p_ray.downstream.measures.likeness import Likeness, measure_likeness
from e2p_ray.downstream.measures.methods import NO_SOFT_TOKEN, REFERENCE, RIGHT, SHUFFLED, in_order
from e2p_ray.downstream.measures.overlap import Overlap, measure_overlap
from e2p_ray.downstream.measures.variety import Variety, measure_variety
from e2p_ray.schema import Content

_COLUMNS = ("method", "task", "language", "user_id", "content_id", "text", "reference", "title", "body")
_SHOWN = (RIGHT, SHUFFLED, NO_SOFT_TOKEN)
_MAX_SAMPLES = 12
_MAX_SAMPLE_CHARS = 400


@dataclass(frozen=True, slots=True)
class TextMeasures:
    """One method's texts of one task and language; the references' own line has no overlap and no likeness."""

    method: str
    task: str
    language: str
    num_texts: int
    overlap: Overlap | None
    likeness: Likeness | None
    variety: Variety | None
    faithfulness: Faithfulness


@dataclass(frozen=True, slots=True)
class SampleTexts:
    """One user's own text and what some methods wrote for the same content."""

    task: str
    language: str
    title: str
    reference: str
    texts: dict[str, str]  # by method


def measure_texts(texts: pl.DataFrame, *, allow: Sequence[str] = (), seed: int) -> tuple[TextMeasures, ...]:
    """All measures of every method, and of the references as a last method; by language, task, then method.

    allow: names that are no foreign ones in any text.
    """
    for name in _COLUMNS:
        assert texts.schema.get(name) == pl.String, f"texts.{name} is {texts.schema.get(name)}, not a string"
        assert texts[name].null_count() == 0, f"texts.{name} is never null"
    found = []
    for (language, task), rows in texts.sort("language", "task").group_by("language", "task", maintain_order=True):
        methods = in_order(rows["method"])
        for method in methods:
            own = rows.filter(method=method).sort("content_id", "user_id")
            found.append(_measure(own, method, str(task), str(language), allow, seed))
        own = rows.filter(method=methods[0]).sort("content_id", "user_id").with_columns(text="reference")
        found.append(_measure(own, REFERENCE, str(task), str(language), allow, seed))
    return tuple(found)


def _measure(
    rows: pl.DataFrame, method: str, task: str, language: str, allow: Sequence[str], seed: int
) -> TextMeasures:
    texts, references, user_ids = (rows[name].to_list() for name in ("text", "reference", "user_id"))
    contents = [Content(*row) for row in rows.select("content_id", "title", "body", "language").iter_rows()]
    compared = method != REFERENCE
    return TextMeasures(
        method=method,
        task=task,
        language=language,
        num_texts=len(rows),
        overlap=measure_overlap(texts, references, user_ids, language=language, seed=seed) if compared else None,
        likeness=measure_likeness(texts, references, user_ids, seed=seed) if compared else None,
        variety=measure_variety(rows["content_id"].to_list(), texts, seed=seed),
        faithfulness=measure_faithfulness(texts, contents, user_ids, allow=allow, seed=seed),
    )


def choose_samples(texts: pl.DataFrame, *, seed: int) -> tuple[SampleTexts, ...]:
    """A few pairs of each task and language, drawn by a hash and not for their looks; every content at most once."""
    shown = [method for method in _SHOWN if method in set(texts["method"])]
    if RIGHT not in shown:
        return ()
    key = ["task", "language", "content_id", "user_id"]
    short = (pl.col(name).str.slice(0, _MAX_SAMPLE_CHARS) for name in ("text", "reference", "title"))
    rows = texts.filter(pl.col("method").is_in(shown)).with_columns(*short)
    groups = rows.select("language", "task").unique().sort("language", "task").rows()
    each = max(1, _MAX_SAMPLES // max(len(groups), 1))
    found: list[SampleTexts] = []
    for language, task in groups:
        own = rows.filter(language=language, task=task)
        order = {row: _draw(seed, *row) for row in own.select("content_id", "user_id").unique().rows()}
        taken: set[str] = set()
        for content_id, user_id in sorted(order, key=lambda row: order[row]):
            if content_id in taken or len(taken) == each:
                continue
            taken.add(content_id)
            same = own.filter(content_id=content_id, user_id=user_id).unique(["method", *key], keep="first")
            by_method = dict(same.select("method", "text").rows())
            written = {method: by_method[method] for method in shown if method in by_method}
            found.append(SampleTexts(task, language, same["title"][0], same["reference"][0], written))
    return tuple(found[:_MAX_SAMPLES])


def _draw(seed: int, content_id: str, user_id: str) -> str:
    return hashlib.sha256(f"{seed}/{content_id}/{user_id}".encode()).hexdigest()

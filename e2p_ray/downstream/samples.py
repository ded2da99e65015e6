"""Which texts a report shows: a few contents for which several users got different texts."""

from __future__ import annotations

import hashlib
from collections.abc import Container
from dataclasses import dataclass, replace

import polars as pl

from e2p_ray.schema import Status

_MAX_TEXTS = 5
_MAX_CONTENTS = 2  # of one task and language


@dataclass(frozen=True)
class SampleText:
    """What one user got."""

    user_id: str
    text: str


@dataclass(frozen=True)
class Sample:
    """One content, its original title, and different texts of different users."""

    content_id: str
    task: str
    language: str
    title: str
    texts: tuple[SampleText, ...]

    def without(self, user_ids: Container[str]) -> Sample:
        """The same without the texts of these users."""
        return replace(self, texts=tuple(text for text in self.texts if text.user_id not in user_ids))

    @property
    def rank(self) -> tuple[int, str]:
        """Best first: many different texts, then an order that means nothing but is always the same."""
        return -len(self.texts), hashlib.sha256(f"{self.content_id}/{self.task}".encode()).hexdigest()


class Samples:
    """Keeps the best contents of each task and language while shards go by."""

    def __init__(self) -> None:
        self._best: dict[tuple[str, str], dict[str, Sample]] = {}

    def add(self, rows: pl.DataFrame) -> None:
        """Rows of one shard with the columns user_id, content_id, task, text, status, title and language."""
        accepted = rows.filter(pl.col("status") == str(Status.OK)).sort("user_id")
        different = accepted.unique(["content_id", "task", "text"], keep="first", maintain_order=True)
        grouped = different.group_by("content_id", "task", "language", "title", maintain_order=True).agg(
            pl.col("user_id").head(_MAX_TEXTS), pl.col("text").head(_MAX_TEXTS)
        )
        for content_id, task, language, title, user_ids, texts in grouped.iter_rows():
            shown = tuple(SampleText(user_id, text) for user_id, text in zip(user_ids, texts, strict=True))
            self._keep(Sample(content_id, task, language, title, shown))

    def _keep(self, sample: Sample) -> None:
        best = self._best.setdefault((sample.task, sample.language), {})
        known = best.get(sample.content_id)  # a hot content has groups in several shards
        if known is None or sample.rank < known.rank:
            best[sample.content_id] = sample
        if len(best) > _MAX_CONTENTS:
            del best[max(best.values(), key=lambda kept: kept.rank).content_id]

    def chosen(self) -> tuple[Sample, ...]:
        """By task, then language, best first."""
        return tuple(
            sample for key in sorted(self._best) for sample in sorted(self._best[key].values(), key=lambda s: s.rank)
        )

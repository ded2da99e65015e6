"""PENS: headlines in one's own style. The content is other people's headlines for the article, the same for all users.

Articles are split, not rows: validation and test articles are unseen, by the projector and by the user embeddings.
The users are the same 103 people in all three splits. The articles' bodies are not to be had, so no figure made
here may be set beside published ones.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
from numpy.random import default_rng

from tests.real.tables import SPLITS, Answer, RealTask, TaskTables
from tests.real.vectors import VectorSettings, Written
from tests.real.writers import write_writers

TEMPLATE = {"content": "{body}", "cue_before": "\n\nHeadline:"}
VECTORS = VectorSettings(num_style=10, num_words=6)
_NOW = datetime(2021, 1, 1, tzinfo=UTC)
_SHARES = (0.7, 0.1, 0.2)  # of the articles
_MAX_SOURCES = 5
_JOIN = " / "  # measured: the base model gains more from it than from line ends or full stops

Articles = Mapping[str, Mapping[str, str]]  # content id -> user id -> headline


def write_pens(data: Path, folder: Path, *, seed: int = 0, vectors: VectorSettings = VECTORS) -> RealTask:
    """Write the task's tables; `data` is the folder with pens_headlines.parquet.

    An article is told in two views (content ids end in /0 and /1): the headlines that are the content of one are
    among the targets of the other, so that none is lost as a source. Later user embeddings know half of the training
    articles no more, and the validation articles instead.
    """
    articles = _read(data)
    splits = split_articles(articles, seed)
    contents: list[tuple[str, str, str]] = []
    answers: dict[str, list[Answer]] = {split: [] for split in SPLITS}
    for split, chosen in splits.items():
        for content_id in chosen:
            for number, sources in enumerate(_views(content_id, articles[content_id], seed)):
                view_id = f"{content_id}/{number}"
                headlines = [articles[content_id][user_id] for user_id in sources]
                body = _JOIN.join(headlines)
                targets = [
                    Answer(user_id, view_id, text)
                    for user_id, text in articles[content_id].items()
                    if user_id not in sources and text.lower() not in body.lower()
                ]
                if targets:
                    contents.append((view_id, headlines[0], body))
                    answers[split].extend(targets)
    tables = TaskTables(folder, task="headline", now=_NOW)
    tables.write_contents(pl.DataFrame(contents, schema=["content_id", "title", "body"], orient="row"))
    for split in SPLITS:
        tables.write_targets(split, answers[split])
    early = history_of(articles, splits["train"])
    late = history_of(articles, [*splits["train"][len(splits["train"]) // 2 :], *splits["validation"]])
    spaces = write_writers(tables, early, late, vectors, seed=seed)
    return RealTask(
        name="pens",
        folder=folder,
        task="headline",
        template=TEMPLATE,
        target_prefix=" ",
        language="en",
        embedding_space=spaces[0],
        refit_space=spaces[1],
        embedding_dim=vectors.num_axes,
        num_users=len(early),
        num_contents=len(contents),
        num_targets={split: len(answers[split]) for split in SPLITS},
    )


def split_articles(content_ids: Iterable[str], seed: int) -> dict[str, list[str]]:
    """Content ids by split, at random; ids are sorted first, so that only their set and the seed matter."""
    ordered = sorted(content_ids)
    shuffled = [ordered[place] for place in default_rng([seed, 1]).permutation(len(ordered))]
    first, second = round(_SHARES[0] * len(ordered)), round((_SHARES[0] + _SHARES[1]) * len(ordered))
    return {"train": shuffled[:first], "validation": shuffled[first:second], "test": shuffled[second:]}


def history_of(articles: Articles, content_ids: Iterable[str]) -> dict[str, list[Written]]:
    """What every user wrote for these articles."""
    history: dict[str, list[Written]] = {}
    for content_id in sorted(content_ids):
        for user_id, text in articles[content_id].items():
            history.setdefault(user_id, []).append(Written(text))
    return dict(sorted(history.items()))


def _read(data: Path) -> dict[str, dict[str, str]]:
    """Headlines by article and user; the first of several, and only those in Latin letters."""
    table = pl.read_parquet(data / "pens_headlines.parquet").with_columns(
        text=pl.col("text").str.replace_all(r"\s+", " ").str.strip_chars()
    )
    latin = table.filter(pl.col("text").str.contains(r"[A-Za-z]{2}"))
    first = latin.unique(["user_id", "content_id"], keep="first", maintain_order=True).sort("content_id", "user_id")
    articles: dict[str, dict[str, str]] = {}
    for user_id, content_id, text in first.select("user_id", "content_id", "text").iter_rows():
        articles.setdefault(content_id, {})[user_id] = text
    return articles


def _views(content_id: str, headlines: Mapping[str, str], seed: int) -> list[list[str]]:
    """Two disjoint sets of users, half of the article's and five at most, whose headlines are the content of a view."""
    user_ids = sorted(headlines)
    order = default_rng([seed, zlib.crc32(content_id.encode())]).permutation(len(user_ids))
    shuffled = [user_ids[place] for place in order]
    size = min(_MAX_SOURCES, len(user_ids) // 2)
    return [shuffled[:size], shuffled[size : 2 * size]] if size else []

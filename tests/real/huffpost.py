"""HuffPost: bylines as users, description -> headline; the latest articles of every byline are the unseen ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from tests.real.tables import SPLITS, Answer, RealTask, TaskTables
from tests.real.vectors import VectorSettings, Written
from tests.real.writers import write_writers

TEMPLATE = {"content": "{body}", "cue_before": "\n\nHeadline:"}
VECTORS = VectorSettings(num_style=8, num_words=16)
_NOW = datetime(2021, 9, 16, tzinfo=UTC)
_SHARES = (0.7, 0.1, 0.2)  # of a byline's articles, by date
_MIN_ARTICLES = 5  # of a byline
_MIN_JUDGED = 10  # bylines with fewer are in training only

Articles = Mapping[str, Sequence[Mapping[str, str]]]  # by byline, oldest first


def write_huffpost(data: Path, folder: Path, *, seed: int = 0, vectors: VectorSettings = VECTORS) -> RealTask:
    """Write the task's tables; `data` is the folder with huffpost.parquet. Contents have no title: it is the answer.

    Later user embeddings are of the newer half of the training and validation articles.
    """
    splits = _split(_read(data))
    tables = TaskTables(folder, task="headline", now=_NOW)
    contents = [
        (article["content_id"], "", article["body"])
        for articles in splits.values()
        for own in articles.values()
        for article in own
    ]
    tables.write_contents(pl.DataFrame(contents, schema=["content_id", "title", "body"], orient="row"))
    num_targets = {}
    for split, articles in splits.items():
        answers = [
            Answer(byline, article["content_id"], article["title"])
            for byline, own in articles.items()
            for article in own
        ]
        tables.write_targets(split, answers)
        num_targets[split] = len(answers)
    early = {byline: _history(own) for byline, own in splits["train"].items()}
    until_later = {byline: [*own, *splits["validation"].get(byline, ())] for byline, own in splits["train"].items()}
    late = {byline: _history(own[len(own) // 2 :]) for byline, own in until_later.items()}
    spaces = write_writers(tables, early, late, vectors, seed=seed)
    return RealTask(
        name="huffpost",
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
        num_targets=num_targets,
    )


def _read(data: Path) -> Articles:
    """Articles with a byline, an own title and an own body, where the body does not give the title away."""
    table = pl.read_parquet(data / "huffpost.parquet").with_columns(
        pl.col("title", "body").str.replace_all(r"\s+", " ").str.strip_chars()
    )
    table = table.with_columns(content_id=pl.format("h{}", pl.int_range(pl.len()))).filter(
        pl.col("byline") != "",
        pl.col("title") != "",
        pl.col("body") != "",
        pl.struct("title", "body").is_first_distinct(),
    )
    told = [title.lower() in body.lower() for title, body in table.select("title", "body").iter_rows()]
    table = table.filter(~pl.Series(told)).sort("byline", "date", "content_id")
    articles: dict[str, list[Mapping[str, str]]] = {}
    for article in table.iter_rows(named=True):
        articles.setdefault(article["byline"], []).append(article)
    return {byline: own for byline, own in articles.items() if len(own) >= _MIN_ARTICLES}


def _split(articles: Articles) -> dict[str, dict[str, list[Mapping[str, str]]]]:
    """Articles by split and byline; no day of a byline is in two splits."""
    splits: dict[str, dict[str, list[Mapping[str, str]]]] = {split: {} for split in SPLITS}
    for byline, own in articles.items():
        if len(own) < _MIN_JUDGED:
            splits["train"][byline] = list(own)
            continue
        first, second = (own[round(share * len(own)) - 1]["date"] for share in (_SHARES[0], _SHARES[0] + _SHARES[1]))
        for article in own:
            split = "train" if article["date"] <= first else "validation" if article["date"] <= second else "test"
            splits[split].setdefault(byline, []).append(article)
    return splits


def _history(articles: Sequence[Mapping[str, str]]) -> list[Written]:
    return [Written(one["title"], f"{one['category']} {one['body']}") for one in articles]

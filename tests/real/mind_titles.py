"""MIND: clicked titles as targets, abstracts as contents, users from click histories, and impressions to rank.

By time: the earlier clicks of a history make the user embedding, its last ones the training targets, and the log's
first days (after all histories) validate, its last days test. No article is in the targets of two splits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from e2p_ray.upstream.factorise import FactoriseSettings, Factors, factorise
from tests.real.tables import SPLITS, Answer, RealTask, TaskTables

TEMPLATE = {"content": "{body}", "cue_before": "\n\nHeadline:"}
_NOW = datetime(2019, 11, 15, tzinfo=UTC)
_TEST_FROM = "2019-11-13"
_LATE_SHARE = 0.3  # of a history
_MAX_LATE = 8  # clicks

Histories = Mapping[str, Sequence[str]]  # by user id: content ids, oldest first


def write_mind(data: Path, folder: Path, *, seed: int = 0, num_factors: int = 32) -> RealTask:
    """Write the task's tables; `data` is the folder with mind_contents.parquet and mind_impressions.parquet.

    Contents have no title: it is the answer. The table `impressions` has it as `text`: what was shown in the test days,
    clicked or not, of impressions with some of both.
    """
    articles = _articles(data)
    log = pl.read_parquet(data / "mind_impressions.parquet").sort("impression_id")
    early, whole = _histories(log)
    answers = _answers(log, early, whole, dict(articles.select("content_id", "title").iter_rows()))
    impressions = _impressions(log, articles, early)
    tables = TaskTables(folder, task="headline", now=_NOW)
    tables.write_contents(articles.select("content_id", pl.lit("").alias("title"), "body"))
    tables.write("impressions", impressions)
    for split in SPLITS:
        tables.write_targets(split, answers[split])
    spaces = _write_users(tables, articles, early, whole, FactoriseSettings(num_factors=num_factors, seed=seed))
    return RealTask(
        name="mind",
        folder=folder,
        task="headline",
        template=TEMPLATE,
        target_prefix=" ",
        language="en",
        embedding_space=spaces[0],
        refit_space=spaces[1],
        embedding_dim=num_factors,
        num_users=len(early),
        num_contents=len(articles),
        num_targets={split: len(answers[split]) for split in SPLITS},
        num_impressions=impressions["impression_id"].n_unique(),
    )


def fold_in(factors: Factors, settings: FactoriseSettings, clicks: Sequence[Sequence[str]]) -> npt.NDArray[np.float32]:
    """User embeddings (n, d) for other clicks in the space of a fit: one user step of ALS against its item factors."""
    place_of = {item_id: place for place, item_id in enumerate(factors.item_ids)}
    items = factors.item_factors.astype(np.float64)
    everywhere = items.T @ items + settings.regularization * np.eye(items.shape[1])
    rows = []
    for own in clicks:
        counts = Counter(place_of[item_id] for item_id in own if item_id in place_of)
        clicked = items[list(counts)]
        confidence = settings.alpha * np.array(list(counts.values()), np.float64)
        left = everywhere + (clicked.T * (confidence - 1)) @ clicked
        rows.append(np.linalg.solve(left, clicked.T @ confidence))
    return np.array(rows, np.float32)


def _articles(data: Path) -> pl.DataFrame:
    """Articles with a title and an abstract that does not give it away."""
    table = pl.read_parquet(data / "mind_contents.parquet").with_columns(
        pl.col("title", "body").str.replace_all(r"\s+", " ").str.strip_chars()
    )
    table = table.filter(pl.col("title") != "", pl.col("body").str.len_chars() > 20).sort("content_id")
    told = [title.lower() in body.lower() for title, body in table.select("title", "body").iter_rows()]
    return table.filter(~pl.Series(told))


def _histories(log: pl.DataFrame) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The earlier part of every user's history, and all of it; users with one click or none are left out."""
    first = log.unique("user_id", keep="first", maintain_order=True).sort("user_id")
    early: dict[str, list[str]] = {}
    whole: dict[str, list[str]] = {}
    for user_id, history in first.select("user_id", "history").iter_rows():
        if len(history) > 1:
            num_late = min(_MAX_LATE, max(1, round(_LATE_SHARE * len(history))))
            early[user_id], whole[user_id] = history[:-num_late], list(history)
    return early, whole


def _answers(
    log: pl.DataFrame, early: Histories, whole: Histories, titles: Mapping[str, str]
) -> dict[str, list[Answer]]:
    """Clicked titles by split. Later splits come first: an article that is theirs is in no earlier one."""
    clicks: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    for user_id, time, clicked in log.select("user_id", "time", "clicked").iter_rows():
        split = "test" if time >= _TEST_FROM else "validation"
        clicks[split].extend((user_id, content_id) for content_id in clicked)
    for user_id, history in whole.items():
        clicks["train"].extend((user_id, content_id) for content_id in history[len(early[user_id]) :])
    taken: set[str] = set()
    answers: dict[str, list[Answer]] = {}
    for split in reversed(SPLITS):
        known = [pair for pair in dict.fromkeys(clicks[split]) if pair[0] in early and pair[1] in titles]
        answers[split] = [Answer(user_id, item, titles[item]) for user_id, item in known if item not in taken]
        taken.update(item for _, item in clicks[split])
    return answers


def _impressions(log: pl.DataFrame, articles: pl.DataFrame, early: Histories) -> pl.DataFrame:
    """impression_id, user_id, content_id, text, clicked: the test days' impressions with a click and a non-click."""
    tested = log.filter(pl.col("time") >= _TEST_FROM, pl.col("user_id").is_in(list(early)))
    shown = pl.concat(
        tested.select("impression_id", "user_id", content_id=column, clicked=pl.lit(column == "clicked")).explode(
            "content_id"
        )
        for column in ("clicked", "not_clicked")
    )
    known = shown.join(articles.select("content_id", text="title"), on="content_id")
    both = known.filter(pl.col("clicked").any().over("impression_id"), ~pl.col("clicked").all().over("impression_id"))
    ordered = both.unique(["impression_id", "content_id"], keep="first", maintain_order=True)
    return ordered.sort("impression_id", "content_id").select(
        "impression_id", "user_id", "content_id", "text", "clicked"
    )


def _write_users(
    tables: TaskTables, articles: pl.DataFrame, early: Histories, whole: Histories, settings: FactoriseSettings
) -> tuple[str, str]:
    clicks = pl.DataFrame(
        [(user_id, item) for user_id, history in early.items() for item in history],
        schema=["user_id", "item_id"],
        orient="row",
    )
    fit = factorise(clicks, settings)
    refit = factorise(clicks, FactoriseSettings(num_factors=settings.num_factors, seed=settings.seed + 1))
    assert list(fit.user_ids) == list(early), "both are sorted by user id"
    later = fold_in(fit, settings, list(whole.values()))
    known = {content_id: (category, title) for content_id, category, title in articles.select(_PROFILE).iter_rows()}
    for table, vectors, space, histories in (
        ("users", fit.user_embeddings, fit.embedding_space, early),
        ("users_later", later, fit.embedding_space, whole),
        ("users_refit", refit.user_embeddings, refit.embedding_space, early),
    ):
        tables.write_users(
            table,
            vectors,
            space,
            user_ids=list(histories),
            history_sizes=[len(history) for history in histories.values()],
            profile_texts=[_profile(history, known) for history in histories.values()],
        )
    return fit.embedding_space, refit.embedding_space


_PROFILE = ("content_id", "subcategory", "title")


def _profile(history: Sequence[str], known: Mapping[str, tuple[str, str]]) -> str:
    """What a user reads in words; empty when no article of his history is known."""
    read = [known[content_id] for content_id in history if content_id in known]
    if not read:
        return ""
    subjects = ", ".join(subject for subject, _ in Counter(subject for subject, _ in read).most_common(4))
    return f"Reads about: {subjects}. Read last: {'; '.join(title for _, title in read[-3:])}."

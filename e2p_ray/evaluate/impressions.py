"""Ranking: does the text of a candidate that was clicked become likelier under its user's soft token?"""

from __future__ import annotations

from dataclasses import replace

import polars as pl

from e2p_ray.downstream.measures.methods import NO_SOFT_TOKEN, RIGHT, SHUFFLED
from e2p_ray.evaluate.contest import Contest, shuffled_users
from e2p_ray.train.lessons import Target
from e2p_ray.train.score import score


def ranked_impressions(contest: Contest) -> pl.DataFrame | None:
    """method, impression_id, user_id, content_id, score, clicked; None without impressions that can be scored.

    Scores are mean log-likelihoods a token of the text shown. `gain` and `gain_shuffled` take away what the text has
    without a soft token: a text that is likely anyway says nothing about the user.
    """
    shown = contest.data.impressions
    if shown is None:
        return None
    users = pl.Series(contest.data.users.user_ids, dtype=pl.String)
    contents = pl.Series(list(contest.data.contents), dtype=pl.String)
    shown = shown.filter(
        pl.col("user_id").is_in(users.implode()),
        pl.col("content_id").is_in(contents.implode()),
        pl.col("text").str.strip_chars() != "",
    )
    if shown.is_empty():
        return None
    contest.say(f"ranking: {len(shown):,} candidates of {shown['impression_id'].n_unique():,} impressions")
    task = next(iter(contest.tasks))
    targets = tuple(
        Target(u, c, task, text) for u, c, text in shown.select("user_id", "content_id", "text").iter_rows()
    )
    table = contest.lessons(targets)
    rows = shown[table.source]
    languages = rows["content_id"].to_list()
    language_of = pl.Series([contest.data.contents[content_id].language for content_id in languages]).to_numpy()
    other = replace(table, user=shuffled_users(table.user, language_of, contest.config.evaluation.seed))
    store = contest.new_store()
    right, shuffled, none = (
        -found.nll / found.num_tokens
        for found in (
            score(contest.base, contest.projector, table, store),
            score(contest.base, contest.projector, other, store),
            score(contest.base, None, table, contest.new_store()),
        )
    )
    by_method = {
        RIGHT: right,
        SHUFFLED: shuffled,
        NO_SOFT_TOKEN: none,
        "gain": right - none,
        "gain_shuffled": shuffled - none,
    }
    columns = ("impression_id", "user_id", "content_id", "clicked")
    return pl.concat(
        rows.select(pl.lit(method).alias("method"), *columns, pl.Series("score", values))
        for method, values in by_method.items()
    )

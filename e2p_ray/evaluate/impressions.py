"""Ranking: does the text of a candidate that was clicked become likelier under its user's soft token?"""

from __future__ import annotations

from dataclasses import replace

import polars as pl

from e2p_ray.config import EvaluateConfig
from e2p_ray.downstream.measures.methods import GAIN, GAIN_SHUFFLED, NO_SOFT_TOKEN, RIGHT, SHUFFLED
from e2p_ray.evaluate.contest import Contest, finite_score, shuffled_users
from e2p_ray.train.lessons import Target


def shown_targets(config: EvaluateConfig, impressions: pl.DataFrame) -> tuple[Target, ...]:
    """The texts that were shown, as targets of the configuration's first task."""
    task = next(iter(config.tasks))
    rows = impressions.select("user_id", "content_id", "text").iter_rows()
    return tuple(Target(user_id, content_id, task, text) for user_id, content_id, text in rows)


def ranked_impressions(contest: Contest) -> pl.DataFrame | None:
    """method, impression_id, user_id, content_id, score, clicked; None without impressions.

    Scores are mean log-likelihoods a token of the text shown. `gain` and `gain_shuffled` take away what the text has
    without a soft token: a text that is likely anyway says nothing about the user.
    """
    shown, table = contest.data.impressions, contest.shown
    if shown is None or table is None:
        return None
    rows = shown[table.source]
    contest.say(f"ranking: {len(rows):,} candidates of {rows['impression_id'].n_unique():,} impressions")
    languages = rows["content_id"].to_list()
    language_of = pl.Series([contest.data.contents[content_id].language for content_id in languages]).to_numpy()
    other = replace(table, user=shuffled_users(table.user, language_of, contest.config.evaluation.seed))
    store = contest.new_store()
    right, shuffled, none = (
        -found.nll / found.num_tokens
        for found in (
            finite_score(contest.base, contest.projector, table, store),
            finite_score(contest.base, contest.projector, other, store),
            finite_score(contest.base, None, table, contest.new_store()),
        )
    )
    by_method = {
        RIGHT: right,
        SHUFFLED: shuffled,
        NO_SOFT_TOKEN: none,
        GAIN: right - none,
        GAIN_SHUFFLED: shuffled - none,
    }
    columns = ("impression_id", "user_id", "content_id", "clicked")
    return pl.concat(
        rows.select(pl.lit(method).alias("method"), *columns, pl.Series("score", values))
        for method, values in by_method.items()
    )

"""Logged candidates ranked by a score, against the clicks: NDCG@5, NDCG@10, MRR and AUC, a value an impression.

Definitions of the MIND benchmark (Wu et al. 2020): MRR is the mean of 1/rank over *all* clicked candidates. Tied
candidates share their places (McSherry and Najork 2008), so a score that is the same for all gives chance, whatever the
order of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from e2p_ray.downstream.measures.bootstrap import Floats, Interval, mean_intervals
from e2p_ray.downstream.measures.methods import in_order

_COLUMNS = {
    "method": pl.String,
    "impression_id": pl.String,
    "user_id": pl.String,
    "score": pl.Float64,
    "clicked": pl.Boolean,
}


@dataclass(frozen=True, slots=True)
class Ranking:
    """One method's scores against the clicks; impressions all clicked, or not at all, say nothing and are left out."""

    method: str
    num_impressions: int
    num_left_out: int
    ndcg_5: Interval
    ndcg_10: Interval
    mrr: Interval
    auc: Interval


def measure_ranking(ranking: pl.DataFrame, *, seed: int) -> tuple[Ranking, ...]:
    """A `Ranking` a method, intervals over users; a method without a usable impression has none.

    Columns: method, impression_id, user_id, score (higher is better, finite), clicked.
    """
    for name, kind in _COLUMNS.items():
        assert ranking.schema.get(name) == kind, f"ranking.{name} is {ranking.schema.get(name)}, not {kind}"
    assert ranking["score"].is_finite().all(), "scores are finite"
    found = []
    for method in in_order(ranking["method"]):
        rows = ranking.filter(method=method)
        per_impression = impression_measures(rows)
        if len(per_impression) == 0:
            continue
        values = per_impression.select("ndcg_5", "ndcg_10", "mrr", "auc").to_numpy()
        measured = mean_intervals(per_impression["user_id"].to_list(), values, seed=seed)
        num_left_out = rows["impression_id"].n_unique() - len(per_impression)
        found.append(Ranking(method, len(per_impression), num_left_out, *measured))
    return tuple(found)


def impression_measures(rows: pl.DataFrame) -> pl.DataFrame:
    """impression_id, user_id, ndcg_5, ndcg_10, mrr, auc of one method's impressions with both classes."""
    impression = ["impression_id"]
    size = pl.len().over(impression)
    clicks = pl.col("clicked").sum().over(impression)
    ranked = rows.filter((clicks > 0) & (clicks < size)).with_columns(
        first=pl.col("score").rank("min", descending=True).over(impression).cast(pl.Int64),
        last=pl.col("score").rank("max", descending=True).over(impression).cast(pl.Int64),
        from_below=pl.col("score").rank("average").over(impression),
    )
    first, last = ranked["first"].to_numpy(), ranked["last"].to_numpy()
    places = np.arange(1, max(10, int(last.max(initial=0))) + 1)
    discounts = 1.0 / np.log2(places + 1)
    clicked = ranked.with_columns(
        gain_5=_mean_over_ties(np.where(places <= 5, discounts, 0.0), first, last),
        gain_10=_mean_over_ties(np.where(places <= 10, discounts, 0.0), first, last),
        reciprocal=_mean_over_ties(1.0 / places, first, last),
        size=size,
    ).filter("clicked")
    summed = clicked.group_by(impression, maintain_order=True).agg(
        pl.col("user_id").first(),
        pl.col("size").first().cast(pl.Float64),
        pl.len().alias("num_clicked"),
        pl.col("gain_5", "gain_10", "reciprocal", "from_below").sum(),
    )
    best = np.concatenate([[0.0], np.cumsum(discounts)])
    num_clicked = summed["num_clicked"].to_numpy().astype(np.int64)
    pairs = num_clicked * (summed["size"].to_numpy() - num_clicked)
    won = summed["from_below"].to_numpy() - num_clicked * (num_clicked + 1) / 2  # Mann and Whitney's U
    return summed.select(
        "impression_id",
        "user_id",
        pl.Series("ndcg_5", summed["gain_5"].to_numpy() / best[np.minimum(num_clicked, 5)]),
        pl.Series("ndcg_10", summed["gain_10"].to_numpy() / best[np.minimum(num_clicked, 10)]),
        pl.Series("mrr", summed["reciprocal"].to_numpy() / num_clicked),
        pl.Series("auc", won / pairs),
    )


def _mean_over_ties(worth: Floats, first: Floats, last: Floats) -> pl.Series:
    """The mean worth of the places that the candidates of one score share."""
    total = np.concatenate([[0.0], np.cumsum(worth)])
    return pl.Series((total[last] - total[first - 1]) / (last - first + 1))

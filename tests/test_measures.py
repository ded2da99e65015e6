"""Intervals, likelihoods, retrieval and ranking against independent references, with controls that must fail."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from e2p_ray.downstream.evaluation import summarise
from e2p_ray.downstream.measures.bootstrap import Interval, mean_intervals, ratio_interval, ratio_intervals, user_sums
from e2p_ray.downstream.measures.likelihood import check_scores, gain_histogram, gains_by_history, user_totals
from e2p_ray.downstream.measures.ranking import impression_measures, measure_ranking
from e2p_ray.downstream.measures.retrieval import LikelihoodMatrix, expected_ranks, measure_retrieval
from e2p_ray.errors import RunError
from tests.evaluation_world import (
    METHODS,
    ranking_frame,
    scores_frame,
)

QUICK = settings(max_examples=40, deadline=None)


def _width(interval: Interval) -> float:
    return interval.high - interval.low


# -- intervals


def _clustered(random: np.random.Generator, num_users: int, num_rows: int) -> tuple[list[str], Any]:
    users = [f"u{n}" for n in range(num_users) for _ in range(num_rows)]
    own = np.repeat(random.normal(0, 1, num_users), num_rows)
    return users, (own + random.normal(0, 0.5, num_users * num_rows))[:, None]


def test_an_interval_is_that_of_scipys_bootstrap() -> None:
    random = np.random.default_rng(0)
    nll, tokens = random.gamma(4, 10, 50), random.integers(3, 40, 50).astype(float)

    def ratio(top: Any, below: Any, axis: int) -> Any:
        return top.sum(axis) / below.sum(axis)

    options = {"paired": True, "method": "percentile", "n_resamples": 4000}
    theirs = stats.bootstrap((nll, tokens), ratio, rng=random, **options).confidence_interval
    ours = ratio_interval(nll, tokens, seed=1, num_resamples=4000)
    assert ours.value == pytest.approx(math.fsum(nll) / math.fsum(tokens))
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.06 * _width(ours))
    assert abs(ratio_interval(nll, tokens, seed=1, level=0.5).low - theirs.low) > 0.2 * _width(ours), "another level"


def test_users_are_resampled_and_not_rows() -> None:
    """On 150 made worlds the interval holds the truth about 95 times of 100; that of single rows does not."""
    random = np.random.default_rng(1)
    held, held_by_rows = 0, 0
    for seed in range(150):
        users, values = _clustered(random, 40, 8)
        (ours,) = mean_intervals(users, values, seed=seed, num_resamples=300)
        (rows,) = mean_intervals([f"{n}" for n in range(len(users))], values, seed=seed, num_resamples=300)
        assert _width(ours) > 1.5 * _width(rows)
        held += ours.low <= 0 <= ours.high
        held_by_rows += rows.low <= 0 <= rows.high
    assert 0.88 <= held / 150 <= 0.99
    assert held_by_rows / 150 < 0.75, "the control: rows are not independent"


def test_users_without_targets_are_an_error_and_one_user_has_no_width() -> None:
    with pytest.raises(RunError, match="nothing to measure"):
        ratio_interval(np.zeros(0), np.zeros(0), seed=0)
    empty = scores_frame().clear()
    with pytest.raises(RunError, match="nothing to measure"):
        summarise(empty, [], about={}, seed=0)
    one = ratio_interval(np.array([6.0]), np.array([4.0]), seed=0)
    assert one == Interval(1.5, 1.5, 1.5)


def test_order_of_rows_and_names_of_users_do_not_matter() -> None:
    users, values = _clustered(np.random.default_rng(2), 12, 3)
    order = np.random.default_rng(3).permutation(len(users))
    (ours,) = mean_intervals(users, values, seed=0)
    (moved,) = mean_intervals([users[n] for n in order], values[order], seed=0)
    assert (moved.value, moved.low, moved.high) == pytest.approx((ours.value, ours.low, ours.high))
    (other,) = mean_intervals(users, values[order], seed=0)
    assert other.low != pytest.approx(ours.low), "the control: values of other users"


def test_sums_are_by_user() -> None:
    sums, counts = user_sums(["b", "a", "b"], np.array([[1.0], [2.0], [5.0]]))
    assert sums.tolist() == [[2.0], [6.0]]
    assert counts.tolist() == [1.0, 2.0]
    both = ratio_intervals(np.array([[1.0, 2.0], [3.0, 6.0]]), np.array([1.0, 1.0]), seed=0)
    doubled = [2 * end for end in (both[0].value, both[0].low, both[0].high)]
    assert [both[1].value, both[1].low, both[1].high] == pytest.approx(doubled)


# -- likelihood


def test_gains_are_those_of_plain_sums() -> None:
    frame = scores_frame(noise=0.1)
    evaluation = summarise(frame, [], about={}, seed=0)
    for part in ("all", "en", "ja"):
        rows = [row for row in frame.iter_rows(named=True) if part in ("all", row["language"])]
        for method in METHODS:
            score = evaluation.score(method, part)
            assert score is not None
            nll: Counter[tuple[str, str]] = Counter()
            for row in rows:
                nll[row["method"], row["user_id"]] += row["nll"]
            users = {row["user_id"] for row in rows}
            tokens = sum(row["num_tokens"] for row in rows if row["method"] == method)
            saved = [nll[method, user] - nll["right", user] for user in users]
            assert (score.num_users, score.num_tokens) == (len(users), tokens)
            assert score.nll_per_token.value == pytest.approx(sum(nll[method, user] for user in users) / tokens)
            if method == "right":
                assert score.gain is score.gaining_users is None
                continue
            assert score.gain is not None
            assert score.gaining_users is not None
            assert score.gain.value == pytest.approx(sum(saved) / tokens)
            assert score.gaining_users.value == pytest.approx(sum(nats > 0 for nats in saved) / len(users))


def test_a_paired_gain_is_surer_than_its_two_losses() -> None:
    evaluation = summarise(scores_frame(), [], about={}, seed=0)
    shuffled, right = evaluation.score("shuffled"), evaluation.score("right")
    assert shuffled is not None
    assert right is not None
    assert shuffled.gain is not None
    assert _width(shuffled.gain) < 0.5 * _width(right.nll_per_token)


@pytest.mark.parametrize(
    "change",
    [
        lambda frame: frame[1:],
        lambda frame: pl.concat([frame, frame[:1]]),
        lambda frame: frame.with_columns(num_tokens=pl.col("num_tokens") + (pl.col("method") == "mean")),
        lambda frame: frame.with_columns(nll=pl.col("nll") / 0),
        lambda frame: frame.with_columns(num_tokens=pl.col("num_tokens").cast(pl.Int32)),
        lambda frame: frame.drop("history_size"),
    ],
)
def test_uneven_scores_are_our_bug(change: Any) -> None:
    check_scores(scores_frame())
    with pytest.raises(AssertionError):
        check_scores(change(scores_frame()))


def test_history_bins_hold_every_known_user_once() -> None:
    frame = scores_frame(num_users=43).with_columns(
        history_size=pl.when(pl.col("user_id") < "reader-0040").then(pl.col("history_size") // 7)
    )
    totals = user_totals(frame)
    bins = gains_by_history(totals, "shuffled", seed=0)
    sizes = [(5 + user) // 7 for user in range(40)]
    assert sum(found.num_users for found in bins) == 40
    assert len(bins) > 2
    for found, after in pairwise(bins):
        assert found.low <= found.high < after.low
    for found in bins:
        assert found.num_users == sum(found.low <= size <= found.high for size in sizes) >= 5
        own = frame.filter(pl.col("history_size").is_between(found.low, found.high))
        shuffled, right = (own.filter(method=method)["nll"].to_list() for method in ("shuffled", "right"))
        tokens = own.filter(method="right")["num_tokens"].to_list()
        assert found.gain.value == pytest.approx((math.fsum(shuffled) - math.fsum(right)) / sum(tokens))


def test_a_lone_long_history_joins_its_neighbours() -> None:
    sizes = pl.when(pl.col("user_id") == "reader-0000").then(500).otherwise(3).cast(pl.Int64)
    frame = scores_frame(num_users=30)
    assert gains_by_history(user_totals(frame.with_columns(history_size=sizes)), "shuffled", seed=0) == ()
    sizes = pl.when(pl.col("user_id") < "reader-0012").then(3).otherwise(sizes + 4).cast(pl.Int64)
    bins = gains_by_history(user_totals(frame.with_columns(history_size=sizes)), "shuffled", seed=0)
    assert [found.num_users for found in bins] == [12, 18]
    unknown = pl.lit(None, pl.Int64)
    assert gains_by_history(user_totals(frame.with_columns(history_size=unknown)), "shuffled", seed=0) == ()


@QUICK
@given(gain=st.floats(-0.2, 0.2), noise=st.sampled_from([0.0, 0.01, 1.0]), seed=st.integers(0, 99))
@example(gain=0.021484375, noise=0.01, seed=21)  # one user of twelve loses: the outermost
def test_histogram_holds_every_user_on_the_right_side_of_zero(gain: float, noise: float, seed: int) -> None:
    totals = user_totals(scores_frame(gain=gain, noise=noise, seed=seed, num_users=12))
    bars = gain_histogram(totals, "shuffled")
    gains = totals.gains("shuffled") / totals.num_tokens
    assert sum(bars.counts) == 12
    assert bars.num_gaining == (gains > 0).sum()
    starts = bars.start + bars.width * np.arange(len(bars.counts))
    below = [count for start, count in zip(starts, bars.counts, strict=True) if start < -bars.width / 2]
    assert sum(below) == (gains < 0).sum()


# -- retrieval


def _all_orders(values: Sequence[float], right: int) -> tuple[float, float, float]:
    """Top-1, top-5 and 1/rank over all orders of the users that go down in value."""
    found = []
    for order in permutations(range(len(values))):
        if all(values[a] >= values[b] for a, b in pairwise(order)):
            rank = order.index(right) + 1
            found.append((rank <= 1, rank <= 5, 1 / rank))
    top_1, top_5, mrr = np.mean(found, axis=0)
    return float(top_1), float(top_5), float(mrr)


@QUICK
@given(values=arrays(np.float64, (2, 6), elements=st.sampled_from([-2.0, 0.0, 1.0, 2.0])), right=st.integers(0, 5))
def test_ranks_are_means_over_all_orders_of_ties(values: Any, right: int) -> None:
    ranks = expected_ranks(values, np.array([right, 5 - right]))
    for row, column, ours in zip(values, (right, 5 - right), ranks, strict=True):
        assert tuple(ours) == pytest.approx(_all_orders(row, column))


def test_equal_users_are_chance_and_a_perfect_model_is_first() -> None:
    random = np.random.default_rng(0)
    right = random.integers(20, size=50)
    found = measure_retrieval(LikelihoodMatrix("x", "en", np.full((50, 20), -3.0), right), seed=0)
    for scores in (found.centred, found.raw):
        for interval, chance in ((scores.top_1, 1 / 20), (scores.top_5, 5 / 20), (scores.mrr, found.chance_mrr)):
            assert (interval.value, interval.low, interval.high) == pytest.approx((chance,) * 3)
    assert found.chance_mrr == pytest.approx(np.mean([1 / rank for rank in range(1, 21)]))
    perfect = random.normal(size=(50, 20))
    perfect[np.arange(50), right] += 20
    assert measure_retrieval(LikelihoodMatrix("x", "en", perfect, right), seed=0).centred.top_1.value == 1.0
    wrong = measure_retrieval(LikelihoodMatrix("x", "en", perfect, (right + 1) % 20), seed=0)
    assert wrong.centred.top_1.value < 0.2, "the control: another user's column"


def test_a_user_whom_every_text_suits_does_not_win() -> None:
    right = np.arange(40) % 8
    values = np.random.default_rng(1).normal(0, 0.1, (40, 8))
    values[np.arange(40), right] += 1.0
    values[:, 3] += 50.0
    found = measure_retrieval(LikelihoodMatrix("x", "ja", values, right), seed=0)
    assert found.centred.top_1.value == 1.0
    assert found.raw.top_1.value == pytest.approx(1 / 8), "the control: raw, user 3 stands first always"
    order = np.random.default_rng(2).permutation(8)
    moved = measure_retrieval(LikelihoodMatrix("x", "ja", values[:, order], np.argsort(order)[right]), seed=0)
    assert moved.centred.mrr.value == pytest.approx(found.centred.mrr.value)


def test_unrelated_likelihoods_are_near_chance() -> None:
    random = np.random.default_rng(3)
    found = measure_retrieval(
        LikelihoodMatrix("x", "en", random.normal(size=(2000, 10)), random.integers(10, size=2000)), seed=0
    )
    assert found.centred.top_1.value == pytest.approx(found.chance_top_1, abs=0.03)
    assert found.centred.mrr.value == pytest.approx(found.chance_mrr, abs=0.03)


# -- ranking


def _impressions(rows: Sequence[tuple[float, bool]], *, user: str = "u", name: str = "i") -> pl.DataFrame:
    values = [("m", name, user, score, clicked) for score, clicked in rows]
    kinds: dict[str, Any] = dict.fromkeys(["method", "impression_id", "user_id"], pl.String)
    return pl.DataFrame(values, schema=kinds | {"score": pl.Float64, "clicked": pl.Boolean}, orient="row")


def _ranked(clicks: Sequence[bool]) -> tuple[float, float, float, float]:
    """NDCG@5, NDCG@10, MRR and AUC of clicks from first to last place, as MIND's own script defines them."""

    def dcg(ordered: Sequence[bool], k: int) -> float:
        return math.fsum(click / math.log2(place + 2) for place, click in enumerate(ordered[:k]))

    best = sorted(clicks, reverse=True)
    mrr = sum(click / (place + 1) for place, click in enumerate(clicks)) / sum(clicks)
    pairs = [after for place, click in enumerate(clicks) if click for after in range(len(clicks)) if not clicks[after]]
    own = [place for place, click in enumerate(clicks) if click for _ in range(len(clicks) - sum(clicks))]
    auc = np.mean([place < after for place, after in zip(own, pairs, strict=True)])
    return dcg(clicks, 5) / dcg(best, 5), dcg(clicks, 10) / dcg(best, 10), mrr, float(auc)


@QUICK
@given(
    rows=st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.5]), st.booleans()), min_size=2, max_size=6).filter(
        lambda rows: len({clicked for _, clicked in rows}) == 2
    )
)
def test_ranking_is_the_mean_over_all_orders_of_ties(rows: list[tuple[float, bool]]) -> None:
    orders = [order for order in permutations(rows) if all(a[0] >= b[0] for a, b in pairwise(order))]
    theirs = np.mean([_ranked([clicked for _, clicked in order]) for order in orders], axis=0)
    (ours,) = impression_measures(_impressions(rows)).select("ndcg_5", "ndcg_10", "mrr", "auc").rows()
    assert ours == pytest.approx(tuple(theirs))
    (turned,) = impression_measures(_impressions([(-score, clicked) for score, clicked in rows]))["auc"]
    assert turned == pytest.approx(1 - ours[3]), "reversed scores"
    (moved,) = impression_measures(_impressions(rows[::-1])).select("ndcg_5", "ndcg_10", "mrr", "auc").rows()
    assert moved == pytest.approx(ours), "the order of the rows"


def test_places_beyond_ten_count_for_nothing_but_mrr() -> None:
    rows = [(float(-place), place == 11) for place in range(15)]
    (found,) = measure_ranking(_impressions(rows), seed=0)
    assert [found.ndcg_5.value, found.ndcg_10.value, found.mrr.value] == pytest.approx([0.0, 0.0, 1 / 12])
    assert found.auc.value == pytest.approx(3 / 14)


def test_impressions_of_one_class_are_left_out_and_counted() -> None:
    right, shuffled = measure_ranking(ranking_frame(num_impressions=40), seed=0)
    assert (right.method, right.num_impressions, right.num_left_out) == ("right", 38, 2)
    assert right.auc.low > 0.5
    assert shuffled.auc.low < 0.5 < shuffled.auc.high, "the control knows nothing"
    assert measure_ranking(_impressions([(1.0, True), (0.0, True)]), seed=0) == ()

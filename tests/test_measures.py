"""Every measure against an independent reference, each group with a control that must fail."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats

from e2p_ray.downstream.evaluation import Evaluation, MethodCost, summarise
from e2p_ray.downstream.measures.bootstrap import Interval, mean_intervals, ratio_interval, ratio_intervals, user_sums
from e2p_ray.downstream.measures.faithfulness import measure_faithfulness
from e2p_ray.downstream.measures.likelihood import check_scores, gain_histogram, gains_by_history, user_totals
from e2p_ray.downstream.measures.likeness import habits, measure_likeness
from e2p_ray.downstream.measures.overlap import measure_overlap
from e2p_ray.downstream.measures.ranking import impression_measures, measure_ranking
from e2p_ray.downstream.measures.retrieval import LikelihoodMatrix, expected_ranks, measure_retrieval
from e2p_ray.downstream.measures.texts import choose_samples, measure_texts
from e2p_ray.downstream.measures.tokens import words, words_and_marks
from e2p_ray.downstream.measures.variety import distinct_2, measure_variety
from e2p_ray.downstream.measures.verdict import Finding
from e2p_ray.downstream.pages.columns import width
from e2p_ray.errors import RunError
from e2p_ray.schema import Content
from tests.evaluation_world import (
    METHODS,
    NUM_CONTENTS,
    NUM_USERS,
    costs,
    matrices,
    ranking_frame,
    scores_frame,
    texts_frame,
    whole_evaluation,
)

QUICK = settings(max_examples=40, deadline=None)
EN, JA = st.text("ab c.", max_size=12), st.text("橋港が開。A1", max_size=8)


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
    assert both[1] == Interval(*(pytest.approx(2 * end) for end in (both[0].value, both[0].low, both[0].high)))


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
        (nll,) = [own.filter(method="shuffled")["nll"].sum() - own.filter(method="right")["nll"].sum()]
        assert found.gain.value == pytest.approx(nll / own.filter(method="right")["num_tokens"].sum())


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
        return sum((2**click - 1) / math.log2(place + 2) for place, click in enumerate(ordered[:k]))

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
    assert (found.ndcg_5.value, found.ndcg_10.value, found.mrr.value) == (0.0, 0.0, pytest.approx(1 / 12))
    assert found.auc.value == pytest.approx(3 / 14)


def test_impressions_of_one_class_are_left_out_and_counted() -> None:
    right, shuffled = measure_ranking(ranking_frame(num_impressions=40), seed=0)
    assert (right.method, right.num_impressions, right.num_left_out) == ("right", 38, 2)
    assert right.auc.low > 0.5
    assert shuffled.auc.low < 0.5 < shuffled.auc.high, "the control knows nothing"
    assert measure_ranking(_impressions([(1.0, True), (0.0, True)]), seed=0) == ()


# -- overlap with references


def _ngrams(units: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(units[start : start + size]) for start in range(len(units) - size + 1))


def _f_score(matched: int, num_text: int, num_reference: int) -> float:
    return 2 * matched / (num_text + num_reference) if matched else 0.0


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + _common(a[1:], b[1:])
    return max(_common(a[1:], b), _common(a, b[1:]))


def _rouge(text: str, reference: str, language: str) -> list[float]:
    both = (text, reference)
    if language == "en":
        a, b = (line.replace(".", " ").split() for line in both)
    else:  # a run of A and 1 is one word, every other letter but the stop is one of its own
        a, b = (
            "".join(f" {c} " if c in "橋港が開" else c for c in line.replace("。", " ")).lower().split()
            for line in both
        )
    grams = [(_ngrams(a, size), _ngrams(b, size)) for size in (1, 2)]
    values = [_f_score((x & y).total(), x.total(), y.total()) for x, y in grams]
    return [*values, _f_score(_common(a, b), len(a), len(b))]


@pytest.mark.parametrize("language", ["en", "ja"])
@QUICK
@given(data=st.data())
def test_rouge_is_that_of_plain_counting(language: str, data: st.DataObject) -> None:
    text, reference = (data.draw(EN if language == "en" else JA) for _ in range(2))
    found = measure_overlap([text], [reference], ["u"], language=language, seed=0)
    ours = [found.rouge_1.value, found.rouge_2.value, found.rouge_l.value]
    assert ours == pytest.approx(_rouge(text, reference, language))


def test_rouge_by_hand_in_both_languages() -> None:
    english = measure_overlap(["The cat lay on the mat."], ["the cat sat on the mat"], ["u"], language="en", seed=0)
    assert english.rouge_1.value == pytest.approx(5 / 6)
    assert english.rouge_2.value == pytest.approx(3 / 5)
    assert english.rouge_l.value == pytest.approx(5 / 6)
    japanese = measure_overlap(["犬が好きだ。"], ["猫が好きだ"], ["u"], language="ja", seed=0)
    assert japanese.rouge_1.value == pytest.approx(4 / 5)
    assert japanese.rouge_2.value == pytest.approx(3 / 4)
    assert japanese.rouge_l.value == pytest.approx(4 / 5)
    own = RougeScorer(["rouge1"]).score("猫が好きだ", "犬が好きだ。")
    assert own["rouge1"].fmeasure == 0.0, "the control: the library's own words drop Japanese"


def _bleu(texts: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> float:
    """Of a corpus, with no n-gram count at zero."""
    logs = []
    for size in (1, 2, 3, 4):
        grams = [(_ngrams(a, size), _ngrams(b, size)) for a, b in zip(texts, references, strict=True)]
        logs.append(math.log(sum((a & b).total() for a, b in grams) / sum(a.total() for a, _ in grams)))
    num_text, num_reference = sum(map(len, texts)), sum(map(len, references))
    return math.exp(sum(logs) / 4 + min(0.0, 1 - num_reference / num_text))


def _chrf(texts: Sequence[str], references: Sequence[str]) -> float:
    """Mean precision and recall of 1 to 6 letters over the corpus, blanks left out, recall twice as heavy."""
    pairs = [("".join(a.split()), "".join(b.split())) for a, b in zip(texts, references, strict=True)]
    rates = []
    for size in range(1, 7):
        grams = [(_ngrams(a, size), _ngrams(b, size)) for a, b in pairs]
        matched = sum((a & b).total() for a, b in grams)
        rates.append((matched / sum(a.total() for a, _ in grams), matched / sum(b.total() for _, b in grams)))
    precision, recall = np.mean(rates, axis=0)
    return float(5 * precision * recall / (4 * precision + recall))


def test_bleu_and_chrf_of_both_languages() -> None:
    texts = ["The dog bit the man.", "It was not a surprise to him."]
    references = ["The dog bit the young man.", "It was not unexpected."]
    found = measure_overlap(texts, references, ["u", "v"], language="en", seed=0)
    cut = [[line.replace(".", " .").split() for line in side] for side in (texts, references)]
    assert found.bleu == pytest.approx(_bleu(*cut))
    assert found.chrf == pytest.approx(_chrf(texts, references))
    texts, references = (
        ["新しい橋が月曜に開通した。", "費用は40億円です"],
        ["新しい橋が開通した。", "費用は40億円になる"],
    )
    found = measure_overlap(texts, references, ["u", "v"], language="ja-JP", seed=0)
    cut = [[list(line.replace("40", "#")) for line in side] for side in (texts, references)]
    assert found.bleu == pytest.approx(_bleu(*cut))
    assert found.chrf == pytest.approx(_chrf(texts, references))
    other = measure_overlap(texts, references, ["u", "v"], language="en", seed=0)
    assert other.bleu < 0.5 * found.bleu, "the control: words between spaces"


@pytest.mark.parametrize(
    ("language", "text", "foreign"),
    [("en", "Harbour bridge opens on Monday", "quick jazzy vixen"), ("ja", "港の橋が開通した", "犬も猫も走る")],
)
def test_the_same_text_is_one_and_a_foreign_one_nothing(language: str, text: str, foreign: str) -> None:
    same = measure_overlap([text], [text], ["u"], language=language, seed=0)
    values = [same.rouge_1.value, same.rouge_2.value, same.rouge_l.value, same.bleu, same.chrf]
    assert values == pytest.approx([1.0] * 5)
    other = measure_overlap([foreign], [text], ["u"], language=language, seed=0)
    assert [other.rouge_1.value, other.rouge_2.value, other.rouge_l.value] == [0.0] * 3
    assert other.chrf < 0.1


def test_words_of_mixed_languages() -> None:
    assert words("ＧＤＰ 2.5%増、don't_stop Straße") == ["gdp", "2", "5", "増", "don", "t", "stop", "strasse"]
    assert words_and_marks("Ab,橋 1.") == ["Ab", ",", "橋", "1", "."]
    assert words("ｶﾞス") == ["ガ", "ス"], "half-width kana"
    assert words("서울 시장") == ["서울", "시장"], "Korean has spaces"


# -- variety, likeness, faithfulness


def test_variety_by_hand() -> None:
    ids = ["a", "a", "a", "b", "b", "alone"]
    texts = ["one two", "one two", "one three", "橋が", "港が", "x"]
    found = measure_variety(ids, texts, seed=0)
    assert found is not None
    assert found.num_contents == 2
    assert found.distinct.value == pytest.approx((1 / 2 + 1) / 2)
    assert found.distance.value == pytest.approx(((0 + 1 / 2 + 1 / 2) / 3 + 1 / 2) / 2)
    assert found.distinct_2.value == pytest.approx((2 / 3 + 1) / 2)
    assert distinct_2(["one", ""]) == 0.0
    assert measure_variety(["a", "b"], ["x", "x"], seed=0) is None


@QUICK
@given(texts=st.lists(JA | EN, min_size=2, max_size=9), same=EN)
def test_variety_lies_between_one_text_and_all_different(texts: list[str], same: str) -> None:
    found = measure_variety(["a"] * len(texts), texts, seed=0)
    none = measure_variety(["a"] * len(texts), [same] * len(texts), seed=0)
    assert found is not None
    assert none is not None
    assert (none.distinct.value, none.distance.value) == (0.0, 0.0)
    assert found.distinct.value == pytest.approx((len(set(texts)) - 1) / (len(texts) - 1))
    assert 0.0 <= found.distance.value <= 1.0


def test_likeness_by_hand_and_by_scipy() -> None:
    texts, references = ["Why?", "ab", "「橋」１", "abcdefgh"], ["Why not?", "ab!", "橋は1", "abc"]
    users = ["u", "u", "v", "w"]
    found = measure_likeness(texts, references, users, seed=0)
    assert found.length_difference.value == pytest.approx((4 + 1 + 1 + 5) / 4)
    assert found.habits.value == pytest.approx((5 + 4 + 4 + 5) / (4 * 5))
    assert found.length_correlation == pytest.approx(stats.pearsonr([3, 4, 8], [5.5, 3, 3]).statistic)
    same = measure_likeness(references, references, users, seed=0)
    assert (same.length_difference.value, same.habits.value) == (0.0, 1.0)
    assert measure_likeness(["a", "b", "c"], references[:3], ["u", "v", "w"], seed=0).length_correlation is None


def test_habits_in_both_languages() -> None:
    names = ["question", "exclamation", "number", "quotation", "colon"]
    for text, shown in {
        "Why: 'now'?": {"question", "colon", "quotation"},
        "なぜ？": {"question"},
        "速報：３人「無事」！": {"exclamation", "number", "quotation", "colon"},
        "It's fine": set(),
    }.items():
        assert {name for name, found in zip(names, habits(text), strict=True) if found} == shown, text


def test_faithful_texts_name_only_what_the_content_names() -> None:
    body = "The city opened a bridge on Monday. It cost 40 million dollars. Mayor Anna Larsson cut the ribbon."
    english = Content("c", "Harbour bridge opens", body, "en")
    japanese = Content("d", "新しい橋が開通", "費用は40億円。佐藤市長がテープを切った。", "ja")
    cases = {
        "A bridge for 40 million dollars": english,
        "A bridge for 41 million dollars": english,
        "Mayor Peter Jackson opens the bridge": english,
        "佐藤市長が40億円の橋を開通": japanese,
        "費用41億円の橋が開通": japanese,
        "": japanese,
    }
    found = measure_faithfulness(list(cases), list(cases.values()), list("uvwxyz"), seed=0)
    assert found.faithful.value == pytest.approx(2 / 6)
    assert found.foreign_numbers == pytest.approx(2 / 6)
    assert found.foreign_names == pytest.approx(1 / 6)
    assert found.num_empty == 1
    swapped = measure_faithfulness(list(cases)[:1], [japanese], ["u"], seed=0)
    assert measure_faithfulness(list(cases)[:1], [english], ["u"], seed=0).faithful.value == 1.0
    assert swapped.num_empty == 0


def test_texts_are_measured_by_language_with_the_references_last() -> None:
    found = measure_texts(texts_frame(), seed=0)
    assert [(one.language, one.method) for one in found] == [
        (language, method)
        for language in ("en", "ja")
        for method in ("right", "shuffled", "no_soft_token", "reference")
    ]
    by_key = {(one.language, one.method): one for one in found}
    for language in ("en", "ja"):
        right, none, own = (by_key[language, method] for method in ("right", "no_soft_token", "reference"))
        assert right.overlap is not None
        assert none.overlap is not None
        assert right.overlap.rouge_l.value > none.overlap.rouge_l.value + 0.2
        assert right.variety is not None
        assert none.variety is not None
        assert right.variety.distinct.value == 1.0 > none.variety.distinct.value == 0.0
        assert own.overlap is own.likeness is None
    moved = measure_texts(texts_frame().sample(fraction=1, shuffle=True, seed=1), seed=0)
    assert moved == found


def test_samples_are_of_every_language_and_of_no_content_twice() -> None:
    samples = choose_samples(texts_frame(), seed=0)
    assert 2 <= len(samples) <= 12
    assert {sample.language for sample in samples} == {"en", "ja"}
    assert all(list(sample.texts) == ["right", "shuffled", "no_soft_token"] for sample in samples)
    assert choose_samples(texts_frame(), seed=0) == samples
    assert choose_samples(texts_frame(methods=("shuffled",)), seed=0) == ()


# -- the whole


@pytest.fixture(scope="module")
def whole() -> Evaluation:
    return whole_evaluation()


def test_a_clear_gain_is_called_personalisation(whole: Evaluation) -> None:
    first, *others = whole.conclusion.sentences
    shuffled = whole.score("shuffled")
    assert whole.conclusion.finding is Finding.PERSONALISES
    assert shuffled is not None
    assert shuffled.gain is not None
    assert first == (
        f"The right user's soft token beats a shuffled user's by {shuffled.gain.value:.4f} nats a token "
        f"(95 % interval {shuffled.gain.low:.4f} to {shuffled.gain.high:.4f}): it personalises."
    )
    assert sum(sentence.endswith("it personalises.") for sentence in others) == 2, "each language"


@pytest.mark.parametrize(
    ("gain", "num_users", "finding", "words"),
    [
        (-0.05, NUM_USERS, Finding.HARMS, "loses to a shuffled user's"),
        (0.05, 3, Finding.NOT_MEASURED, "Only 3 user(s)"),
    ],
)
def test_the_words_follow_the_interval(gain: float, num_users: int, finding: Finding, words: str) -> None:
    found = summarise(scores_frame(gain=gain, num_users=num_users), [], about={}, seed=0).conclusion
    assert found.finding is finding
    assert words in found.sentences[0]
    assert ": it personalises" not in " ".join(found.sentences)


def test_without_a_gain_none_is_shown() -> None:
    """Of 20 worlds in which the right user is no better, the interval leaves zero in about one."""
    methods = pl.col("method").is_in(["right", "shuffled"])
    frames = [scores_frame(gain=0.0, seed=seed, num_users=30).filter(methods) for seed in range(20)]
    found = [summarise(frame, [], about={}, seed=0).conclusion for frame in frames]
    same = [conclusion for conclusion in found if conclusion.finding is Finding.NOT_SHOWN]
    assert len(same) >= 16
    assert all("no difference is shown" in conclusion.sentences[0] for conclusion in same)
    assert not any(": it personalises" in conclusion.sentences[0] for conclusion in same)


def test_without_the_shuffled_user_nothing_is_said() -> None:
    frame = scores_frame().filter(pl.col("method") != "shuffled")
    found = summarise(frame, [MethodCost("right")], about={}, seed=0)
    assert found.conclusion.finding is Finding.NOT_MEASURED
    assert "not both measured" in found.conclusion.sentences[0]
    assert found.lines()


def test_an_evaluation_survives_json_and_names_nobody(whole: Evaluation) -> None:
    written = whole.to_json()
    assert Evaluation.from_json(written) == whole
    for text in (written, whole.lines()):
        assert "reader-" not in text
        assert "article-" not in text
        assert "impression-" not in text
    assert whole.num_contents == NUM_CONTENTS


def test_the_order_of_rows_does_not_matter(whole: Evaluation) -> None:
    mixed = [
        frame.sample(fraction=1, shuffle=True, seed=3) for frame in (scores_frame(), texts_frame(), ranking_frame())
    ]
    moved = summarise(mixed[0], costs(), retrieval=matrices(), texts=mixed[1], ranking=mixed[2], about={}, seed=0)
    for ours, theirs in zip(whole.scores, moved.scores, strict=True):
        assert theirs.nll_per_token.low == pytest.approx(ours.nll_per_token.low)
    assert [one.auc.value for one in moved.ranking] == pytest.approx([one.auc.value for one in whole.ranking])
    assert (moved.texts, moved.samples, moved.retrieval) == (whole.texts, whole.samples, whole.retrieval)


def test_the_terminal_table_is_aligned_and_narrow(whole: Evaluation) -> None:
    lines = whole.lines().splitlines()
    assert max(map(width, lines)) <= 115
    start = next(index for index, line in enumerate(lines) if line.startswith("method"))
    table = lines[start : start + 1 + len(METHODS)]
    edge = lines[start].index("nats/token") + len("nats/token")
    for line in table:
        assert line[edge - 1] != " "
        assert line[edge : edge + 2] == "  "
    for words_ in ("right user", "LoRA", "our_own_method", "which user?", "ranking clicks", "drift", "1.25M"):
        assert words_ in whole.lines()

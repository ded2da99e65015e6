"""Negative log-likelihood of the users' own texts under each method, and what the right user's soft token gains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from e2p_ray.downstream.measures.bootstrap import NO_USERS, Floats, Interval, ratio_interval, ratio_intervals
from e2p_ray.downstream.measures.methods import CONSTANT, RIGHT, SHUFFLED, in_order
from e2p_ray.downstream.pages.axis import round_step
from e2p_ray.errors import RunError

ALL = "all"
_NUM_HISTORY_BINS = 5
_MIN_BIN_USERS = 5
_NUM_BARS = 30
_COLUMNS = {
    "method": pl.String,
    "task": pl.String,
    "language": pl.String,
    "user_id": pl.String,
    "content_id": pl.String,
    "num_tokens": pl.Int64,
    "nll": pl.Float64,
}


@dataclass(frozen=True, slots=True)
class MethodScore:
    """One method on the pairs of one part: all, a language, or a task.

    nll_per_token is in nats. gain: nats a token by which the right user's soft token is better than this method, on the
    same pairs; gaining_users: the share of users whose texts it makes likelier. Both None for the right user itself.
    """

    part: str
    method: str
    num_pairs: int
    num_users: int
    num_tokens: int
    nll_per_token: Interval
    gain: Interval | None
    gaining_users: Interval | None


@dataclass(frozen=True, slots=True)
class HistoryGain:
    """Gain of the right user over a control among users with between `low` and `high` items of history."""

    control: str
    low: int
    high: int
    num_users: int
    gain: Interval


@dataclass(frozen=True, slots=True)
class GainHistogram:
    """Users by their own gain over a control: counts[i] of them from start + i * width on, in nats a token.

    The first and last bars also hold what lies beyond. No bar lies on both sides of zero.
    """

    control: str
    start: float
    width: float
    counts: tuple[int, ...]
    num_gaining: int


@dataclass(frozen=True, slots=True)
class UserTotals:
    """Sums over the pairs of each user: nll (num_users, num_methods), tokens and history (num_users,)."""

    methods: tuple[str, ...]
    nll: Floats
    num_tokens: Floats
    history_sizes: Floats  # NaN where unknown
    num_pairs: int

    def gains(self, control: str) -> Floats:
        """(num_users,) summed nats that the right user's soft token saves against the control."""
        gains: Floats = self.nll[:, self.methods.index(control)] - self.nll[:, self.methods.index(RIGHT)]
        return gains


def check_scores(scores: pl.DataFrame) -> None:
    """Columns, kinds, finite values, and the same pairs under every method."""
    for name, kind in _COLUMNS.items():
        assert scores.schema.get(name) == kind, f"scores.{name} is {scores.schema.get(name)}, not {kind}"
    assert "history_size" in scores.columns, "scores.history_size is there, if only null"
    assert scores["nll"].is_finite().all(), "likelihoods are finite"
    assert (scores["num_tokens"] > 0).all(), "every target has tokens"
    keys = ["task", "language", "user_id", "content_id", "num_tokens"]
    counted = scores.group_by(keys).agg(pl.col("method").value_counts())
    num_methods = scores["method"].n_unique()
    uneven = counted.filter(
        (pl.col("method").list.len() != num_methods)
        | (pl.col("method").list.eval(pl.element().struct.field("count").n_unique()).list.first() != 1)
    )
    assert len(uneven) == 0, f"every method has the same pairs; {len(uneven)} pairs have not"


def part_label(part: str) -> str:
    """How a part is called: all pairs, a language by its name, a task as it is."""
    return {ALL: "all pairs", "en": "English", "ja": "Japanese"}.get(part, part)


def parts_of(scores: pl.DataFrame) -> list[tuple[str, pl.DataFrame]]:
    """Everything, each language, and each task where there are several."""
    parts = [(ALL, scores)]
    parts += [(name, scores.filter(language=name)) for name in sorted(scores["language"].unique())]
    tasks = sorted(scores["task"].unique())
    return parts + [(name, scores.filter(task=name)) for name in tasks if len(tasks) > 1]


def user_totals(scores: pl.DataFrame) -> UserTotals:
    """The scores summed by user, users in the order of their ids. Raises RunError without scores."""
    if scores.is_empty():
        raise RunError(NO_USERS)
    methods = tuple(in_order(scores["method"]))
    wide = scores.group_by("user_id").agg(
        *(pl.col("nll").filter(method=method).sum().alias(f"nll {method}") for method in methods),
        pl.col("num_tokens").filter(method=methods[0]).sum(),
        pl.col("history_size").max().cast(pl.Float64),
    )
    wide = wide.sort("user_id")
    return UserTotals(
        methods=methods,
        nll=wide.select(f"nll {method}" for method in methods).to_numpy(),
        num_tokens=wide["num_tokens"].cast(pl.Float64).to_numpy(),
        history_sizes=wide["history_size"].fill_null(float("nan")).to_numpy(),
        num_pairs=len(scores) // len(methods),
    )


def score_methods(part: str, totals: UserTotals, *, seed: int) -> tuple[MethodScore, ...]:
    """Every method of one part, over the same resamples of its users."""
    levels = ratio_intervals(totals.nll, totals.num_tokens, seed=seed)
    others = [method for method in totals.methods if method != RIGHT] if RIGHT in totals.methods else []
    gains: dict[str, Interval] = {}
    shares: dict[str, Interval] = {}
    if others:
        saved = np.column_stack([totals.gains(method) for method in others])
        gains = dict(zip(others, ratio_intervals(saved, totals.num_tokens, seed=seed), strict=True))
        users = np.ones(len(saved))
        shares = dict(zip(others, ratio_intervals((saved > 0).astype(np.float64), users, seed=seed), strict=True))
    return tuple(
        MethodScore(
            part=part,
            method=method,
            num_pairs=totals.num_pairs,
            num_users=len(totals.num_tokens),
            num_tokens=int(totals.num_tokens.sum()),
            nll_per_token=level,
            gain=gains.get(method),
            gaining_users=shares.get(method),
        )
        for method, level in zip(totals.methods, levels, strict=True)
    )


def shuffled_over_constant(totals: UserTotals, *, seed: int) -> Interval | None:
    """Nats a token that a shuffled user's soft token gains over the constant one; None where one is not measured."""
    if not {SHUFFLED, CONSTANT} <= set(totals.methods):
        return None
    constant, shuffled = (totals.nll[:, totals.methods.index(method)] for method in (CONSTANT, SHUFFLED))
    return ratio_interval(constant - shuffled, totals.num_tokens, seed=seed)


def controls_of(totals: UserTotals) -> list[str]:
    """The controls whose gains are looked at user by user."""
    return [method for method in (SHUFFLED, CONSTANT) if {method, RIGHT} <= set(totals.methods)]


def gains_by_history(totals: UserTotals, control: str, *, seed: int) -> tuple[HistoryGain, ...]:
    """About equally many users a bin, never fewer than five; nothing where history is unknown or all in one bin."""
    known = np.isfinite(totals.history_sizes)
    sizes, gains, tokens = totals.history_sizes[known], totals.gains(control)[known], totals.num_tokens[known]
    num_bins = min(_NUM_HISTORY_BINS, len(sizes) // _MIN_BIN_USERS)
    if num_bins < 2:
        return ()
    bins = np.searchsorted(_bin_edges(sizes, num_bins), sizes, side="left")
    found = []
    for index in np.unique(bins):
        own = bins == index
        gain = ratio_interval(gains[own], tokens[own], seed=seed)
        found.append(HistoryGain(control, int(sizes[own].min()), int(sizes[own].max()), int(own.sum()), gain))
    return tuple(found) if len(found) > 1 else ()


def _bin_edges(sizes: Floats, num_bins: int) -> list[float]:
    """Quantiles, less those that would leave a bin with too few users for an interval, as ties and outliers do."""
    edges: list[float] = []
    for edge in np.unique(np.quantile(sizes, np.arange(1, num_bins) / num_bins)):
        num_before = ((sizes <= edge) & (sizes > (edges[-1] if edges else -np.inf))).sum()
        if min(num_before, (sizes > edge).sum()) >= _MIN_BIN_USERS:
            edges.append(float(edge))
    return edges


def gain_histogram(totals: UserTotals, control: str) -> GainHistogram:
    """Bars of a round width over all but the outermost users."""
    gains = totals.gains(control) / totals.num_tokens
    low, high = np.percentile(gains, [1, 99])
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    width = round_step((high - low) / _NUM_BARS) if high > low else 1e-3
    first, last = int(np.floor(low / width)), int(np.floor(high / width))
    if (gains < 0).any():  # an outermost user, too, is on the right side of zero
        first = min(first, -1)
    bars = np.clip(np.floor(gains / width).astype(np.int64), first, last) - first
    counts = np.bincount(bars, minlength=last - first + 1)
    return GainHistogram(control, first * width, width, tuple(int(n) for n in counts), int((gains > 0).sum()))


def scores_of(scores: Sequence[MethodScore], part: str) -> list[MethodScore]:
    """The methods of one part, in their order."""
    return [score for score in scores if score.part == part]

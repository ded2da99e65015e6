"""Given a text, for which of N users was it written? The users are ranked by the likelihood they give the text.

Two rankings. In the raw one a user whose soft token makes every text likelier stands above the right user for every
text. The centred one first takes from every user's column its own mean over the texts: what remains is how much *this*
text suits *this* user. Centred is the measure to look at, because the question is whether soft tokens tell users apart,
and not which of them is the best prompt. The means use no knowledge of who is right, so unrelated texts and users still
give chance; a user's own texts raise the user's mean, so the centred measure errs to the low side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from e2p_ray.downstream.measures.bootstrap import Floats, Interval, mean_intervals

_TIE_NATS = 1e-5  # what rounding does to the log-likelihood of one text in float32


@dataclass(frozen=True, slots=True)
class LikelihoodMatrix:
    """Log-likelihoods (num_texts, num_users) in nats under one method, and each text's right column (num_texts,)."""

    method: str
    language: str
    log_likelihoods: Floats
    right_columns: NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class RankScores:
    """Shares of texts whose right user is first or among five, and the mean of 1/rank."""

    top_1: Interval
    top_5: Interval
    mrr: Interval


@dataclass(frozen=True, slots=True)
class Retrieval:
    """How well one method's likelihoods find the right user."""

    method: str
    language: str
    num_texts: int
    num_users: int
    centred: RankScores
    raw: RankScores
    chance_top_1: float
    chance_top_5: float
    chance_mrr: float


def measure_retrieval(matrix: LikelihoodMatrix, *, seed: int) -> Retrieval:
    """Both rankings with intervals over the right users. Ties share their ranks: equal columns give chance."""
    num_texts, num_users = matrix.log_likelihoods.shape
    assert matrix.right_columns.shape == (num_texts,), "one right user a text"
    assert num_texts > 0, "some texts"
    assert np.isfinite(matrix.log_likelihoods).all(), "log-likelihoods are finite"
    centred = matrix.log_likelihoods - matrix.log_likelihoods.mean(axis=0, keepdims=True)
    harmonic = _harmonic(num_users)
    return Retrieval(
        method=matrix.method,
        language=matrix.language,
        num_texts=num_texts,
        num_users=num_users,
        centred=_scores(centred, matrix.right_columns, seed),
        raw=_scores(matrix.log_likelihoods, matrix.right_columns, seed),
        chance_top_1=1 / num_users,
        chance_top_5=min(5, num_users) / num_users,
        chance_mrr=float(harmonic[num_users] / num_users),
    )


def _scores(values: Floats, right_columns: NDArray[np.intp], seed: int) -> RankScores:
    expected = expected_ranks(values, right_columns)
    top_1, top_5, mrr = mean_intervals([f"{column}" for column in right_columns], expected, seed=seed)
    return RankScores(top_1, top_5, mrr)


def expected_ranks(values: Floats, right_columns: NDArray[np.intp]) -> Floats:
    """(num_texts, 3): in the first place, in the first five, 1/rank; each the mean over all orders of tied users."""
    right = np.take_along_axis(values, right_columns[:, None], axis=1)
    num_better = (values > right + _TIE_NATS).sum(axis=1)
    num_tied = (np.abs(values - right) <= _TIE_NATS).sum(axis=1)  # the right user too
    harmonic = _harmonic(values.shape[1])
    mean_reciprocal = (harmonic[num_better + num_tied] - harmonic[num_better]) / num_tied
    tops = [np.clip((k - num_better) / num_tied, 0.0, 1.0) for k in (1, 5)]
    return np.column_stack([*tops, mean_reciprocal])


def _harmonic(size: int) -> Floats:
    """1 + 1/2 + ... + 1/n for n from 0 to size."""
    return np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, size + 1))])

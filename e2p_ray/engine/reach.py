"""How far the rows of a pass are guessed ahead: where the time that guesses save is more than they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from e2p_ray.engine.agreement import MAX_STREAK, Agreement
from e2p_ray.engine.pass_cost import PassCost

_Ints = npt.NDArray[np.int64]

MAX_AHEAD = 16  # tokens of a row in one pass
NO_GUESS = -1
_LEAST_CHANCE = 0.02  # of a guess whose token costs nothing, as far as costs are known
_HOPELESS, _NO_CHANCE = 1e-3, 1e-12
_NUM_STREAKS = MAX_STREAK + 1
_LOOKED_AT = 3  # few guesses, of which it is reckoned what they tell for the next pass, besides those that pay at once


@dataclass(frozen=True, slots=True, eq=False)
class Outlook:
    """Rows (n,) before a pass: the `Source` of their guesses or NO_GUESS, how many of these held in a row, and the
    tokens that each is to write yet: an estimate where it has no guess, and then a pass brings it one token nearer.
    """

    sources: _Ints
    streaks: _Ints
    num_left: _Ints


def reach_of_each(rows: Outlook, num_tokens: int, cost: PassCost, agreements: Sequence[Agreement]) -> _Ints:
    """Guesses (n,) where each row counts that is done: as many as are likely enough to pay for a token of this pass.

    Where others wait, a row that is done a step sooner makes place for one of them: its part of a pass is saved. Where
    somebody waits for its text it is the same: he waits a pass less, and all n of them the n-th part of it longer.
    """
    needed = chances_needed(len(rows.sources), num_tokens, cost)
    kinds, kind_of = np.unique(_kinds(rows), return_inverse=True)
    reach: _Ints = np.array([
        0 if source == NO_GUESS else num_ahead(agreements[source], streak, needed)
        for source, streak in (divmod(kind, _NUM_STREAKS) for kind in kinds.tolist())
    ])  # fmt: skip
    limited: _Ints = np.minimum(reach[kind_of], rows.num_left - 1)
    return limited


def chances_needed(num_rows: int, num_tokens: int, cost: PassCost) -> list[float]:
    """How likely each row's first guess must be to pay in a pass of so many tokens besides, its second, and so on.

    1 / (1 + overhead / rows), where a pass costs an overhead and the same for every token.
    """
    costs = [cost.of(num_tokens + ahead * num_rows) for ahead in range(MAX_AHEAD + 1)]
    return [max((after - before) / cost.of(num_rows), _LEAST_CHANCE) for before, after in pairwise(costs)]


def num_ahead(agreement: Agreement, streak: int, needed: Sequence[float]) -> int:
    """How many tokens to guess for a row: as long as the chance that all of them hold is above what is needed."""
    chances = agreement.chances(streak, MAX_AHEAD)
    return next((at for at in range(MAX_AHEAD) if chances[at + 1] <= needed[at]), MAX_AHEAD)


def reach_of_all(rows: Outlook, num_tokens: int, cost: PassCost, agreements: Sequence[Agreement]) -> _Ints:
    """Guesses (n,) where only all rows together count: those with which the last is done so much sooner that they pay.

    Nothing is saved by rows that are done while others write on. So guesses pay for rows that have most to write, as
    far as all of these hold; none does where such a row has no guess. It may be best to see first what one more pass
    says of them, which costs that pass and tells right drafts from wrong ones.
    """
    num_rows, longest = len(rows.sources), int(rows.num_left.max())
    guessed = rows.sources != NO_GUESS
    lags = longest - rows.num_left
    alone = longest if guessed.all() else int(lags[~guessed].min())  # passes that a row without a guess makes anyway
    if min(alone, longest - 1) <= 0:
        return np.zeros(num_rows, np.int64)
    near = guessed & (lags < 2 * MAX_AHEAD)  # others are done before, whatever is guessed
    ahead = _Ahead.of(_kinds(rows)[near], lags[near], num_rows, cost, agreements)
    values, chances = ahead.values(num_tokens, min(alone, longest - 1))
    best, chosen = 0.0, 0
    for at in sorted({*range(min(_LOOKED_AT, len(values))), int(np.argmax(values))}):
        value = values[at]
        if chances[at] > _HOPELESS:
            limit = min(alone, longest - 2) - at  # the pass brings all rows a token nearer besides
            value += chances[at] * max(ahead.after(at).values(num_rows, limit)[0])
        if value > best:
            best, chosen = value, at
    return np.where(guessed, np.maximum(chosen - lags, 0), 0)


@dataclass(frozen=True, slots=True, eq=False)
class _Ahead:
    """What it is worth to guess the longest of num_rows rows 0, 1, ... tokens ahead, and shorter ones by as much less.

    Of rows that are alike (k,): kinds, the tokens that they have less to write than the longest, and how many they are.
    `chances` (kinds, MAX_AHEAD + 2): that the next 0, 1, ... guesses of such a row hold, as logarithms.
    """

    kinds: _Ints
    lags: _Ints
    counts: _Ints
    num_rows: int
    cost: PassCost
    chances: npt.NDArray[np.float64]

    @classmethod
    def of(cls, kinds: _Ints, lags: _Ints, num_rows: int, cost: PassCost, agreements: Sequence[Agreement]) -> _Ahead:
        rows, counts = np.unique(kinds * (2 * MAX_AHEAD) + lags, return_counts=True)
        found = [one.chances(streak, MAX_AHEAD + 1) for one in agreements for streak in range(_NUM_STREAKS)]
        return cls(*np.divmod(rows, 2 * MAX_AHEAD), counts, num_rows, cost, np.log(np.maximum(found, _NO_CHANCE)))

    def values(self, num_tokens: int, limit: int) -> tuple[list[float], list[float]]:
        """For as many tokens as pay at most: the cost saved, and the chance that all of them and one more hold.

        The pass has num_tokens besides the guesses; where all hold, it is in place of passes of a token for each row.
        """
        ahead = np.arange(min(max(limit, 0), MAX_AHEAD) + 1)
        each = np.maximum(ahead - self.lags[:, None], 0)
        held = self.chances[self.kinds[:, None], np.maximum(ahead + 1 - self.lags[:, None], 0)]
        chances = np.exp(self.counts @ held)
        saved = np.concatenate([[0.0], np.cumsum(chances - _LEAST_CHANCE)[:-1]]) * self.cost.of(self.num_rows)
        costs = [self.cost.of(num_tokens + num_guesses) for num_guesses in (self.counts @ each).tolist()]
        return (saved - costs + costs[0]).tolist(), chances.tolist()

    def after(self, ahead: int) -> _Ahead:
        """The same rows when all guesses held, and each has the token that the pass chose itself besides."""
        sources, streaks = np.divmod(self.kinds, _NUM_STREAKS)
        streaks = np.minimum(streaks + 1 + np.maximum(ahead - self.lags, 0), MAX_STREAK)
        return replace(self, kinds=sources * _NUM_STREAKS + streaks, lags=np.maximum(self.lags - ahead, 0))


def _kinds(rows: Outlook) -> _Ints:
    """A number for what decides how likely a row's guesses are: their source, and how many held."""
    return rows.sources * _NUM_STREAKS + np.minimum(rows.streaks, MAX_STREAK)

"""How far the rows of a pass are guessed ahead: where the time that guesses save is more than they take."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from e2p_ray.engine.agreement import MAX_STREAK, Agreement
from e2p_ray.engine.pass_cost import PassCost

_Ints = npt.NDArray[np.int64]

MAX_AHEAD = 16  # tokens of a row in one pass: beyond, a wrong guess costs more than a right one saves
NO_GUESS = -1
_HOPELESS = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class Outlook:
    """Rows (n,) before a pass: the `Source` of their guesses or NO_GUESS, how many of these held in a row, and the
    tokens that each is to write yet: an estimate where it has no guess, and then a pass brings it one token nearer.
    """

    sources: _Ints
    streaks: _Ints
    num_left: _Ints


_Shares = dict[tuple[int, int, int], int]  # rows by source, streak, and tokens that they have less to write


def reach_of_each(rows: Outlook, num_tokens: int, cost: PassCost, agreements: Sequence[Agreement]) -> _Ints:
    """Guesses (n,) where each row counts that is done: as many as are likely enough to pay for a token of this pass.

    Where others wait, a row that is done a step sooner makes place for one of them: its part of a pass is saved. Where
    somebody waits for its text it is the same: he waits a pass less, and all n of them the n-th part of it longer.
    """
    needed = chance_needed(len(rows.sources), num_tokens, cost)
    kinds, kind_of = np.unique(_kinds(rows), return_inverse=True)
    reach: _Ints = np.array([
        0 if source == NO_GUESS else num_ahead(agreements[source], streak, needed)
        for source, streak in map(_source_and_streak, kinds.tolist())
    ])  # fmt: skip
    limited: _Ints = np.minimum(reach[kind_of], rows.num_left - 1)
    return limited


def chance_needed(num_rows: int, num_tokens: int, cost: PassCost) -> float:
    """How likely a guess must be to pay, in a pass of so many tokens besides, where each row counts.

    1 / (1 + overhead / rows), where a pass costs an overhead and the same for every token.
    """
    return (cost.of(num_tokens + num_rows) - cost.of(num_tokens)) / cost.of(num_rows)


def num_ahead(agreement: Agreement, streak: int, needed: float) -> int:
    """How many tokens to guess for a row: as long as the chance that all of them hold is above what is needed."""
    chance, count = 1.0, 0
    while count < MAX_AHEAD:
        chance *= agreement.rate(streak + count)
        if chance <= needed:
            break
        count += 1
    return count


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
    kinds = _kinds(rows)[guessed].tolist()
    shares = Counter((*_source_and_streak(kind), lag) for kind, lag in zip(kinds, lags[guessed].tolist(), strict=True))
    values = _values(shares, num_rows, num_tokens, min(alone, longest - 1), cost, agreements)
    best, chosen = 0.0, 0
    for ahead, (value, chance) in enumerate(values):
        if chance > _HOPELESS:
            limit = min(alone, longest - 2) - ahead  # the pass brings all rows a token nearer besides
            later = _values(_after(shares, ahead), num_rows, num_rows, limit, cost, agreements)
            value += chance * max(value for value, _ in later)
        if value > best:
            best, chosen = value, ahead
    return np.where(guessed, np.maximum(chosen - lags, 0), 0)


def _values(
    shares: _Shares, num_rows: int, num_tokens: int, limit: int, cost: PassCost, agreements: Sequence[Agreement]
) -> list[tuple[float, float]]:
    """By how many tokens the longest rows are guessed ahead: the cost saved, and the chance that one more would hold.

    A pass of num_tokens besides the guesses is one that num_rows rows do not need where all guesses hold.
    """
    chances = {key: agreements[key[0]].chances(key[1], MAX_AHEAD + 1) for key in shares}
    without, saved = cost.of(num_tokens), 0.0
    found = []
    for ahead in range(min(max(limit, 0), MAX_AHEAD) + 1):
        num_guesses = sum(count * max(ahead - key[2], 0) for key, count in shares.items())
        value = saved - (cost.of(num_tokens + num_guesses) - without)
        chance = math.prod(chances[key][max(ahead + 1 - key[2], 0)] ** count for key, count in shares.items())
        found.append((value, chance))
        if chance < _HOPELESS:
            break
        saved += chance * cost.of(num_rows)
    return found


def _after(shares: _Shares, ahead: int) -> _Shares:
    """The rows after a pass in which all guesses held, and the token that it chose itself as well."""
    found = Counter[tuple[int, int, int]]()
    for (source, streak, lag), count in shares.items():
        found[source, min(streak + 1 + max(ahead - lag, 0), MAX_STREAK), max(lag - ahead, 0)] += count
    return found


def _kinds(rows: Outlook) -> _Ints:
    """A number for what decides how likely a row's guesses are."""
    return rows.sources * (MAX_STREAK + 1) + np.minimum(rows.streaks, MAX_STREAK)


def _source_and_streak(kind: int) -> tuple[int, int]:
    return divmod(kind, MAX_STREAK + 1)

"""How far the rows of a pass are guessed ahead: where the time that guesses save is more than they take."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from e2p_ray.engine.agreement import Agreement
from e2p_ray.engine.pass_cost import PassCost

MAX_AHEAD = 16  # tokens of a row in one pass: beyond, a wrong guess costs more than a right one saves
_HOPELESS = 1e-3


@dataclass(frozen=True, slots=True)
class Outlook:
    """A row before a pass: whose guesses it would be given, how many held, and the tokens that it is to write yet.

    Without a guess (`agreement` is None) `num_left` is an estimate, and a pass brings the row one token nearer.
    """

    agreement: Agreement | None
    streak: int
    num_left: int


_Shares = dict[tuple[Agreement, int, int], int]  # rows by agreement, streak, and tokens that they have less to write


def reach_of_each(rows: Sequence[Outlook], num_tokens: int, cost: PassCost) -> list[int]:
    """Guesses where each row counts that is done: as many as are likely enough to pay for a token of this pass.

    Where others wait, a row that is done a step sooner makes place for one of them: its part of a pass is saved. Where
    somebody waits for its text it is the same: he waits a pass less, and all n of them the n-th part of it longer.
    """
    needed = chance_needed(len(rows), num_tokens, cost)
    return [
        0 if row.agreement is None else num_ahead(row.agreement, row.streak, needed, row.num_left - 1) for row in rows
    ]


def chance_needed(num_rows: int, num_tokens: int, cost: PassCost) -> float:
    """How likely a guess must be to pay, in a pass of so many tokens besides, where each row counts.

    1 / (1 + overhead / rows), where a pass costs an overhead and the same for every token.
    """
    return (cost.of(num_tokens + num_rows) - cost.of(num_tokens)) / cost.of(num_rows)


def num_ahead(agreement: Agreement, streak: int, needed: float, room: int) -> int:
    """How many tokens to guess for a row: as long as the chance that all of them hold is above what is needed."""
    chance, count = 1.0, 0
    while count < min(MAX_AHEAD, room):
        chance *= agreement.rate(streak + count)
        if chance <= needed:
            break
        count += 1
    return count


def reach_of_all(rows: Sequence[Outlook], num_tokens: int, cost: PassCost) -> list[int]:
    """Guesses where only all rows together count: those with which the last one is done so much sooner that they pay.

    Nothing is saved by rows that are done while others write on. So guesses pay for rows that have most to write, as
    far as all of these hold; none does where such a row has no guess. It may be best to see first what one more pass
    says of them, which costs that pass and tells right drafts from wrong ones.
    """
    longest = max(row.num_left for row in rows)
    # The passes that a row without a guess makes anyway.
    alone = min((longest - row.num_left for row in rows if row.agreement is None), default=longest)
    if min(alone, longest - 1) <= 0:
        return [0] * len(rows)
    shares = Counter((row.agreement, row.streak, longest - row.num_left) for row in rows if row.agreement is not None)
    values = _values(shares, len(rows), num_tokens, min(alone, longest - 1), cost)
    best, chosen = 0.0, 0
    for ahead, (value, chance) in enumerate(values):
        if chance > _HOPELESS:
            limit = min(alone, longest - 2) - ahead  # the pass brings all rows a token nearer besides
            later = _values(_after(shares, ahead), len(rows), len(rows), limit, cost)
            value += chance * max(value for value, _ in later)
        if value > best:
            best, chosen = value, ahead
    return [0 if row.agreement is None else max(chosen - (longest - row.num_left), 0) for row in rows]


def _values(shares: _Shares, num_rows: int, num_tokens: int, limit: int, cost: PassCost) -> list[tuple[float, float]]:
    """By how many tokens the longest rows are guessed ahead: the cost saved, and the chance that one more would hold.

    A pass of num_tokens besides the guesses is one that num_rows rows do not need where all guesses hold.
    """
    chances = {key: key[0].chances(key[1], MAX_AHEAD + 1) for key in shares}
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
    found: Counter[tuple[Agreement, int, int]] = Counter()
    for (agreement, streak, lag), count in shares.items():
        found[agreement, streak + 1 + max(ahead - lag, 0), max(lag - ahead, 0)] += count
    return found

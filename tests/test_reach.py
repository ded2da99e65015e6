"""How far rows are guessed ahead: what it is reckoned from, and that it pays, by passes played through."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from e2p_ray.engine.agreement import Agreement, Source, classes_of, new_agreements
from e2p_ray.engine.pass_cost import PassCost
from e2p_ray.engine.reach import (
    MAX_AHEAD,
    NO_GUESS,
    Outlook,
    chances_needed,
    num_ahead,
    reach_of_all,
    reach_of_each,
)
from tests import tiny_models

CPU = PassCost.of_seconds((1, 4, 16, 64), (0.0115, 0.0125, 0.020, 0.060))  # a 30 M model, one core of a Zen 3
GPU = PassCost.of_seconds((1, 64, 256, 1024), (1.0, 1.05, 1.1, 2.0))
Row = tuple[Agreement | None, int, int]  # whose guesses it has, how many held, and tokens that it is to write yet
Reach = Callable[[Sequence[Row], int, PassCost], list[int]]


def outlook(rows: Sequence[Row]) -> tuple[Outlook, list[Agreement]]:
    agreements = list(dict.fromkeys(row[0] for row in rows if row[0] is not None))
    sources = [NO_GUESS if row[0] is None else agreements.index(row[0]) for row in rows]
    columns = (np.array(column) for column in (sources, [row[1] for row in rows], [row[2] for row in rows]))
    return Outlook(*columns), agreements


def of_each(rows: Sequence[Row], num_tokens: int, cost: PassCost) -> list[int]:
    found, agreements = outlook(rows)
    reach: list[int] = reach_of_each(found, num_tokens, cost, agreements).tolist()
    return reach


def of_all(rows: Sequence[Row], num_tokens: int, cost: PassCost) -> list[int]:
    found, agreements = outlook(rows)
    reach: list[int] = reach_of_all(found, num_tokens, cost, agreements).tolist()
    return reach


def agreement(first: float, later: float, seen: float = 1000.0) -> Agreement:
    return Agreement([first * seen, later * seen, later * seen], [seen] * 3)


class TestPassCost:
    def test_straight_lines_between_what_was_measured_and_beyond(self) -> None:
        cost = PassCost((1, 4, 16), (1.0, 1.0, 3.0))
        assert [cost.of(num) for num in (1, 2, 4, 10, 16, 22)] == [1.0, 1.0, 1.0, 2.0, 3.0, 4.0]

    def test_measurements_are_rounded_and_never_fall(self) -> None:
        cost = PassCost.of_seconds((1, 4, 16, 64), (0.0100, 0.0097, 0.0195, 0.0806))
        assert cost.costs == (1.0, 1.0, 2.0, 8.0)
        again = PassCost.of_seconds((1, 4, 16, 64), (0.0102, 0.0101, 0.0210, 0.0790))
        assert again == cost, "another measurement of the same machine"


class TestOfEach:
    def test_guesses_reach_further_the_more_a_pass_costs(self) -> None:
        given = new_agreements()[Source.GIVEN]
        costs = [tiny_models.pass_cost(overhead) for overhead in (1, 64, 1024, 1 << 20)]
        reach = [num_ahead(given, 4, chances_needed(256, 256, cost)) for cost in costs]
        assert reach == sorted(reach)
        assert reach[0] == 0
        assert reach[-1] == MAX_AHEAD

    def test_the_chance_that_pays(self) -> None:
        assert chances_needed(16, 16, tiny_models.pass_cost(32)) == pytest.approx([1 / (1 + 32 / 16)] * MAX_AHEAD)
        needed = chances_needed(2, 2, CPU)
        assert needed[0] < 0.03 < 0.1 < needed[1], "tokens that cost nothing, and then some that do"

    def test_guesses_that_never_hold_are_not_tried_where_the_first_tokens_cost_nothing(self) -> None:
        for cost in (CPU, GPU):
            assert of_each([(agreement(0.001, 0.5), 0, 24)] * 2, 2, cost) == [0, 0]

    def test_no_further_than_the_end(self) -> None:
        rows = [(agreement(1, 1), 4, num_left) for num_left in (1, 5, 99)]
        assert of_each([*rows, (None, 0, 7)], 4, GPU) == [0, 4, MAX_AHEAD, 0]


class TestOfAll:
    def test_a_row_alone_is_guessed_to_its_end(self) -> None:
        for num_left, expected in ((1, 0), (9, 8), (17, 16), (99, MAX_AHEAD)):
            assert of_all([(agreement(0.9, 0.99), 0, num_left)], 1, CPU) == [expected]

    def test_drafts_that_never_hold_are_not_tried(self) -> None:
        assert of_all([(agreement(0.01, 0.5), 0, 24)], 1, CPU) == [0]

    def test_none_where_a_row_without_a_guess_goes_on_as_long(self) -> None:
        sure = agreement(0.999, 0.999)
        rows = [(sure, 5, 17)] * 3
        assert of_all(rows, 3, CPU) == [MAX_AHEAD] * 3, "the control"
        assert of_all([*rows, (None, 0, 17)], 4, CPU) == [0] * 4
        assert of_all([*rows, (None, 0, 13)], 4, CPU) == [4, 4, 4, 0], "as far as it pays"

    def test_only_the_rows_that_have_most_to_write(self) -> None:
        sure = agreement(0.999, 0.999)
        rows = [(sure, 5, num_left) for num_left in (17, 11, 1)]
        assert of_all(rows, 3, CPU) == [16, 10, 0]

    def test_rows_whose_drafts_are_half_sure_are_seen_first(self) -> None:
        """One more pass of four rows tells for a twelfth of what 64 wrong guesses cost."""
        unsure = agreement(0.8, 0.998)
        assert of_all([(unsure, 0, 17)], 1, CPU) == [MAX_AHEAD], "alone it is tried at once"
        assert max(of_all([(unsure, 0, 17)] * 4, 4, CPU)) <= 1
        assert of_all([(unsure, 1, 17)] * 4, 4, CPU) == [MAX_AHEAD] * 4
        assert of_all([(unsure, 0, 17)] * 4, 4, GPU) == [MAX_AHEAD] * 4, "where tokens are free"

    def test_many_rows_never_hold_all(self) -> None:
        assert of_all([(agreement(0.8, 0.9), 0, 24)] * 256, 256, CPU) == [0] * 256
        assert of_all([(agreement(0.8, 0.9), 0, 24)], 1, CPU) > [0], "the control"


def test_the_rate_follows_what_is_seen() -> None:
    good, bad = new_agreements()[Source.GIVEN], new_agreements()[Source.GIVEN]
    for _ in range(50):
        good.see([0, 0, 100], [0, 0, 100])
        bad.see([0, 0, 0], [0, 0, 100])
    assert good.rate(9) > 0.99
    assert bad.rate(9) < 0.05
    assert good.rate(0) == new_agreements()[Source.GIVEN].rate(0), "others' rates stay"


def see(agreement: Agreement, streak: int, right: bool) -> None:
    one = [int(at == classes_of(np.array(streak))) for at in range(3)]
    agreement.see([right * at for at in one], one)


class Played:
    """Rows pass by pass: a text is `length` tokens; of a draft all hold, or those before `wrong`."""

    def __init__(self, reach: Reach, cost: PassCost, num_rows: int, share_same: float, length: int = 24) -> None:
        self.reach, self.cost, self.num_rows, self.length = reach, cost, num_rows, length
        self.share_same, self.rng = share_same, np.random.default_rng(0)
        self.agreement = new_agreements()[Source.GIVEN]

    def cost_of_calls(self, num_calls: int) -> float:
        """Of calls of so many rows, each of which ends with its last row."""
        return sum(self._call(self._rows(self.num_rows), []) for _ in range(num_calls))

    def cost_of_a_queue(self, num_rows: int) -> float:
        """Of one call, in which a row comes in for each that is done."""
        rows = self._rows(num_rows)
        return self._call(rows[: self.num_rows], rows[self.num_rows :])

    def _rows(self, num_rows: int) -> list[list[int]]:
        """What each has written, and how much of its draft is right."""
        is_same = self.rng.random(num_rows) < self.share_same
        return [[0, self.length if same else int(self.rng.integers(2))] for same in is_same]

    def _call(self, rows: list[list[int]], waiting: list[list[int]]) -> float:
        total = 0.0
        while rows:
            outlooks = [
                (self.agreement if written <= wrong else None, written, self.length - written)
                for written, wrong in rows
            ]
            guesses = self.reach(outlooks, len(rows), self.cost)
            total += self.cost.of(len(rows) + sum(guesses))
            for row, guessed in zip(rows, guesses, strict=True):
                before, wrong = row
                row[0] = min(before + min(guessed, max(wrong - before, 0)) + 1, self.length)
                for streak in range(before, min(row[0], wrong + 1)):
                    see(self.agreement, streak, streak != wrong)
            rows = [row for row in rows if row[0] < self.length]
            num_free = self.num_rows - len(rows)
            rows, waiting = [*rows, *waiting[:num_free]], waiting[num_free:]
        return total


def nothing(rows: Sequence[Row], num_tokens: int, cost: PassCost) -> list[int]:
    return [0] * len(rows)


def as_far_as_may_be(rows: Sequence[Row], num_tokens: int, cost: PassCost) -> list[int]:
    return [0 if row[0] is None else min(MAX_AHEAD, row[2] - 1) for row in rows]


@pytest.mark.parametrize("cost", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("share_same", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("num_rows", [1, 2, 4, 8, 16, 64])
def test_guesses_never_cost_more_than_they_save(num_rows: int, share_same: float, cost: PassCost) -> None:
    """Played through with the costs of real passes; what is learned on the way included."""
    full = Played(nothing, cost, num_rows, share_same).cost_of_calls(40)
    drafted = Played(of_all, cost, num_rows, share_same).cost_of_calls(40)
    assert drafted <= 1.01 * full
    if share_same == 1.0 and num_rows <= 16:
        assert drafted < 0.9 * full
    if share_same == 0.8 and num_rows <= 4:
        assert drafted < {1: 0.5, 2: 0.7, 4: 0.9}[num_rows] * full


@pytest.mark.parametrize("cost", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("share_same", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("num_rows", [1, 4, 16, 64])
def test_nor_where_others_wait(num_rows: int, share_same: float, cost: PassCost) -> None:
    full = Played(nothing, cost, num_rows, share_same).cost_of_a_queue(40 * num_rows)
    drafted = Played(of_each, cost, num_rows, share_same).cost_of_a_queue(40 * num_rows)
    assert drafted <= 1.01 * full
    if share_same == 1.0:
        share = 0.4 if cost is GPU else {1: 0.4, 4: 0.5, 16: 0.9, 64: 1.01}[num_rows]  # 64 are bound by arithmetic
        assert drafted < share * full


def test_a_control_that_must_fail() -> None:
    """Guesses wherever there are some do cost more, and the policy finds nearly all that they save."""
    greedy = [Played(as_far_as_may_be, CPU, 4, share).cost_of_calls(40) for share in (0.0, 0.8, 1.0)]
    chosen = [Played(of_all, CPU, 4, share).cost_of_calls(40) for share in (0.0, 0.8, 1.0)]
    full = [Played(nothing, CPU, 4, share).cost_of_calls(40) for share in (0.0, 0.8, 1.0)]
    assert greedy[0] > 1.1 * full[0]
    assert chosen[1] < greedy[1]
    assert chosen[2] < 1.2 * greedy[2]

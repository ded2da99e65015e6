"""The order of a GPU: two waves in turns, a pass's tokens looked at in the wave's next turn. Here on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from e2p_ray.engine import decode, waves
from e2p_ray.engine.decode import Decoder
from e2p_ray.engine.wave import Ended, Wave
from e2p_ray.engine.waves import Waves
from e2p_ray.schema import Completion
from tests import tiny_models

# The engine's own tests once more, in this order.
from tests.test_drafts import SAMPLED, groups_of, same, with_drafts
from tests.test_engine import TestEndings as TestEndingsInTurns
from tests.test_engine import TestTrouble as TestTroubleInTurns
from tests.test_engine import messy_groups, run, texts
from tests.test_serve_engine import engine
from tests.test_serve_engine import test_cancelled_rows_leave_and_change_nobody_else_s_text as test_cancelled_in_turns
from tests.test_serve_engine import test_other_texts_can_be_written_between_two_steps as test_others_between_turns
from tests.test_serve_engine import test_streamed_texts_grow_into_the_completions as test_streamed_in_turns
from tests.tiny_models import engine_of

__all__ = [
    "TestEndingsInTurns",
    "TestTroubleInTurns",
    "engine",
    "test_cancelled_in_turns",
    "test_others_between_turns",
    "test_streamed_in_turns",
]
LLAMA = LlamaConfig(**tiny_models.common())


@pytest.fixture(autouse=True)
def in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waves, "LEAST_ROWS", 3)
    monkeypatch.setattr(decode, "num_waves", lambda device, max_rows: 2)
    monkeypatch.setattr(decode, "looks_later", lambda device: True)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What happened: passes with their waves, and completions."""
    found: list[tuple[str, int]] = []
    plain_pass, plain_completion = Decoder._pass, Decoder._completion

    def passed(self: Decoder, wave: Wave, first: int, *, others_wait: bool) -> None:
        found.append(("pass", id(wave)))
        plain_pass(self, wave, first, others_wait=others_wait)

    def completed(self: Decoder, ended: Ended) -> Completion:
        found.append(("text", 0))
        return plain_completion(self, ended)

    monkeypatch.setattr(Decoder, "_pass", passed)
    monkeypatch.setattr(Decoder, "_completion", completed)
    return found


@pytest.mark.parametrize("max_rows", [5, 8, 64])
def test_two_waves_take_turns_and_write_what_one_writes(max_rows: int, seen: list[tuple[str, int]]) -> None:
    groups = messy_groups()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "num_waves", lambda device, rows: 1)
        patch.setattr(decode, "looks_later", lambda device: False)
        expected = texts(run(engine_of(LLAMA, max_rows=max_rows), groups))
    assert len({wave for kind, wave in seen[:10] if kind == "pass"}) == 1, "control"
    seen.clear()
    assert texts(run(engine_of(LLAMA, max_rows=max_rows), groups)) == expected
    first = [wave for kind, wave in seen if kind == "pass"][:6]
    assert first[0] != first[1]
    assert first[:2] * 3 == first, "in turns"


def test_the_next_pass_is_launched_before_texts_are_made(
    seen: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Decoder._look_at

    def looked(self: Decoder, wave: Wave, launched: Any) -> None:
        seen.append(("look", id(wave)))
        plain(self, wave, launched)

    monkeypatch.setattr(Decoder, "_look_at", looked)

    def share_that_holds_up() -> float:
        """Of the texts, those for which a wave waited between its tokens and its next pass."""
        seen.clear()
        run(engine_of(LLAMA, max_rows=8), messy_groups())
        before, waits = "", list[bool]()
        for kind, _ in seen:
            if kind == "text":
                waits.append(before == "look")
            else:
                before = kind
        return sum(waits) / len(waits)

    assert share_that_holds_up() < 0.5, "only where a wave ended, and nobody was left to go on with"
    monkeypatch.setattr(decode, "looks_later", lambda device: False)
    assert share_that_holds_up() == 1, "control"


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_drafts_in_turns_change_nothing(sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "measure_pass_cost", lambda base: tiny_models.pass_cost(1024))  # every guess is tried
    tiny_models.write_letters_only(monkeypatch)
    groups, tasks = groups_of(3, 12), {"headline": tiny_models.task(**sampling | {"max_new_tokens": 20})}
    plain = engine_of(LLAMA, tasks=tasks, max_rows=16, drafts=False)
    expected = run(plain, groups)
    engine = engine_of(LLAMA, tasks=tasks, max_rows=16)
    half_right = with_drafts(groups, lambda key: expected[key].text[:9] + "abc" + expected[key].text[9:])
    assert same(run(engine, half_right), expected)
    assert engine.stats.num_accepted_tokens > 100
    assert engine.stats.num_draft_tokens > engine.stats.num_accepted_tokens, "control: some guesses were wrong"


class TestTurns:
    def wave(self, num_rows: int) -> Any:
        class Rows:
            def __len__(self) -> int:
                return num_rows

        return Rows()

    def test_few_rows_are_one_wave(self) -> None:
        turns = Waves(2)
        turns.turn(2, 10)
        assert turns.current is None
        turns.current = mine = self.wave(2)
        turns.turn(1, 10)
        assert turns.current is mine, "who comes joins the wave that is there"

    def test_many_rows_are_two(self) -> None:
        turns = Waves(2)
        turns.turn(12, 10)
        assert turns.share(12, 10) == 6
        turns.current = one = self.wave(6)
        turns.turn(6, 10)
        assert turns.current is None, "the second one begins"
        turns.current = other = self.wave(6)
        for expected in (one, other, one):
            turns.turn(0, 10)
            assert turns.current is expected
        turns.end(one)
        turns.turn(0, 10)
        assert turns.current is other

    def test_more_waves_may_begin_later_and_those_that_run_go_on(self) -> None:
        turns = Waves(1)
        turns.current = one = self.wave(9)
        turns.grow(1)
        turns.turn(9, 10)
        assert turns.current is one
        for _ in range(2):
            turns.grow(2)
        assert turns.share(9, 10) == 9
        turns.turn(9, 10)
        assert turns.current is None
        turns.current = other = self.wave(9)
        turns.grow(1)
        for expected in (one, other, one):
            turns.turn(0, 10)
            assert turns.current is expected
        assert list(turns) == [one, other]

    def test_only_a_gpu_with_rows_for_two_has_two(self) -> None:
        devices = [torch.device(name) for name in ("cpu", "cuda")]
        assert [[waves.num_waves(one, size) for size in (5, 6)] for one in devices] == [[1, 1], [1, 2]]
        assert [waves.looks_later(one) for one in devices] == [False, True]

    def test_no_share_is_more_than_a_wave_may_have(self) -> None:
        assert Waves(2).share(100, 10) == 10
        assert Waves(1).share(100, 10) == 10

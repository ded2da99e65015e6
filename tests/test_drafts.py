"""Drafts: the same tokens as without them, whatever is guessed; and what they save."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from e2p_ray.engine import decode
from e2p_ray.engine.drafts import Drafts, Experience, RowDraft, Told
from e2p_ray.engine.engine import Engine
from e2p_ray.engine.row import Row
from e2p_ray.schema import Completion, Group, RequestKey
from tests import tiny_models
from tests.listening import Listening

GREEDY = {"max_new_tokens": 24}
SAMPLED = {"max_new_tokens": 24, "temperature": 0.9, "top_p": 0.95}
CONTROLLED = {"max_new_tokens": 24, "repetition_penalty": 1.3, "no_repeat_ngram_tokens": 3}
STOPPED = {"max_new_tokens": 24, "temperature": 1.0, "stop": ("e", "\n"), "max_chars": 9}


@pytest.fixture(autouse=True)
def launch_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which a pass costs as much as a thousand tokens, so that every guess that may hold is tried."""
    monkeypatch.setattr(decode, "measure_pass_cost", lambda base: tiny_models.pass_cost(1024))


@pytest.fixture(autouse=True)
def letters_only(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_models.write_letters_only(monkeypatch)


def engine_of(sampling: dict[str, Any], *, drafts: bool = True, max_rows: int = 64) -> Engine:
    tasks = {"headline": tiny_models.task(**sampling)}
    return tiny_models.engine_of(tiny_models.configs()["llama"], tasks=tasks, max_rows=max_rows, drafts=drafts)


def groups_of(num_contents: int, num_users: int, first: int = 0) -> list[Group]:
    contents = tiny_models.contents(num_contents)
    return [tiny_models.group(content, range(first, first + num_users)) for content in contents]


def with_drafts(groups: Iterable[Group], draft_of: Callable[[RequestKey], str | None]) -> list[Group]:
    return [
        replace(group, requests=tuple(replace(request, draft=draft_of(request.key)) for request in group.requests))
        for group in groups
    ]


def run(engine: Engine, groups: list[Group]) -> dict[RequestKey, Completion]:
    return {completion.key: completion for completion in engine.generate(groups)}


def same(found: dict[RequestKey, Completion], expected: dict[RequestKey, Completion]) -> bool:
    def outcome(completion: Completion) -> Any:
        return completion.text, completion.finish_reason, completion.num_output_tokens

    close = all(abs(found[key].mean_logprob - expected[key].mean_logprob) < 1e-4 for key in expected)
    return close and {k: outcome(c) for k, c in found.items()} == {k: outcome(c) for k, c in expected.items()}


@pytest.mark.parametrize(
    "sampling", [GREEDY, SAMPLED, CONTROLLED, STOPPED], ids=["greedy", "sampled", "controlled", "stopped"]
)
class TestLossless:
    def test_right_drafts_give_the_same_texts_in_fewer_passes(self, sampling: dict[str, Any]) -> None:
        groups = groups_of(5, 100)
        plain = engine_of(sampling, drafts=False)
        expected = run(plain, groups)
        engine = engine_of(sampling)
        assert same(run(engine, with_drafts(groups, lambda key: expected[key].text)), expected)
        assert engine.stats.num_accepted_tokens > 0
        assert engine.stats.num_steps < plain.stats.num_steps
        assert plain.stats.num_draft_tokens == 0

    def test_wrong_drafts_change_nothing(self, sampling: dict[str, Any]) -> None:
        groups = groups_of(5, 100)
        expected = run(engine_of(sampling, drafts=False), groups)
        keys = list(expected)
        others = dict(zip(keys, keys[7:] + keys[:7], strict=True))
        engine = engine_of(sampling)
        assert same(run(engine, with_drafts(groups, lambda key: expected[others[key]].text)), expected)
        assert engine.stats.num_draft_tokens > engine.stats.num_accepted_tokens, "the control costs tokens"

    @pytest.mark.parametrize("max_rows", [1, 7])
    def test_half_right_drafts_in_small_waves(self, sampling: dict[str, Any], max_rows: int) -> None:
        groups = groups_of(3, 6)
        expected = run(engine_of(sampling, drafts=False), groups)

        def half(key: RequestKey) -> str:
            text = expected[key].text
            return text[: len(text) // 2] + "?" + text[len(text) // 2 + 1 :]

        assert same(run(engine_of(sampling, max_rows=max_rows), with_drafts(groups, half)), expected)


def test_a_control_that_must_fail() -> None:
    """Swapped users write other texts: equality above is not for free."""
    group = groups_of(1, 10)[0]
    expected = run(engine_of(GREEDY, drafts=False), [group])
    others = [*group.requests[1:], group.requests[0]]
    swapped = tuple(
        replace(request, user_embedding=other.user_embedding)
        for request, other in zip(group.requests, others, strict=True)
    )
    assert not same(run(engine_of(GREEDY, drafts=False), [replace(group, requests=swapped)]), expected)


def test_users_who_are_alike_draft_for_each_other_in_a_first_run() -> None:
    """The same user embedding over and over: what the first wave wrote is what the others will write."""
    group = groups_of(1, 1)[0]
    request = group.requests[0]
    alike = tuple(replace(request, key=request.key._replace(user_id=f"u{at}")) for at in range(40))
    groups = [replace(group, requests=alike)]
    plain, engine = engine_of(GREEDY, drafts=False, max_rows=4), engine_of(GREEDY, max_rows=4)
    assert same(run(engine, groups), run(plain, groups))
    assert engine.stats.num_accepted_tokens > 0.6 * engine.stats.num_draft_tokens > 0
    assert engine.stats.num_steps < 0.7 * plain.stats.num_steps


def test_rows_without_a_guess_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is told before the first row is done; then all that still write are shown what they have written."""
    shown, plain = list[int](), RowDraft.follow

    def watched(self: RowDraft, tokens: Sequence[int]) -> None:
        shown.append(len(tokens))
        plain(self, tokens)

    monkeypatch.setattr(RowDraft, "follow", watched)
    groups = groups_of(2, 10)
    expected = run(engine_of(GREEDY, drafts=False), groups)
    engine = engine_of(GREEDY)
    assert same(run(engine, groups), expected)
    lengths = [completion.num_output_tokens for completion in expected.values()]
    assert len(set(lengths)) > 1, "the control: some are done earlier"
    assert shown[:20] == [1] * 20, "the first step"
    assert shown[20] == min(lengths), "all since"
    assert len(shown) < sum(lengths)


def test_a_text_told_meanwhile_becomes_a_guess_of_rows_that_began_like_it() -> None:
    told = Told()
    like_it, unlike_it = (RowDraft([], [], told, Experience()) for _ in range(2))
    for draft, begun in ((like_it, [5, 6]), (unlike_it, [5, 7])):
        draft.follow(begun)
        assert draft.is_idle
    told.add((5, 6, 7, 8, 9), None)
    assert not like_it.is_idle
    for draft in (like_it, unlike_it):
        draft.follow([7])
    assert like_it.ahead(10) == (8, 9)
    assert unlike_it.ahead(10) == ()
    assert unlike_it.is_idle


def test_the_nearest_user_s_text_is_guessed_first_and_then_the_most_common_ones() -> None:
    drafts = Drafts(tiny_models.byte_tokenizer(), tiny_models.EOS, Experience())
    row = first_row(engine_of(GREEDY))

    def of(*user: float) -> Row:
        return replace(row, user_embedding=np.array(user, np.float32))

    north, east, south, shared = (1, 9), (2, 9), (3, 9), (4, 9)
    for user, text in (((0, 1), north), ((1, 0), east), ((0, -1), south)):
        drafts.tell(of(*user), text)
    for teller in (replace(row, user_embedding=None), of(5, 5), of(0.9, 0), of(0, -0.9)):
        drafts.tell(teller, shared)
    expected = {(0.1, 0.8): north, (0.8, 0.1): east, (0.2, -0.7): south}
    for place, text in expected.items():
        draft = drafts.of(of(*place))
        assert draft.guess == text
        draft.follow([shared[0]])
        assert draft.guess == shared, "what began otherwise goes on with another"
        others = drafts._told_of(row).order_for(np.array(place, np.float32))
        assert others[:2] == [text, shared]
        assert sorted(others) == [north, east, south, shared]
    assert drafts.of(replace(row, user_embedding=None)).guess == shared, "the control: without a user the common one"


def test_guesses_beside_a_row_without_one_pay_where_somebody_waits_for_each_text() -> None:
    """A batch ends with the row that has no draft; online the others' texts are there sooner."""
    group = groups_of(1, 40)[0]
    texts = run(engine_of(GREEDY, drafts=False), [group])
    longest, *others = [key for key, one in texts.items() if one.num_output_tokens == GREEDY["max_new_tokens"]]
    expected = {key: texts[key] for key in (longest, *others)}
    as_long = replace(group, requests=tuple(one for one in group.requests if one.key in expected))
    drafted = with_drafts([as_long], lambda key: None if key == longest else expected[key].text)

    def written(*, is_followed: bool) -> tuple[int, dict[RequestKey, int]]:
        """Accepted tokens, and the steps after which each text was there."""
        engine = engine_of(GREEDY)
        engine.listener = Listening() if is_followed else None
        steps = {}
        for one in engine.generate(drafted):
            assert one.text == expected[one.key].text
            steps[one.key] = engine.stats.num_steps
        return engine.stats.num_accepted_tokens, steps

    assert written(is_followed=False)[0] == 0, "the control"
    num_accepted, steps = written(is_followed=True)
    assert num_accepted > 0
    assert len(steps) == len(expected) > 4
    assert all(steps[key] < steps[longest] / 2 for key in others)


def test_drafts_that_never_hold_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a pass costs little besides its tokens, guesses stop; where it costs much, they go on."""
    monkeypatch.setattr(decode, "measure_pass_cost", lambda base: tiny_models.pass_cost(64))
    groups = with_drafts(groups_of(6, 60), lambda key: "no such text at all, whatever is asked")
    engine = engine_of(GREEDY)
    found = run(engine, groups)
    num_tokens = sum(completion.num_output_tokens for completion in found.values())
    assert engine.stats.num_draft_tokens < 0.2 * num_tokens


def test_a_draft_with_an_insertion_is_found_again() -> None:
    group = groups_of(1, 20)[0]
    everyone = run(engine_of(GREEDY, drafts=False), [group])
    longest = max(everyone, key=lambda key: len(everyone[key].text))
    text = everyone[longest].text
    assert len(text) > 12
    alone = [replace(group, requests=tuple(request for request in group.requests if request.key == longest))]
    engine = engine_of(GREEDY)
    found = run(engine, with_drafts(alone, lambda key: text[:4] + "xyz" + text[4:]))
    assert found[longest].text == text
    assert engine.stats.num_accepted_tokens >= 8


def first_row(engine: Engine) -> Row:
    row = next(iter(engine._rows(groups_of(1, 1))))
    assert isinstance(row, Row)
    return row


def test_a_draft_begins_as_the_texts_before_it_did() -> None:
    """This model writes no blank first: after a few texts, drafts are tried without one."""
    engine = engine_of(GREEDY)
    experience = Experience()
    drafts = Drafts(tiny_models.byte_tokenizer(), tiny_models.EOS, experience)
    row = replace(first_row(engine), draft="abc")
    blank, plain = (tuple(tiny_models.byte_tokenizer().encode(text, add_special_tokens=False)) for text in (" a", "a"))
    assert drafts._given(row)[0][: len(blank)] == blank
    for _ in range(3):
        drafts.tell(row, plain)
    assert drafts._given(row)[0][:1] == plain
    for _ in range(3):
        drafts.tell(row, blank)
    assert drafts._given(row)[0][: len(blank)] == blank


def test_drafts_forget_texts_beyond_their_bounds() -> None:
    engine = engine_of(GREEDY)
    drafts = Drafts(tiny_models.byte_tokenizer(), tiny_models.EOS, Experience())
    row = first_row(engine)
    for at in range(100):
        drafts.tell(row, (at, at + 1))
    told = drafts._told_of(row)
    assert len(told.texts) == 32
    for at in range(400):
        other = replace(row.segments, left=(at, *row.segments.left))
        drafts.tell(Row(row.key, other, np.zeros(4, np.float32), row.sampling, 0), (1, 2))
    assert len(drafts._told) == 256

"""Drafts: the same tokens as without them, whatever is guessed; and what they save."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from e2p_ray.engine import decode
from e2p_ray.engine.agreement import Agreement, Source
from e2p_ray.engine.drafts import Drafts, Experience, Guess, RowDraft
from e2p_ray.engine.engine import Engine
from e2p_ray.engine.guesses import Guesses
from e2p_ray.engine.reach import NO_GUESS
from e2p_ray.engine.row import Row
from e2p_ray.engine.told import Told, ToldTexts
from e2p_ray.engine.worth import Worth, kind_of
from e2p_ray.schema import Completion, ErrorCode, Group, RequestKey
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

        engine = engine_of(sampling, max_rows=max_rows)
        assert same(run(engine, with_drafts(groups, half)), expected)
        assert engine.stats.num_draft_tokens > engine.stats.num_accepted_tokens > 0


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


@pytest.mark.parametrize("step", [3, 6, 7])
def test_logits_that_are_not_finite_are_no_guess_that_came_true(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of eight tokens, too, behind guesses that all came true: one more had no place in the wave."""
    groups, sampling = groups_of(3, 6), {"max_new_tokens": 8}
    tiny_models.choose_by_logits(monkeypatch)
    expected = run(engine_of(sampling, drafts=False), groups)
    poison = next(key for key, one in expected.items() if one.num_output_tokens == 8)
    plain = decode.Decoder._pick

    def poisoned(self: Any, wave: Any, slots: Any, written: Any, num_written: Any, logits: Any) -> Any:
        for at, (slot, number) in enumerate(zip(slots, num_written, strict=True)):
            if wave.rows[slot].key == poison and number == step:
                logits = logits.clone()
                logits[at, 17] = float("nan")
        return plain(self, wave, slots, written, num_written, logits)

    monkeypatch.setattr(decode.Decoder, "_pick", poisoned)
    engine = engine_of(sampling)
    found = run(engine, with_drafts(groups, lambda key: expected[key].text))
    assert engine.stats.num_accepted_tokens > 0
    assert found.pop(poison).error_code is ErrorCode.NON_FINITE_LOGITS
    assert same(found, {key: one for key, one in expected.items() if key != poison})


def test_special_tokens_spelled_out_in_drafts_stay_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer may have more of them than the model has embeddings."""
    plain = tiny_models.byte_tokenizer

    def with_more() -> Any:
        tokenizer = plain()
        tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{at}|>" for at in range(60)]})
        return tokenizer

    monkeypatch.setattr(tiny_models, "byte_tokenizer", with_more)
    assert with_more().encode("<|59|>") > [tiny_models.VOCAB_SIZE], "the control"
    groups = groups_of(2, 10)  # more than are encoded one by one, and few
    expected = run(engine_of(GREEDY, drafts=False), groups)
    for chosen in (groups, groups[:1]):
        few = [replace(group, requests=group.requests[:3]) for group in chosen] if chosen is not groups else chosen
        engine = engine_of(GREEDY)
        found = run(engine, with_drafts(few, lambda key: f"{expected[key].text[:4]}<|59|><|eos|>"))
        assert same(found, {key: expected[key] for key in found})
        assert engine.stats.num_draft_tokens > 0


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


def test_online_what_was_written_in_a_call_is_a_guess_in_the_next_ones() -> None:
    """There each text is a call of its own."""
    group = groups_of(1, 1)[0]
    request = group.requests[0]
    users = [replace(request, key=request.key._replace(user_id=f"u{at}")) for at in range(8)]
    calls = [replace(group, requests=(user,)) for user in users]
    plain = engine_of(GREEDY, drafts=False)
    expected = [run(plain, [call]) for call in calls]

    def num_steps(*, is_followed: bool) -> list[int]:
        """Of each call."""
        engine, found = engine_of(GREEDY), [0]
        engine.listener = Listening() if is_followed else None
        for call, texts in zip(calls, expected, strict=True):
            assert same(run(engine, [call]), texts)
            found.append(engine.stats.num_steps)
        return np.diff(found).tolist()

    first, *others = num_steps(is_followed=True)
    assert first == plain.stats.num_steps / len(calls), "the control: of the first nothing is known"
    assert max(others) < first / 2
    assert num_steps(is_followed=False) == [first] * len(calls), "a batch's shard knows no texts of those before it"


def test_rows_that_nothing_can_be_found_for_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is told before the first row is done; then those are asked whose content has a new text."""
    asked, plain = list[int](), RowDraft.next

    def watched(self: RowDraft, written: list[int]) -> Guess | None:
        asked.append(len(written))
        return plain(self, written)

    monkeypatch.setattr(RowDraft, "next", watched)
    groups = groups_of(2, 10)
    expected = run(engine_of(GREEDY, drafts=False), groups)
    engine = engine_of(GREEDY)
    assert same(run(engine, groups), expected)
    lengths = [completion.num_output_tokens for completion in expected.values()]
    assert len(set(lengths)) > 1, "the control: some are done earlier"
    assert asked[:20] == [0] * 20, "as they come in"
    assert asked[20] >= min(lengths)
    assert len(asked) < sum(lengths) / 2


class Followed:
    """Rows of a wave that write what a test says, and the guesses that they have."""

    def __init__(self, drafts: Sequence[RowDraft | None], max_new: int = 12) -> None:
        self.guesses, self.experience = Guesses(len(drafts), max_new), Experience()
        self.written, self.num_written = np.zeros((len(drafts), max_new), np.int64), np.zeros(len(drafts), np.int64)
        self.guesses.add(drafts)

    def write(self, *rows: Sequence[int], told: tuple[Told, tuple[int, ...]] | None = None) -> None:
        for slot, tokens in enumerate(rows):
            end = self.num_written[slot] + len(tokens)
            self.written[slot, self.num_written[slot] : end] = tokens
            self.num_written[slot] = end
        if told is not None:
            told[0].add(told[1], None)
        self.guesses.passed()
        self.guesses.follow(self.written, self.num_written, int(told is not None), self.experience)

    @property
    def agreements(self) -> tuple[Agreement, ...]:
        return self.experience.agreements

    def ahead(self) -> list[list[int]]:
        """All that is guessed of each row."""
        outlook = self.guesses.outlook(0, self.num_written, np.full(len(self.num_written), self.written.shape[1]))
        reach = np.where(outlook.sources == NO_GUESS, 0, outlook.num_left)
        found = self.guesses.ahead(0, self.num_written, reach)
        return [row[row >= 0].tolist() for row in found]


def test_a_text_told_meanwhile_becomes_a_guess_of_rows_that_began_like_it() -> None:
    told = Told()
    rows = Followed([RowDraft([], told, None) for _ in range(3)])
    rows.write([5, 6], [5, 7], [])
    assert not rows.guesses.any_from(0)
    rows.write([7], [7], [], told=(told, (5, 6, 7, 8, 9)))
    assert rows.ahead() == [[8, 9], [], [5, 6, 7, 8, 9]]


def test_guesses_are_judged_by_all_that_is_written_up_to_the_first_wrong_one() -> None:
    rows = Followed([RowDraft([(1, 2, 3, 4, 5, 6, 7)], Told(), None) for _ in range(3)])
    before = [[one.rate(streak) for streak in (0, 1, 4)] for one in rows.agreements]
    rows.write([1, 2, 3, 4, 5], [1, 9, 3, 4, 5], [9])
    assert rows.ahead() == [[6, 7], [6, 7], []], "the second goes on behind the place where it has 4, 5"
    expected = Agreement([3.5 + 2, 8.5 + 3, 19.0 + 1], [5.0 + 3, 10.0 + 4, 20.0 + 1])
    assert [rows.agreements[Source.GIVEN].rate(streak) for streak in (0, 1, 4)] == [
        expected.rate(streak) for streak in (0, 1, 4)
    ]
    assert [[one.rate(streak) for streak in (0, 1, 4)] for one in rows.agreements[1:]] == before[1:]
    rows.write([6], [6], [])
    assert rows.agreements[Source.REALIGNED].rate(0) > before[Source.REALIGNED][0]
    assert rows.ahead() == [[7], [7], []]


def test_rows_that_leave_take_their_guesses_along() -> None:
    rows = Followed([RowDraft([(at, at, at)], Told(), None) for at in range(4)])
    rows.guesses.move([0], [3], 3)
    assert rows.guesses.any_from(2)
    rows.num_written, rows.written = rows.num_written[:3], rows.written[:3]
    assert rows.ahead() == [[3, 3, 3], [1, 1, 1], [2, 2, 2]]
    rows.guesses.grow(9, 20)
    rows.guesses.add([RowDraft([(7,) * 20], Told(), None)])
    rows.num_written, rows.written = np.zeros(4, np.int64), np.zeros((9, 20), np.int64)
    assert rows.ahead() == [[3, 3, 3], [1, 1, 1], [2, 2, 2], [7] * 20]


def test_the_nearest_user_s_text_is_guessed_first_and_then_the_most_common_ones() -> None:
    drafts = Drafts(tiny_models.byte_tokenizer(), tiny_models.EOS, Experience())
    row = first_row(engine_of(GREEDY))

    def of(*user: float) -> Row:
        return replace(row, user_embedding=np.array(user, np.float32))

    def first(*user: float) -> RowDraft:
        (draft,) = drafts.of([of(*user)], 0)
        assert draft is not None
        return draft

    north, east, south, shared = (1, 9), (2, 9), (3, 9), (4, 9)
    for user, text in (((0, 1), north), ((1, 0), east), ((0, -1), south)):
        drafts.tell(of(*user), text)
    for teller in (replace(row, user_embedding=None), of(5, 5), of(5, -5)):
        drafts.tell(teller, shared)
    for place, text in {(0.1, 0.8): north, (0.8, 0.1): east, (0.2, -0.7): south}.items():
        draft = first(*place)
        assert draft.next([]) == (text, Source.TOLD)
        assert draft.next([shared[0]]) == (shared, Source.TOLD), "what began otherwise goes on with another"
        assert draft.next([shared[0]]) is None
        others = drafts.told.of(row).order_for(np.array(place, np.float32))
        assert others[:2] == [text, shared]
        assert sorted(others) == [north, east, south, shared]
    (of_nobody,) = drafts.of([replace(row, user_embedding=None)], 0)
    assert of_nobody is not None
    assert of_nobody.next([]) == (shared, Source.TOLD), "the control: without a user the common one"
    drafts.tell(of(0.7, 0), shared)
    assert first(0.8, 0.1).next([]) == (shared, Source.TOLD), "the nearest wrote what others had written before"


def test_what_is_told_meanwhile_is_looked_at_as_all_of_it_is() -> None:
    """The nearest user's first, then the most common."""
    told = Told()
    told.add((1, 9), np.zeros(2, np.float32))
    draft = RowDraft([], told, np.ones(2, np.float32))
    assert draft.next([]) == ((1, 9), Source.TOLD)
    assert not draft.has_news
    for text, place in (((2, 9), 5), ((3, 9), 5), ((3, 9), 5), ((4, 9), 1), ((1, 9), 1)):
        told.add(text, np.full(2, place, np.float32))
    assert [draft.next([at]) for at in (4, 3, 2)] == [((at, 9), Source.TOLD) for at in (4, 3, 2)]
    assert draft.next([1]) is None, "the control: it was compared with that already"
    again = RowDraft([], told, np.ones(2, np.float32))
    assert again.next([1]) == ((1, 9), Source.TOLD)


def test_of_many_texts_the_common_and_the_last_ones_are_kept() -> None:
    told = Told()
    common, others = (7, 7), [(at,) for at in range(100)]
    for text in others:
        told.add(text, None)
        told.add(common, None)
    assert told.order_for(None) == [common, *others[-31:]]
    assert told.last == common
    assert told.num_new == 101


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
    """Where a pass costs little besides its tokens, guesses stop; where it costs much, they go on for longer."""
    groups = with_drafts(groups_of(6, 60), lambda key: "no such text at all, whatever is asked")
    expected = run(engine_of(GREEDY, drafts=False), groups)

    def num_tried(overhead_tokens: int) -> int:
        monkeypatch.setattr(decode, "measure_pass_cost", lambda base: tiny_models.pass_cost(overhead_tokens))
        engine = engine_of(GREEDY)
        assert same(run(engine, groups), expected)
        return engine.stats.num_draft_tokens

    num_tokens = sum(completion.num_output_tokens for completion in expected.values())
    assert num_tried(64) < 0.2 * num_tokens
    assert num_tried(4096) > num_tried(64)


def test_rows_get_guesses_where_these_have_saved_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """After some calls whose drafts were wrong one in eight has any; as soon as they are right again all have."""
    made, plain = list[int](), Drafts.of

    def watched(self: Drafts, rows: Sequence[Row], num_running: int) -> list[RowDraft | None]:
        drafts = plain(self, rows, num_running)
        made.append(sum(draft is not None for draft in drafts))
        return drafts

    monkeypatch.setattr(Drafts, "of", watched)
    monkeypatch.setattr(ToldTexts, "tell", lambda told, row, tokens: None)  # the same users' own texts would be right
    calls = [group for at in range(40) for group in groups_of(1, 4, first=4 * at)]
    expected = run(engine_of(GREEDY, drafts=False), calls)
    wrong = with_drafts(calls, lambda key: "no such text at all, whatever is asked")
    right = with_drafts(calls, lambda key: expected[key].text)
    engine = engine_of(GREEDY)

    def num_made(calls: list[Group]) -> list[int]:
        """Rows of each call, which are written one call after the other, that had guesses."""
        made.clear()
        found = dict[RequestKey, Completion]()
        for group in calls:
            found |= run(engine, [group])
        assert same(found, {key: expected[key] for key in found})
        assert len(made) == len(calls)
        return made

    learning = num_made(wrong)
    assert learning[:4] == [4] * 4
    assert sum(num_made(wrong)) == 4 * len(calls) / 8
    num_steps = engine.stats.num_steps
    learning = num_made(right)
    assert sum(learning[:16]) < 4 * 16, "the control: not at once"
    assert learning[-16:] == [4] * 16
    assert engine.stats.num_steps - num_steps < 0.7 * num_steps / 2
    bare = [replace(request, draft=None) for request in calls[0].requests]
    assert num_made([replace(calls[0], requests=tuple(bare[:3]) + calls[0].requests[3:])]) == [4], "of another kind"


def test_what_guesses_are_worth_is_asked_of_rows_that_are_alike() -> None:
    worth, alone, many = Worth(), kind_of(1, has_draft=True), kind_of(300, has_draft=True)
    assert many == kind_of(500, has_draft=True) != kind_of(512, has_draft=True)
    assert kind_of(1, has_draft=False) != alone

    def see(kind: int, num_tokens: int, num_saved: int) -> None:
        worth.see(np.array([kind] * 2), np.array([num_tokens - 1, 1]), np.array([num_saved, 0]))

    def tried(kind: int) -> list[bool]:
        return [worth.is_tried(kind) for _ in range(16)]

    for kind in (alone, many):
        see(kind, 1000, 0)
    assert tried(many) == [True] * 16, "a thousand tokens of hundreds of rows say little"
    assert tried(alone) == ([False] * 7 + [True]) * 2
    assert tried(kind_of(1, has_draft=False)) == [True] * 16
    see(alone, 125, 60)
    assert tried(alone) == [True] * 16
    for _ in range(20):
        see(alone, 125, 0)
    assert tried(alone) == ([False] * 7 + [True]) * 2


def test_rows_without_guesses_stay_beside_those_that_have_some() -> None:
    rows = Followed([None, RowDraft([(1, 2, 3, 4)], Told(), None), None, RowDraft([(5, 6, 7)], Told(), None)])
    rows.write([9, 9], [1], [9], [5, 6])
    assert rows.ahead() == [[], [2, 3, 4], [], [7]]
    rows.guesses.move([0], [3], 3)
    rows.guesses.move([1], [2], 2)
    rows.num_written, rows.written = np.array([2, 1]), np.array([[5, 6, 0, 0], [9, 0, 0, 0]])
    assert rows.ahead() == [[7], []]
    rows.guesses.add([None, RowDraft([(8, 8)], Told(), None)])
    rows.num_written, rows.written = np.array([2, 1, 0, 0]), np.zeros((4, 4), np.int64)
    assert rows.ahead() == [[7], [], [], [8, 8]]


def test_guesses_that_do_not_pay_are_looked_at_less_and_less() -> None:
    def looks(guesses: Guesses, num_passes: int, num_tried: int = 0) -> list[int]:
        """The passes of so many whose tokens guesses are judged by."""
        found = []
        for at in range(num_passes):
            guesses.tried(num_tried)
            if guesses.passed():
                found.append(at)
                guesses.num_unseen = 0
        return found

    def rows(num: int) -> Guesses:
        return Followed([RowDraft([(1, 2, 3)], Told(), None) for _ in range(num)]).guesses

    many = rows(20)
    assert looks(many, 40) == [0, 1, 2, 3, 5, 9, 17, 25, 33]
    assert not many.any_from(0)
    many.num_unseen = 0
    many.add([])
    assert many.any_from(0), "rows come in"
    assert looks(many, 6) == [0, 1, 2, 3, 5]
    assert looks(many, 6, num_tried=3) == [*range(6)], "as soon as one is tried"
    assert looks(rows(1), 10) == [*range(10)], "of a row alone every pass counts"
    assert looks(rows(2), 10) == [0, 1, 2, 3, 5, 7, 9]


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
    bare = replace(row, draft=None)

    def first_tokens() -> list[tuple[int, ...]]:
        """Of the ways that a draft is tried, as many tokens as a blank and a letter are."""
        none, given = drafts._given([bare, row])
        assert none == []
        return [text[: len(blank)] for text in given]

    assert first_tokens()[0] == blank
    assert len(first_tokens()) == 2
    for _ in range(3):
        drafts.tell(row, plain)
    assert first_tokens()[0][:1] == plain
    for _ in range(3):
        drafts.tell(row, blank)
    assert first_tokens()[0] == blank
    for _ in range(20):
        drafts.tell(row, blank)
    assert first_tokens() == [blank], "after many the other way is not tried"


def test_contents_are_forgotten_beyond_their_bound() -> None:
    told, row = ToldTexts(), first_row(engine_of(GREEDY))
    rows = [replace(row, segments=replace(row.segments, left=(at, *row.segments.left))) for at in range(300)]
    for one in rows:
        told.tell(one, (1, 2))
        told.tell(rows[0], (3, 4))
    assert len(told) == 256
    assert [told.of(rows[at]).num_new for at in (0, 299, 45, 44)] == [2, 1, 1, 0]

"""Every branch from a request to its row, row conservation over messy groups, and engines that lie."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e2p_ray import generate
from e2p_ray.config import JobConfig
from e2p_ray.engine.fake import FakeEngine
from e2p_ray.generate import Generator
from e2p_ray.results import Result
from e2p_ray.schema import (
    DEAD_LETTERS,
    GENERATIONS,
    Arm,
    Completion,
    Content,
    DeadLetter,
    ErrorCode,
    FinishReason,
    Generation,
    Group,
    Reason,
    Request,
    RequestKey,
    Status,
    one_line,
    to_table,
)

BODY = "The city opened a bridge on Monday. It cost 40 million dollars. Cyclists welcomed the wide lanes. Rain fell."
CONTENT = Content("c1", " Bridge opens\n", BODY, "en")
JA = Content("c2", "橋が開通", "市は月曜日に橋を開通した。費用は四千万円だ。自転車の道も広い。", "ja")
SHARED = RequestKey("", "c1", "headline")
KEY = RequestKey("u1", "c1", "headline")
BAD = "Call 555-0123 now"


def make_config(**checks: Any) -> JobConfig:
    return JobConfig.model_validate(
        {
            "inputs": {"users_uri": "u", "contents_uri": "c", "candidates_uri": "x"},
            "output": {"uri": "out"},
            "base_model": {"uri": "model"},
            "projector": {"uri": "projector"},
            "tasks": {"headline": {"prompts": {"default": {}}}, "explanation": {"prompts": {"default": {}}}},
            "checks": checks,
        }
    )


def ask(
    user_id: str = "u1", content: Content = CONTENT, *, favourite: int = 1, reason: Reason | None = None
) -> Request:
    embedding = np.eye(4, dtype=np.float32)[favourite % 4] if reason is None else None
    return Request(RequestKey(user_id, content.content_id, "headline"), embedding, reason)


def run(
    requests: Sequence[Request],
    *,
    content: Content = CONTENT,
    texts: Mapping[RequestKey, str | Sequence[str]] | None = None,
    errors: Mapping[RequestKey, ErrorCode] | None = None,
    **checks: Any,
) -> tuple[list[Generation], list[DeadLetter]]:
    engine = FakeEngine(texts=texts, errors=errors)
    return Generator(engine, make_config(**checks), "run-1").generate(
        [Group(content, "headline", tuple(requests))], shard_id="shard-1"
    )


def only_row(rows_and_letters: tuple[list[Generation], list[DeadLetter]]) -> Generation:
    (row,), letters = rows_and_letters
    assert not letters
    return row


def labels(row: Generation) -> tuple[str, Status, Reason | None, Arm, bool]:
    return row.text, row.status, row.reason, row.arm, row.personalized


def test_accepted() -> None:
    row = only_row(run([ask()]))
    assert labels(row) == ("It cost 40 million dollars.", Status.OK, None, Arm.SOFT_TOKEN, True)
    assert (row.finish_reason, row.mean_logprob, row.num_output_tokens > 0) == (FinishReason.END_TOKEN, -0.5, True)
    assert (row.projector_id, row.base_model_id, row.embedding_space) == ("fake-projector", "fake-model", "fake-space")
    assert (row.run_id, row.key) == ("run-1", KEY)
    assert datetime.now(UTC) >= row.generated_at


def test_accepted_at_the_second_try_says_why_there_was_one() -> None:
    row = only_row(run([ask()], texts={KEY: [BAD, "The bridge is wide."]}))
    assert labels(row) == ("The bridge is wide.", Status.OK, Reason.FOREIGN_PHONE, Arm.SOFT_TOKEN, True)


def test_rejected_twice_falls_back_with_the_first_reason() -> None:
    row = only_row(run([ask()], texts={KEY: [BAD, ""]}))
    expected = ("The city opened a bridge on Monday.", Status.FALLBACK, Reason.FOREIGN_PHONE, Arm.NO_SOFT_TOKEN, False)
    assert labels(row) == expected


def test_no_retry_when_it_is_off() -> None:
    row = only_row(run([ask()], texts={KEY: [BAD, "The bridge is wide."]}, retry=False))
    assert (row.status, row.arm) == (Status.FALLBACK, Arm.NO_SOFT_TOKEN)


def test_title_when_the_unpersonalised_text_is_rejected_too() -> None:
    row = only_row(run([ask()], texts={KEY: BAD, SHARED: "Paris wins 7 medals"}))
    assert labels(row) == ("Bridge opens", Status.FALLBACK, Reason.FOREIGN_PHONE, Arm.TITLE, False)
    assert (row.finish_reason, row.mean_logprob, row.num_prompt_tokens, row.num_output_tokens) == (None, None, 0, 0)


def test_a_title_is_not_checked() -> None:
    content = replace(CONTENT, title="完売 555-0123 http://example.com")
    row = only_row(run([ask()], content=content, texts={KEY: "", SHARED: ""}))
    assert row.text == content.title


def test_an_error_at_the_retry_is_a_fallback() -> None:
    class FailsAtRetry(FakeEngine):
        def generate(self, groups: Iterable[Group | None]) -> Iterator[Completion]:
            for number, completion in enumerate(super().generate(groups)):
                yield replace(completion, error_code=ErrorCode.NON_FINITE_LOGITS) if number == 1 else completion

    rows, letters = Generator(FailsAtRetry(texts={KEY: BAD}), make_config(), "r").generate(
        [Group(CONTENT, "headline", (ask(),))]
    )
    assert not letters
    assert (rows[0].status, rows[0].reason, rows[0].arm) == (Status.FALLBACK, Reason.FOREIGN_PHONE, Arm.NO_SOFT_TOKEN)


@pytest.mark.parametrize("reason", [reason for reason in Reason if reason.startswith("embedding_")])
def test_without_user_embedding(reason: Reason) -> None:
    row = only_row(run([ask(reason=reason)]))
    expected = ("The city opened a bridge on Monday.", Status.FALLBACK, reason, Arm.NO_SOFT_TOKEN, False)
    assert labels(row) == expected
    rejected = only_row(run([ask(reason=reason)], texts={SHARED: ""}))
    assert labels(rejected) == ("Bridge opens", Status.FALLBACK, reason, Arm.TITLE, False)


def test_no_embedding_and_no_reason_is_read_as_a_null_embedding() -> None:
    row = only_row(run([Request(KEY, None)]))
    assert (row.status, row.reason) == (Status.FALLBACK, Reason.EMBEDDING_NULL)


def test_opted_out_is_suppressed_and_never_personalised() -> None:
    row = only_row(run([ask(reason=Reason.OPTED_OUT)]))
    assert labels(row)[1:] == (Status.SUPPRESSED, Reason.OPTED_OUT, Arm.NO_SOFT_TOKEN, False)
    row = only_row(run([ask(reason=Reason.OPTED_OUT)], texts={SHARED: ""}))
    assert labels(row) == ("Bridge opens", Status.SUPPRESSED, Reason.OPTED_OUT, Arm.TITLE, False)


def test_blank_body_publishes_the_title_without_the_engine() -> None:
    class NeverAsked(FakeEngine):
        def generate(self, groups: Iterable[Group | None]) -> Iterator[Completion]:
            assert not list(groups), "nothing to write"
            return iter(())

    content = replace(CONTENT, body=" \n　")
    requests = (ask("u1"), ask("u2", reason=Reason.OPTED_OUT), ask("u3", reason=Reason.EMBEDDING_ZERO))
    rows, letters = Generator(NeverAsked(), make_config(), "r").generate([Group(content, "headline", requests)])
    assert not letters
    assert [(row.status, row.reason, row.arm, row.text) for row in rows] == [
        (Status.FALLBACK, Reason.EMPTY_BODY, Arm.TITLE, "Bridge opens"),
        (Status.SUPPRESSED, Reason.OPTED_OUT, Arm.TITLE, "Bridge opens"),
        (Status.FALLBACK, Reason.EMPTY_BODY, Arm.TITLE, "Bridge opens"),
    ]


@pytest.mark.parametrize("code", [ErrorCode.NON_FINITE_LOGITS, ErrorCode.PROMPT_TOO_LONG, ErrorCode.OUT_OF_MEMORY])
def test_engine_error_is_a_dead_letter(code: ErrorCode) -> None:
    rows, (letter,) = run([ask("u1"), ask("u2")], errors={KEY: code})
    assert [row.user_id for row in rows] == ["u2"]
    assert (letter.key, letter.error_code, letter.shard_id, letter.run_id) == (KEY, code, "shard-1", "run-1")
    assert letter.message
    assert "u1" not in letter.message


def test_engine_error_in_the_shared_text_leads_to_the_title() -> None:
    row = only_row(run([ask(reason=Reason.OPTED_OUT)], errors={SHARED: ErrorCode.NON_FINITE_LOGITS}))
    assert (row.arm, row.text) == (Arm.TITLE, "Bridge opens")


def test_a_shared_text_that_memory_was_short_for_is_asked_for_again() -> None:
    class Short(FakeEngine):
        is_short = True

        def generate(self, groups: Iterable[Group | None]) -> Iterator[Completion]:
            for completion in super().generate(groups):
                short, self.is_short = self.is_short and completion.key == SHARED, False
                yield replace(completion, error_code=ErrorCode.OUT_OF_MEMORY if short else completion.error_code)

    groups = [Group(CONTENT, "headline", (ask(user, reason=Reason.OPTED_OUT),)) for user in ("u1", "u2")]
    rows, letters = Generator(Short(), make_config(), "run-1").generate(groups, shard_id="shard-1")
    assert not letters
    assert {row.user_id: row.arm for row in rows} == {"u1": Arm.TITLE, "u2": Arm.NO_SOFT_TOKEN}


def test_blank_title_where_it_is_needed_is_a_dead_letter() -> None:
    content = replace(CONTENT, title=" ")
    _, (letter,) = run([ask()], content=content, texts={KEY: "", SHARED: ""})
    assert letter.error_code is ErrorCode.EMPTY_CONTENT
    assert only_row(run([ask()], content=content)).status is Status.OK


def test_an_empty_user_id_cannot_take_the_place_of_the_shared_text() -> None:
    rows, (letter,) = run([ask(""), ask("u2", reason=Reason.OPTED_OUT)])
    assert (letter.error_code, letter.user_id) == (ErrorCode.NULL_KEY, "")
    assert rows[0].arm is Arm.NO_SOFT_TOKEN


class Recording(FakeEngine):
    """Keeps what it was asked for."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.asked: list[tuple[int, RequestKey, bool]] = []

    def generate(self, groups: Iterable[Group | None]) -> Iterator[Completion]:
        return super().generate(map(self._note, groups))

    def _note(self, group: Group | None) -> Group | None:
        if group is not None:
            self.asked += [(group.attempt, r.key, r.user_embedding is not None) for r in group.requests]
        return group


def test_one_shared_text_a_content_whoever_needs_it() -> None:
    # A hot content in three groups; opted-out users and a rejected one share a text made in the first call.
    engine = Recording(texts={KEY: BAD})
    groups = [
        Group(CONTENT, "headline", (ask("u1"), ask("u2"))),
        Group(CONTENT, "headline", (ask("u3", reason=Reason.OPTED_OUT), ask("u4"))),
        Group(CONTENT, "headline", (ask("u5", reason=Reason.EMBEDDING_NULL),)),
    ]
    rows, _ = Generator(engine, make_config(), "r").generate(groups)
    assert [key for _, key, _ in engine.asked].count(SHARED) == 1
    assert (0, SHARED, False) in engine.asked
    assert len({row.text for row in rows if row.arm is Arm.NO_SOFT_TOKEN}) == 1
    assert [row.user_id for row in rows] == ["u1", "u2", "u3", "u4", "u5"]


def test_no_shared_text_when_nobody_needs_it_and_none_for_the_opted_out_with_a_user_embedding() -> None:
    engine = Recording()
    Generator(engine, make_config(), "r").generate([Group(CONTENT, "headline", (ask("u1"), ask("u2")))])
    assert {key.user_id for _, key, _ in engine.asked} == {"u1", "u2"}
    engine = Recording()
    Generator(engine, make_config(), "r").generate([Group(CONTENT, "headline", (ask("u1", reason=Reason.OPTED_OUT),))])
    assert engine.asked == [(0, SHARED, False)]


@pytest.mark.parametrize("num_rejected", [0, 2])
def test_of_many_requests_the_shared_text_is_written_along_with_the_first(num_rejected: int) -> None:
    many = tuple(ask(f"u{at}") for at in range(200))
    texts = dict.fromkeys((request.key for request in many[-num_rejected:] if num_rejected), BAD)
    engine = Recording(texts=texts)
    groups = [Group(CONTENT, "headline", many[:150]), Group(CONTENT, "headline", many[150:])]
    rows, letters = Generator(engine, make_config(retry=False), "r").generate(groups)
    assert engine.asked[0] == (0, SHARED, False)
    assert len(engine.asked) == 201
    assert [row.user_id for row in rows] == [request.key.user_id for request in many]
    shared = [row for row in rows if row.arm is Arm.NO_SOFT_TOKEN]
    assert [row.reason for row in shared] == [Reason.FOREIGN_PHONE] * num_rejected
    assert not letters
    # Control: fewer wait until one has failed.
    engine = Recording(texts=texts)
    Generator(engine, make_config(retry=False), "r").generate([Group(CONTENT, "headline", many[-100:])])
    assert [key for _, key, _ in engine.asked].index(SHARED) == 100 if num_rejected else len(engine.asked) == 100


class SharedLast(FakeEngine):
    """Writes unpersonalised texts when nothing else is on its way, one text a step."""

    def generate(self, groups: Iterable[Group | None]) -> Iterator[Completion]:
        owed = list[tuple[Group, Request]]()
        for group in groups:
            if group is not None:
                owed += [(group, request) for request in group.requests]
            elif owed:
                owed.sort(key=lambda one: not one[1].key.user_id)
                of, request = owed.pop(0)
                yield self._complete(of.content, request, 1, of.attempt)


def test_an_unpersonalised_text_of_an_older_content_is_for_nobody_who_asks_for_the_newer_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Asked for ahead, it may outlive all that it was asked for; online the content may have changed meanwhile."""
    monkeypatch.setattr(generate, "MANY_REQUESTS", 2)
    newer = replace(CONTENT, body="The city closed a bridge on Sunday. Rain fell.")
    given = list[Result]()

    def source() -> Iterator[Group | None]:
        yield Group(CONTENT, "headline", (ask("u1"), ask("u2")))
        while len(given) < 2:
            yield None
        yield Group(newer, "headline", tuple(ask(user, newer, reason=Reason.OPTED_OUT) for user in ("u3", "u4")))
        while len(given) < 4:
            yield None

    Generator(SharedLast(), make_config(), "r").follow(source(), given.append)
    texts = {result.key.user_id: result.text for result in given if isinstance(result, Generation)}
    assert texts["u3"] == texts["u4"] == "The city closed a bridge on Sunday."
    assert texts["u1"] in BODY


def test_only_rejected_texts_are_tried_again() -> None:
    engine = Recording(texts={KEY: BAD})
    Generator(engine, make_config(), "r").generate([Group(CONTENT, "headline", (ask("u1"), ask("u2")))])
    assert [key for attempt, key, _ in engine.asked if attempt == 1] == [KEY]


def test_the_published_text_is_one_line() -> None:
    row = only_row(run([ask()], texts={KEY: "  The bridge\n\t is   wide. \n"}))
    assert row.text == "The bridge is   wide."
    assert one_line("橋　開通\r\n費用") == "橋　開通 費用"


class Lying(FakeEngine):
    """Drops, repeats or invents a completion."""

    def __init__(self, lie: str, attempt: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._lie, self._attempt = lie, attempt

    def generate(self, groups: Iterable[Group | None]) -> Iterator[Completion]:
        for group in groups:
            if group is None:
                return
            completions = list(super().generate([group]))
            if group.attempt == self._attempt:
                match self._lie:
                    case "drop":
                        completions.pop()
                    case "repeat":
                        completions.append(completions[0])
                    case "invent":
                        completions.append(replace(completions[0], key=RequestKey("nobody", "c1", "headline")))
                    case "other":
                        completions[0] = replace(completions[0], key=KEY._replace(task="explanation"))
            yield from completions


@pytest.mark.parametrize("attempt", [0, 1])
@pytest.mark.parametrize("lie", ["drop", "repeat", "invent", "other"])
def test_control_an_engine_that_lies_is_caught(lie: str, attempt: int) -> None:
    texts = {RequestKey(user, "c1", "headline"): BAD for user in ("u1", "u2")}
    groups = [Group(CONTENT, "headline", (ask("u1"), ask("u2")))]
    Generator(Lying("nothing", attempt, texts=texts), make_config(), "r").generate(groups)
    with pytest.raises(AssertionError, match=r"the engine (completed|ended)"):
        Generator(Lying(lie, attempt, texts=texts), make_config(), "r").generate(groups)


@pytest.mark.parametrize(
    "groups",
    [
        [Group(CONTENT, "headline", (ask("u1"), ask("u1")))],
        [Group(CONTENT, "headline", (ask("u1"),)), Group(CONTENT, "headline", (ask("u1"),))],
        [Group(CONTENT, "headline", (ask("u1"),)), Group(replace(CONTENT, body="x"), "headline", (ask("u2"),))],
        [Group(CONTENT, "explanation", (ask("u1"),))],
        [Group(JA, "headline", (ask("u1"),))],
    ],
)
def test_unsound_groups_are_refused(groups: list[Group]) -> None:
    with pytest.raises(AssertionError):
        Generator(FakeEngine(), make_config(), "r").generate(groups)


@st.composite
def messy_groups(draw: st.DrawFn) -> tuple[list[Group], FakeEngine]:
    """Contents with and without body and title, any reason, any misbehaviour of the engine, contents in pieces."""
    texts: dict[RequestKey, list[str]] = {}
    errors: dict[RequestKey, ErrorCode] = {}
    groups: list[Group] = []
    for number in range(draw(st.integers(1, 4))):
        body = draw(st.sampled_from([BODY, JA.body, "", " \n"]))
        title = draw(st.sampled_from(["Bridge opens", "橋", " "]))
        content = Content(f"c{number}", title, body, draw(st.sampled_from(["en", "ja", "xx"])))
        for task in draw(st.sampled_from([["headline"], ["headline", "explanation"]])):
            users = draw(st.lists(st.sampled_from(["", *(f"u{n}" for n in range(12))]), unique=True, max_size=10))
            requests = []
            for user_id in users:
                key = RequestKey(user_id, content.content_id, task)
                reason = draw(st.sampled_from([None, None, Reason.OPTED_OUT, Reason.EMBEDDING_ZERO]))
                embedding = np.eye(4, dtype=np.float32)[draw(st.integers(0, 3))] if reason is None else None
                requests.append(Request(key, embedding, reason))
            for key in [*(r.key for r in requests if r.key.user_id), RequestKey("", content.content_id, task)]:
                match draw(st.sampled_from(["good", "good", "bad", "second", "error"])):
                    case "bad":
                        texts[key] = [draw(st.text(max_size=40))]
                    case "second":
                        texts[key] = [BAD, "Rain fell."]
                    case "error":
                        errors[key] = draw(st.sampled_from(list(ErrorCode)))
            cut = draw(st.integers(0, len(requests)))
            groups += [Group(content, task, tuple(requests[:cut])), Group(content, task, tuple(requests[cut:]))]
    return groups, FakeEngine(texts=texts, errors=errors)


@settings(max_examples=200, deadline=None)
@given(messy_groups(), st.booleans())
def test_rows_are_conserved_whatever_happens(made: tuple[list[Group], FakeEngine], retry: bool) -> None:
    groups, engine = made
    rows, letters = Generator(engine, make_config(retry=retry), "r").generate(groups, shard_id="s")
    planned = {request.key: request for group in groups for request in group.requests}
    keys = [row.key for row in rows] + [letter.key for letter in letters]
    assert len(keys) == len(set(keys))
    assert set(keys) == set(planned)
    for row in rows:
        request = planned[row.key]
        assert row.text == one_line(row.text) != ""
        assert row.personalized == (row.arm is Arm.SOFT_TOKEN) == (row.status is Status.OK)
        assert (row.status is Status.SUPPRESSED) == (request.reason is Reason.OPTED_OUT)
        assert not row.personalized or request.user_embedding is not None
        assert row.status is Status.OK or row.reason is not None
        assert (row.finish_reason is None) == (row.arm is Arm.TITLE)
    assert to_table(rows, GENERATIONS).schema == GENERATIONS
    assert to_table(letters, DEAD_LETTERS).schema == DEAD_LETTERS


def test_empty_call() -> None:
    assert Generator(FakeEngine(), make_config(), "r").generate([]) == ([], [])
    assert Generator(FakeEngine(), make_config(), "r").generate([Group(CONTENT, "headline", ())]) == ([], [])


def test_order_and_company_do_not_change_a_row() -> None:
    requests = [ask(f"u{n}", favourite=n) for n in range(6)] + [ask("u9", reason=Reason.OPTED_OUT)]
    engine, config = FakeEngine(texts={KEY: BAD}), make_config()
    together, _ = Generator(engine, config, "r").generate([Group(CONTENT, "headline", tuple(requests))])
    for row, request in zip(together, requests, strict=True):
        (alone,), _ = Generator(engine, config, "r").generate([Group(CONTENT, "headline", (request,))])
        assert replace(alone, generated_at=row.generated_at) == row


def test_nothing_about_the_user_embedding_leaves() -> None:
    secret = np.array([0.125, 7.5, -3.25, 9.0625], dtype=np.float32)
    rows, letters = run(
        [Request(KEY, secret), ask("u2")], errors={RequestKey("u2", "c1", "headline"): ErrorCode.OUT_OF_MEMORY}
    )
    printed = repr(rows) + repr(letters)
    assert not any(str(value) in printed for value in (7.5, -3.25, 9.0625))

"""Requests that join what is being written: in the engine's wave, and in the model's thread of a replica."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from e2p_ray.config import JobConfig, SamplingConfig
from e2p_ray.engine.admission import Admission
from e2p_ray.engine.decode import Decoder
from e2p_ray.engine.engine import Engine
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.wave import Wave
from e2p_ray.loaded import LoadedGenerator
from e2p_ray.schema import Completion, Content, DeadLetter, Generation, Group, Request, RequestKey, Status
from e2p_ray.serve.call import Job
from e2p_ray.serve.loop import ModelLoop
from e2p_ray.serve.problems import ProblemError
from e2p_ray.storage import Storage
from tests import tiny_models
from tests.tiny_models import engine_of, group, task

LLAMA = LlamaConfig(**tiny_models.common())
LONG, SHORT = 24, 9  # tokens, where no text ends early
KEY = RequestKey("nobody", "c0", "short")
TASKS = {
    "short": task(max_new_tokens=SHORT),
    "long": task(cue_after=" in many more words: ", max_new_tokens=LONG),
    "sampled": task(max_new_tokens=SHORT, temperature=0.9, seed=5),
}


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """No text ends before its last token, so that there is something to join."""
    tiny_models.write_letters_only(monkeypatch)
    plain = BaseModel.logits

    def endless(self: BaseModel, hidden: torch.Tensor) -> torch.Tensor:
        logits = plain(self, hidden)
        logits[:, tiny_models.EOS] = -1e4
        return logits

    monkeypatch.setattr(BaseModel, "logits", endless)


def groups_of(task_name: str, num_contents: int, first_user: int = 0) -> list[Group]:
    contents = tiny_models.contents(num_contents, seed=7)
    users = range(first_user, first_user + 3)
    return [group(content, users, task_name=task_name, without=[first_user]) for content in contents]


def arriving(engine: Engine, parts: Sequence[tuple[int, Sequence[Group]]]) -> Iterator[Group | None]:
    """Groups that come once the engine has made so many steps; None until then."""
    before = engine.stats.num_steps
    for step, groups in parts:
        while engine.stats.num_steps - before < step:
            yield None
        yield from groups


def texts_of(completions: Iterator[Completion]) -> dict[RequestKey, tuple[str, int]]:
    found = [(completion.key, (completion.text, completion.num_output_tokens)) for completion in completions]
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.mark.parametrize("along", [True, False])
@pytest.mark.parametrize("names", [("long", "short", "sampled"), ("short", "long", "short")])
def test_who_joins_a_wave_writes_what_he_writes_alone(
    along: bool, names: tuple[str, str, str], letters: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = groups_of(names[0], 1), groups_of(names[1], 4, 10), groups_of(names[2], 2, 20)
    alone = engine_of(LLAMA, tasks=TASKS)
    expected = [texts_of(alone.generate(groups)) for groups in (first, second, third)]
    num_steps = alone.stats.num_steps
    if not along:
        monkeypatch.setattr(Admission, "run_along", lambda *words: False)
    engine = engine_of(LLAMA, tasks=TASKS)
    found = texts_of(engine.generate(arriving(engine, [(0, first), (3, second), (5, third)])))
    assert found == expected[0] | expected[1] | expected[2]
    assert engine.stats.num_waves == 1, "one wave grew as they came"
    assert alone.stats.num_waves == 3, "control"
    assert engine.stats.num_steps < num_steps, "they were decoded together"
    assert engine.stats.num_output_tokens == alone.stats.num_output_tokens


def test_a_pass_for_all_saves_the_passes_of_those_who_join(letters: None, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    plain = Decoder._pass

    def counted(self: Decoder, wave: Wave, first: int, *, others_wait: bool) -> None:
        passes.append(len(wave) - first)
        plain(self, wave, first, others_wait=others_wait)

    monkeypatch.setattr(Decoder, "_pass", counted)
    first, late = groups_of("long", 1), [groups_of("short", 1, 10 * at) for at in range(1, 6)]

    def num_passes() -> int:
        passes.clear()
        engine = engine_of(LLAMA, tasks=TASKS)
        texts_of(engine.generate(arriving(engine, [(0, first), *((2 * at, part) for at, part in enumerate(late, 1))])))
        return len(passes)

    together = num_passes()
    assert together == LONG, "a pass for each token of the longest text, and none besides"
    monkeypatch.setattr(Admission, "run_along", lambda *words: False)
    assert num_passes() == together + len(late), "control: one more for each that comes"


def test_waves_stay_within_their_bounds_whoever_comes(letters: None, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    plain = Decoder._pass

    def counted(self: Decoder, wave: Wave, first: int, *, others_wait: bool) -> None:
        widths.append(len(wave))
        assert len(wave) <= wave.slots.max_rows
        plain(self, wave, first, others_wait=others_wait)

    monkeypatch.setattr(Decoder, "_pass", counted)
    groups = [*groups_of("short", 6), *groups_of("long", 6, 10)]
    expected = texts_of(engine_of(LLAMA, tasks=TASKS).generate(groups))
    assert max(widths) > 16, "control: without such a bound they are more"
    widths.clear()
    engine = engine_of(LLAMA, tasks=TASKS, max_rows=8)
    parts = [(2 * at, [one]) for at, one in enumerate(groups)]
    assert texts_of(engine.generate(arriving(engine, parts))) == expected
    assert max(widths) == 8


def test_a_key_may_come_again_once_it_is_done(letters: None) -> None:
    engine = engine_of(LLAMA, tasks=TASKS)
    (one,) = groups_of("short", 1)
    (other,) = groups_of("long", 1, 10)
    again = [replace(one, attempt=1)]
    found = list(engine.generate(arriving(engine, [(0, [one, other]), (SHORT + 2, again)])))
    texts = [completion.text for completion in found if completion.key == one.requests[1].key]
    assert len(texts) == 2
    assert texts[0] != texts[1], "another attempt, another text"


# -- the model's thread ------------------------------------------------------------------------------------------------


def config_of(*, strict: bool) -> JobConfig:
    tasks = {name: one.model_dump(mode="json") | {"limits": {"must_finish": strict}} for name, one in TASKS.items()}
    checks = ("language", "repetition", "foreign_contacts", "foreign_numbers", "foreign_names", "retry")
    return JobConfig.model_validate(
        {
            "inputs": {"users_uri": "u", "contents_uri": "c", "candidates_uri": "x"},
            "output": {"uri": "out"},
            "base_model": {"uri": "model"},
            "projector": {"uri": "projector"},
            "tasks": tasks,
            "checks": dict.fromkeys(checks, strict),
        }
    )


class Desk:
    """A loop over a tiny model, and who asks it for texts."""

    def __init__(self, *, max_rows: int = 64, max_waiting: int = 100, strict: bool = False) -> None:
        self.engine = engine_of(LLAMA, tasks=TASKS)
        self.loaded = LoadedGenerator(config_of(strict=strict), Storage(), "run", engine=self.engine)
        self.loop = ModelLoop(max_rows=max_rows, max_waiting=max_waiting)
        self.contents = tiny_models.contents(4, seed=7)
        self.done: list[str] = []

    def job(self, user: int, task_name: str, content: int = 0, **changes: Any) -> Job:
        found = self.contents[content]
        key = RequestKey(f"u{user}", found.content_id, task_name)
        vector = np.random.default_rng(user).standard_normal(tiny_models.EMBEDDING_DIM).astype(np.float32)
        request = Request(key, vector)
        loaded = changes.pop("loaded", self.loaded)
        job = Job(loaded, found, task_name, request, loaded.fingerprint_of(request, found))
        return replace(job, future=Future(), **changes)

    def submit(self, name: str, job: Job) -> Job:
        job.future.add_done_callback(lambda future: self.done.append(name))
        self.loop.submit([job])
        return job

    def alone(self, jobs: Sequence[Job]) -> list[Generation | DeadLetter]:
        """What a batch writes for each of them."""
        found = []
        for job in jobs:
            rows, letters = job.loaded.generate([Group(job.content, job.task, (job.request,))])
            found += [_timeless(row) for row in rows] + [_timeless(letter) for letter in letters]
        return found


def _timeless(result: Generation | DeadLetter) -> Generation | DeadLetter:
    if isinstance(result, DeadLetter):
        return result
    return replace(result, generated_at=None, mean_logprob=None)  # type: ignore[arg-type]


def test_a_request_joins_the_call_that_runs_and_another_sampling_waits(letters: None) -> None:
    desk, late = Desk(), list[Job]()
    other = desk.loaded.with_sampling("short", SamplingConfig(max_new_tokens=SHORT, stop=(), temperature=0.7))
    seen: list[int] = []

    def come(text: str) -> None:
        """Called between two steps, when the first request has its first token."""
        if late:
            return
        late.append(desk.submit("joins", desk.job(2, "short", content=1)))
        late.append(desk.submit("equal", desk.job(1, "long")))
        late.append(desk.submit("waits", desk.job(3, "short", loaded=other)))
        late.append(desk.submit("behind it", desk.job(4, "short")))
        desk.loop.run(lambda: seen.append(desk.loop.num_running))

    first = desk.submit("first", desk.job(1, "long", on_text=come))
    first.future.result(60)  # by then the others have come
    results = [_timeless(job.future.result(60)) for job in (first, *late)]
    num_waves = desk.engine.stats.num_waves
    desk.loop.close(10)
    assert desk.done.index("joins") < desk.done.index("first"), "it was not waited for the first one's end"
    assert desk.done.index("equal") == desk.done.index("first") + 1, "one text for both"
    assert desk.done[-2:] == ["waits", "behind it"], "nobody goes before him"
    assert seen == [3], "an errand comes between two steps"
    assert num_waves == 3, "of the first call, of the other sampling's, of the last"
    assert results == desk.alone([first, *late])
    assert len({result.text for result in results if isinstance(result, Generation)}) > 2, "control"


def test_who_leaves_leaves_the_wave_and_room_for_others(letters: None) -> None:
    desk, late = Desk(max_rows=2), list[Job]()

    def come(text: str) -> None:
        if not late:
            late.extend(desk.submit(f"late {user}", desk.job(user, "short")) for user in (5, 6, 7))
            leaving.future.cancel()

    leaving = desk.job(1, "long")
    desk.loop.submit([leaving, first := desk.job(2, "long", on_text=come)])
    first.future.result(60)  # by then the others have come
    results = [_timeless(job.future.result(60)) for job in (first, *late)]
    desk.loop.close(10)
    assert leaving.future.cancelled()
    assert desk.done == ["late 5", "late 6", "late 7"], "one after the other in the place that he left"
    assert desk.engine.stats.num_waves == 1
    assert results == desk.alone([first, *late])


@pytest.mark.parametrize("strict", [False, True])
def test_other_contents_of_one_id_are_not_written_together(strict: bool, letters: None) -> None:
    """Strict checks refuse these texts: second tries and unpersonalised texts come in between."""
    desk, late = Desk(strict=strict), list[Job]()
    changed = Content(desk.contents[0].content_id, "Another title", "Another body about another bridge.", "en")

    def come(text: str) -> None:
        if not late:
            request = Request(RequestKey("u9", changed.content_id, "short"), np.ones(tiny_models.EMBEDDING_DIM, "f4"))
            job = Job(desk.loaded, changed, "short", request, desk.loaded.fingerprint_of(request, changed))
            late.append(desk.submit("changed", job))

    first = desk.submit("first", desk.job(1, "long", on_text=come))
    first.future.result(60)  # by then the others have come
    results = [_timeless(job.future.result(60)) for job in (first, *late)]
    desk.loop.close(10)
    assert desk.done == ["first", "changed"]
    assert results == desk.alone([first, *late])
    assert {result.status for result in results if isinstance(result, Generation)} == {
        Status.FALLBACK if strict else Status.OK
    }


class Clock:
    """In the place of `time`: how late it is, says the test."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


def test_in_a_crowd_nobody_waits_for_a_whole_text(monkeypatch: pytest.MonkeyPatch, letters: None) -> None:
    """One place, one may wait, a second a token: who may is asked at each token but the last of four texts."""
    clock, desk = Clock(), Desk(max_rows=1, max_waiting=1)
    # Nor do earlier texts help: with guesses that hold, several tokens come at once.
    monkeypatch.setattr("e2p_ray.engine.told.ToldTexts.tell", lambda told, row, tokens: None)
    for module in ("loop", "call"):
        monkeypatch.setattr(f"e2p_ray.serve.{module}.time", clock)
    may_wait: dict[int, list[bool]] = {user: [] for user in range(4)}

    def writing(user: int) -> None:
        def come(text: str) -> None:
            clock.now_s += 1
            may_wait[user].append(desk.loop.may_wait())
            if user == 2 and len(may_wait[user]) == 3:
                job.future.cancel()
                may_wait[user].append(desk.loop.may_wait())
            if user == 1 and len(may_wait[user]) == 2:
                desk.loop.submit([waits := desk.job(9, "short")])
                with pytest.raises(ProblemError):
                    desk.loop.submit([desk.job(8, "short")])
                waits.future.cancel()  # the queue is empty again, and it is a crowd

        job = desk.job(user, "long", on_text=come)
        desk.loop.submit([job])
        wait([job.future], 60)

    for user in range(3):
        writing(user)
    clock.now_s += 10 * LONG
    writing(3)
    desk.loop.close(10)
    assert may_wait[0] == [True] * (LONG - 1), "nobody was refused before"
    assert may_wait[1] == [True, True] + [False] * 18 + [True] * 3, "the last tenth of the text"
    assert may_wait[2] == [False, False, False, True], (
        "still a crowd; once its client left, the place is as good as free"
    )
    assert may_wait[3] == [True] * (LONG - 1), "the control: it is over"


def test_scoring_and_writing_take_turns(monkeypatch: pytest.MonkeyPatch, letters: None) -> None:
    """A second a token, five a call that scores: seven calls that come at the first token of a text."""
    clock, desk, num_tokens = Clock(), Desk(max_rows=1), 0
    for module in ("loop", "call"):
        monkeypatch.setattr(f"e2p_ray.serve.{module}.time", clock)
    errands, scored, calls = list[int](), list[int](), list[Future[None]]()

    def score() -> None:
        clock.now_s += 5
        scored.append(num_tokens)

    def come(text: str) -> None:
        nonlocal num_tokens
        clock.now_s += 1
        num_tokens += 1
        if not calls:
            calls.extend(desk.loop.score(score, 1, KEY) for _ in range(7))
            for _ in range(3):
                desk.loop.run(lambda: errands.append(num_tokens))

    job = desk.job(1, "long", on_text=come)
    desk.loop.submit([job])
    wait([job.future], 60)
    wait(calls, 60)
    desk.loop.close(10)
    assert scored[:5] == [1, 6, 11, 16, 21], "five tokens for every five seconds"
    assert scored[5:] == [LONG - 1] * 2, "with nobody to take turns with they go on; of its last token nobody is told"
    assert errands == [1] * 3, "the control: other errands do not wait for a turn"


def test_who_waits_to_be_scored_is_bounded_told_so_and_forgotten_when_he_leaves() -> None:
    loop, begun, over = ModelLoop(max_rows=1, max_waiting=4), threading.Event(), threading.Event()

    def block() -> None:
        begun.set()
        over.wait(60)

    def nothing() -> None:
        """A call that could be scoring."""

    calls = [loop.score(block, 16, KEY)]
    assert begun.wait(60)
    calls.append(leaves := loop.score(nothing, 16, KEY))
    with pytest.raises(ProblemError) as refused:
        loop.score(nothing, 1, KEY)
    assert (refused.value.status, refused.value.code) == (429, "queue_full")
    assert refused.value.retry_after_s is not None
    assert loop.may_wait(), "texts that are to be written have places of their own"
    leaves.cancel()
    calls += [loop.score(nothing, 3, KEY), loop.score(nothing, 1, KEY)]
    with pytest.raises(ProblemError):
        loop.score(nothing, 1, KEY)
    loop.close(0.0)
    for call in calls[2:]:
        with pytest.raises(ProblemError) as ended:
            call.result(60)
        assert ended.value.code == "shutting_down"
    over.set()
    calls[0].result(60)  # the control: what runs is finished

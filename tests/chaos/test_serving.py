"""Online serving in numbers: many texts against the batch's, swaps under load, too many users at once.

`E2P_TEST_LONG=1` runs the counts of the README; `-s` shows the times.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from deltalake import DeltaTable

import jobs.whole_run
from e2p_ray.config import JobConfig, OutputConfig
from e2p_ray.results import Result
from e2p_ray.schema import DeadLetter, Generation, RequestKey
from e2p_ray.serve.call import Call
from e2p_ray.serve.client import Client, DeadlineError, ServiceError
from e2p_ray.serve.messages import GenerationAnswer
from jobs.whole_run import generate_run
from tests import tiny_models
from tests.chaos.crowd import crowd
from tests.chaos.serving import asked, good_answer, served_alone
from tests.s3 import IS_LONG
from tests.serve_world import TOKENS, Site, serve_config, serving, slow
from tests.small_job import fake_engine, write_small_job
from tests.test_serve_engine import SAME, batch_rows, save_projector, tiny_job
from tests.update_world import serial_batch
from tests.waiting import wait_until

NUM_SWAPS = 100 if IS_LONG else 10
Ask = Callable[[Client, RequestKey], GenerationAnswer]


def all_answers(
    site: Site, keys: Sequence[RequestKey], ask: Ask, num_users: int = 8
) -> dict[RequestKey, GenerationAnswer]:
    """Every request asked for alone, by several users at once in a mixed order, so that what waits is grouped anew."""
    order = random.Random(5).sample(list(keys), len(keys))
    answers: dict[RequestKey, GenerationAnswer] = {}

    def user(part: Sequence[RequestKey]) -> None:
        with site.client() as client:
            for key in part:
                answers[key] = ask(client, key)

    with ThreadPoolExecutor(num_users) as pool:
        list(pool.map(user, [order[at::num_users] for at in range(num_users)]))
    return answers


def plainly(client: Client, key: RequestKey) -> GenerationAnswer:
    return client.generate(key.task, user_id=key.user_id, content_id=key.content_id, timeout_ms=60_000)


def streamed(client: Client, key: RequestKey) -> GenerationAnswer:
    *_, done = client.stream(key.task, user_id=key.user_id, content_id=key.content_id, timeout_ms=60_000)
    assert isinstance(done, GenerationAnswer)
    return done


# -- parity ------------------------------------------------------------------------------------------------------------


def test_texts_are_the_published_ones_looked_up_or_written_again(tmp_path: Path) -> None:
    """A batch's table, read as Delta; the same pairs from a service with that table and from one without any."""
    config, _ = write_small_job(tmp_path, num_users=170 if IS_LONG else 60, num_contents=12, per_user=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs.whole_run, "run_batch", serial_batch)
        generate_run(config, engine_factory=fake_engine)
    names = ["text", "status", "reason", "personalized", "arm", "fingerprint", "num_output_tokens", "prompt_id"]
    rows = DeltaTable(config.output.table_uri).to_pyarrow_table().to_pylist()
    wanted = {RequestKey(*(row[name] for name in RequestKey._fields)): [row[name] for name in names] for row in rows}
    assert len(wanted) >= (1000 if IS_LONG else 350)
    assert len({row[0] for row in wanted.values()}) > 10, "the control: texts differ"
    unpublished = config.model_copy(update={"output": OutputConfig(uri=str(tmp_path / "nothing"))})
    for source, job in (("published", config), ("generated", unpublished)):
        with serving(serve_config(job)) as site:
            answers = all_answers(site, list(wanted), plainly)
        assert {answer.source for answer in answers.values()} == {source}
        assert {key: [getattr(answer, name) for name in names] for key, answer in answers.items()} == wanted


@pytest.fixture(scope="module")
def letters() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        tiny_models.write_letters_only(patch)
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="module")
def tiny(letters: None, tmp_path_factory: pytest.TempPathFactory) -> JobConfig:
    return tiny_job(tmp_path_factory.mktemp("serving"), *((170, 12, 3) if IS_LONG else (30, 6, 2)))


def values_of(row: Generation | DeadLetter | GenerationAnswer) -> list[object]:
    return [getattr(row, name) for name in SAME]


@pytest.fixture(scope="module")
def wanted(tiny: JobConfig) -> dict[RequestKey, list[object]]:
    """The batch's rows of the tiny model."""
    return {key: values_of(row) for key, row in batch_rows(tiny).items()}


def test_a_real_model_s_texts_do_not_depend_on_who_else_asks(
    tiny: JobConfig, wanted: dict[RequestKey, list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, together = Call._give, Counter[int]()

    def give(self: Call, result: Result) -> None:
        together[self.num_jobs] += 1
        plain(self, result)

    monkeypatch.setattr(Call, "_give", give)
    assert len(wanted) >= (1000 if IS_LONG else 110)
    with serving(serve_config(tiny), None) as site:
        for ask in (plainly, streamed):
            answers = all_answers(site, list(wanted), ask)
            different = [key for key, answer in answers.items() if values_of(answer) != wanted[key]]
            assert not different, (len(different), different[:3])
            assert answers.keys() == wanted.keys()
    print(f"\n{2 * len(wanted)} texts, by how many were written at their end: {dict(sorted(together.items()))}")
    assert sum(together[size] for size in together if size > 2) > 10, "the control: texts were written together"


# -- swaps -------------------------------------------------------------------------------------------------------------


def test_no_answer_is_lost_or_mixed_while_projectors_are_swapped(
    tiny: JobConfig, wanted: dict[RequestKey, list[object]], tmp_path: Path
) -> None:
    """Of each projector the batch's rows are known: an answer must be, field by field, one of that which it names."""
    other_uri = str(tmp_path / "projector-2")
    save_projector(tiny, other_uri, seed=2)
    changed = tiny.model_copy(update={"projector": tiny.projector.model_copy(update={"uri": other_uri})})
    expected = {str(row[SAME.index("projector_id")]): wanted for row in wanted.values()}
    others = {key: values_of(row) for key, row in batch_rows(changed).items()}
    expected |= {str(row[SAME.index("projector_id")]): others for row in others.values()}
    assert len(expected) == 2
    own = [key for key in wanted if wanted[key][0] != others[key][0]]
    assert len(own) > len(wanted) // 3, "the control: a mixed answer would be seen"
    over, counts, errors = threading.Event(), Counter[str](), list[Exception]()

    def user(number: int) -> None:
        order = random.Random(number)
        with site.client() as client:
            while not over.is_set():
                key, ask = order.choice(own), order.choice([plainly, plainly, streamed])
                try:
                    answer = ask(client, key)
                    same = values_of(answer) == expected[answer.projector_id][key]
                    counts["right" if same else "mixed"] += 1
                    counts[answer.projector_id] += 1
                except ServiceError as error:
                    errors.append(error)

    with serving(serve_config(tiny), None) as site, ThreadPoolExecutor(6) as pool:
        users = [pool.submit(user, number) for number in range(6)]
        for turn in range(NUM_SWAPS):
            enough = counts["right"] + counts["mixed"] + len(errors) + 12
            assert asyncio.run(site.service.swap((other_uri, tiny.projector.uri)[turn % 2]))
            while counts["right"] + counts["mixed"] + len(errors) < enough:
                time.sleep(0.002)
        over.set()
        for one in users:
            one.result()
    print(f"\n{NUM_SWAPS} swaps: {dict(counts)}, {len(errors)} failed")
    assert not errors
    assert counts["mixed"] == 0
    assert counts["right"] >= 12 * NUM_SWAPS
    assert min(counts[projector_id] for projector_id in expected) > counts["right"] // 5, "both were served"


# -- overload ----------------------------------------------------------------------------------------------------------

MAX_ROWS, MAX_WAITING = 8, 2  # as the defaults: a quarter as many may wait as are written
OVERLOAD_S = 60.0 if IS_LONG else 2.0


def request_number(number: int) -> bytes:
    """One of many pairs, no two alike for a while."""
    return asked(f"user-{number % 200:04d}", f"content-{number // 200 % 6:03d}").data


def test_ten_times_too_much_is_refused_in_time_and_costs_no_memory(tmp_path: Path) -> None:
    sections = {"replica": {"max_waiting": MAX_WAITING}, "engine": {"max_rows": MAX_ROWS}}
    with served_alone(tmp_path, step_s=0.002, num_users=200, **sections) as running:
        times, counts = crowd(running.port, MAX_ROWS, OVERLOAD_S / 2, request_number)
        assert counts.keys() == {"200"}, "the control: as many users as rows are all served"
        capacity = counts["200"] / (OVERLOAD_S / 2)
        num_users = 10 * MAX_ROWS
        period_s = num_users / (10 * capacity)
        # What it keeps for good is there from now on.
        crowd(running.port, num_users, OVERLOAD_S / 4, request_number, period_s)
        before_bytes = running.rss_bytes
        crowded, found = crowd(running.port, num_users, OVERLOAD_S, request_number, period_s)
        grown_bytes = running.rss_bytes - before_bytes
        assert good_answer(running.port).status == 200, "and it is as before"
        longest = running.longest_queue()
    p99_ms, alone_ms = (float(np.percentile(seconds, 99)) * 1000 for seconds in (crowded, times))
    print(f"\n{capacity:.0f} texts/s alone; asked for {found.total() / OVERLOAD_S:.0f}/s: {dict(found)}")
    print(f"p99 of the accepted {p99_ms:.0f} ms, alone {alone_ms:.0f} ms; memory {grown_bytes / 2**20:+.1f} MiB")
    assert found.keys() == {"200", "429"}
    assert found["429"] > found["200"], "the control: it was far too much"
    assert MAX_ROWS < longest <= MAX_ROWS + MAX_WAITING
    assert grown_bytes < 32 * 2**20


def test_control_an_unbounded_queue_is_seen(tmp_path: Path) -> None:
    """The same crowd before a queue without a bound worth the name: nobody is refused, and it grows."""
    sections = {"replica": {"max_waiting": 10**6}, "engine": {"max_rows": MAX_ROWS}}
    with served_alone(tmp_path, step_s=0.002, num_users=200, **sections) as running:
        _, counts = crowd(running.port, 5 * MAX_ROWS, 0.5, request_number)
        assert counts.keys() == {"200"}
        assert running.longest_queue() > MAX_ROWS + MAX_WAITING


def test_deadlines_hold_in_a_crowd_and_leave_nothing_behind(tmp_path: Path) -> None:
    config, _ = write_small_job(tmp_path, num_users=200)
    late = list[int]()
    with serving(serve_config(config), slow(0.01)) as site:

        def user(number: int) -> None:
            with site.client(TOKENS[number % 2]) as client:
                for turn in range(4):
                    try:
                        client.generate(
                            "headline",
                            user_id=f"user-{3 + number % 7:04d}",
                            content_id="content-000",
                            timeout_ms=40 + turn,
                        )
                    except DeadlineError:
                        late.append(number)

        with ThreadPoolExecutor(12) as pool:
            list(pool.map(user, range(12)))
        wait_until(
            lambda: site.service.loop.num_waiting == site.service.loop.num_running == 0, "nothing runs", pause_s=0.002
        )
        assert late, "the control"
        with site.client() as client:
            assert plainly(client, RequestKey("user-0003", "content-001", "headline")).text

"""Requests that no client should send, over raw sockets to a service in a process of its own.

No answer is a 5xx, but the 504 to who asked for a text within no time; nothing without a token gets past the gate,
every refusal is a problem with a code, no user embedding comes back, and the process neither ends nor grows.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from e2p_ray.serve import gate
from e2p_ray.serve.messages import ProblemBody
from tests.chaos.fuzz import (
    CANARY,
    CANARY_MARKS,
    CLOSED,
    HANGS,
    MAX_BODY_BYTES,
    OPEN_PATHS,
    TOKEN,
    Answer,
    Fuzzed,
    Sender,
    fuzzed,
)
from tests.chaos.serving import asked, good_answer, served_alone
from tests.s3 import IS_LONG
from tests.serve_world import serve_config, serving
from tests.small_job import DIM, SPACE, write_small_job

NUM_REQUESTS, NUM_SENDERS = (100_000, 4) if IS_LONG else (2_000, 2)
_OF_THE_SERVER = (400, 413, 414, 431)  # what the HTTP server says itself, in plain text
_IMPATIENT = re.compile(rb'"timeout_ms":\s*\d{1,3}\b')  # or so in UTF-16 or 32: 504 says that none came in time
_NO_WEBSOCKET = 405  # the same, to what would become one by another method than GET


def violations(request: Fuzzed, answer: Answer) -> list[str]:
    """What is wrong with an answer."""
    said, found = answer.body.decode("utf-8", "replace") + answer.headers, []
    if answer.status >= 500 and not (answer.status == 504 and _IMPATIENT.search(request.data.replace(b"\x00", b""))):
        found.append(f"{answer.status}")
    upgrade = b"\r\nUpgrade: websocket\r\n" in request.data
    of_the_server = (*_OF_THE_SERVER, _NO_WEBSOCKET) if upgrade else _OF_THE_SERVER
    # To what would become a WebSocket and has a body in chunks, the server (uvicorn with websockets) says nothing; it
    # reaches no code of ours.
    if not upgrade and (answer.status == HANGS or (answer.status == CLOSED and request.whole)):
        found.append("no answer")
    if any(mark in said for mark in CANARY_MARKS):
        found.append("the user embedding came back")
    if TOKEN in said:
        found.append("a token came back")
    is_open = request.path.split("?")[0] in OPEN_PATHS
    if not request.known and not is_open and answer.status not in (CLOSED, 401, *of_the_server):
        found.append(f"{answer.status} without a token")
    if answer.status >= 400 and answer.status not in of_the_server and answer.body:
        found += [] if _is_problem(answer) else [f"{answer.status} is no problem"]
    return found


def _is_problem(answer: Answer) -> bool:
    try:
        problem = ProblemBody.model_validate_json(answer.body)
    except ValueError:
        return False
    return problem.status == answer.status and problem.type.endswith(problem.code)


def attack(port: int, seed: int, number: int) -> tuple[Counter[str], list[str]]:
    """Statuses of so many requests, and what was wrong, each with the seed that makes it again."""
    counts, wrong = Counter[str](), list[str]()
    sender = Sender(port)
    for at in range(number):
        request = fuzzed(random.Random(f"{seed} {at}"))
        answer = sender.send(request)
        counts[str(answer.status)] += 1
        counts["without a token"] += not request.known
        counts["canaries"] += any(mark.encode() in request.data for mark in CANARY_MARKS)
        wrong += [f"{seed} {at}: {what}" for what in violations(request, answer)]
    sender.close()
    return counts, wrong


def text_of(answer: Answer) -> str:
    assert answer.status == 200, answer.body
    return str(json.loads(answer.body)["text"])


def test_no_request_breaks_it_or_gets_past_its_gate(tmp_path: Path) -> None:
    limits = {"max_body_bytes": MAX_BODY_BYTES, "max_content_chars": 5000}
    with served_alone(tmp_path, api=limits) as running, ThreadPoolExecutor(NUM_SENDERS) as pool:
        before = text_of(good_answer(running.port))
        attack(running.port, -1, NUM_REQUESTS // 10)  # what it keeps for good is there from now on
        before_bytes = running.rss_bytes
        found = list(pool.map(lambda seed: attack(running.port, seed, NUM_REQUESTS // NUM_SENDERS), range(NUM_SENDERS)))
        grown_bytes = running.rss_bytes - before_bytes
        assert text_of(good_answer(running.port)) == before, "and it answers as before"
        log = running.said
    counts = sum((counts for counts, _ in found), Counter[str]())
    wrong = [what for _, part in found for what in part]
    print(f"\n{NUM_REQUESTS} requests: {dict(sorted(counts.items()))}; memory {grown_bytes / 2**20:+.1f} MiB")
    assert not wrong, (len(wrong), wrong[:10])
    assert "BREACH" not in log
    assert not [mark for mark in CANARY_MARKS if mark in log]
    assert TOKEN not in log
    assert "Traceback" not in log, log[log.index("Traceback") :][:3000]
    assert grown_bytes < 48 * 2**20
    for status in ("200", "400", "401", "404", "405", "413", "422"):
        assert counts[status] > NUM_REQUESTS // 1000, f"the control: some came as far as {status}"
    assert counts["canaries"] > NUM_REQUESTS // 20, "the control: there was something to be given away"
    assert counts["without a token"] > NUM_REQUESTS // 10


def test_control_a_service_without_a_gate_and_answers_that_tell_are_seen(tmp_path: Path) -> None:
    config, _ = write_small_job(tmp_path, num_users=12)
    open_to_all = serve_config(config, api={"tokens": [], "allow_anonymous": True, "max_body_bytes": MAX_BODY_BYTES})
    with serving(open_to_all) as site:
        _, wrong = attack(int(site.url.rpartition(":")[2]), 0, 200)
    assert [what for what in wrong if what.endswith("without a token")]
    request = Fuzzed(b"", "/v1/generations", True)
    echo = json.dumps({"embedding": [CANARY] * DIM, "embedding_space": SPACE}).encode()
    assert violations(request, Answer(200, "", b"{}")) == []
    assert len(violations(request, Answer(500, TOKEN, echo))) == 4
    assert violations(request, Answer(422, "", b'{"detail": "no"}')) == ["422 is no problem"]


def test_a_body_that_does_not_come_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "_BODY_TIMEOUT_S", 0.2)
    config, _ = write_small_job(tmp_path, num_users=12)
    whole = asked("user-0003", "content-001")
    with serving(serve_config(config)) as site:
        sender = Sender(int(site.url.rpartition(":")[2]))
        assert text_of(sender.send(whole)), "the control: the same request with its whole body"
        answer = sender.send(replace(whole, data=whole.data[:-10]))
        sender.close()
    assert answer.status == 408
    assert ProblemBody.model_validate_json(answer.body).code == "body_too_slow"


def test_nobody_gets_a_websocket(tmp_path: Path) -> None:
    config, _ = write_small_job(tmp_path, num_users=12)
    upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n"
    head = f"GET /v1/generations HTTP/1.1\r\nHost: x\r\n{upgrade}\r\n".format(key="dGhlIHNhbXBsZSBub25jZQ==")
    with serving(serve_config(config)) as site:
        sender = Sender(int(site.url.rpartition(":")[2]))
        assert sender.send(Fuzzed(head.encode(), "/v1/generations", known=False)).status in (403, 401)
        sender.close()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_seed_makes_the_same_requests(seed: int) -> None:
    first, again = ([fuzzed(random.Random(f"{seed} {at}")) for at in range(50)] for _ in range(2))
    assert first == again
    assert first != [fuzzed(random.Random(f"{seed + 1} {at}")) for at in range(50)]
    assert len({request.data for request in first}) > 40

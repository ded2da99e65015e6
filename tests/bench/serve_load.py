"""Users of `tests.bench.serve`: each a thread that asks, waits for its answer, and asks again."""

from __future__ import annotations

import http.client
import json
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.bench.serve_site import TOKEN

_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Answer:
    """One request's answer and its times."""

    at: int  # the request's place
    seconds: float
    first_token_s: float | None
    body: dict[str, Any]


@dataclass(frozen=True)
class Load:
    """What a level of users saw."""

    answers: list[Answer]
    wall_s: float

    def percentile_ms(self, percent: float) -> float:
        return float(np.percentile([answer.seconds for answer in self.answers], percent)) * 1000

    @property
    def first_token_ms(self) -> float:
        """The median."""
        times = [answer.first_token_s for answer in self.answers if answer.first_token_s is not None]
        return float(np.median(times)) * 1000

    @property
    def texts_per_s(self) -> float:
        return len(self.answers) / self.wall_s


def load(port: int, path: str, bodies: Sequence[dict[str, Any]], num_users: int) -> Load:
    """All requests by so many users at once. The connection is there before the first one."""
    waiting: queue.SimpleQueue[tuple[int, dict[str, Any]]] = queue.SimpleQueue()
    for item in enumerate(bodies):
        waiting.put(item)
    answers, errors = list[Answer](), list[BaseException]()
    ready = threading.Barrier(num_users + 1)

    def user() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
        try:
            connection.connect()
            ready.wait()
            while True:
                answers.append(ask(connection, path, *waiting.get_nowait()))
        except queue.Empty:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)
            ready.abort()
        finally:
            connection.close()

    threads = [threading.Thread(target=user) for _ in range(num_users)]
    for thread in threads:
        thread.start()
    ready.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    wall_s = time.perf_counter() - start
    if errors:
        raise errors[0]
    return Load(sorted(answers, key=lambda answer: answer.at), wall_s)


def ask(connection: http.client.HTTPConnection, path: str, at: int, body: dict[str, Any]) -> Answer:
    """One request; RuntimeError for anything but an answer."""
    data = json.dumps(body)
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    start = time.perf_counter()
    connection.request("POST", path, data, headers)
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {response.read()[:300]!r}")
    if not body.get("stream"):
        found = json.loads(response.read())
        return Answer(at, time.perf_counter() - start, None, found)
    first_s, found = None, dict[str, Any]()
    event = ""
    for line in response:
        name, _, value = line.decode().rstrip("\n").partition(": ")
        if name == "event":
            event = value
        elif name == "data" and event == "token":
            first_s = first_s or time.perf_counter() - start
        elif name == "data" and event == "done":
            found = json.loads(value)
        elif name == "data":
            raise RuntimeError(f"{event}: {value[:300]}")
    seconds = time.perf_counter() - start
    return Answer(at, seconds, first_s or seconds, found)

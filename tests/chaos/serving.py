"""A service with the fake engine in a process of its own, so that its memory and its log are its own, too."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.chaos.crowd import post
from tests.chaos.fuzz import TOKEN, Answer, Fuzzed, Sender
from tests.serve_world import TOKENS
from tests.small_job import write_small_job

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Running:
    """A service's process, its port, and what it has said."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def rss_bytes(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def longest_queue(self) -> int:
        """The most texts that waited and were written at once; ends the process, which says so then."""
        self.stop()
        return int(_said(self.log, r"LONGEST (\d+)"))

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


@contextmanager
def served_alone(
    folder: Path, *, step_s: float = 0.0, num_users: int = 12, **sections: dict[str, Any]
) -> Iterator[Running]:
    """tests.serve_process over the tables of a small job."""
    folder.mkdir(exist_ok=True)
    _, path = write_small_job(folder, num_users=num_users)
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    api = {"tokens": list(TOKENS), "rate_per_s": 1e6, "burst": 10**6}
    values |= sections | {"api": api | sections.get("api", {})}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    log = folder / "log"
    command = [sys.executable, "-m", "tests.serve_process", str(path), "--fake-step-s", str(step_s)]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream)
    try:
        over_s = time.monotonic() + 60
        while not (port := _said(log, r"PORT (\d+)")):
            assert process.poll() is None, log.read_text(encoding="utf-8")
            assert time.monotonic() < over_s
            time.sleep(0.05)
        yield Running(process, int(port), log)
    finally:
        process.terminate()
        process.wait(30)


def _said(log: Path, pattern: str) -> str:
    found = re.search(pattern, log.read_text(encoding="utf-8", errors="replace"))
    return found[1] if found else ""


def asked(user_id: str, content_id: str) -> Fuzzed:
    """A request that nothing is wrong with."""
    data = post(TOKEN, {"user_id": user_id, "content_id": content_id, "task": "headline"})
    return Fuzzed(data, "/v1/generations", known=True)


def good_answer(port: int) -> Answer:
    """What becomes of such a request."""
    sender = Sender(port)
    answer = sender.send(asked("user-0003", "content-001"))
    sender.close()
    return answer

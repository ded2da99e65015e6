"""One system in a process of its own: it loads, says so, and runs when told.

Standard library only: it is imported in vLLM's virtual environment too. The parent stops a worker's
processes while others are timed, so that nothing of it runs then.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

STAND_IN_ID = 259  # for the soft token, where a system takes ids only: a word that no content has
Run = Callable[[], dict[str, Any]]
# What is not timed: an empty cache, a new engine, and some rows of what is timed then. A process that was stopped for
# minutes finds its caches cold, and pages of its libraries gone.
Prepare = Callable[[], Run]
NUM_WARMING_ROWS = 16


def serve(load: Callable[[], Prepare], model_bytes: int) -> None:
    """Load, then answer every line of standard input with one run's seconds, memory and what the run itself returns.

    Memory is the process's peak resident size during runs, above what it held before loading and the weights' own
    bytes: caches, activations, copies, second layouts of weights, and the libraries that loading brought.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print belongs into the log
    before = _status_bytes("VmRSS")
    try:
        prepare = load()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        _say(answers, {"loaded_bytes": _status_bytes("VmRSS")})
        for _ in sys.stdin:
            run = prepare()
            wall, cpu = time.perf_counter(), time.process_time()
            answer = run()
            answer |= {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
            _say(answers, answer | {"peak_bytes": _status_bytes("VmHWM") - before - model_bytes})
    except Exception as error:
        _say(answers, {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"})
        raise


def _say(answers: Any, value: Mapping[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


def _status_bytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, f"/proc/self/status has no {name}"
    return int(found[1]) * 1024


class WorkerError(Exception):
    """A system failed; the message is its own."""


class Worker:
    """The parent's side: starts the process on `cores`, runs it, and keeps it stopped in between."""

    def __init__(
        self, command: Sequence[str], *, environment: Mapping[str, str], cores: Sequence[int], log: Path
    ) -> None:
        self._log = log
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env={**os.environ, **environment},
                text=True,
                process_group=0,  # stopped and continued as a whole; the kernel ends one that lost its parent
                preexec_fn=lambda: os.sched_setaffinity(0, cores),
            )
        try:
            self._answer()
        except WorkerError:
            self.stop()
            raise
        self._signal(signal.SIGSTOP)

    def run(self) -> dict[str, Any]:
        """One run. Raises WorkerError with what the system said."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        return answer

    def stop(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"it ended without a word; see {self._log}"}
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)

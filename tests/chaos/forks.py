"""Jobs in processes that are forked from one that has everything imported: a job starts in milliseconds.

`python -m tests.chaos.forks` is that process. It reads a line of JSON, a list of jobs, forks one child each, waits for
all, and answers with a line of exit codes (negative: the signal). It never opens a table or a socket itself: a
child of a process with running threads would hang in them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from e2p_ray.errors import IncompleteRunError
from jobs.cli import run_job
from tests.chaos.steps import Death, Step, Steps, publishing, read_steps

ROOT = Path(__file__).resolve().parent.parent.parent
_LONGEST_S = 120.0


@dataclass(frozen=True)
class Job:
    """A job's command line, and what is to happen to its process."""

    verb: str  # generate, publish, vacuum, purge
    config_path: str
    options: tuple[str, ...] = ()
    death: Death | None = None
    meets: bool = False  # the other jobs of this call, once each has looked at the table
    lag_s: float = 0.0  # what it waits after that
    real_engine: bool = False


@dataclass(frozen=True)
class Ended:
    """How a job ended: its exit code or the signal, what it said, which calls it made."""

    code: int
    said: str
    steps: tuple[Step, ...] = field(repr=False)

    @property
    def was_killed(self) -> bool:
        return self.code in (-signal.SIGKILL, -signal.SIGALRM)


class Forks:
    """The warm process, from the side of the tests. Use it in a `with`."""

    def __init__(self, folder: Path, *imports: str) -> None:
        self._folder, self._count, self._stack = folder, 0, ExitStack()
        folder.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("E2P_")}
        log = self._stack.enter_context((folder / "warm.log").open("wb"))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.forks", *imports],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
        self._stack.enter_context(self._process)
        self._stack.callback(self._process.kill)

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, job: Job) -> Ended:
        """One job, to its end."""
        return self.run_together([job])[0]

    def run_together(self, jobs: Sequence[Job]) -> list[Ended]:
        """Some jobs at once."""
        places = [str(self._folder / f"{self._count + number}") for number in range(len(jobs))]
        self._count += len(jobs)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = [asdict(job) | {"place": place} for job, place in zip(jobs, places, strict=True)]
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, (self._folder / "warm.log").read_text(encoding="utf-8")[-4000:]
        return [
            Ended(code, Path(f"{place}.log").read_text(encoding="utf-8"), tuple(read_steps(f"{place}.trace")))
            for code, place in zip(json.loads(answer), places, strict=True)
        ]


def _serve() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        barrier = get_context("fork").Barrier(len(asked))
        pids = [_fork(values, barrier) for values in asked]
        print(json.dumps([_wait(pid) for pid in pids]), flush=True)


def _fork(values: dict[str, Any], barrier: Barrier) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        place, death = values.pop("place"), values.pop("death")
        out = os.open(f"{place}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        job = Job(**values, death=Death(**death) if death else None)
        code = _call(job, f"{place}.trace", barrier)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001 - a child never comes back into the parent's loop
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(99)
    os._exit(code)


def _wait(pid: int) -> int:
    deadline_s = time.monotonic() + _LONGEST_S
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline_s:
            os.kill(pid, signal.SIGSEGV)  # no signal that a test asks for
        time.sleep(0.002)


def _call(job: Job, trace: str, barrier: Barrier) -> int:
    """The job itself, in the child."""
    if job.meets:
        _meet_at_the_table(barrier, job.lag_s)
    Steps(trace, job.death).watch()
    return run_job(_job_of(job), ["--config", job.config_path, *job.options])


def _job_of(job: Job) -> Any:
    """The real job; of `generate`, with the workers in this process and, unless asked for, without a model."""
    import jobs.generate
    import jobs.publish
    import jobs.purge
    import jobs.vacuum
    import jobs.whole_run
    from tests.small_job import fake_engine

    if job.verb != "generate":
        return {"publish": jobs.publish.JOB, "purge": jobs.purge.JOB, "vacuum": jobs.vacuum.JOB}[job.verb]
    vars(jobs.whole_run)["run_batch"] = _run_here
    factory = None if job.real_engine else fake_engine

    def generate(config: Any, options: argparse.Namespace) -> None:
        jobs.whole_run.generate_run(
            config, publish_it=not options.no_publish, full=options.full, engine_factory=factory
        )

    return replace(jobs.generate.JOB, call=generate)


def _run_here(*arguments: Any, **options: Any) -> Any:
    """`run_batch` with one worker, in this process; a shard that fails ends it, as it does after the last attempt."""
    from tests.update_world import serial_batch

    try:
        return serial_batch(*arguments, **options)
    except AssertionError as error:
        raise IncompleteRunError(f"a shard is left: {error}") from error


def _meet_at_the_table(barrier: Barrier, lag_s: float) -> None:
    """All publishers go on together once each has opened the table as it is before any of them."""
    module = publishing()
    open_table, is_first = module.open_table, [True]

    def meeting(*arguments: Any) -> Any:
        table = open_table(*arguments)
        if is_first.pop() if is_first else False:
            barrier.wait(60)
            time.sleep(lag_s)
        return table

    module.open_table = meeting


if __name__ == "__main__":
    import importlib

    for name in ("jobs.generate", "jobs.publish", "jobs.purge", "jobs.vacuum", "tests.update_world", *sys.argv[1:]):
        importlib.import_module(name)
    _serve()

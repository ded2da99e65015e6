"""What all jobs have in common: options, one readable message for an error, exit codes."""

from __future__ import annotations

import argparse
import atexit
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NoReturn, TypeVar

from e2p_ray.config import Config, load_config
from e2p_ray.errors import E2PError
from jobs.streams import put

C = TypeVar("C", bound=Config)

_INTERRUPTED, _TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
_UNEXPECTED = 1
_RESUME = "interrupted. What is committed stays; run the same command again and it resumes"


@dataclass(frozen=True)
class Job(Generic[C]):
    """A verb: its name, what --help says of it, its configuration, its own options, the call, and what Ctrl-C says."""

    prog: str
    description: str
    config: type[C]
    call: Callable[[C, argparse.Namespace], None]
    add_options: Callable[[argparse.ArgumentParser], None] | None = None
    on_interrupt: str = _RESUME


def run_job(job: Job[C], argv: Sequence[str] | None = None) -> int:
    """Parse the options and make the call; the exit code is the error's (130 for Ctrl-C, 143 for SIGTERM)."""
    return guarded(lambda: _call(job, argv), job.prog, on_interrupt=job.on_interrupt)


def main(job: Job[C]) -> NoReturn:
    """Run a job as a process, which ends with its exit code."""
    end(run_job(job))


def end(code: int) -> NoReturn:
    """End this process without taking apart what it has imported: 0.7 s of a job's end (2026-11-30, a Zen 3 core).

    What is registered for the end is done. Threads that Python waits for are waited for, in the usual way.
    """
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        sys.exit(code)
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as error:
        code = code or _UNEXPECTED
        if not isinstance(error, BrokenPipeError):  # the reader of a pipe left: not our trouble
            put(sys.stderr, f"what was printed is not whole: {error}\n")
    os._exit(code)


def guarded(call: Callable[[], None], prog: str, *, on_interrupt: str = _RESUME) -> int:
    """Make a call and turn what it raises into one message on stderr and an exit code."""
    try:
        call()
    except KeyboardInterrupt:
        put(sys.stderr, f"\n{prog}: {on_interrupt}\n")
        return _INTERRUPTED
    except SystemExit as error:
        if error.code != signal.SIGTERM:
            raise
        put(sys.stderr, f"{prog}: {on_interrupt}\n")  # by the handler that Ray sets (2.60)
        return _TERMINATED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of a pipe left: not our trouble
        return _UNEXPECTED
    except E2PError as error:
        _say(prog, str(error))
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - the last line of defence: a message instead of a page of frames
        _say(prog, f"unexpected {type(error).__name__}: {error}\nSet E2P_DEBUG=1 to see where it comes from")
        return _UNEXPECTED
    return 0


def _say(prog: str, message: str) -> None:
    if os.environ.get("E2P_DEBUG"):
        traceback.print_exc()
    put(sys.stderr, f"{prog}: {message}\n")


def _call(job: Job[C], argv: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(prog=job.prog, usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    options_help = ""
    if job.add_options is not None:
        job.add_options(parser)
        options_help = parser.format_help()
    options, rest = parser.parse_known_args(argv)
    config = load_config(job.config, rest, prog=job.prog, description=job.description, options_help=options_help)
    options.words = rest  # those of the configuration, for who hands them on
    job.call(config, options)

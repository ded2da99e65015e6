"""Every call of storage and of Delta that a process makes, counted, and the one at which it has to die.

A process dies by SIGKILL of itself: nothing of it runs after that, as under the kernel's or a scheduler's kill.
"""

from __future__ import annotations

import importlib
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deltalake
from deltalake import DeltaTable

from e2p_ray.storage.local import LocalPlace
from e2p_ray.storage.s3 import S3Place

HOWS = ("before", "after", "torn", "within")
"""before, after: of the call; torn: with half of a local file written, under the name that it has until it is whole;
within: some microseconds after the call began, wherever that is, by an alarm that nothing catches."""

_PLACE_CALLS = ("read", "read_range", "put", "put_if_absent", "info", "delete", "list_below", "list_dated")
_DELTA_CALLS = ("__init__", "create_write_transaction", "history", "get_add_actions", "restore")
_CREATE = "create_table_with_add_actions"


@dataclass(frozen=True)
class Step:
    """One call of an uninterrupted process."""

    number: int
    call: str  # put, read ...; of Delta with its name before it
    where: str  # the object, or the table

    @property
    def writes(self) -> bool:
        return self.call in ("put", "put_if_absent", "delete") or self.commits

    @property
    def commits(self) -> bool:
        """Whether it is the one that changes what readers see."""
        return self.call in (f"delta.{_CREATE}", "delta.create_write_transaction")

    @property
    def stage(self) -> str:
        """What part of a job it belongs to."""
        if self.call.startswith("delta."):
            return "commit" if self.commits else "table"
        stages = {"/audit": "audit", "/report": "report", "/in/": "inputs", "/markers": "markers", "/run.json": "run"}
        stages |= {"/plans": "plan", "/updates": "update", "/dead_letters": "dead letters", "/generations": "data"}
        return next((name for part, name in stages.items() if part in self.where), "others")


@dataclass(frozen=True)
class Death:
    """Where a process ends."""

    step: int
    how: str = "before"
    stage: str = ""  # counts only the writing calls of this stage; empty: every call
    delay_us: int = 0  # of "within"

    def is_at(self, step: Step, num_of_stage: int) -> bool:
        """Whether this is the call; so many of its stage wrote before it."""
        if not self.stage:
            return step.number == self.step
        return step.writes and step.stage == self.stage and num_of_stage == self.step


class Steps:
    """Counts the calls of this process, writes each down as it begins, and ends the process at one of them."""

    def __init__(self, trace: str, death: Death | None) -> None:
        self._trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._death = death
        self._count = 0
        self._num_of_stage = Counter[str]()
        self._lock = threading.Lock()
        self._inside = threading.local()

    def watch(self) -> None:
        """From now on."""
        for place in (LocalPlace, S3Place):
            for name in _PLACE_CALLS:
                self._wrap(place, name, name)
        for name in _DELTA_CALLS:
            self._wrap(DeltaTable, name, f"delta.{name}")
        self._wrap(publishing(), _CREATE, f"delta.{_CREATE}")
        fsync = os.fsync

        def torn_or_synced(fd: Any) -> None:
            self._tear(fd)
            fsync(fd)

        os.fsync = torn_or_synced

    def _wrap(self, owner: Any, name: str, call: str) -> None:
        inner = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            return self._around(call, arguments, lambda: inner(*arguments, **options))

        setattr(owner, name, counted)

    def _around(self, call: str, arguments: tuple[Any, ...], inner: Callable[[], Any]) -> Any:
        if getattr(self._inside, "now", False):  # a call within a call is a part of it
            return inner()
        death = self._begun(call, _where(arguments))
        how = death.how if death else ""
        if how == "before":
            die()
        if death is not None and how == "within":
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, max(death.delay_us, 1) / 1e6)
        self._inside.now, self._inside.tearing = True, how == "torn"
        try:
            return inner()
        finally:
            self._inside.now = self._inside.tearing = False
            if how in ("after", "torn"):  # a call that wrote no file was not torn
                die()

    def _begun(self, call: str, where: str) -> Death | None:
        """Count and write down a call; the death, if it is this one's."""
        with self._lock:
            step = Step(self._count, call, where)
            self._count += 1
            num_of_stage = self._num_of_stage[step.stage]
            self._num_of_stage[step.stage] += step.writes
        os.write(self._trace, f"{step.number}\t{call}\t{where}\n".encode())
        return self._death if self._death and self._death.is_at(step, num_of_stage) else None

    def _tear(self, descriptor: Any) -> None:
        if getattr(self._inside, "tearing", False):
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            die()


def publishing() -> Any:
    """The module of `publish`: the package has the function under this name."""
    return importlib.import_module("e2p_ray.commit.publish")


def die() -> None:
    """End this process as the kernel does."""
    os.kill(os.getpid(), signal.SIGKILL)


def read_steps(trace: str) -> list[Step]:
    """What a process wrote down, in the order of the calls."""
    with open(trace, encoding="utf-8") as lines:
        parts = (line.rstrip("\n").split("\t") for line in lines)
        return sorted((Step(int(number), call, where) for number, call, where in parts), key=lambda step: step.number)


def _where(arguments: tuple[Any, ...]) -> str:
    """The object that a call is about, or the table."""
    for argument in arguments[1:] or arguments:
        uri = getattr(argument, "uri", argument)
        if isinstance(uri, str):
            return uri
    first = arguments[0] if arguments else None
    return str(first.table_uri) if isinstance(first, deltalake.DeltaTable) and hasattr(first, "_table") else ""

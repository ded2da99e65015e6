"""The model's own thread: takes the texts that wait, as many at once as fit, writes them together, hands them out."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence, Set
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from e2p_ray.engine.contract import Listener
from e2p_ray.generate import UNPERSONALIZED_USER_ID
from e2p_ray.loaded import LoadedGenerator
from e2p_ray.schema import Content, DeadLetter, Generation, Group, Request, RequestKey
from e2p_ray.serve.pauses import Pauses, interrupted
from e2p_ray.serve.problems import queue_full

T = TypeVar("T")
Result = Generation | DeadLetter

# A model that was at work this long ago is busy: those whose texts it gave out then are about to ask again. Longer than
# a client's way there and back, shorter than anybody would notice.
_BUSY_S = 0.05
# How long a busy model waits for the next text, and for all of them, as shares of what a call takes: who misses a call
# waits for the whole of it, so that four users who ask in turns of one and three wait twice as long as they need to.
_GAP_SHARE, _GATHER_SHARE = 0.03, 0.1
_MAX_RETRY_AFTER_S = 30


@dataclass(frozen=True, eq=False)
class Job:
    """One text that is wanted. Cancelling its future takes it out of the queue, or out of the running wave."""

    loaded: LoadedGenerator
    content: Content
    task: str
    request: Request
    fingerprint: str
    on_text: Callable[[str], None] | None = None  # all that is written so far; called on the model's thread
    future: Future[Result] = field(default_factory=Future)


@dataclass(frozen=True, eq=False)
class _Errand:
    """Something else for the model's thread."""

    call: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.call())
        except BaseException as error:  # noqa: BLE001 - it belongs to who waits for the result
            self.future.set_exception(error)


class ModelLoop:
    """A thread that alone touches the engines, and the bounded queue before it.

    What waits together is written together, grouped by content. Idle, it starts with the first request at once; busy,
    it lets others gather for `max_wait_ms`, or for a small part of what a call takes where that is longer.
    What is behind, a batch's shards, is done while nothing else waits.
    """

    def __init__(self, *, max_rows: int, max_waiting: int, max_wait_ms: float) -> None:
        self._max_rows, self._max_waiting, self._max_wait_s = max_rows, max_waiting, max_wait_ms / 1000
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._errands: deque[_Errand] = deque()
        self._behind: deque[_Errand] = deque()
        self._running = 0
        self._closed = False
        self._last_end_s = -math.inf
        self._call_s = 0.1  # what a call takes, smoothed: how long to wait is said by it
        self._num_cancelled = 0
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Texts in the queue."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Texts that are being written."""
        return self._running

    def submit(self, jobs: Sequence[Job]) -> None:
        """All of them into the queue, or ProblemError 429 and none."""
        with self._changed:
            if len(self._waiting) + len(jobs) > self._max_waiting:
                rounds = 1 + len(self._waiting) / self._max_rows
                raise queue_full(min(max(1, math.ceil(rounds * self._call_s)), _MAX_RETRY_AFTER_S))
            self._waiting += jobs
            self._changed.notify_all()
        for job in jobs:
            job.future.add_done_callback(lambda future, job=job: self._forget(future, job))  # type: ignore[misc]

    def run(self, call: Callable[[], T]) -> Future[T]:
        """Make a call on the model's thread, before what waits."""
        errand = _Errand(call)
        with self._changed:
            self._errands.append(errand)
            self._changed.notify_all()
        return errand.future

    def run_behind(self, call: Callable[[Pauses], T]) -> Future[T]:
        """Make a call on the model's thread when nothing else waits.

        An engine that is followed by what the call is given lets others go first between its steps.
        """
        errand = _Errand(lambda: call(Pauses(self._let_others)))
        with self._changed:
            if self._closed:
                errand.future.set_exception(interrupted())
            else:
                self._behind.append(errand)
            self._changed.notify_all()
        return errand.future

    def close(self, timeout_s: float | None = None) -> None:
        """Finish what waits, then end; who still waits after `timeout_s` is cancelled."""
        with self._changed:
            self._closed = True
            behind = [*self._behind]
            self._behind.clear()
            self._changed.notify_all()
        for errand in behind:
            if errand.future.set_running_or_notify_cancel():
                errand.future.set_exception(interrupted())
        self._thread.join(timeout_s)
        with self._changed:
            left = [*self._waiting]
        for job in left:
            job.future.cancel()

    def _forget(self, future: Future[Result], job: Job) -> None:
        if future.cancelled():
            with self._changed:
                self._num_cancelled += 1
                with suppress(ValueError):
                    self._waiting.remove(job)

    # -- on the model's thread ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._errands or self._behind or self._closed)
                behind = self._behind.popleft() if self._behind and not self._others_wait else None
                if behind is None and not self._others_wait and self._closed:
                    return
            if behind is not None:
                behind.run()
            else:
                self._do_next()

    @property
    def _others_wait(self) -> bool:
        """Whether there is anything that goes before what is behind."""
        return bool(self._waiting or self._errands)

    def _let_others(self) -> None:
        """Between two steps of what is behind."""
        while self._others_wait:
            self._do_next()
        if self._closed:
            raise interrupted()

    def _do_next(self) -> None:
        """One errand, or as many texts as are written together."""
        with self._changed:
            errand, jobs = self._errands.popleft() if self._errands else None, list[Job]()
            if errand is None:
                if time.monotonic() - self._last_end_s < _BUSY_S:
                    self._gather()
                jobs = self._take()
                self._running = len(jobs)
        if errand is not None:
            errand.run()
        elif jobs:
            began_s = time.monotonic()
            self._write(jobs)
            self._running = 0
            self._last_end_s = time.monotonic()
            self._call_s += 0.2 * (self._last_end_s - began_s - self._call_s)

    def _gather(self) -> None:
        """Let others come, as long as they keep coming; the lock is held."""
        gap_s = max(self._max_wait_s, _GAP_SHARE * self._call_s)
        over_s = time.monotonic() + max(self._max_wait_s, _GATHER_SHARE * self._call_s)
        while len(self._waiting) < self._max_rows and (left_s := over_s - time.monotonic()) > 0:
            if not self._changed.wait(min(gap_s, left_s)):
                return

    def _take(self) -> list[Job]:
        """As many jobs as may be written in one call, in their order; the others stay.

        One call has one version of everything: of the generator, of each content, of each request.
        """
        taken, left = list[Job](), deque[Job]()
        contents: dict[str, Content] = {}
        fingerprints: dict[RequestKey, str] = {}
        for job in self._waiting:
            content = contents.get(job.content.content_id, job.content)
            same = (not taken or job.loaded is taken[0].loaded) and content == job.content
            same = same and fingerprints.get(job.request.key, job.fingerprint) == job.fingerprint
            if not same or len(taken) >= self._max_rows:
                left.append(job)
                continue
            taken.append(job)
            contents[job.content.content_id] = job.content
            fingerprints[job.request.key] = job.fingerprint
        self._waiting = left
        return taken

    def _write(self, jobs: list[Job]) -> None:
        """Write these; where a call fails, its halves are tried, so that it fails for those alone who make it fail."""
        jobs = [job for job in jobs if not job.future.cancelled()]
        if not jobs:
            return
        call = _Call(jobs, lambda: self._num_cancelled)
        try:
            with jobs[0].loaded.followed_by(call):
                rows, dead_letters = jobs[0].loaded.generate(call.groups())
        except Exception as error:  # noqa: BLE001 - one request's trouble must not end the thread
            middle = len(jobs) // 2
            if middle:
                self._write(jobs[:middle])
                self._write(jobs[middle:])
            elif jobs[0].future.set_running_or_notify_cancel():
                jobs[0].future.set_exception(error)
            return
        results: list[Result] = [*rows, *dead_letters]
        for result in results:
            for job in call.jobs[result.key]:
                if job.future.set_running_or_notify_cancel():
                    job.future.set_result(result)


class _Call(Listener):
    """One call of the generator: its jobs by request, those of equal requests together."""

    def __init__(self, jobs: Sequence[Job], num_cancelled: Callable[[], int]) -> None:
        self.jobs: dict[RequestKey, list[Job]] = {}
        for job in jobs:
            self.jobs.setdefault(job.request.key, []).append(job)
        self._streamed = {key for key, same in self.jobs.items() if any(job.on_text for job in same)}
        self._num_cancelled, self._seen = num_cancelled, -1
        self._gone: Set[RequestKey] = frozenset()

    def groups(self) -> list[Group]:
        """Each content and task with its requests."""
        found: dict[tuple[str, str], list[Job]] = {}
        for same in self.jobs.values():
            found.setdefault((same[0].content.content_id, same[0].task), []).append(same[0])
        return [Group(jobs[0].content, jobs[0].task, tuple(job.request for job in jobs)) for jobs in found.values()]

    def between_steps(self) -> None:
        """Nothing else to do."""

    def cancelled(self) -> Set[RequestKey]:
        """Requests whose every client left, and a content's unpersonalised text when all of its clients did."""
        if self._seen != (now := self._num_cancelled()):
            self._seen = now
            gone = {key for key, same in self.jobs.items() if all(job.future.cancelled() for job in same)}
            staying = {key[1:] for key in self.jobs.keys() - gone}
            shared = {RequestKey(UNPERSONALIZED_USER_ID, *key[1:]) for key in gone if key[1:] not in staying}
            self._gone = gone | shared
        return self._gone

    def streamed(self) -> Set[RequestKey]:
        """See `Listener.streamed`."""
        return self._streamed

    def on_text(self, key: RequestKey, text: str) -> None:
        """See `Listener.on_text`."""
        for job in self.jobs[key]:
            if job.on_text is not None and not job.future.cancelled():
                job.on_text(text)

"""One call of the generator for all who wait for texts, which later requests may join."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from e2p_ray.engine.contract import Listener
from e2p_ray.generate import MANY_REQUESTS
from e2p_ray.loaded import LoadedGenerator
from e2p_ray.results import UNPERSONALIZED_USER_ID, Result
from e2p_ray.schema import Content, DeadLetter, ErrorCode, Group, Request, RequestKey


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


class Queue(Protocol):
    """Where a call's jobs come from. All but the count is for the model's thread."""

    num_cancelled: int  # jobs that somebody has left, so far

    def take(self, call: Call) -> list[Job]:
        """Jobs that the call admits; they have been added to it."""
        ...

    def run_errands(self) -> None:
        """What is to be done before further texts: errands, and one call that scores if it is its turn."""
        ...

    def took(self, seconds_s: float) -> None:
        """A text took so long."""
        ...


class Call(Listener):
    """One call of the generator, which later requests may join: its jobs by request, equal requests together.

    At any time it has one version of everything: of the generator, of each content, of each request.
    """

    def __init__(self, queue: Queue, max_rows: int, only: Sequence[Job] | None) -> None:
        self._queue, self._max_rows, self._only = queue, max_rows, only
        self.loaded: LoadedGenerator | None = None  # that of its first job
        self._jobs: dict[RequestKey, list[Job]] = {}
        self._began_s: dict[RequestKey, float] = {}
        self._streamed: set[RequestKey] = set()
        # Contents and tasks whose unpersonalised text is asked for before anybody needs it.
        self._ahead: set[tuple[str, str]] = set()
        self._seen = -1  # how many had been cancelled when `_gone` was found
        self._gone: Set[RequestKey] = frozenset()

    @property
    def num_jobs(self) -> int:
        """Texts that are being written, with those that are one text for several."""
        return sum(len(same) for same in [*self._jobs.values()])

    def num_leaving(self, since_s: float) -> int:
        """Texts that have been written since then or longer, or that nobody waits for any more."""
        return sum(self._began_s.get(key, since_s) <= since_s or _is_left(same) for key, same in [*self._jobs.items()])

    def run(self) -> None:
        """Write until nobody is left."""
        first = self._next()
        if self.loaded is not None:
            with self.loaded.followed_by(self):
                self.loaded.follow(self._groups(first), self._give)

    def left(self) -> list[Job]:
        """Who has no text yet."""
        return [job for same in self._jobs.values() for job in same]

    def admits(self, job: Job) -> bool:
        """Whether a job may be written with the others."""
        if self.loaded is not None and job.loaded is not self.loaded:
            return False
        if same := self._jobs.get(job.request.key):
            return same[0].fingerprint == job.fingerprint and same[0].content == job.content
        others = (same[0].content for same in self._jobs.values())
        same_id = (content for content in others if content.content_id == job.content.content_id)
        return len(self._jobs) < self._max_rows and next(same_id, job.content) == job.content

    def add(self, job: Job) -> None:
        """A job comes in."""
        key, self.loaded, self._seen = job.request.key, job.loaded, -1
        if key not in self._jobs:
            self._jobs[key], self._began_s[key] = [], time.monotonic()
        self._jobs[key].append(job)
        if job.on_text is not None:
            self._streamed.add(key)

    def _next(self) -> list[Group]:
        """Each content and task of jobs that come in now, with its requests."""
        known = self._jobs.keys() - ()
        if self._only is None:
            jobs = self._queue.take(self)
        else:
            jobs, self._only = [job for job in self._only if not job.future.cancelled()], ()
            for job in jobs:
                self.add(job)
        new = {job.request.key: job for job in jobs if job.request.key not in known}
        found: dict[tuple[str, str], list[Job]] = {}
        for job in new.values():
            found.setdefault((job.content.content_id, job.task), []).append(job)
        self._ahead.update(pair for pair, jobs in found.items() if len(jobs) >= MANY_REQUESTS)
        return [Group(jobs[0].content, jobs[0].task, tuple(job.request for job in jobs)) for jobs in found.values()]

    def _groups(self, groups: list[Group]) -> Iterator[Group | None]:
        while groups or self._jobs:
            yield from groups
            groups = self._next()
            if not groups and self._jobs:
                yield None

    def _give(self, result: Result) -> None:
        key = result.key
        jobs, self._seen = self._jobs.pop(key), -1
        self._streamed.discard(key)
        took_s = time.monotonic() - self._began_s.pop(key)
        waiting = [job for job in jobs if job.future.set_running_or_notify_cancel()]
        if waiting and not (isinstance(result, DeadLetter) and result.error_code is ErrorCode.NON_FINITE_LOGITS):
            self._queue.took(took_s)  # a model that gives NaN has no success
        for job in waiting:
            job.future.set_result(result)

    # -- between two steps -------------------------------------------------------------------------------------------

    def between_steps(self) -> None:
        """Errands go before texts, and scoring takes turns with them."""
        self._queue.run_errands()

    def cancelled(self) -> Set[RequestKey]:
        """Requests whose every client left, and a content's unpersonalised text when all of its clients did.

        Once the call has no job left, nobody can need one any more: it would only keep those who come from beginning.
        """
        if self._seen != (now := self._queue.num_cancelled):
            self._seen = now
            gone = {key for key, same in self._jobs.items() if _is_left(same)}
            staying = {key[1:] for key in self._jobs.keys() - gone}
            shared = {RequestKey(UNPERSONALIZED_USER_ID, *key[1:]) for key in gone if key[1:] not in staying}
            if not self._jobs:
                shared = {RequestKey(UNPERSONALIZED_USER_ID, *pair) for pair in self._ahead}
            self._gone = gone | shared
        return self._gone

    def streamed(self) -> Set[RequestKey]:
        """See `Listener.streamed`."""
        return self._streamed

    def on_text(self, key: RequestKey, text: str) -> None:
        """See `Listener.on_text`."""
        for job in self._jobs[key]:
            if job.on_text is not None and not job.future.cancelled():
                job.on_text(text)


def _is_left(same: Sequence[Job]) -> bool:
    """Whether nobody waits for the text of these jobs any more."""
    return all(job.future.cancelled() for job in same)

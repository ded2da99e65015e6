"""The model's own thread: writes what waits, lets later requests join, hands texts out."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from e2p_ray.results import Result
from e2p_ray.schema import RequestKey
from e2p_ray.serve.call import Call, Job
from e2p_ray.serve.pauses import Pauses, interrupted
from e2p_ray.serve.problems import ProblemError, ended, queue_full

T = TypeVar("T")

_MAX_RETRY_AFTER_S = 30
# In a crowd nobody waits longer than about this share of what a text takes, and it is a crowd for so many texts' time
# after each refusal. Ten times too many requests for two places on one core, p99 of the accepted 921 to 1,263 ms
# without, 717 to 764 with a quarter, 602 to 703 with a tenth; as many texts a second (2026-11-22).
_CROWDED_WAIT = 0.1
_CROWDED_TEXTS = 4.0
_USUAL_TEXT_S = 0.1  # before there was any
# After so many requests, about two contents at least, at which the model failed one by one with no success between, it
# is to blame and not a request: a GPU that had an error has it for ever.
_MAX_FAILED = 10


@dataclass(frozen=True, eq=False)
class _Errand:
    """Something else for the model's thread."""

    call: Callable[[], Any]
    num_texts: int = 0  # that it scores
    key: RequestKey | None = None  # of one of its texts, where the model makes or scores such
    future: Future[Any] = field(default_factory=Future)

    def run(self) -> None:
        """Make the call, if somebody waits for it."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.call())
        except BaseException as error:  # noqa: BLE001 - it belongs to who waits for the result
            self.future.set_exception(error)


class ModelLoop:
    """A thread that alone touches the engines, and the bounded queue before it.

    Idle, it starts with the first request at once. Who comes later joins what is being written, between two steps of
    the engine, while there is room; behind one that cannot join, nobody does. Scoring takes turns with writing, between
    two steps: each gets as much time. What is behind, a batch's shards, is done while nothing else waits.
    """

    def __init__(self, *, max_rows: int, max_waiting: int) -> None:
        self._max_rows, self._max_waiting = max_rows, max_waiting
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._errands: deque[_Errand] = deque()
        self._scores: deque[_Errand] = deque()
        self._behind: deque[_Errand] = deque()
        self._call: Call | None = None
        self._closed = False
        self._is_scoring = False
        self._score_s, self._next_score_s = 0.0, -math.inf  # what the last call took; when it is the next one's turn
        self._text_s: float | None = None  # what a text takes, smoothed
        self._refused_s = -math.inf  # when somebody was, at last
        self._failed = deque[RequestKey](maxlen=_MAX_FAILED)  # at which the model did since its last success
        self.num_cancelled = 0  # jobs that their clients left
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread is there and still makes texts; where not, its process is of no use any more."""
        fails = len(self._failed) == _MAX_FAILED and len({key.content_id for key in [*self._failed]}) > 1
        return self._thread.is_alive() and not fails

    @property
    def num_waiting(self) -> int:
        """Texts in the queue."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Texts that are being written."""
        call = self._call
        return 0 if call is None else call.num_jobs

    def submit(self, jobs: Sequence[Job]) -> None:
        """All of them into the queue, or ProblemError 429 and none."""
        with self._changed:
            if not self._thread.is_alive():
                raise ended()
            if not self.may_wait(len(jobs)):
                raise self.refuse()
            self._waiting += jobs
            self._changed.notify_all()
        for job in jobs:
            job.future.add_done_callback(lambda future, job=job: self._forget(future, job))  # type: ignore[misc]

    def may_wait(self, num_texts: int = 1) -> bool:
        """Whether so many more texts may. A batch of more than may wait does while nobody else waits."""
        if num_texts > max(self._max_waiting, 1) and not self._waiting:
            return True
        free = max(self._max_rows - self.num_running, 0)  # places that the first who wait are about to take
        num_before = len(self._waiting) - free
        fits = num_before + num_texts <= self._max_waiting
        return fits and (num_texts > 1 or num_before < 0 or self._waits_shortly(num_before))

    def refuse(self) -> ProblemError:
        """The 429 of somebody who may not wait; for a while it is a crowd."""
        self._refused_s = time.monotonic()
        rounds = 1 + len(self._waiting) / self._max_rows
        return _come_again(rounds * (self._text_s or _USUAL_TEXT_S))

    def _waits_shortly(self, num_before: int) -> bool:
        """Whether one more, behind so many who wait for places, may be expected to wait no longer than is right now.

        Who comes just after many texts began together waits for a whole text, however few wait before him. A burst
        may do that; where more come all the time than can be served, somebody else comes when a place is free.
        """
        now_s, call, text_s = time.monotonic(), self._call, self._text_s
        if call is None or text_s is None or now_s > self._refused_s + _CROWDED_TEXTS * text_s:
            return True
        return call.num_leaving(now_s - (1 - _CROWDED_WAIT) * text_s) > num_before

    def run(self, call: Callable[[], T]) -> Future[T]:
        """Make a call on the model's thread, before what waits."""
        errand = _Errand(call)
        with self._changed:
            if not self._thread.is_alive():
                raise ended()
            self._errands.append(errand)
            self._changed.notify_all()
        return errand.future

    def score(self, call: Callable[[], T], num_texts: int, key: RequestKey) -> Future[T]:
        """Make a call that scores so many texts, when it is its turn; or ProblemError 429. `key` is of one of them."""
        errand = _Errand(call, num_texts, key)
        with self._changed:
            if not self._thread.is_alive():
                raise ended()
            self.require_room_to_score(num_texts)
            self._scores.append(errand)
            self._changed.notify_all()
        errand.future.add_done_callback(lambda future: self._forget_score(future, errand))
        return errand.future

    def require_room_to_score(self, num_texts: int) -> None:
        """ProblemError 429 where so many texts may not wait to be scored: as many may as may to be written.

        One call may wait always, however many its texts are.
        """
        with self._changed:
            waiting = [*(errand.num_texts for errand in self._scores), num_texts]
            waiting = waiting[0 if self._is_scoring else 1 :]  # the first is about to begin
            if len(waiting) > 1 and sum(waiting) > self._max_waiting:
                raise _come_again(2 * len(waiting) * self._score_s)

    def run_behind(self, call: Callable[[Pauses], T], key: RequestKey) -> Future[T]:
        """Make a call that writes on the model's thread when nothing else waits. `key` is of one of its texts.

        An engine that is followed by what the call is given lets others go first between its steps.
        """
        errand = _Errand(lambda: call(Pauses(self._let_others)), key=key)
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
        self._give_up()

    def _give_up(self) -> None:
        """Who still waits is told so, whatever for."""
        with self._changed:
            left, errands, behind = [*self._waiting], [*self._errands, *self._scores], [*self._behind]
            for queue in (self._errands, self._scores, self._behind):
                queue.clear()
        for job in left:
            job.future.cancel()
        for those, error in ((errands, ended), (behind, interrupted)):
            for errand in those:
                if errand.future.set_running_or_notify_cancel():
                    errand.future.set_exception(error())

    def _forget(self, future: Future[Result], job: Job) -> None:
        if future.cancelled():
            with self._changed:
                self.num_cancelled += 1
                with suppress(ValueError):
                    self._waiting.remove(job)

    def _forget_score(self, future: Future[Any], errand: _Errand) -> None:
        if future.cancelled():
            with self._changed, suppress(ValueError):
                self._scores.remove(errand)

    # -- on the model's thread ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            self._work_until_closed()
        finally:
            self._closed = True  # by a bug of ours: nobody must wait for a thread that is gone
            self._give_up()

    def _work_until_closed(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._others_wait or self._behind or self._closed)
                behind = self._behind.popleft() if self._behind and not self._others_wait else None
                if behind is None and not self._others_wait and self._closed:
                    return
            if behind is not None:
                self._try(behind)
            else:
                self._do_next()

    @property
    def _others_wait(self) -> bool:
        """Whether there is anything that goes before what is behind."""
        return bool(self._waiting or self._errands or self._scores)

    def _let_others(self) -> None:
        """Between two steps of what is behind."""
        while self._others_wait:
            self._do_next()
        if self._closed:
            raise interrupted()

    def _do_next(self) -> None:
        """What waits: errands, then texts, until no text is left that may join them."""
        self.run_errands()
        if self._waiting:
            self._write(None)

    def run_errands(self) -> None:
        """What is to be done before further texts: errands, and one call that scores if it is its turn."""
        while self._errands:
            with self._changed:  # whoever gives up empties it
                errand = self._errands.popleft() if self._errands else None
            if errand is not None:
                errand.run()
        self._score_next()

    def _score_next(self) -> None:
        began_s = time.monotonic()
        with self._changed:
            texts_turn = (self._call is not None or self._waiting) and began_s < self._next_score_s
            if texts_turn or not self._scores:
                return
            errand, self._is_scoring = self._scores.popleft(), True
        self._try(errand)
        now_s, self._is_scoring = time.monotonic(), False
        self._score_s = now_s - began_s
        self._next_score_s = now_s + self._score_s

    def _write(self, jobs: Sequence[Job] | None) -> None:
        """Write these, or who waits and who joins them."""
        outer, self._call = self._call, Call(self, self._max_rows, jobs)
        call = self._call
        try:
            self._finish(call)
        except BaseException:  # as a panic of the tokenizer's: the thread ends with it, and nobody must wait for that
            for job in call.left():
                job.future.cancel()
            raise
        finally:
            self._call = outer

    def _finish(self, call: Call) -> None:
        """A call; where it fails, halves of it fail for those alone who make it."""
        try:
            call.run()
        except Exception as error:  # noqa: BLE001 - one request's trouble must not end the thread
            left = call.left()
            if len(left) > 1:
                middle = len(left) // 2
                self._write(left[:middle])
                self._write(left[middle:])
            elif left and left[0].future.set_running_or_notify_cancel():
                self._failed_at(left[0].request.key)
                left[0].future.set_exception(error)

    def _try(self, errand: _Errand) -> None:
        """Run what is the model's own work."""
        assert errand.key is not None, "it scores or writes"
        errand.run()
        if errand.future.cancelled():
            return
        if errand.future.exception() is None:
            self._failed.clear()
        elif not self._closed:  # what is behind fails when the loop is closed
            self._failed_at(errand.key)

    def _failed_at(self, key: RequestKey) -> None:
        if key not in self._failed:
            self._failed.append(key)

    def take(self, call: Call) -> list[Job]:
        """Jobs out of the queue that may be written now: at first whoever may, then nobody before his turn."""
        with self._changed:
            taken, left = list[Job](), deque[Job]()
            begins = call.loaded is None
            while self._waiting and (begins or not left):
                job = self._waiting.popleft()
                if job.future.cancelled():
                    continue
                if call.admits(job):
                    call.add(job)
                    taken.append(job)
                else:
                    left.append(job)
            self._waiting = left + self._waiting
            return taken

    def took(self, seconds_s: float) -> None:
        """A text took so long, from the queue to its end."""
        self._failed.clear()
        self._text_s = seconds_s if self._text_s is None else self._text_s + 0.2 * (seconds_s - self._text_s)


def _come_again(seconds_s: float) -> ProblemError:
    return queue_full(min(max(1, math.ceil(seconds_s)), _MAX_RETRY_AFTER_S))

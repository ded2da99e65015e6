"""From groups of requests to rows that may be published: engine, checks, fallbacks. The one path of batch and serve.

What becomes of a request:

- With a user embedding: the personalised text, if the checks accept it (ok); else one more, sampled, if the checks'
  `retry` is on and accepts that (ok as well, with the first verdict's reason); else a fallback with that reason.
- Without one: the reason says why. Opted out is `suppressed`, anything else `fallback`.
- A fallback is the unpersonalised text of the same engine, one for all users of a content, if the checks accept it;
  else the content's title, which is published as it is. A blank body goes straight to the title.
- An error of the engine in a personalised text is a dead letter; in the unpersonalised one it leads to the title. Where
  the title is needed and blank, a dead letter as well: no text is ever made up here.

The engine reads its groups from here while it writes. What a text makes necessary, a second try or a content's
unpersonalised text, joins the wave that is running, and so may requests that nobody knew of when it began.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from e2p_ray.check import check
from e2p_ray.config import JobConfig
from e2p_ray.engine.contract import TextEngine
from e2p_ray.results import UNPERSONALIZED_USER_ID, Result, Results, Written, is_blank
from e2p_ray.schema import (
    Completion,
    Content,
    DeadLetter,
    ErrorCode,
    Generation,
    Group,
    Request,
    RequestKey,
    Verdict,
    one_line,
)

_MAX_SHARED = 1024  # unpersonalised texts that are kept for those who come later
_PASSING = (ErrorCode.CANCELLED, ErrorCode.OUT_OF_MEMORY)  # another try may give the text
# Requests of a content among which one is likely to need the unpersonalised text: it is written along with theirs.
# Asked for when the last of a shard's texts has failed, it takes as many steps as a whole wave (5 % of a job in shards
# of 640 requests on a CPU; more where a step costs the same for one row as for hundreds).
MANY_REQUESTS = 128


class Generator:
    """Writes, checks and labels the texts of groups; keeps nothing between calls but the engine."""

    def __init__(self, engine: TextEngine, config: JobConfig, run_id: str) -> None:
        self._engine = engine
        self._config = config
        self._results = Results(engine, config, run_id)

    def generate(self, groups: Sequence[Group], *, shard_id: str = "") -> tuple[list[Generation], list[DeadLetter]]:
        """Exactly one row or dead letter a request, in the order of the requests.

        Within a call a request key occurs once and a content id stands for one content. AssertionError where that does
        not hold, and where the engine drops, repeats or invents a completion.
        """
        _require_sound(groups)
        found: list[Result] = []
        self.follow(groups, found.append, shard_id=shard_id)
        planned = [request.key for group in groups for request in group.requests]
        _require_same_keys(planned, found)
        by_key = {result.key: result for result in found}
        results = [by_key[key] for key in planned]
        rows = [result for result in results if isinstance(result, Generation)]
        dead_letters = [result for result in results if isinstance(result, DeadLetter)]
        return rows, dead_letters

    def follow(self, groups: Iterable[Group | None], give: Callable[[Result], None], *, shard_id: str = "") -> None:
        """Write what comes; `give` gets each request's row or dead letter as soon as it is known.

        None among the groups: nobody waits now, ask again after the next step; they end when all that came is given.
        At any time a request key is on its way once and a content id stands for one content. AssertionError as above.
        """
        flow = _Flow(groups, self._config, self._results, give, shard_id)
        for completion in self._engine.generate(flow.groups()):
            flow.take(completion)
        flow.require_done()

    def fingerprint_of(self, request: Request, content: Content) -> str:
        """What the fingerprint of this request's row would be."""
        return self._results.fingerprint(request, content)


@dataclass(slots=True, eq=False)
class _Open:
    """A request without a result yet, and the personalised text that it has so far."""

    request: Request
    content: Content
    own: Written | None = None


class _Flow:
    """Requests on their way: what the engine is to write for each, and what became of it."""

    def __init__(
        self,
        groups: Iterable[Group | None],
        config: JobConfig,
        results: Results,
        give: Callable[[Result], None],
        shard_id: str,
    ) -> None:
        self._source, self._source_is_over = iter(groups), False
        self._config, self._results, self._give, self._shard_id = config, results, give, shard_id
        self._next: deque[Group] = deque()  # for the engine
        self._asked: dict[RequestKey, Group] = {}  # texts that it owes, by request or unpersonalised key
        self._open: dict[RequestKey, _Open] = {}
        self._sharing: dict[RequestKey, list[_Open]] = {}  # who waits for an unpersonalised text
        self._shared: OrderedDict[RequestKey, tuple[Content, Written]] = OrderedDict()

    # -- to the engine -----------------------------------------------------------------------------------------------

    def groups(self) -> Iterator[Group | None]:
        """What is to be written, as far as it is known; None where more may follow from what is being written."""
        while True:
            if self._next:
                yield self._next.popleft()
            elif not self._source_is_over:
                try:
                    group = next(self._source)
                except StopIteration:
                    self._source_is_over = True
                    continue
                if group is None:
                    yield None
                else:
                    self._begin(group)
            elif self._asked:
                yield None
            else:
                return

    def _begin(self, group: Group) -> None:
        """Requests come in; the unpersonalised text that some of them need shares the prefix of the others."""
        own, missing = list[Request](), list[Request]()
        for request in group.requests:
            assert request.key not in self._open, f"{request.key} is on its way already"
            state = self._open[request.key] = _Open(request, group.content)
            if not request.key.user_id or is_blank(group.content):
                self._settle(state)
            elif request.user_embedding is not None:
                own.append(request)
            elif self._must_share(state):
                missing.append(request)
        ahead = len(own) >= MANY_REQUESTS and self._is_unasked(own[0])
        if missing or ahead:
            draft = next((request.draft for request in missing if request.draft), None)
            own.insert(0, Request(_unpersonalized_key((missing or own)[0].key), None, draft=draft))
        self._ask(group, own)

    def _is_unasked(self, request: Request) -> bool:
        """Whether its content's unpersonalised text is neither there nor on its way."""
        key = _unpersonalized_key(request.key)
        return key not in self._shared and key not in self._asked

    def _must_share(self, state: _Open) -> bool:
        """Give the request its content's unpersonalised text, or let it wait. True where that is to be asked for."""
        key = _unpersonalized_key(state.request.key)
        content, written = self._shared.get(key, (None, None))
        if content == state.content:
            self._settle(state, written)
            return False
        waiting = self._sharing.setdefault(key, [])
        waiting.append(state)
        return key not in self._asked

    def _ask(self, group: Group, requests: Sequence[Request], attempt: int = 0) -> None:
        if requests:
            asked = replace(group, requests=tuple(requests), attempt=attempt)
            self._next.append(asked)
            self._asked |= {request.key: asked for request in requests}

    # -- from the engine ---------------------------------------------------------------------------------------------

    def take(self, completion: Completion) -> None:
        """A text has been written: it settles its request, or leads to a further one."""
        group = self._asked.pop(completion.key, None)
        if group is None:
            raise AssertionError(f"the engine completed {completion.key} unasked, or twice")
        written = self._checked(completion, group)
        if completion.key.user_id == UNPERSONALIZED_USER_ID:
            self._take_shared(group.content, written)
            return
        state = self._open[completion.key]
        if state.own is None:
            state.own = written
            if not written.rejected:
                self._settle(state)
            elif self._config.checks.retry:
                self._ask(group, [state.request], attempt=1)
            else:
                self._fall_back(state, group)
        elif written.accepted:
            state.own = replace(written, first_reason=state.own.verdict.reason)
            self._settle(state)
        else:
            self._fall_back(state, group)

    def _take_shared(self, content: Content, written: Written) -> None:
        key = written.completion.key
        if written.completion.error_code not in _PASSING:
            self._shared[key] = content, written
        if len(self._shared) > _MAX_SHARED:
            self._shared.popitem(last=False)
        for state in self._sharing.pop(key, ()):
            if state.content == content:
                self._settle(state, written)
            elif self._must_share(state):  # online a content may have changed since its text was asked for ahead
                self._ask(Group(state.content, key.task, ()), [Request(key, None)])

    def _fall_back(self, state: _Open, group: Group) -> None:
        if self._must_share(state):
            self._ask(group, [Request(_unpersonalized_key(state.request.key), None)])

    def _settle(self, state: _Open, shared: Written | None = None) -> None:
        del self._open[state.request.key]
        self._give(self._results.result(state.request, state.content, state.own, shared, self._shard_id))

    def _checked(self, completion: Completion, group: Group) -> Written:
        text, verdict = one_line(completion.text), Verdict()
        if completion.error_code is None:
            limits = self._config.tasks[group.task].limits
            verdict = check(text, group.content, completion, limits, self._config.checks)
        return Written(completion, text, verdict)

    def require_done(self) -> None:
        """AssertionError where the engine ended before all was written."""
        if self._open or self._asked or not self._source_is_over:
            owed = [*self._asked, *self._open]
            raise AssertionError(f"the engine ended and owes {len(owed)} texts: {owed[:3]}")


def _unpersonalized_key(key: RequestKey) -> RequestKey:
    return key._replace(user_id=UNPERSONALIZED_USER_ID)


def _require_sound(groups: Sequence[Group]) -> None:
    """One content a content id, and requests that belong to their group."""
    contents: dict[str, Content] = {}
    for group in groups:
        content_id = group.content.content_id
        if contents.setdefault(content_id, group.content) != group.content:
            raise AssertionError(f"content {content_id!r} has two versions in one call")
        for request in group.requests:
            if request.key[1:] != (content_id, group.task):
                raise AssertionError(f"{request.key} is in the group of {content_id!r}, {group.task!r}")


def _require_same_keys(planned: Iterable[RequestKey], results: Iterable[Result]) -> None:
    """Row conservation: key sets, never counts, and no key twice on either side."""
    wanted = Counter(planned)
    found = Counter(result.key for result in results)
    if wanted == found and all(count == 1 for count in wanted.values()):
        return
    repeated = [key for key, count in (wanted + found).items() if wanted[key] > 1 or found[key] > 1]
    problems = {"missing": [*(wanted - found)], "unplanned": [*(found - wanted)], "repeated": repeated}
    raise AssertionError("; ".join(f"{len(keys)} {name}: {keys[:3]}" for name, keys in problems.items() if keys))

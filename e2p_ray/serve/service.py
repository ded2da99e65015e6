"""One replica's work: look up, write what is not published, score, swap projectors. No HTTP, no Ray."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from e2p_ray.config import SamplingConfig, ServeConfig
from e2p_ray.errors import ConfigError, E2PError, IncompatibleError
from e2p_ray.fingerprint import embedding_part
from e2p_ray.loaded import EngineFactory, LoadedGenerator
from e2p_ray.plan.inputs import Space
from e2p_ray.schema import (
    Arm,
    Content,
    DeadLetter,
    ErrorCode,
    Generation,
    Group,
    Reason,
    Request,
    RequestKey,
    TextScore,
    UserEmbedding,
)
from e2p_ray.serve.call import Job
from e2p_ray.serve.log import ReplicaLog
from e2p_ray.serve.lookup import Published, Tables, User
from e2p_ray.serve.loop import ModelLoop
from e2p_ray.serve.messages import Consent, ContentPart, SamplingOverride, SwapState, UserPart
from e2p_ray.serve.problems import ContentProblemError, ProblemError, ended
from e2p_ray.serve.profile import given_embedding, given_events
from e2p_ray.storage import Storage

RUN_ID = "online"  # what stands for a run in a text that was written for one request
_ANONYMOUS = "anonymous-"
_INLINE = "inline-"
_STATUSES = {ErrorCode.OUT_OF_MEMORY: 503, ErrorCode.NON_FINITE_LOGITS: 500}  # of dead letters; of others 422
_MAX_VARIANTS = 32  # generators kept for other samplings: each is a few small objects


@dataclass(frozen=True, eq=False)
class Asked:
    """A request with all that was looked up for it."""

    loaded: LoadedGenerator
    content: Content
    request: Request
    fingerprint: str
    user_id: str | None
    consent: Consent | None
    published: Published | None

    @property
    def known_text(self) -> dict[str, object] | None:
        """The published row, where it is what would be written now."""
        if self.published is not None and self.published.fingerprint == self.fingerprint:
            return self.published.row
        return None

    def job(self, on_text: Callable[[str], None] | None = None) -> Job:
        """The request as work for the model, with the published text as draft."""
        request = self.request
        if self.published is not None and self.published.row["arm"] != Arm.TITLE.value:
            request = replace(request, draft=self.published.text)
        return Job(self.loaded, self.content, request.key.task, request, self.fingerprint, on_text)


class Service:
    """Base model, projector, tables and the model's thread of one replica."""

    def __init__(
        self,
        config: ServeConfig,
        storage: Storage,
        *,
        engine_factory: EngineFactory | None = None,
        log: ReplicaLog | None = None,
    ) -> None:
        require_native(config)
        self.config = config = _for_few_rows(config)
        self._log = log or ReplicaLog()
        self.tables = Tables(config, storage, self._log)
        self.loop = ModelLoop(
            max_rows=config.engine.usual_rows,
            max_waiting=config.replica.max_waiting,
        )
        self._variants: OrderedDict[tuple[LoadedGenerator, str, str], LoadedGenerator] = OrderedDict()
        self._varying = threading.Lock()
        self._swapping = asyncio.Lock()
        self.swap_state: SwapState | None = None
        try:
            # On the model's thread from the beginning: what torch keeps by thread belongs there.
            self._loaded = self.loop.run(
                lambda: LoadedGenerator(config, storage, RUN_ID, engine_factory=engine_factory)
            ).result()
            self.tables.open()
        except BaseException:
            self.close(0.0)
            raise
        self._log.info("replica_ready", projector_id=self._loaded.projector_id)

    @property
    def loaded(self) -> LoadedGenerator:
        """What new requests are written with. A request keeps what it began with."""
        return self._loaded

    def close(self, timeout_s: float | None = None) -> None:
        """Finish what waits, then stop."""
        self.tables.close()
        self.loop.close(timeout_s)

    # -- looking up --------------------------------------------------------------------------------------------------

    def look_up(
        self,
        user: UserPart,
        content: ContentPart,
        task: str,
        sampling: SamplingOverride | None = None,
        *,
        loaded: LoadedGenerator | None = None,
        person: User | None = None,
    ) -> Asked:
        """A request with its user, content and published row; ProblemError where there is no such task or content.

        `person` is what `person_of` said of the user, for who asks for several contents.
        """
        base = loaded or self._loaded
        if task not in base.config.tasks:
            raise ProblemError(422, "unknown_task", "no such task is configured; GET /v1/models lists them")
        found = self._content(content)
        person = person or self.person_of(user, base)
        key = RequestKey(_key_id(user, person), found.content_id, task)
        request = Request(key, person.user_embedding, person.reason)
        generator = base if sampling is None else self._variant(base, task, sampling)
        published = None
        if user.user_id is not None and content.content_id is not None:
            published = self.tables.published(*key)
        return Asked(
            loaded=generator,
            content=found,
            request=request,
            fingerprint=generator.fingerprint_of(request, found),
            user_id=user.user_id,
            consent=None if user.user_id is None else person.consent,
            published=published,
        )

    def _content(self, asked: ContentPart) -> Content:
        if asked.content is None:
            assert asked.content_id is not None, "the message has one of the two"
            found = self.tables.content(asked.content_id)
            if found is None:
                raise ContentProblemError(404, "unknown_content", "the contents table has no such content_id")
        else:
            given = asked.content
            if len(given.body) > self.config.api.max_content_chars:
                raise ContentProblemError(
                    413, "content_too_long", f"a body has {self.config.api.max_content_chars} characters at most"
                )
            content_id = asked.content_id or _inline_id(given.title, given.body, given.language)
            found = Content(content_id, given.title, given.body, given.language)
        if not found.title.strip() and not found.body.strip():
            raise ContentProblemError(422, ErrorCode.EMPTY_CONTENT.value, "the content has neither a title nor a body")
        return found

    def person_of(self, asked: UserPart, loaded: LoadedGenerator) -> User:
        """Consent as the table has it now, whatever came with the request, and the user embedding of this moment."""
        space, profile = Space(loaded.embedding_space, loaded.embedding_dim), self.config.profile
        given, events = given_embedding(asked, space), given_events(asked, space, profile)
        user = User(Consent.GIVEN) if asked.user_id is None else self.tables.user(asked.user_id, space)
        if user.consent is not Consent.GIVEN:
            return User(user.consent, None, Reason.OPTED_OUT)
        if given is not None:
            user = User(Consent.GIVEN, given)
        if events is None or user.user_embedding is None:
            return user
        return User(Consent.GIVEN, events.fold_into(user.user_embedding, profile))

    def _variant(self, base: LoadedGenerator, task: str, override: SamplingOverride) -> LoadedGenerator:
        """The generator with another sampling; equal ones are one, so that their texts are written together."""
        sampling: SamplingConfig = override.on(base.config.tasks[task].sampling)
        if sampling == base.config.tasks[task].sampling:
            return base
        name = (base, task, sampling.model_dump_json())
        with self._varying:
            found = self._variants.pop(name, None) or base.with_sampling(task, sampling)
            if base is self._loaded:  # one that has been swapped out is not kept alive
                self._variants[name] = found
            while len(self._variants) > _MAX_VARIANTS:
                self._variants.popitem(last=False)
            return found

    # -- writing -----------------------------------------------------------------------------------------------------

    async def write(self, jobs: Sequence[Job]) -> list[Generation | ProblemError]:
        """What becomes of each; cancelling the call cancels them. ProblemError 429 where too many wait."""
        self.submit(jobs)
        return await self.results(jobs)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Into the queue; ProblemError 429 where too many wait. `results` must follow."""
        self.loop.submit(jobs)

    async def results(self, jobs: Sequence[Job]) -> list[Generation | ProblemError]:
        """What becomes of submitted jobs; cancelling the call cancels them."""
        try:
            results = await asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs), return_exceptions=True)
        finally:
            for job in jobs:
                job.future.cancel()
        return [self._outcome(result) for result in results]

    def _outcome(self, result: Generation | DeadLetter | BaseException) -> Generation | ProblemError:
        if isinstance(result, Generation):
            return result
        if isinstance(result, DeadLetter):
            if result.error_code is ErrorCode.NON_FINITE_LOGITS:  # embeddings that come with a request are finite
                self._log.error("text_failed", error_type=result.error_code.value)
            status = _STATUSES.get(result.error_code, 422)
            return ProblemError(status, result.error_code.value, result.message)
        if isinstance(result, asyncio.CancelledError):
            return ended()
        return self._failed("text_failed", result)

    def _failed(self, event: str, error: BaseException) -> ProblemError:
        self._log.error(event, error_type=type(error).__name__)
        return ProblemError(500, "internal", "the model failed on this request")

    async def score(
        self, groups: Sequence[Group], texts: dict[RequestKey, str], loaded: LoadedGenerator, key: RequestKey
    ) -> dict[RequestKey, TextScore]:
        """How likely each text is; ProblemError 429 where too many wait. `key` stands for them all."""
        done = self.loop.score(lambda: loaded.score(groups, texts), len(groups), key)
        try:
            return {found.key: found for found in await asyncio.wrap_future(done)}
        except ProblemError:
            raise
        except Exception as error:
            raise self._failed("score_failed", error) from error

    # -- another projector -------------------------------------------------------------------------------------------

    async def swap(self, projector_uri: str) -> bool:
        """Take over another projector: read it, try it, then give it to new requests. False, and the old one, else.

        Requests that wait or run keep the projector that they began with.
        """
        async with self._swapping:
            old = self._loaded
            if projector_uri == old.config.projector.uri and self.swap_state is None:
                return True
            try:
                make = await asyncio.to_thread(old.read_projector, projector_uri)
                self._loaded = await asyncio.wrap_future(self.loop.run(lambda: _warmed(make())))
            except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the old one goes on
                said = str(error) if isinstance(error, E2PError) else type(error).__name__
                self.swap_state = SwapState(projector_uri=projector_uri, done=False, error=said)
                self._log.error("swap_refused", projector_uri=projector_uri, message=said)
                return False
            with self._varying:
                self._variants.clear()
            self.swap_state = SwapState(projector_uri=projector_uri, done=True, error=None)
            self._log.info("swapped", projector_id=self._loaded.projector_id, before=old.projector_id)
            return True


def _for_few_rows(config: ServeConfig) -> ServeConfig:
    """The configuration of an engine that often writes for one or two users only, and for no more than have a place."""
    engine = config.engine
    keep_plain = True if engine.keep_plain is None else engine.keep_plain
    online = engine.model_copy(update={"keep_plain": keep_plain, "max_rows": engine.usual_rows})
    return config.model_copy(update={"engine": online})


def require_native(config: ServeConfig) -> None:
    """ConfigError for an engine that cannot be followed while it writes."""
    if config.engine.kind != "native":
        raise ConfigError("engine.kind: only `native` is served online: vLLM has neither scores nor drafts")


def _warmed(loaded: LoadedGenerator) -> LoadedGenerator:
    """The generator, after it has written something for somebody; IncompatibleError where it cannot."""
    content = Content("warm-up", "A bridge opens", "The city opened a bridge.", "en")
    vector: UserEmbedding = np.full(loaded.embedding_dim, loaded.embedding_dim**-0.5, np.float32)
    for task, config in loaded.config.tasks.items():
        language = next(iter(config.prompts))
        content = replace(content, language="en" if language == "default" else language)
        key = RequestKey("warm-up", content.content_id, task)
        _, dead_letters = loaded.generate([Group(content, task, (Request(key, vector),))])
        if dead_letters:
            raise IncompatibleError(f"projector {loaded.projector_id}: {dead_letters[0].message}")
    return loaded


def _key_id(asked: UserPart, user: User) -> str:
    """The user's id in keys: nobody's known id for a user embedding that came alone, the same for the same one."""
    if asked.user_id is not None:
        return asked.user_id
    assert user.user_embedding is not None, "the message has one of the two"
    return _ANONYMOUS + embedding_part(np.ascontiguousarray(user.user_embedding, "<f4").data)


def _inline_id(*texts: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        encoded = str(text).encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return _INLINE + digest.hexdigest()


def elapsed_ms(since_s: float) -> float:
    """Milliseconds since a moment of `time.perf_counter`."""
    return round((time.perf_counter() - since_s) * 1000, 3)

"""What stands before the API: bearer tokens, rates and body sizes, as plain ASGI."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import math
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from e2p_ray.config import ApiConfig
from e2p_ray.serve.editors import PAGE_PATHS
from e2p_ray.serve.problems import MEDIA_TYPE, ProblemError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_OPEN_PATHS = frozenset({"/healthz", "/readyz"}) | PAGE_PATHS
_ANYBODY = 0
_BODY_TIMEOUT_S = 20.0  # of a body of 1 MiB: 50 KB a second, which a slow phone still has
_MAX_DIGITS = 18


class TokenBucket:
    """A rate over time with bursts. What costs more than is left goes through, on credit, once one is left."""

    def __init__(self, rate_per_s: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate_per_s, self._burst, self._clock = rate_per_s, burst, clock
        self._level, self._at_s = float(burst), clock()

    def take(self) -> None:
        """ProblemError 429 where not one is left."""
        now_s = self._clock()
        self._level = min(self._level + (now_s - self._at_s) * self._rate_per_s, float(self._burst))
        self._at_s = now_s
        if self._level < 1:
            wait_s = max(1, math.ceil((1 - self._level) / self._rate_per_s))
            raise ProblemError(429, "rate_limited", "this token asks too often", retry_after_s=wait_s)
        self._level -= 1

    def charge(self, cost: int) -> None:
        """What was let through costs so much more; who comes next waits for it."""
        self._level -= cost


class Gate:
    """Lets requests through to an ASGI app that have a token, keep their rate and are small enough.

    What is let through finds its token's bucket in scope["state"]["bucket"], for what costs more than one text. The
    body has been read by then: no app waits for a client that sends slowly. `refusal` is asked last, with the path and
    the body of what would be let through.
    """

    def __init__(
        self, app: App, config: ApiConfig, refusal: Callable[[str, bytes], ProblemError | None] = lambda *_: None
    ) -> None:
        self._app, self._max_body_bytes, self._refusal = app, config.max_body_bytes, refusal
        self._digests = [_digest(token.get_secret_value().encode()) for token in config.tokens]
        self._anonymous = config.allow_anonymous and not config.tokens
        self._buckets = [TokenBucket(config.rate_per_s, config.burst) for _ in config.tokens or (None,)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})  # there is none; the server says 403
            return
        if scope["type"] != "http" or scope["path"] in _OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            bucket = self._buckets[self._token(scope["headers"])]
            bucket.take()
            body = await self._body(scope["headers"], receive)
        except ProblemError as problem:
            await _answer(problem, send)
            return
        if body is None:
            return  # the client left
        if (refused := self._refusal(scope["path"], body)) is not None:
            await _answer(refused, send)
            return
        scope.setdefault("state", {})["bucket"] = bucket
        await self._app(scope, _replayed(body, receive), send)

    def _token(self, headers: Sequence[tuple[bytes, bytes]]) -> int:
        """The number of the request's token; as long for a wrong one as for a right one."""
        if self._anonymous:
            return _ANYBODY
        given = [value for name, value in headers if name.lower() == b"authorization"]
        kind, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        digest, found = _digest(token.strip()), None
        for number, known in enumerate(self._digests):
            if hmac.compare_digest(digest, known):
                found = number
        if found is None or kind.lower() != b"bearer":
            raise ProblemError(401, "unauthorized", "give a token: Authorization: Bearer ...")
        return found

    async def _body(self, headers: Sequence[tuple[bytes, bytes]], receive: Receive) -> bytes | None:
        too_large = ProblemError(413, "body_too_large", f"a body has {self._max_body_bytes} bytes at most")
        for name, value in headers:
            if name.lower() != b"content-length":
                continue
            # No number of so many digits is small, and Python refuses to read very long ones.
            if not value.isdigit() or len(value) > _MAX_DIGITS or int(value) > self._max_body_bytes:
                raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self._max_body_bytes:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError as error:
            raise ProblemError(408, "body_too_slow", "the body of the request did not come") from error


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then what comes after it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message


async def _answer(problem: ProblemError, send: Send) -> None:
    data = json.dumps(problem.body()).encode()
    headers = {"content-type": MEDIA_TYPE, "content-length": str(len(data)), **problem.headers()}
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": encoded})
    await send({"type": "http.response.body", "body": data})

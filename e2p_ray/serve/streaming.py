"""One text as server-sent events, while it is written.

`token` {"text"}: what was added. Checks see whole texts, so what has come so far is a draft that may still be rejected.
`restart` {}: forget what has come; another try begins. `done`: the answer as without streaming, the only text that may
be shown: it is checked, and may be another one than what was streamed. `error`: a problem instead of `done`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from e2p_ray.serve.answers import generated_answer, published_answer
from e2p_ray.serve.problems import ProblemError, deadline_passed
from e2p_ray.serve.service import Asked, Service

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_UNFINISHED = "\ufffd"  # what bytes of a character look like before its last one


async def until_gone(receive: Receive) -> None:
    """Returns when the client has left; the request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def begun_stream(
    service: Service, asked: Asked, began_s: float, timeout_s: float, receive: Receive
) -> AsyncIterator[bytes]:
    """The events of a request that is in the queue now; ProblemError 429 where that is full."""
    published = published_answer(asked, began_s)
    if published is not None:
        return _only(_event("done", published.model_dump(mode="json")))
    loop, texts = asyncio.get_running_loop(), asyncio.Queue[str | None]()
    job = asked.job(on_text=lambda text: _put(loop, texts, text))
    service.submit([job])
    work = asyncio.ensure_future(service.results([job]))
    work.add_done_callback(lambda _: texts.put_nowait(None))
    return _events(asked, work, texts, began_s, timeout_s, receive)


def _put(loop: asyncio.AbstractEventLoop, texts: asyncio.Queue[str | None], text: str) -> None:
    loop.call_soon_threadsafe(texts.put_nowait, text)


async def _events(
    asked: Asked,
    work: asyncio.Future[list[Any]],
    texts: asyncio.Queue[str | None],
    began_s: float,
    timeout_s: float,
    receive: Receive,
) -> AsyncIterator[bytes]:
    gone = asyncio.ensure_future(until_gone(receive))
    gone.add_done_callback(lambda _: texts.put_nowait(None))
    over_s = asyncio.get_running_loop().time() + timeout_s
    sent = ""
    try:
        while (text := await _next(texts, over_s)) is not None:
            text = text.rstrip(_UNFINISHED)
            if not text.startswith(sent):
                yield _event("restart", {})
                sent = ""
            if text != sent:
                yield _event("token", {"text": text[len(sent) :]})
                sent = text
        if not work.done():
            return  # the client left
        (outcome,) = work.result()
        if isinstance(outcome, ProblemError):
            raise outcome
        yield _event("done", generated_answer(asked, outcome, began_s).model_dump(mode="json"))
    except ProblemError as problem:
        yield _event("error", problem.body())
    finally:
        work.cancel()
        gone.cancel()


async def _next(texts: asyncio.Queue[str | None], over_s: float) -> str | None:
    try:
        async with asyncio.timeout_at(over_s):
            return await texts.get()
    except TimeoutError as error:
        raise deadline_passed() from error


async def _only(event: bytes) -> AsyncIterator[bytes]:
    yield event


def _event(name: str, data: Mapping[str, Any]) -> bytes:
    """In ASCII: there are clients that end a line at U+2028, too."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()

"""Many users at once, who ask as often as they would have to for a service to have too much."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping

from e2p_ray.serve.messages import ProblemBody


def post(token: str, body: Mapping[str, str]) -> bytes:
    """A request for one text."""
    data = json.dumps(dict(body)).encode()
    head = (
        "POST /v1/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {token}\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def crowd(
    port: int, num_users: int, seconds: float, request: Callable[[int], bytes], period_s: float = 0.0
) -> tuple[list[float], Counter[str]]:
    """Seconds of every accepted request, and how many had which HTTP status.

    Every user asks again once the answer is there, but not before a period is over; `request` makes bytes of a
    request's number. All in one thread: eighty of them would wait for each other's turns, and the times would be
    theirs. A refusal that does not say which it is, and when to come again, is an AssertionError.
    """
    over_s, times, counts = time.monotonic() + seconds, list[float](), Counter[str]()

    async def user(number: int) -> None:
        connection = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.sleep(period_s * number / num_users)
        while (now_s := time.monotonic()) < over_s:
            try:
                status, head, body = await _answer(*connection, request(number))
            except (asyncio.IncompleteReadError, ConnectionError):  # HAProxy closes old connections when it reloads
                connection[1].close()
                connection = await asyncio.open_connection("127.0.0.1", port)
                status, head, body = await _answer(*connection, request(number))
            number += num_users
            counts[status] += 1
            if status == "200":
                times.append(time.monotonic() - now_s)
            elif status == "429":
                problem = ProblemBody.model_validate_json(body)
                assert problem.code == "queue_full"
                assert f"retry-after: {problem.retry_after_s}" in head
            await asyncio.sleep(max(0.0, now_s + period_s - time.monotonic()))
        connection[1].close()

    async def users() -> None:
        await asyncio.gather(*map(user, range(num_users)))

    asyncio.run(users())
    return times, counts


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[str, str, bytes]:
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    body = await reader.readexactly(int(head.split("content-length: ")[1].split("\r\n")[0]))
    return head.split(" ")[1], head, body

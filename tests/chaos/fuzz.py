"""Requests that no client should send: seeded, as bytes, with what may become of each."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any

from tests.serve_world import TOKENS
from tests.small_job import DIM, SPACE

CLOSED, HANGS = 0, -1
CANARY = 0.918273645546372
CANARY_MARKS = ("0.918273", ".91827364", "9182736455")
TOKEN = TOKENS[0]
MAX_BODY_BYTES = 65_536
OPEN_PATHS = ("/healthz", "/readyz", "/", "/page.css", "/page.js")
WRITING = ("/v1/generations", "/v1/generations:batch", "/v1/scores")
_PATHS = (
    *WRITING * 4, "/v1/models", "/v1/contents?prefix=\"", "/openapi.json", "/", "/page.js", "/docs", "/v1",
    "/v1/generations/", "//v1/generations",
    "/v1//models", "/v1/generations%3Abatch", "/v1/%67enerations", "/v1/generations%00", "/v1/../v1/models",
    "/healthz/../v1/models", "/healthz", "/readyz", "/healthz/", "/HEALTHZ", "/v1/models?token=" + TOKEN,
    "/v1/generations?" + "a" * 3000, "/%ff%fe", "/v1/models;x=1", "/v1/models#x", "http://other/v1/models", "*",
    "/" + "x" * 6000,
)  # fmt: skip
_METHODS = ("GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "CONNECT", "post", "BREW", "PRI", "G" * 200)
_TEXTS = (
    "", " ", "\x00", "\n", "\ud800", "\udfff\ud800", "\ufeff", "\u202egnp.exe", "😀" * 50, "e\u0301" * 40, "東京" * 30,
    "x" * 511, "x" * 513, "y" * 20_000, "../../etc/passwd", "{title}{body}{0.__class__}", "%s%n%d", "<|bos|><|eos|>",
    "'; DROP TABLE users; --", "user-0003\x00", "USER-0003", "\\u0000", "NaN", "null", "\r\nSet-Cookie: a=b",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 1.5, 2**31, 2**63, 2**64, 10**400, -(10**30), 1e308, 5e-324, float("nan"),
    float("inf"), [], [[]], {}, {"a": {}}, [None], [0.5] * DIM, ["x"] * DIM, [CANARY], [1e39] * DIM, [10**400] * DIM,
    {"": ""}, "en", "fr",
)  # fmt: skip


@dataclass(frozen=True)
class Fuzzed:
    """One request. `known`: it has a right token, and no other. `whole`: HTTP can tell where it ends."""

    data: bytes
    path: str
    known: bool
    whole: bool = True


@dataclass(frozen=True)
class Answer:
    """What came back; status CLOSED where the connection was closed without a word."""

    status: int
    headers: str
    body: bytes


def fuzzed(rng: random.Random) -> Fuzzed:
    """One request of some thousands of kinds."""
    path = rng.choice(WRITING) if rng.random() < 0.75 else rng.choice(_PATHS)
    method = "POST" if rng.random() < 0.9 else rng.choice(_METHODS)
    known, tokens = _authorization(rng)
    body = _body(rng)
    headers = [("Host", "localhost"), ("Content-Type", "application/json"), *(("Authorization", t) for t in tokens)]
    if rng.random() < 0.12:
        headers = _hostile(rng, headers)
    # Of a request to become a WebSocket uvicorn passes on no body, and whoever reads it waits.
    framing, whole = [("Content-Length", str(len(body)))], ("Upgrade", "websocket") not in headers
    if rng.random() < 0.06:
        framing, body, whole = _framing(rng, body)
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers + framing)]
    head = "\r\n".join(lines).encode("utf-8", "surrogatepass") + b"\r\n\r\n"
    return Fuzzed(head + body, path, known, whole)


def _authorization(rng: random.Random) -> tuple[bool, list[str]]:
    if rng.random() < 0.8:
        return True, [f"{rng.choice(('Bearer', 'bearer', 'BEARER'))} {TOKEN}"]
    return False, rng.choice(
        [
            [], [""], ["Bearer"], ["Bearer "], [TOKEN], [f"Basic {TOKEN}"], [f"Bearer {TOKEN}x"],
            [f"Bearer {TOKEN[:-1]}"], [f"Bearer {TOKEN.upper()}"], [f"Bearer {TOKEN} {TOKEN}"],
            [f"Bearer {TOKEN}", f"Bearer {TOKEN}"],
            [f"Bearer {TOKEN}", "Bearer x"], [f"Bearer\t{TOKEN}"], [f"Bearer {TOKEN},"], ["Bearer " + "a" * 7000],
            [f"Bearer {TOKEN}\x00"], ["Bearer tökén-of-thé-newsroom"], ["Bearer null"], [f"Bearer Bearer {TOKEN}"],
        ]
    )  # fmt: skip


def _valid(rng: random.Random) -> dict[str, Any]:
    user: dict[str, Any] = {"user_id": f"user-{rng.randrange(12):04d}"}
    if rng.random() < 0.4:
        vector = [CANARY, *(rng.uniform(-1, 1) for _ in range(DIM - 1))]
        user = {"embedding": vector, "embedding_space": SPACE} | (user if rng.random() < 0.5 else {})
    content: dict[str, Any] = {"content_id": f"content-{rng.randrange(6):03d}"}
    if rng.random() < 0.3:
        content = {"content": {"title": "Bridge", "body": "It opened. It cost 3 million.", "language": "en"}}
    pairs = [user | content] * rng.randrange(1, 4)
    kinds: list[dict[str, Any]] = [
        user | content | {"stream": rng.random() < 0.2, "timeout_ms": rng.choice([1, 1000, 10**9])},
        user | content | {"sampling": {"temperature": 0.5, "max_new_tokens": 4}},
        {"pairs": pairs},
        user | {"candidates": [content | {"text": "A text"}, content]},
    ]
    return {"task": "headline"} | rng.choice(kinds)


def _body(rng: random.Random) -> bytes:
    value: Any = _valid(rng)
    kind = rng.random()
    if kind < 0.15:
        return json.dumps(value).encode()
    if kind < 0.75:
        for _ in range(rng.randrange(1, 3)):
            value = _mutated(rng, value)
        return json.dumps(value, ensure_ascii=True).encode()
    if kind < 0.9:
        return _broken(rng, json.dumps(value).encode())
    return rng.choice(_ODD)(rng)


def _mutated(rng: random.Random, value: Any) -> Any:
    """Something somewhere in it is another thing."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name, changed = rng.choice(list(value)), dict(value)
        match rng.randrange(6):
            case 0:
                del changed[name]
            case 1:
                changed[rng.choice(_TEXTS)] = rng.choice(_VALUES)
            case _:
                changed[name] = _mutated(rng, value[name])
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], _mutated(rng, value[at]), *value[at + 1 :]]
    return rng.choice(_TEXTS) if rng.random() < 0.5 else rng.choice(_VALUES)


def _broken(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    match rng.randrange(5):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        case 2:
            return data[:at] + rng.choice([b"\xff\xfe", b"\xed\xa0\x80", b"\x00", b"\xef\xbb\xbf", b"}"]) + data[at:]
        case 3:
            return data + data
        case _:
            return data.decode().encode(rng.choice(["utf-16", "utf-32", "utf-8-sig"]))


_ODD: list[Callable[[random.Random], bytes]] = [
    lambda rng: b"",
    lambda rng: rng.choice([b"null", b"[]", b"0", b'"x"', b"{}", b"NaN", b"[[", b"user_id=1&task=headline", b"<a/>"]),
    lambda rng: b"[" * rng.choice([500, 5000, 60_000]),
    lambda rng: b'{"a":' * rng.choice([500, 10_000]) + b"1" + b"}" * rng.choice([500, 10_000]),
    lambda rng: b'{"task":"headline","task":"headline","user_id":"a","user_id":"user-0003","content_id":"content-000"}',
    lambda rng: b"1" * rng.choice([5000, 60_000]),
    lambda rng: b" " * (MAX_BODY_BYTES + rng.choice([0, 1, 100_000])),
    lambda rng: rng.randbytes(rng.randrange(1, 3000)),
    lambda rng: json.dumps({"task": "headline", "pairs": [{"user_id": "u", "content_id": "c"}] * 600}).encode(),
    lambda rng: json.dumps({"task": "headline", "embedding": [CANARY] * 3000, "embedding_space": SPACE}).encode(),
]


def _hostile(rng: random.Random, headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return headers + rng.choice(
        [
            [("Content-Type", rng.choice(["text/plain", "application/json; charset=utf-7", "multipart/form-data"]))],
            [("X-" + "a" * 50, "b" * 8000)], [(f"X-{n}", "v") for n in range(150)], [("X", "c" * 70_000)],
            [("Expect", "100-continue")], [("Expect", "the impossible")], [("X-HTTP-Method-Override", "DELETE")],
            [("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Version", "13"),
             ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")],
            [("Upgrade", "h2c"), ("Connection", "Upgrade, HTTP2-Settings")], [("Host", "other")], [("X-A", "b\x00c")],
            [("X-A", "b\r\nX-B: c")], [("X-Forwarded-For", "127.0.0.1"), ("Forwarded", "for=127.0.0.1")],
            [("Cookie", f"token={TOKEN}")], [("Connection", "close")], [("Accept-Encoding", "gzip, br;q=nan")],
            [("bad header", "x")], [("", "x")], [("Content-Type", "😀")], [("Transfer-Encoding", "gzip")],
            [("Proxy-Authorization", f"Bearer {TOKEN}")],
        ]
    )  # fmt: skip


def _framing(rng: random.Random, body: bytes) -> tuple[list[tuple[str, str]], bytes, bool]:
    """Lengths that are wrong, and bodies in chunks."""
    length = str(len(body))
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:7], body[7:]) if part) + b"0\r\n\r\n"
    return rng.choice(
        [
            ([("Transfer-Encoding", "chunked")], chunks, True),
            ([("Transfer-Encoding", "chunked")], b"zz\r\n" + chunks, False),
            ([("Transfer-Encoding", "chunked")], chunks[:-4], False),
            ([("Transfer-Encoding", "chunked"), ("Content-Length", "3")], chunks, False),
            ([("Content-Length", rng.choice(["-1", "abc", "1e3", "9" * 30, "", "+5", "0x10", "1 1"]))], body, False),
            ([("Content-Length", str(len(body) + 50))], body, False),
            ([("Content-Length", length), ("Content-Length", str(len(body) + 1))], body, False),
            ([("Content-Length", "1")], body, False),
            ([], body, False),
        ]
    )


class Sender:
    """A connection that is made anew where a request leaves it unusable."""

    def __init__(self, port: int, timeout_s: float = 20.0) -> None:
        self._port, self._timeout_s = port, timeout_s
        self._socket: socket.socket | None = None

    def send(self, request: Fuzzed) -> Answer:
        """The answer, with the status HANGS where the server says nothing and keeps the connection."""
        method = request.data.split(b" ", 1)[0].decode("utf-8", "replace")
        kept = self._socket is not None
        try:
            found = self._sent(request, method)
        except TimeoutError:
            self.close()
            return Answer(HANGS, "", b"")
        except (OSError, HTTPException):
            self.close()
            if not kept:
                return Answer(CLOSED, "", b"")
            return self.send(request)  # the server may end an idle connection at any time
        return found

    def _sent(self, request: Fuzzed, method: str) -> Answer:
        if self._socket is None:
            self._socket = socket.create_connection(("127.0.0.1", self._port), self._timeout_s)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(request.data)
        if not request.whole:
            self._socket.shutdown(socket.SHUT_WR)
        response = HTTPResponse(self._socket, method=method)
        response.begin()
        answer = Answer(response.status, str(response.headers), response.read())
        if response.will_close or not request.whole or response.status in (101, 400):
            self.close()
        return answer

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

"""An HTTP proxy before an S3 server that fails on purpose, so that retries meet real sockets.

`faulty_s3` is a thread of the test's process and follows a script, fault by fault. `stormy_s3` is a process of its own
(deltalake holds the interpreter's lock while it waits for an answer) and draws faults at random, from a seed.
"""

from __future__ import annotations

import http.client
import json
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAULTS = ("slow_down", "internal", "reset", "lost_answer", "truncate", "hang_up")
"""slow_down, internal: 503 and 500 with S3's XML; reset: before anything is done; lost_answer: done, then reset;
truncate: half of the body, then the end; hang_up: no answer within the time-out. Further: ok, denied and wrong_key
(403), slow (an answer after a while), corrupt (a body of the right length with one wrong byte)."""

_ERRORS = {
    "slow_down": (503, "SlowDown"),
    "internal": (500, "InternalError"),
    "denied": (403, "AccessDenied"),
    "wrong_key": (403, "InvalidAccessKeyId"),
}
_SLOW_S = 0.3
_DENIED_EVERY = 100  # requests
_CONTROL = "/-/"  # no bucket has this name


@dataclass
class Storm:
    """Faults at random: each request gets one by these shares.

    `denied` then goes on for all requests for `denied_s`; with that, it comes now and then whatever is drawn.
    """

    shares: Mapping[str, float]
    seed: int = 0
    denied_s: float = 0.0
    _random: random.Random = field(init=False, repr=False)
    _denied_until_s: float = field(default=0.0, init=False, repr=False)
    _num_drawn: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def draw(self) -> str:
        now_s = time.monotonic()
        if now_s < self._denied_until_s:
            return "denied"
        fault = self._random.choices([*self.shares, "ok"], [*self.shares.values(), 1 - sum(self.shares.values())])[0]
        self._num_drawn += 1
        if fault == "denied" or (self.denied_s and self._num_drawn % _DENIED_EVERY == 0):
            fault = "denied"
            self._denied_until_s = now_s + self.denied_s
        return fault


@dataclass
class Faulty:
    """A running proxy: the faults of the next requests, and how many came."""

    endpoint_url: str
    script: list[str] = field(default_factory=list)  # one for each request to come, then `after`
    after: str = "ok"
    only: str = ""  # a pattern of "METHOD /path": other requests are served, and neither counted nor in the script
    storm: Storm | None = None  # in place of the script
    num_requests: int = 0
    counts: Counter[str] = field(default_factory=Counter)  # requests by fault
    lock: threading.Lock = field(default_factory=threading.Lock)

    def plan(self, script: Sequence[str], after: str = "ok", only: str = "") -> None:
        with self.lock:
            self.script, self.after, self.num_requests, self.storm = list(script), after, 0, None
            self.only = only
            self.counts.clear()

    def brew(self, storm: Storm) -> None:
        self.plan([])
        self.storm = storm

    def next(self, request: str) -> str:
        with self.lock:
            if not re.search(self.only, request):
                return "ok"
            self.num_requests += 1
            planned = self.script.pop(0) if self.script else self.after
            fault = self.storm.draw() if self.storm else planned
            self.counts[fault] += 1
            return fault


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        return  # a client that hung up: what we do to clients, they may do to us


@contextmanager
def faulty_s3(endpoint_url: str) -> Iterator[Faulty]:
    """A proxy before the server at `endpoint_url`, in this process."""
    stopping = threading.Event()
    server = _QuietServer(("127.0.0.1", 0), _handler(endpoint_url, stopping))
    faulty = Faulty(f"http://127.0.0.1:{server.server_address[1]}")
    server.faulty = faulty  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield faulty
    finally:
        stopping.set()
        server.shutdown()
        server.server_close()


class Stormy:
    """A proxy in a process of its own, and how to steer it."""

    def __init__(self, endpoint_url: str) -> None:
        self.endpoint_url = endpoint_url

    def brew(self, seed: int, denied_s: float = 0.0, **shares: float) -> None:
        """From now on faults by these shares; counts begin anew. Without shares: fair weather."""
        self._ask({"seed": seed, "denied_s": denied_s, "shares": shares})

    def plan(self, script: Sequence[str], after: str = "ok", only: str = "") -> None:
        """From now on these faults, one after another, for requests that match `only`; counts begin anew."""
        self._ask({"script": list(script), "after": after, "only": only})

    def _ask(self, weather: Mapping[str, object]) -> None:
        request = urllib.request.Request(f"{self.endpoint_url}{_CONTROL}", json.dumps(weather).encode())
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.status == 200

    def counts(self) -> Counter[str]:
        """Requests by fault since the last change of the weather."""
        with urllib.request.urlopen(f"{self.endpoint_url}{_CONTROL}", timeout=30) as answer:
            return Counter(json.loads(answer.read()))


@contextmanager
def stormy_s3(endpoint_url: str) -> Iterator[Stormy]:
    """A proxy before the server at `endpoint_url`, in a process of its own."""
    command = [sys.executable, "-m", "tests.faulty", endpoint_url]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield Stormy(process.stdout.readline().strip())
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def _handler(endpoint_url: str, stopping: threading.Event) -> type[BaseHTTPRequestHandler]:
    upstream = urlsplit(endpoint_url)
    assert upstream.hostname is not None
    assert upstream.port is not None
    host, port = upstream.hostname, upstream.port

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        @property
        def faulty(self) -> Faulty:
            found: Faulty = self.server.faulty  # type: ignore[attr-defined]
            return found

        def handle_any(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path == _CONTROL:
                self.control(data)
                return
            fault = self.faulty.next(f"{self.command} {self.path}")
            if fault in _ERRORS:
                status, code = _ERRORS[fault]
                self.reply(status, [], f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())
            elif fault == "hang_up":
                stopping.wait(3)
                self.close_connection = True
            elif fault == "reset":
                self.reset()
            else:
                self.serve(data, fault)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_any  # noqa: N815

        def control(self, data: bytes) -> None:
            if self.command == "POST":
                asked = json.loads(data)
                self.faulty.plan(**asked) if "script" in asked else self.faulty.brew(Storm(**asked))
            self.reply(200, [], json.dumps(self.faulty.counts).encode())

        def serve(self, data: bytes, fault: str) -> None:
            """The server's answer, or what is left of it."""
            if fault == "slow":
                stopping.wait(_SLOW_S)
            status, headers, body = self.forward(data)
            if fault == "lost_answer":
                self.reset()
                return
            if fault == "corrupt" and status in (200, 206) and self.command == "GET" and body:
                middle = len(body) // 2
                body = body[:middle] + bytes([body[middle] ^ 0x41]) + body[middle + 1 :]
            self.reply(status, headers, body, cut=fault == "truncate")

        def forward(self, data: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            connection = http.client.HTTPConnection(host, port, timeout=30)
            try:
                # The Host header stays: the signature covers it.
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in ("connection", "expect"):
                        connection.putheader(name, value)
                connection.endheaders(data)
                answer = connection.getresponse()
                return answer.status, answer.getheaders(), answer.read()
            finally:
                connection.close()

        def reply(self, status: int, headers: list[tuple[str, str]], body: bytes, *, cut: bool = False) -> None:
            self.send_response(status)
            length = next((value for name, value in headers if name.lower() == "content-length"), str(len(body)))
            for name, value in headers:
                if name.lower() not in ("connection", "content-length", "transfer-encoding", "date", "server"):
                    self.send_header(name, value)
            self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = cut

        def reset(self) -> None:
            # Linger of zero: the client sees a reset, not an end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True

        def finish(self) -> None:
            try:
                super().finish()
            except (OSError, ValueError):  # our own reset closed the socket
                return

        def log_message(self, *_: object) -> None:
            return

    return Handler


def _main(endpoint_url: str) -> None:
    with faulty_s3(endpoint_url) as faulty:
        print(faulty.endpoint_url, flush=True)
        sys.stdin.read()  # until whoever started this ends


if __name__ == "__main__":
    _main(sys.argv[1])

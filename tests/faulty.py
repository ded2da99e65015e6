"""An HTTP proxy before an S3 server that fails on purpose, so that retries meet real sockets."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAULTS = ("slow_down", "internal", "reset", "lost_answer", "truncate", "hang_up")
"""slow_down, internal: 503 and 500 with S3's XML; reset: before anything is done; lost_answer: done, then reset;
truncate: half of the body, then the end; hang_up: no answer within the time-out. Further: ok, denied."""


@dataclass
class Faulty:
    """A running proxy: the faults of the next requests, and how many came."""

    endpoint_url: str
    script: list[str] = field(default_factory=list)  # one for each request to come, then `after`
    after: str = "ok"
    num_requests: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def plan(self, script: Sequence[str], after: str = "ok") -> None:
        with self.lock:
            self.script, self.after, self.num_requests = list(script), after, 0

    def next(self) -> str:
        with self.lock:
            self.num_requests += 1
            return self.script.pop(0) if self.script else self.after


@contextmanager
def faulty_s3(endpoint_url: str) -> Iterator[Faulty]:
    """A proxy before the server at `endpoint_url`."""
    upstream = urlsplit(endpoint_url)
    assert upstream.hostname is not None
    assert upstream.port is not None
    host, port = upstream.hostname, upstream.port

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = faulty.next()
            if fault in ("slow_down", "internal", "denied"):
                status, code = {"slow_down": (503, "SlowDown"), "internal": (500, "InternalError"),
                                "denied": (403, "AccessDenied")}[fault]  # fmt: skip
                self.reply(status, [], f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())
            elif fault == "hang_up":
                stopping.wait(3)
                self.close_connection = True
            elif fault == "reset":
                self.reset()
            else:
                status, headers, body = self.forward(data)
                if fault == "lost_answer":
                    self.reset()
                else:
                    self.reply(status, headers, body, cut=fault == "truncate")

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_any  # noqa: N815

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

    stopping = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    faulty = Faulty(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield faulty
    finally:
        stopping.set()
        server.shutdown()
        server.server_close()

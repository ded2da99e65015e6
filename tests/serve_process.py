"""The API in a process of its own, by uvicorn and without Ray: python -m tests.serve_process CONFIG [--port 8000].

It prints `PORT` and its port once it listens. With --fake-step-s the fake engine writes, a token in so many seconds.
What comes through the gate is looked at once more, by other code: a request that has no known token there is a line
`BREACH` on standard error. At its end it prints `LONGEST` and the most texts that have waited for the model at once.
"""

from __future__ import annotations

import argparse
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import uvicorn
import yaml

from e2p_ray.config import ServeConfig
from e2p_ray.serve.api import make_api
from e2p_ray.serve.gate import App, Gate, Receive, Scope, Send
from e2p_ray.serve.loop import ModelLoop
from e2p_ray.serve.service import Service
from e2p_ray.storage import Storage
from tests.serve_world import slow

_OPEN = ("/healthz", "/readyz", "/", "/page.css", "/page.js")


def watched(gate: Gate, tokens: list[str]) -> Gate:
    """The gate, with a witness behind it."""
    inner: App = gate._app
    known = {token.encode() for token in tokens}

    async def witness(scope: Scope, receive: Receive, send: Send) -> None:
        given = [value.split(b" ")[-1].strip() for name, value in scope["headers"] if name == b"authorization"]
        if scope["path"] not in _OPEN and not known & set(given):
            print("BREACH", scope["path"], file=sys.stderr, flush=True)
        await inner(scope, receive, send)

    gate._app = witness
    return gate


class Longest:
    """The most texts that waited and were written at once, looked at every millisecond."""

    def __init__(self, loop: ModelLoop) -> None:
        self._loop, self.number = loop, 0
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self.number = max(self.number, self._loop.num_waiting + self._loop.num_running)
            time.sleep(0.001)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--fake-step-s", type=float)
    options = parser.parse_args()
    config = ServeConfig.model_validate(yaml.safe_load(options.config.read_text(encoding="utf-8")))
    factory = None if options.fake_step_s is None else slow(options.fake_step_s)
    service = Service(config, Storage(config.storage), engine_factory=factory)
    api = make_api(service)
    assert isinstance(api, Gate)
    app = watched(api, [token.get_secret_value() for token in config.api.tokens])
    longest = Longest(service.loop)
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again once it has stopped
        signal.signal(number, lambda *_: None)
    with socket.create_server(("127.0.0.1", options.port), backlog=2048) as listening:
        print("PORT", listening.getsockname()[1], flush=True)
        try:
            uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off")).run([listening])
        finally:
            service.close(1)
            print("LONGEST", longest.number, flush=True)


if __name__ == "__main__":
    main()

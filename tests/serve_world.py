"""A service on a real port, in this process: tables of a small job, the fake engine or a tiny one, a client."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from ray.serve import Application

from e2p_ray.config import JobConfig, ServeConfig, load_config
from e2p_ray.engine.fake import FakeEngine
from e2p_ray.loaded import EngineFactory
from e2p_ray.serve.api import make_api
from e2p_ray.serve.client import Client
from e2p_ray.serve.replica import application
from e2p_ray.serve.service import Service
from e2p_ray.storage import Storage
from tests.small_job import fake_engine

TOKENS = ("token-of-the-newsroom", "token-of-the-app-000")


@dataclass(frozen=True)
class Site:
    """A service and where it is reached."""

    url: str
    service: Service

    def client(self, token: str | None = TOKENS[0]) -> Client:
        return Client(self.url, token, timeout_s=30)


def serve_config(config: JobConfig, **sections: dict[str, Any]) -> ServeConfig:
    """A job's configuration with the sections of a service; no rate but where a test gives one."""
    values = {name: getattr(config, name) for name in JobConfig.model_fields}
    api = {"tokens": TOKENS, "rate_per_s": 1e6, "burst": 10**6} | sections.pop("api", {})
    tables = {"refresh_s": 0.1} | sections.pop("tables", {})
    return ServeConfig.model_validate({**values, "api": api, "tables": tables, **sections})


@contextmanager
def serving(config: ServeConfig, engine_factory: EngineFactory | None = fake_engine) -> Iterator[Site]:
    """The API over uvicorn on a free port."""
    service = Service(config, Storage(config.storage), engine_factory=engine_factory)
    server = uvicorn.Server(uvicorn.Config(make_api(service), port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
            assert thread.is_alive(), "the server ended"
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Site(f"http://127.0.0.1:{port}", service)
    finally:
        server.should_exit = True
        thread.join(10)
        service.close(10)


def slow_engine(step_s: float, config: JobConfig, storage: Storage) -> FakeEngine:
    """The fake engine with a time a token."""
    engine = fake_engine(config, storage)
    engine._step_s = step_s
    return engine


def slow(step_s: float) -> EngineFactory:
    return functools.partial(slow_engine, step_s)


def build(args: dict[str, str]) -> Application:
    """What `e2p_ray.serve.app:build` is, with a slow fake engine."""
    config = load_config(ServeConfig, ["--config", args["config"]], prog="tests", description="")
    return application(config, engine_factory=slow(0.01))

"""The way into a real Ray Serve: it streams, frees the rows of who leaves, and brings replicas back from zero."""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from ray import serve

import e2p_ray.serve.front
from e2p_ray.errors import ConfigError
from e2p_ray.loaded import EngineFactory
from e2p_ray.schema import Status
from e2p_ray.serve.client import Client, DeadlineError, InvalidRequestError, ServiceError, Token, TooManyRequestsError
from e2p_ray.serve.front import FLAGS, _mortal, front_of_local_ray, require_free_port, unused_ports
from e2p_ray.serve.messages import GenerationAnswer
from e2p_ray.serve.replica import APP_NAME, DEPLOYMENT_NAME
from jobs.serve import serve_until
from tests.s3 import IS_LONG
from tests.serve_world import TOKENS, serve_config, slow
from tests.small_job import write_small_job
from tests.test_serve_replica import until
from tests.waiting import wait_until

ASK = {"user_id": "user-0003", "content_id": "content-001"}


@contextmanager
def job(folder: Path, factory: EngineFactory, **sections: dict[str, Any]) -> Iterator[int]:
    """jobs.serve in a thread, ready; its port."""
    config, _ = write_small_job(folder, num_users=12)
    (port,), stop = unused_ports(1), threading.Event()
    served = serve_config(config, **sections | {"api": {"port": port} | sections.get("api", {})})
    thread = threading.Thread(target=serve_until, args=(served, stop), kwargs={"engine_factory": factory})
    thread.start()
    try:
        with client_of(port) as client:
            until(client, lambda models: True)
        yield port
    finally:
        stop.set()
        thread.join(90)
    assert not thread.is_alive()


def client_of(port: int) -> Client:
    return Client(f"http://127.0.0.1:{port}", TOKENS[0], timeout_s=90)


def listener_of(port: int) -> tuple[psutil.Process, str]:
    """Who listens at a port, and at which address."""
    for found in psutil.net_connections("tcp"):
        if found.status == psutil.CONN_LISTEN and found.laddr and found.laddr.port == port:
            return psutil.Process(found.pid), found.laddr.ip
    raise AssertionError(f"nobody listens at {port}")


def num_replicas() -> int:
    found = serve.status().applications[APP_NAME].deployments[DEPLOYMENT_NAME]
    return sum(number for state, number in found.replica_states.items() if state == "RUNNING")


@pytest.mark.usefixtures("ray_cluster")
def test_requests_go_straight_to_replicas_and_everything_stays_bounded(tmp_path: Path) -> None:
    """A second a token and one row: no text is ever finished here, and who is not taken out keeps the model."""
    one_row = {"engine": {"max_rows": 1}, "replica": {"max_waiting": 1}, "api": {"max_body_bytes": 20_000}}
    with job(tmp_path, slow(1.0), **one_row) as port:
        _check_front(port)
        with client_of(port) as client, client_of(port) as second:
            with client_of(port) as first:
                stays = first.stream("explanation", **ASK)
                assert isinstance(next(stays), Token), "it comes while the text is written"
                with pytest.raises(DeadlineError):
                    client.generate("explanation", **ASK | {"user_id": "user-0004"}, timeout_ms=700)
                _check_full(port)
            del stays  # the client has left
            comes = second.stream("explanation", **ASK | {"user_id": "user-0006"})
            assert isinstance(next(comes), Token), "its row is free for the next one"
            _check_problems(port, client)


def _check_front(port: int) -> None:
    process, _ = listener_of(port)
    assert process.name() == "haproxy"
    config = Path(next(word for word in process.cmdline() if word.endswith("haproxy.cfg")))
    assert stat.S_IMODE(config.parent.parent.stat().st_mode) == 0o700, "its admin socket is for nobody else"
    assert f"stats socket {config.parent}/" in config.read_text(encoding="utf-8")

    def servers() -> list[str]:
        return re.findall(rf"server \S+{DEPLOYMENT_NAME}\S+ 127\.0\.0\.1:(\d+) ", config.read_text(encoding="utf-8"))

    wait_until(
        lambda: len(servers()) == 1, "one server"
    )  # until it knows of the replica, requests go through Serve's own proxy
    (replica,) = servers()
    served_by, address = listener_of(int(replica))
    assert address == "127.0.0.1", "as api.host says"
    assert served_by.name() != "haproxy", "the control"
    direct, through = (
        httpx2.get(f"http://127.0.0.1:{at}/v1/models", headers={"Authorization": f"Bearer {TOKENS[0]}"}).json()
        for at in (int(replica), port)
    )
    assert direct["replica"] == through["replica"] == f"{direct['replica'].split(':')[0]}:{served_by.pid}"


def _check_full(port: int) -> None:
    """While one text is written, one may wait; of six more the others are told to come again."""

    def ask(number: int) -> ServiceError:
        with client_of(port) as client, pytest.raises((DeadlineError, TooManyRequestsError)) as refused:
            client.generate("explanation", **ASK | {"user_id": f"user-{number:04d}"}, timeout_ms=2500)
        return refused.value

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(ask, range(3, 9)))
    full = [error for error in found if isinstance(error, TooManyRequestsError)]
    assert 1 <= len(full) <= 5, "one waited"
    assert {error.code for error in full} == {"queue_full"}
    assert all(error.retry_after_s for error in full)


def _check_problems(port: int, client: Client) -> None:
    with pytest.raises(InvalidRequestError) as large:
        client.generate("headline", content={"body": "b" * 30_000, "language": "en"}, user_id="user-0003")
    assert (large.value.status, large.value.code) == (413, "body_too_large")
    url = f"http://127.0.0.1:{port}"
    refused = httpx2.get(f"{url}/v1/models")
    assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
    assert refused.headers["www-authenticate"] == "Bearer"
    for path in ("/healthz", "/readyz", "/-/healthz"):
        assert httpx2.get(f"{url}{path}").status_code == 200


@pytest.mark.skipif(not IS_LONG, reason="takes 35 s, most of it Ray's own")
@pytest.mark.usefixtures("ray_cluster")
def test_replicas_come_from_zero_and_go_and_no_request_fails(tmp_path: Path) -> None:
    replica = {
        "min_replicas": 0, "max_replicas": 2, "target_ongoing_requests": 2,
        "look_back_s": 1.5, "upscale_delay_s": 0, "downscale_delay_s": 1, "drain_s": 20,
    }  # fmt: skip
    workers, url = {"num_cpus": 0.5}, ""
    with job(tmp_path, slow(0.02), replica=replica, workers=workers) as port:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: num_replicas() == 0, "no replica")
        assert httpx2.get(f"{url}/-/healthz").status_code == 200, "the way in is there"
        with client_of(port) as client:
            cold = client.generate("headline", **ASK, timeout_ms=60_000)
            assert cold.status is Status.OK, "answered by a replica that was started for it"
            over, seen, most = threading.Event(), list[GenerationAnswer](), 0

            def ask(number: int) -> None:
                with client_of(port) as own:
                    while not over.is_set():
                        user_id = f"user-{3 + number % 5:04d}"
                        seen.append(own.generate("headline", **ASK | {"user_id": user_id}, timeout_ms=60_000))

            with ThreadPoolExecutor(8) as pool:
                asking = [pool.submit(ask, number) for number in range(8)]
                with suppress(AssertionError):
                    wait_until(lambda: num_replicas() == 2, "two replicas")
                most = num_replicas()
                wanted = len(seen) + 40
                wait_until(lambda: len(seen) >= wanted, "answers")
                over.set()
                for one in asking:
                    one.result()  # raises what failed
            assert most == 2
            assert {answer.status for answer in seen} == {Status.OK}
            assert len({answer.text for answer in seen if answer.user_id == ASK["user_id"]}) == 1
            wait_until(lambda: num_replicas() == 0, "no replica")
            again = client.generate("headline", **ASK, timeout_ms=60_000)
            assert (again.text, again.fingerprint) == (cold.text, cold.fingerprint)


# -- what a Ray of our own is started with -----------------------------------------------------------------------------


def test_the_environment_is_set_for_the_while_and_what_was_there_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_HAPROXY_STATS_PORT", "8404")
    before = dict(os.environ)
    with front_of_local_ray():
        added = {name: value for name, value in os.environ.items() if before.get(name) != value}
        assert FLAGS.items() <= added.items()
        assert "RAY_SERVE_HAPROXY_STATS_PORT" not in added, "the user's own choice"
        folder = Path(added["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert len(f"{folder}/{'n' * 56}/admin.sock.1234567.tmp") <= 107, "what a socket's name may have"
    assert dict(os.environ) == before
    assert not folder.exists()


def test_a_port_that_somebody_has_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"api\.port {port}"):
            require_free_port("127.0.0.1", port)
    require_free_port("127.0.0.1", port)  # the control


@pytest.mark.parametrize("host", ["nosuchhost.invalid", "192.0.2.1"])
def test_a_host_that_is_not_this_machine_is_not_called_a_port_in_use(host: str) -> None:
    with pytest.raises(ConfigError, match=rf"api\.host '{host}'"):
        require_free_port(host, unused_ports(1)[0])


def test_unused_ports_are_none_that_somebody_has_or_is_given_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    linux_gives = range(32_768, 61_000)  # net.ipv4.ip_local_port_range where nobody has set it
    assert not set(e2p_ray.serve.front._QUIET_PORTS) & set(linux_gives)
    monkeypatch.setattr(e2p_ray.serve.front, "_QUIET_PORTS", unused_ports(9))
    first, second = unused_ports(2), unused_ports(9)
    assert set(first) < set(second), "the control: a port that nobody has may be told twice"
    with socket.create_server(("127.0.0.1", first[0])), socket.create_server(("", first[1])):
        assert set(unused_ports(7)) == set(second) - set(first)
        with pytest.raises(ConfigError, match=r"8 ports of .* 7 are free"):
            unused_ports(8)


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
def test_haproxy_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    sleep = shutil.which("sleep")
    assert sleep is not None
    folder = tmp_path / "a b's"  # as a venv's may be
    folder.mkdir()
    sleep = str(shutil.copy(sleep, folder))
    start = "import subprocess, sys; print(subprocess.Popen([sys.argv[1], '600']).pid, flush=True); sys.stdin.read()"
    for program, is_left in ((_mortal(sleep, tmp_path), False), (sleep, True)):
        with subprocess.Popen(
            [sys.executable, "-c", start, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as parent:
            assert parent.stdout is not None
            child = psutil.Process(int(parent.stdout.readline()))
            wait_until(partial(runs_sleep, child), "the program runs")
            parent.kill()
        if is_left:
            assert child.is_running(), "the control: another program stays"
            child.kill()
        else:
            wait_until(partial(has_ended, child), "its end")


def runs_sleep(process: psutil.Process) -> bool:
    return bool(process.name() == "sleep")


def has_ended(process: psutil.Process) -> bool:
    return not psutil.pid_exists(process.pid) or process.status() == "zombie"

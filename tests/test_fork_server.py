"""Workers forked from a process that has imported what they need are as those are that a raylet begins itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from ray._common.utils import get_ray_address_file

from e2p_ray import forked_worker
from e2p_ray.config import JobConfig
from e2p_ray.engine_process import engine_forks
from e2p_ray.fork_server import fork_server
from tests.chaos.conservation import assert_conserved
from tests.chaos.real_job import write_real_job
from tests.test_jobs import expected_keys
from tests.waiting import wait_until

# Its server shall import these modules; what a worker of it is, with and without.
_SESSION = """
import json, os, random, resource, signal, sys, uuid
from contextlib import nullcontext
import numpy as np
import ray
from e2p_ray.fork_server import fork_server
from e2p_ray.ray_session import ray_session

@ray.remote
class Seen:
    def process(self):
        import psutil
        process = psutil.Process()
        return {
            "pid": process.pid,
            "parent": " ".join(process.parent().cmdline()),
            "has_torch": "torch" in sys.modules,
            "arguments": [word for word in sys.argv if not word.startswith("--")],
            "path": sys.path,
            "folder": os.getcwd(),
            "variables": {name: value for name, value in os.environ.items() if name != "RAY_RAYLET_PID"},
            "blocked_signals": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
            "children_are_waited_for": signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL,
            "oom_score": open("/proc/self/oom_score_adj").read(),
            "max_files": resource.getrlimit(resource.RLIMIT_NOFILE),
            "niceness": os.getpriority(os.PRIO_PROCESS, 0),
            "leads_its_group": os.getpgid(0) == os.getpid(),
            "stdin": os.readlink("/proc/self/fd/0"),
            "random": [random.random(), np.random.rand(), uuid.uuid4().hex, ray.ObjectRef.from_random().hex()],
        }

    def die(self):
        os._exit(1)

def ended(actor):
    try:
        ray.get(actor.die.remote())
    except ray.exceptions.RayActorError:
        return True

with (
    fork_server(sys.argv[1:], {}) if sys.argv[1:] else nullcontext({}) as forks,
    ray_session(None, variables={"E2P_X": "1"}, forks=forks),
):
    first, second = Seen.remote(), Seen.remote()
    seen = ray.get([first.process.remote(), second.process.remote()])
    has_ended = ended(first)
    # Neither the death of another one nor that of the server is its own; who comes later is begun without a server.
    seen.append(ray.get(second.process.remote()))
    import psutil
    for child in psutil.Process().children():
        if child.status() != psutil.STATUS_ZOMBIE and "e2p_ray.fork_server" in child.cmdline():
            child.kill()
            child.wait()
    seen.append(ray.get(second.process.remote()))
    seen.append(ray.get(Seen.remote().process.remote()))
    print(json.dumps([has_ended, seen]))
"""


def workers_seen(*modules: str) -> tuple[bool, list[dict[str, Any]]]:
    """Whether the first worker has ended as asked; what the workers of a Ray of its own are."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "E2P_DEBUG")}
    few_files = ["bash", "-c", 'ulimit -S -n 1024 && exec "$@"', "-"]  # Ray has it raised for its processes
    command = [*few_files, sys.executable, "-c", _SESSION, *modules]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    has_ended, seen = json.loads(ended.stdout.splitlines()[-1])
    return has_ended, seen


def without_its_own(seen: dict[str, Any]) -> dict[str, Any]:
    """What two workers may have in common."""
    return {name: value for name, value in seen.items() if name not in ("pid", "parent", "has_torch", "random")}


def test_a_forked_worker_is_as_a_raylet_begins_one_but_has_imported_already() -> None:
    has_ended, (first, second, later, alone, begun) = workers_seen("torch")
    _, (other, *_) = workers_seen()
    assert has_ended
    for forked in (first, second):
        assert forked["has_torch"]
        assert "fork_server" in forked["parent"]
        assert without_its_own(forked) == without_its_own(other)
    assert not set(first["random"]) & set(second["random"])
    assert later["pid"] == alone["pid"] == second["pid"]
    for control in (begun, other):
        assert not control["has_torch"]
        assert "raylet" in control["parent"]
    assert without_its_own(begun) == without_its_own(other)
    assert other["variables"]["E2P_X"] == "1"


@pytest.mark.parametrize("modules", [("no_such_module",), ("torch", "ray")])
def test_where_the_server_cannot_import_workers_begin_without_it(modules: tuple[str, ...]) -> None:
    _, (first, *_) = workers_seen(*modules)
    assert not first["has_torch"]
    assert "raylet" in first["parent"]


def test_who_has_given_up_waiting_gets_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_to_come.py").write_text("import time; time.sleep(2)")
    (tmp_path / "script.py").write_text("import pathlib, sys; pathlib.Path(sys.argv[1]).touch()")

    def ask(name: str, max_wait_s: float) -> None:
        monkeypatch.setattr(forked_worker, "_MAX_WAIT_S", max_wait_s)
        words = [str(tmp_path / "script.py"), str(tmp_path / name)]
        forked_worker.ask(path, forked_worker.Order(words, dict(os.environ), str(tmp_path), [], "0", [64, 64]))

    with fork_server(["slow_to_come"], {"PYTHONPATH": str(tmp_path)}) as found:
        (path,) = found.values()
        wait_until(Path(path).exists, "it listens")
        with pytest.raises(TimeoutError):
            ask("first", 0.2)
        ask("second", 30)
        wait_until((tmp_path / "second").exists, "the control")
    assert not (tmp_path / "first").exists()


_SERVER = """
import sys, time
from e2p_ray.fork_server import fork_server
with fork_server([], {}) as found:
    print(*found.values(), flush=True)
    time.sleep(600)
"""


def test_a_server_ends_with_whoever_began_it() -> None:
    with subprocess.Popen([sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        path = Path(job.stdout.readline().strip())
        wait_until(path.exists, "it listens")
        (server,) = psutil.Process(job.pid).children()
        assert server.is_running(), "the control"
        job.kill()
    wait_until(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE, "it ends")
    assert not path.parent.exists()


# A server for which there is no room for another process.
_FULL = """
import os, sys
from e2p_ray import fork_server
def fork():
    raise BlockingIOError("Resource temporarily unavailable")
os.fork = fork
fork_server.main(sys.argv[1], [])
"""


def test_who_cannot_be_given_a_process_is_told_so_and_is_a_worker_itself(tmp_path: Path) -> None:
    path = tmp_path / "server" / "socket"
    path.parent.mkdir()
    order = forked_worker.Order([], {}, str(tmp_path), [], "", [64, 64])
    with subprocess.Popen([sys.executable, "-c", _FULL, str(path)], stdin=subprocess.PIPE) as server:
        wait_until(path.exists, "it listens")
        num_files = set[int]()
        for _ in range(3):
            with pytest.raises(ConnectionError, match="has ended"):
                forked_worker.ask(str(path), order)
            num_files.add(len(os.listdir(f"/proc/{server.pid}/fd")))
        assert len(num_files) == 1, "it keeps none of the files it was sent"
        server.communicate()


def test_a_server_leaves_nothing() -> None:
    before = set(psutil.Process().children())
    with fork_server([], {}) as found:
        (path,) = map(Path, found.values())
        wait_until(path.exists, "it listens")
        assert set(psutil.Process().children()) - before, "the control"
    assert not path.parent.exists()
    assert not set(psutil.Process().children()) - before


def test_processes_are_forked_for_a_ray_of_ones_own_on_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def has_server(**values: Any) -> bool:
        inputs = {f"{name}_uri": "s3://b/t" for name in ("users", "contents", "candidates")}
        given = {"inputs": inputs, "base_model": {"uri": "m"}, "projector": {"uri": "p"}, "output": {"uri": "o"}}
        tasks = {"headline": {"prompts": {"default": {"content": "{body}"}}}}
        with engine_forks(JobConfig.model_validate({**given, "tasks": tasks, **values})) as forks:
            return bool(forks)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert has_server()
    assert not has_server(workers={"num_gpus": 1})
    assert not has_server(engine={"kind": "vllm"})
    assert not has_server(workers={"ray_address": "auto"})
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert not has_server()
    monkeypatch.delenv("RAY_ADDRESS")
    remembered = Path(get_ray_address_file(None))
    remembered.parent.mkdir()
    remembered.touch()
    assert not has_server(), "`ray start` has left one"
    assert has_server(workers={"ray_address": "local"})
    remembered.unlink()
    assert has_server(), "the control"
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    assert not has_server()


def test_the_worker_of_a_job_on_a_ray_of_its_own_is_forked(tmp_path: Path) -> None:
    config = write_real_job(tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "jobs.generate", "--config", str(tmp_path / "job.yaml")]
    is_forked: dict[int, bool] = {}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
        while job.poll() is None:
            with suppress(psutil.Error):  # one of them has ended meanwhile
                for child in psutil.Process(job.pid).children(recursive=True):
                    parent = child.parent()
                    if parent is not None and any("MapWorker" in word for word in child.cmdline()):
                        # As seen first: a worker that ends after the server has another parent in its last moments.
                        is_forked.setdefault(child.pid, "e2p_ray.fork_server" in parent.cmdline())
            time.sleep(0.05)
    assert job.returncode == 0
    assert set(is_forked.values()) == {True}
    assert_conserved(config, expected_keys(20))

"""A Ray that a job starts has what the job needs and nothing for onlookers; its workers have the variables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray._private import services

from e2p_ray import idle_agent
from e2p_ray.errors import ConfigError
from e2p_ray.ray_session import in_place, ray_session, start_ray
from tests.waiting import wait_until

# A process of its own: the one of the tests has a Ray.
_SESSION = """
import json, os, sys
import psutil, ray
from e2p_ray.ray_session import ray_session

@ray.remote
def seen():
    return [os.environ.get(name) for name in variables]

variables = {"E2P_X": "1", "OMP_NUM_THREADS": "3"}
before = [os.environ.get(name) for name in variables]
with ray_session(None, include_dashboard=sys.argv[1] == "dashboard", variables=variables) as all_have_them:
    processes = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    is_same = [os.environ.get(name) for name in variables] == before
    print(json.dumps([all_have_them, ray.get(seen.remote()), processes, is_same]))
"""


def session(kind: str) -> tuple[bool, list[str | None], str, bool]:
    """Whether all workers have the variables, what one has, all processes, whether the driver has its own as before."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    ended = subprocess.run([sys.executable, "-c", _SESSION, kind], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    all_have_them, seen, processes, is_same = json.loads(ended.stdout.splitlines()[-1])
    return all_have_them, seen, "\n".join(processes), is_same


@pytest.mark.parametrize("kind", ["job", "dashboard"])
def test_workers_of_a_ray_that_is_started_have_the_variables_and_nothing_runs_that_nobody_looks_at(kind: str) -> None:
    all_have_them, seen, processes, driver_has_its_own = session(kind)
    assert all_have_them
    assert seen == ["1", "3"]
    assert driver_has_its_own
    assert "raylet" in processes
    assert ("idle_agent.py" in processes) == (kind == "job")
    for name in ("dashboard/dashboard.py", "monitor.py", "log_monitor.py", "DashboardAgent"):
        assert (name in processes) == (kind == "dashboard"), f"{name} in\n{processes}"


_RAYLET = """
import os, subprocess, sys, time
agent = [sys.executable, sys.argv[1], "agent.py", "--session-dir=" + sys.argv[2], "--node-id=abc", "--minimal"]
print(subprocess.Popen(agent, env={**os.environ, "RAY_RAYLET_PID": str(os.getpid())}).pid, flush=True)
time.sleep(600)
"""


def test_the_idle_agent_says_that_nothing_listens_and_ends_with_its_raylet(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _RAYLET, idle_agent.__file__, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as raylet:
        assert raylet.stdout is not None
        agent = psutil.Process(int(raylet.stdout.readline()))
        names = {f"{name}_port_abc" for name in ("metrics_agent", "metrics_export", "dashboard_agent_listen")}
        wait_until(lambda: {path.name for path in tmp_path.iterdir()} == names, "its files are there")
        assert {path.read_text() for path in tmp_path.iterdir()} == {"-1"}
        assert agent.is_running(), "the control"
        raylet.kill()
    wait_until(lambda: not agent.is_running() or agent.status() == psutil.STATUS_ZOMBIE, "it ends")


@pytest.mark.usefixtures("ray_cluster")
def test_workers_of_a_ray_that_was_found_have_to_be_given_them() -> None:
    with ray_session(None, variables={"E2P_X": "1"}) as all_have_them:
        assert not all_have_them
    assert "E2P_X" not in os.environ


@pytest.mark.parametrize(
    ("address", "variable", "said"),
    [
        ("localhost", None, r"workers\.ray_address 'localhost': .*Invalid address format"),
        ("", None, r"workers\.ray_address '': .*Invalid address format"),
        (None, "nonsense", r"RAY_ADDRESS 'nonsense': .*Invalid address format"),
        ("10.0.0.5:6379", "10.0.0.6:6379", r"workers\.ray_address '10\.0\.0\.5:6379': no Ray .*Failed to connect"),
        (None, "10.0.0.6:6379", r"RAY_ADDRESS '10\.0\.0\.6:6379': no Ray .*Failed to connect"),
        ("auto", "10.0.0.6:6379", r"RAY_ADDRESS '10\.0\.0\.6:6379': no Ray .*Failed to connect"),
        ("auto", None, r"no Ray is named \(workers\.ray_address, RAY_ADDRESS\), and of this machine: no Ray"),
        (None, None, r"last started on this machine \(`ray stop` .*Failed to connect"),
    ],
)
def test_an_address_without_a_ray_is_named_with_who_gave_it(
    address: str | None, variable: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)

    def init(address: Any, **_: object) -> None:
        """Ray's own, up to where it would wait for an answer."""
        found = services.canonicalize_bootstrap_address(address)
        raise ConnectionError(f"Failed to connect to Ray cluster at {found}")

    with in_place([(ray, "init", init)]), pytest.raises(ConfigError, match=said):
        start_ray(address)


def test_an_error_of_something_else_than_an_address_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def init(**_: object) -> None:
        raise ValueError("of what is done meanwhile")

    with in_place([(ray, "init", init)]), pytest.raises(ValueError, match="meanwhile"):
        start_ray(None)


_BATCH = """
import json, sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
import psutil
from e2p_ray.batch import pool, run_batch
from tests.small_job import fake_engine
from tests.test_batch import opened

if sys.argv[2] == "theirs":
    pool.no_actors_for_others = nullcontext
job, seen = opened(Path(sys.argv[1]), workers={"min_size": 1, "max_size": 1}), set()

def look(_):
    seen.update(" ".join(child.cmdline()).strip() for child in psutil.Process().children(recursive=True))

summary = run_batch(job.config, job.storage, job.run, engine_factory=fake_engine, on_progress=look)
print(json.dumps([summary.num_done == len(job.run.shard_ids), sorted(seen)]))
"""


@pytest.mark.parametrize("whose", ["own", "theirs"])
def test_a_job_on_a_ray_of_its_own_has_no_actors_of_ray_data_for_others(tmp_path: Path, whose: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", _BATCH, str(tmp_path), whose]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "Error occurred" not in ended.stderr
    is_done, processes = json.loads(ended.stdout.splitlines()[-1])
    assert is_done
    assert any("ShardWorker" in process for process in processes)
    # Without, they are there: another version of Ray may have other names for them.
    for name in ("_StatsActor", "_AutoscalingCoordinatorActor", "ActorLocationTracker"):
        assert any(name in process for process in processes) == (whose == "theirs"), f"{name} in {processes}"

"""Jobs on clusters: the schedule's RayJob through an API server, and `ray job submit` to a real Ray with a token."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from deltalake import DeltaTable

from e2p_ray.errors import ConfigError, E2PError
from e2p_ray.serve.front import unused_ports
from jobs.cluster import main
from jobs.cluster_files import render
from jobs.cluster_settings import SETTINGS, load_settings
from jobs.cluster_submit import Api, submit
from tests.small_job import write_small_job

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "/apis/ray.io/v1/namespaces/default/rayjobs"
MANIFEST = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "e2p-generate", "namespace": "default"}}


@dataclass
class Kubernetes:
    """As much of an API server as the schedule meets."""

    url: str = ""
    objects: dict[str, dict[str, Any]] = field(default_factory=dict)
    calls: list[tuple[str, str]] = field(default_factory=list)
    num_polls_until_gone: int = 2
    forbidden: frozenset[str] = frozenset()
    has_operator: bool = True
    token: str = "token-1"

    def answer(self, method: str, path: str, token: str, body: Any) -> tuple[int, dict[str, Any]]:
        self.calls.append((method, path))
        if token != f"Bearer {self.token}":
            return 401, {"message": "Unauthorized"}
        if not self.has_operator:
            return 404, {"message": "404 page not found"}
        if method in self.forbidden:
            return 403, {"message": f"rayjobs is forbidden: cannot {method.lower()}"}
        if method == "POST":
            name = f"{path}/{body['metadata']['name']}"
            if name in self.objects:
                return 409, {"message": "already exists"}
            self.objects[name] = body
            return 201, body
        if path not in self.objects:
            return 404, {"message": "not found"}
        found = self.objects[path]
        if method == "DELETE":
            assert body == {"propagationPolicy": "Foreground"}
            found["deleted"] = 0
        elif "deleted" in found:
            found["deleted"] += 1
            if found["deleted"] >= self.num_polls_until_gone:
                del self.objects[path]
        return 200, found


@pytest.fixture
def kubernetes() -> Iterator[Kubernetes]:
    state = Kubernetes()

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            code, found = state.answer(self.command, self.path, self.headers["Authorization"], body)
            data = json.dumps(found).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = _do  # noqa: N815 - the names that http.server calls

        def log_message(self, format: str, *args: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "rayjob.yaml"
    path.write_text(yaml.safe_dump(MANIFEST), encoding="utf-8")
    (tmp_path / "token").write_text("token-1\n", encoding="utf-8")
    return path


def api(kubernetes: Kubernetes, manifest: Path) -> Api:
    return Api(kubernetes.url, manifest.parent, poll_s=0.001)


def test_the_first_run_is_made(kubernetes: Kubernetes, manifest: Path) -> None:
    assert submit(manifest, api(kubernetes, manifest)) == "e2p-generate is submitted"
    assert kubernetes.objects == {f"{FOLDER}/e2p-generate": MANIFEST}


@pytest.mark.parametrize("status", ["Running", "Initializing", "Retrying", "Waiting", ""])
def test_a_run_at_work_is_left_alone(kubernetes: Kubernetes, manifest: Path, status: str) -> None:
    at_work = {**MANIFEST, "status": {"jobDeploymentStatus": status}}
    kubernetes.objects[f"{FOLDER}/e2p-generate"] = at_work
    assert "still at work" in submit(manifest, api(kubernetes, manifest))
    assert kubernetes.objects == {f"{FOLDER}/e2p-generate": at_work}
    assert [method for method, _ in kubernetes.calls] == ["GET"]


@pytest.mark.parametrize("status", ["Complete", "Failed"])
def test_a_run_that_has_ended_makes_room(kubernetes: Kubernetes, manifest: Path, status: str) -> None:
    kubernetes.objects[f"{FOLDER}/e2p-generate"] = {**MANIFEST, "status": {"jobDeploymentStatus": status}}
    assert submit(manifest, api(kubernetes, manifest)) == "e2p-generate is submitted"
    assert kubernetes.objects == {f"{FOLDER}/e2p-generate": MANIFEST}
    assert [method for method, _ in kubernetes.calls] == ["GET", "DELETE", "GET", "GET", "GET", "POST"]


def test_the_role_of_the_schedule_allows_these_calls_and_no_others(
    kubernetes: Kubernetes, manifest: Path, tmp_path: Path
) -> None:
    kubernetes.objects[f"{FOLDER}/e2p-generate"] = {**MANIFEST, "status": {"jobDeploymentStatus": "Complete"}}
    submit(manifest, api(kubernetes, manifest))
    verbs = {"GET": "get", "POST": "create", "DELETE": "delete"}
    config, _ = write_small_job(tmp_path)
    values = json.loads(config.model_dump_json())
    for section in ("inputs", "output", "projector"):
        values[section] = {name: f"s3://bucket/{name}" for name in values[section]}
    path = tmp_path / "on-s3.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    documents = yaml.safe_load_all(render("schedule", load_settings(SETTINGS), path))
    (role,) = [document for document in documents if document["kind"] == "Role"]
    assert role["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["get", "create", "delete"]},
    ]
    assert {verbs[method] for method, _ in kubernetes.calls} == set(role["rules"][0]["verbs"])


def test_control_a_refusal_is_told_and_nothing_is_lost(kubernetes: Kubernetes, manifest: Path) -> None:
    ended = {**MANIFEST, "status": {"jobDeploymentStatus": "Complete"}}
    kubernetes.objects[f"{FOLDER}/e2p-generate"] = ended
    kubernetes.forbidden = frozenset({"DELETE"})
    with pytest.raises(E2PError, match="403: rayjobs is forbidden"):
        submit(manifest, api(kubernetes, manifest))
    assert kubernetes.objects == {f"{FOLDER}/e2p-generate": ended}


def test_without_the_operator_nothing_is_said_to_be_submitted(kubernetes: Kubernetes, manifest: Path) -> None:
    kubernetes.has_operator = False
    with pytest.raises(E2PError, match=f"POST {FOLDER}: .* 404: .* Is the KubeRay operator installed, with its CRDs"):
        submit(manifest, api(kubernetes, manifest))
    assert [method for method, _ in kubernetes.calls] == ["GET", "POST"]


def test_errors_are_messages_with_an_exit_code(
    kubernetes: Kubernetes, manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kubernetes.token = "token-2"
    words = ["submit", str(manifest), "--account", str(manifest.parent)]
    assert main([*words, "--server", kubernetes.url]) == 1
    assert main([*words, "--server", "http://127.0.0.1:9"]) == 1
    said = capsys.readouterr().err
    assert "401: Unauthorized" in said
    assert "does not answer" in said
    assert "token-" not in said
    manifest.write_text("- no RayJob", encoding="utf-8")
    with pytest.raises(ConfigError, match="not a RayJob"):
        submit(manifest, api(kubernetes, manifest))
    manifest.write_bytes("名前: x".encode("shift_jis"))
    with pytest.raises(ConfigError, match="not a RayJob"):
        submit(manifest, api(kubernetes, manifest))


def test_outside_a_pod_it_says_so(manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", str(manifest), "--account", str(tmp_path / "nothing")]) == 2
    said = capsys.readouterr().err
    assert "nothing has no token and ca.crt that can be read (No such file or directory)" in said
    assert "kubectl create -f" in said
    assert main(["submit", str(manifest), "--account", str(manifest.parent)]) == 2, "a token, but no ca.crt"
    assert "unexpected" not in capsys.readouterr().err
    assert main(["submit", str(manifest), "--account", str(manifest.parent), "--server", "localhost:8001"]) == 2
    assert "--server 'localhost:8001': not http://HOST:PORT" in capsys.readouterr().err


def test_a_server_of_something_else_is_told(manifest: Path) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, format: str, *args: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        with pytest.raises(E2PError, match="answers as no Kubernetes does"):
            submit(manifest, Api(f"http://127.0.0.1:{server.server_address[1]}", manifest.parent))
        server.shutdown()


# `ray job submit`


@contextlib.contextmanager
def ray_with_token(folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """The dashboard's address of a Ray that was started as on a cluster, apart from the other tests' one."""
    port, dashboard, agent = unused_ports(3)
    ports = {"port": port, "dashboard-port": dashboard, "dashboard-agent-listen-port": agent}
    sizes = {"num-cpus": 2, "object-store-memory": 200 * 2**20}
    words = [f"--{name}={value}" for name, value in (ports | sizes).items()]
    ray = str(Path(sys.executable).parent / "ray")
    short = tempfile.mkdtemp(prefix="r")  # Ray puts sockets into it, whose paths may have 107 bytes
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(
            [ray, "start", "--head", "--block", "--dashboard-host=127.0.0.1", f"--temp-dir={short}", *words],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        # Asked to end, it takes half a minute (measured) of which nothing is tested.
        of_head = psutil.Process(head.pid)
        processes = [of_head, *of_head.children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait()
        psutil.wait_procs(processes[1:], 30)
        shutil.rmtree(short, ignore_errors=True)


def first_answer(address: str) -> int:
    """The status that a stranger gets from the dashboard, as soon as it is there."""
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"{address}/api/version", timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            time.sleep(0.2)
    raise AssertionError("no dashboard")


def answered(address: str, token: str, job: dict[str, str] | None = None) -> int:
    """The status that the list of jobs gets with this token, or a job that is submitted as `ray job submit` does it."""
    request = urllib.request.Request(f"{address}/api/jobs/", None if job is None else json.dumps(job).encode())
    request.add_header("Authorization", f"Bearer {token}")
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_job_from_a_laptop_runs_and_publishes_and_strangers_are_refused(
    tmp_path: Path,
) -> None:
    config, path = write_small_job(tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 32, "RAY_USAGE_STATS_ENABLED": "0"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    with ray_with_token(tmp_path, environment) as address:
        assert first_answer(address) == 401
        words = ["ray", "job", "submit", "--address", address, "--working-dir", ".", "--"]
        words += ["python", "-m", "tests.fake_generate", "--config", str(path)]
        mark = tmp_path / "a stranger's job ran"
        assert answered(address, "b" * 32, {"entrypoint": f'touch "{mark}"'}) == 403
        assert answered(address, environment["RAY_AUTH_TOKEN"]) == 200, "control: it is the token that is wrong"
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert "a" * 32 not in done.stdout + done.stderr
    table = DeltaTable(config.output.table_uri)
    assert table.version() == 0
    assert "published: " in done.stdout
    assert not mark.exists()

"""The same API hosted by a real Ray Serve: requests, streams, swaps without a restart, and the job around it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx2
import psutil
import pytest
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

import jobs.serve
from e2p_ray.config import JobConfig, ServeConfig, load_config
from e2p_ray.engine.manifest import ProjectorManifest, read_manifest
from e2p_ray.errors import ConfigError, InputError
from e2p_ray.serve.app import build, serve_file
from e2p_ray.serve.client import Client, DeadlineError, InvalidRequestError, Token, UnauthorizedError, UnavailableError
from e2p_ray.serve.front import unused_ports
from e2p_ray.serve.messages import GenerationAnswer, ModelsAnswer
from e2p_ray.storage import Storage
from jobs.cli import run_job
from jobs.serve import JOB, _failed, _set_by_signals, serve_until
from tests.plan_world import with_broken
from tests.serve_world import TOKENS, serve_config, slow
from tests.small_job import write_small_job
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parent.parent


def until(client: Client, holds: Callable[[ModelsAnswer], bool], timeout_s: float = 90.0) -> ModelsAnswer:
    """What is served, once it is so."""
    over_s = time.monotonic() + timeout_s
    while True:
        try:
            models = client.models()
            if holds(models):
                return models
        except (UnavailableError, InvalidRequestError):
            pass
        assert time.monotonic() < over_s, "not in time"
        time.sleep(0.1)


def deploy(config: ServeConfig, path: Path, projector_uri: str) -> None:
    """What `serve deploy` does with the printed file, with our own builder and this projector in it."""
    values = serve_file(config, str(path))
    (found,) = values["applications"]
    found["import_path"] = "tests.serve_world:build"
    found["deployments"][0]["user_config"]["projector_uri"] = projector_uri
    client = _get_global_client()
    assert client is not None, "Serve runs"
    client.deploy_apps(ServeDeploySchema.model_validate(values))


def other_projector(config: JobConfig, uri: str) -> str:
    """An artifact for the same base model; returns its id."""
    old = read_manifest(Storage(), config.projector.uri)
    names = ("embedding_dim", "embedding_space", "d_model", "base_model_id", "tokenizer_hash")
    made = ProjectorManifest(**{name: getattr(old, name) for name in names}, output_rms=2.0).with_files({})
    Storage().write_bytes(f"{uri}/config.json", made.to_json().encode())
    return made.projector_id


def check_answers(client: Client) -> GenerationAnswer:
    answer = client.generate("headline", user_id="user-0003", content_id="content-001")
    *tokens, done = client.stream("headline", user_id="user-0003", content_id="content-001")
    assert isinstance(done, GenerationAnswer)
    assert (done.text, done.fingerprint) == (answer.text, answer.fingerprint)
    assert "".join(token.text for token in tokens if isinstance(token, Token)) == done.text
    assert len(tokens) > 2, "the control: it came in parts"
    with pytest.raises(DeadlineError):
        client.generate("headline", user_id="user-0003", content_id="content-001", timeout_ms=20)
    return answer


@pytest.mark.usefixtures("ray_cluster")
def test_a_real_serve_answers_streams_swaps_and_stops(tmp_path: Path) -> None:
    """The job starts it; then it is deployed from a file, which puts new replicas there, and the file changes."""
    config, path = write_small_job(tmp_path, num_users=12)
    (port,), stop = unused_ports(1), threading.Event()
    served = serve_config(config, api={"port": port})
    values = yaml.safe_load(path.read_text(encoding="utf-8")) | {"api": {"tokens": list(TOKENS), "port": port}}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    uris = [config.projector.uri, str(tmp_path / "projector-2"), str(tmp_path / "nothing")]
    other_id = other_projector(config, uris[1])
    job = threading.Thread(target=serve_until, args=(served, stop), kwargs={"engine_factory": slow(0.01)})
    job.start()
    try:
        with Client(f"http://127.0.0.1:{port}", TOKENS[0], timeout_s=60) as client:
            started = until(client, lambda models: True)
            answer = check_answers(client)
            with Client(f"http://127.0.0.1:{port}") as nobody, pytest.raises(UnauthorizedError):
                nobody.models()
            deploy(served, path, uris[0])
            first = until(client, lambda models: models.replica != started.replica)
            assert first.projector_id == started.projector_id != other_id
            deploy(served, path, uris[1])
            second = until(client, lambda models: models.projector_id == other_id)
            assert second.replica == first.replica, "the same process"
            swapped = check_answers(client)
            assert swapped.projector_id == other_id
            assert swapped.fingerprint != answer.fingerprint
            deploy(served, path, uris[2])
            kept = until(client, lambda models: models.swap is not None and not models.swap.done)
            assert (kept.replica, kept.projector_id) == (first.replica, other_id)
    finally:
        stop.set()
        job.join(60)
    assert_ended(job, port)


def assert_ended(job: threading.Thread, port: int) -> None:
    """The job is over, and nobody answers where it served."""
    assert not job.is_alive()
    with Client(f"http://127.0.0.1:{port}", TOKENS[0]) as client, pytest.raises(UnavailableError):
        client.models()


@pytest.mark.usefixtures("ray_cluster")
def test_what_runs_is_finished_when_it_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # its places are the job's, whatever folder replicas have
    config, _ = write_small_job(Path("job"), num_users=6)
    (port,), stop = unused_ports(1), threading.Event()
    served = serve_config(config, api={"port": port})
    job = threading.Thread(target=serve_until, args=(served, stop), kwargs={"engine_factory": slow(1.0)})
    job.start()
    try:
        with Client(f"http://127.0.0.1:{port}", TOKENS[0], timeout_s=60) as client:
            until(client, lambda models: True)
            events = client.stream("headline", user_id="user-0003", content_id="content-001")
            assert isinstance(next(events), Token)
            stop.set()
            *tokens, done = events
            assert len(tokens) == 3, "the control: much was left to be written"
            assert isinstance(done, GenerationAnswer)
    finally:
        stop.set()
        job.join(90)
    assert_ended(job, port)


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Shop:
    """Somebody else's application."""

    def __call__(self) -> str:
        return "open"


@pytest.mark.usefixtures("ray_cluster")
def test_other_applications_of_a_cluster_s_serve_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, _ = write_small_job(tmp_path, num_users=6)
    (port, ours), stop = unused_ports(2), threading.Event()
    served = serve_config(config, api={"port": ours})
    shop = cast(Any, Shop).bind()
    serve.start(http_options={"port": port})
    try:
        serve.run(shop, name="shop", route_prefix="/shop")
        job = threading.Thread(target=serve_until, args=(served, stop), kwargs={"engine_factory": slow(0.01)})
        job.start()
        with Client(f"http://127.0.0.1:{port}", TOKENS[0], timeout_s=60) as client:
            until(client, lambda models: True)
        wait_until(lambda: f"serving on http://127.0.0.1:{port};" in capsys.readouterr().err, "where it is reached")
        stop.set()
        job.join(90)
        assert {name: app.status for name, app in serve.status().applications.items()} == {"shop": "RUNNING"}
        serve.run(shop, name="shop", route_prefix="/")
        with pytest.raises(ConfigError, match=r'Prefix / is being used by application "shop"\. .*workers\.ray_address'):
            serve_until(served, threading.Event(), engine_factory=slow(0.01))
        assert httpx2.get(f"http://127.0.0.1:{port}/").text == "open"
    finally:
        stop.set()
        serve.shutdown()  # type: ignore[no-untyped-call]


def test_the_file_for_serve_deploy_is_whole_and_holds_no_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, path = write_small_job(tmp_path, num_users=1)
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values |= {"api": {"tokens": list(TOKENS), "port": 8123}, "replica": {"min_replicas": 0, "max_replicas": 4}}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert run_job(JOB, ["--config", str(path), "--print-config", str(path)]) == 0
    printed = capsys.readouterr().out
    assert not [token for token in TOKENS if token in printed]
    schema = ServeDeploySchema.model_validate(yaml.safe_load(printed))
    (found,) = schema.applications
    assert (found.import_path, schema.http_options.port) == ("e2p_ray.serve.app:build", 8123)
    built = build(found.args)
    deployment = built._bound_deployment
    assert deployment.name == found.deployments[0].name
    scaling = deployment._deployment_config.autoscaling_config
    assert scaling is not None
    assert (scaling.min_replicas, scaling.max_replicas) == (0, 4)


def test_options_are_in_the_file_for_serve_deploy_but_no_secret_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is the projector, whose change would be another application's, with new replicas."""
    config, path = write_small_job(tmp_path, num_users=1)
    values = yaml.safe_load(path.read_text(encoding="utf-8")) | {"api": {"tokens": list(TOKENS)}}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    options = {"replica.max_replicas": "4", "replica.max_waiting": "7", "projector.uri": config.projector.uri}
    words = ["--config", str(path), "--engine.max_rows=8", "--print-config", str(path)]
    words += [word for name, value in options.items() for word in (f"--{name}", value)]
    secrets = {"api.tokens": '["a-token-of-the-command-line"]', "storage.secret_access_key": "key-of-the-command-line"}
    for given in ({}, secrets):
        said = [word for name, value in given.items() for word in (f"--{name}", value)]
        assert run_job(JOB, [*words, *said]) == 0
        printed = capsys.readouterr()
        assert "of-the-command-line" not in printed.out + printed.err
        for name in given:
            assert f"--{name} is not printed" in printed.err
        (found,) = ServeDeploySchema.model_validate(yaml.safe_load(printed.out)).applications
        assert found.args == {
            "config": str(path), "replica.max_replicas": "4", "replica.max_waiting": "7", "engine.max_rows": "8",
        }  # fmt: skip
        deployed = build(found.args)._bound_deployment._deployment_config
        assert deployed.autoscaling_config is not None
        assert (deployed.autoscaling_config.max_replicas, deployed.max_ongoing_requests) == (4, 2 * (7 + 8))


def test_what_cannot_be_served_is_refused_before_anything_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, path = write_small_job(tmp_path, num_users=1)
    monkeypatch.setattr(jobs.serve, "ray_session", lambda address: pytest.fail("Ray was started"))
    assert run_job(JOB, ["--config", str(path)]) == 2, "no tokens"
    assert "api" in capsys.readouterr().err
    monkeypatch.setenv("E2P_API__TOKENS", '["too short"]')
    assert run_job(JOB, ["--config", str(path)]) == 2
    assert "too short" not in capsys.readouterr().err
    monkeypatch.setenv("E2P_API__TOKENS", f'["{TOKENS[0]}"]')
    assert run_job(JOB, ["--config", str(path), "--engine.kind", "vllm"]) == 2
    assert "native" in capsys.readouterr().err
    assert run_job(JOB, ["--config", str(path), "--projector.uri", str(tmp_path / "nothing")]) == 2
    with pytest.raises(ConfigError, match="min_replicas"):
        run_job_config(path)
    assert config.engine.kind == "native"


def run_job_config(path: Path) -> None:
    load_config(ServeConfig, ["--config", str(path), "--replica.min_replicas", "3"], prog="test", description="")


@pytest.mark.usefixtures("ray_cluster")
def test_a_replica_that_this_machine_cannot_hold_is_refused(tmp_path: Path) -> None:
    config, _ = write_small_job(tmp_path, num_users=1)
    (port,) = unused_ports(1)
    large = serve_config(config, api={"port": port}, workers={"num_cpus": 64})
    with pytest.raises(ConfigError, match=r"num_cpus 64 .* more than this machine has"):
        serve_until(large, threading.Event())


@pytest.mark.usefixtures("ray_cluster")
def test_what_a_replica_does_not_start_for_is_said_as_the_error_that_it_is(tmp_path: Path) -> None:
    config, _ = write_small_job(tmp_path, num_users=6)
    uri = config.inputs.users_uri
    Storage().write_table(uri, with_broken(Storage().read_table(uri), "user_id", 4))
    (port,) = unused_ports(1)
    said = f"^the replicas do not start: {uri}, column 'user_id', row 4 .counted from 0.: not UTF-8. Write it anew"
    with pytest.raises(InputError, match=said):
        serve_until(serve_config(config, api={"port": port}), threading.Event(), engine_factory=slow(0.01))


def test_of_another_error_the_last_line_is_said() -> None:
    deployment = SimpleNamespace(message="It failed 3 times. Error:\nTraceback:\n  File x\nMemoryError: 1 of 2 GB\n")
    app: Any = SimpleNamespace(message="Failed to update", deployments={"generator": deployment})
    found = _failed(app)
    assert (type(found), str(found)) == (RuntimeError, "the replicas do not start: MemoryError: 1 of 2 GB")


def test_a_second_signal_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stop = threading.Event()
    with _set_by_signals(stop):
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_waits_for_a_larger_machine_says_so_and_ends_when_told(number: signal.Signals, tmp_path: Path) -> None:
    """With a Ray of its own, whose handler for SIGTERM is not the job's; as an address is named, it may grow."""
    _, path = write_small_job(tmp_path, num_users=1)
    (port,) = unused_ports(1)
    options = {"config": path, "workers.ray_address": "auto", "workers.num_cpus": 64, "api.port": port}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    env = {**os.environ, "RAY_ADDRESS": "local", "E2P_API__TOKENS": f'["{TOKENS[0]}"]'}
    said, below = tmp_path / "said", set[psutil.Process]()
    with said.open("wb") as file:
        job = subprocess.Popen([sys.executable, "-m", "jobs.serve", *words], cwd=ROOT, env=env, stderr=file)

    def serve_is_there() -> bool:
        below.update(psutil.Process(job.pid).children(recursive=True))
        return '"serve"' in said.read_text(encoding="utf-8")  # of Serve's own words: Started Serve in namespace "serve"

    try:
        wait_until(lambda: serve_is_there() or job.poll() is not None, "Serve starts", longest_s=300)
        job.send_signal(number)
        status = job.wait(120)
    finally:
        job.kill()
        left = psutil.wait_procs(below, timeout=30)[1]
        for process in left:
            process.kill()
    lines = said.read_text(encoding="utf-8").splitlines()
    assert (status, lines[-1]) == (0, "stopped"), lines
    assert lines[0].startswith("waiting: none of the cluster's 1 nodes has the 64 CPUs")
    assert not [line for line in lines if line.startswith("serving on")]
    assert len(below) > 3, "the control: it had processes of Ray"
    assert not left

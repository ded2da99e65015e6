"""Serve texts online, until Ctrl-C."""

from __future__ import annotations

import argparse
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType

import ray
import yaml
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatusOverview

from e2p_ray import errors
from e2p_ray.batch.session import check_resources
from e2p_ray.config import ServeConfig
from e2p_ray.config.options import keys
from e2p_ray.engine.manifest import load_manifest
from e2p_ray.engine_process import engine_forks
from e2p_ray.environment import names_no_cluster
from e2p_ray.errors import ConfigError, E2PError
from e2p_ray.fork_server import NO_FORKS
from e2p_ray.loaded import EngineFactory
from e2p_ray.ray_session import ray_session
from e2p_ray.serve.app import serve_file
from e2p_ray.serve.front import front_of_local_ray, require_free_port
from e2p_ray.serve.replica import APP_NAME, application
from e2p_ray.serve.service import require_native
from e2p_ray.storage import Storage
from jobs.cli import Job, main
from jobs.steps import say

_OWN_ERROR = re.compile(r"^e2p_ray\.errors\.(\w+): (.+)$", re.MULTILINE)
_LOOK_S = 0.5  # between two looks at what Serve has started; each asks its controller
_MARGIN_S = 30.0  # beyond replica.drain_s: replicas stay reachable for a while, and then they end


def serve_texts(config: ServeConfig, options: argparse.Namespace) -> None:
    """Print the file for `serve deploy`, or serve until told to stop."""
    if options.print_config is not None:
        values = serve_file(config, options.print_config, _handed_on(options.words))
        print(yaml.safe_dump(values, sort_keys=False), end="")
        return
    serve_until(config, threading.Event())


def _handed_on(words: Sequence[str]) -> dict[str, str]:
    """The command line's options that the application needs on the cluster, as `app.build` takes them.

    Not the projector, which is the deployment's own setting: another one there is swapped in, another option here is
    another application. Nor a secret, which is said.
    """
    given, rest = dict[str, str](), iter(words)
    for word in rest:
        name, equals, value = word.removeprefix("--").partition("=")
        given[name] = value if equals else next(rest)
    secrets = [".".join(path) for path, field in keys(ServeConfig) if "SecretStr" in str(field.annotation)]
    for name in [name for name in given if any(f"{secret}.".startswith(f"{name}.") for secret in secrets)]:
        say(f"--{name} is not printed, it may hold a secret: set E2P_{name.replace('.', '__').upper()} on the cluster")
        del given[name]
    return {name: value for name, value in given.items() if name not in ("config", "projector.uri")}


def serve_until(config: ServeConfig, stop: threading.Event, *, engine_factory: EngineFactory | None = None) -> None:
    """Serve on the Ray that is there, or on one of its own; requests that run are finished when it stops.

    On the main thread Ctrl-C and SIGTERM set `stop`. ConfigError where this machine cannot hold a replica; what a
    cluster lacks is said, and waited for.
    """
    require_native(config)
    load_manifest(config, Storage(config.storage))  # says what does not fit before anything is started
    # For a Ray that is started here. Its own choice, 15, lets a batch stand back; a text that is waited for should not.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if not ray.is_initialized() and names_no_cluster(config.workers.ray_address):
        require_free_port(config.api.host, config.api.port)
    # `serve deploy` talks to the dashboard.
    with (
        engine_forks(config) if engine_factory is None else nullcontext(NO_FORKS) as forks,
        front_of_local_ray(),
        ray_session(config.workers.ray_address, include_dashboard=True, forks=forks),
        _set_by_signals(stop),
    ):
        if missing := check_resources(config):
            say(f"waiting: {missing}")
        with _running_serve(config) as way_in, _deployed(config, engine_factory):
            if _comes_up(stop):
                say(f"serving on http://{way_in.host}:{way_in.port}; Ctrl-C stops it")
                stop.wait()
                say(f"finishing requests for up to {config.replica.drain_s:g} s; Ctrl-C again ends them")
    say("stopped")


@contextmanager
def _running_serve(config: ServeConfig) -> Iterator[HTTPOptions]:
    """Ray Serve, and where it listens: one that is there already keeps its place, and is there afterwards."""
    before = _get_global_client(raise_if_no_controller_running=False)
    try:
        serve.start(http_options=HTTPOptions(host=config.api.host, port=config.api.port))
        client = _get_global_client()
        assert client is not None, "it has started"
        yield client.http_config
    finally:
        if before is None and not _other_applications():
            serve.shutdown()  # type: ignore[no-untyped-call]


def _other_applications() -> set[str]:
    """Those that somebody else deployed meanwhile."""
    with suppress(RayError):
        return set(serve.status().applications) - {APP_NAME}
    return set()


@contextmanager
def _deployed(config: ServeConfig, engine_factory: EngineFactory | None) -> Iterator[None]:
    """The application, about to start; at the end it alone is taken away, once its requests are finished."""
    made = application(config.with_absolute_places(), engine_factory=engine_factory)
    target = serve.RunTarget(made, APP_NAME, "/")
    try:
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    except RayServeException as error:
        cause = error.cause if isinstance(error, RayTaskError) else error  # without its frames
        remedy = "Delete what is in the way, or serve on another cluster (workers.ray_address)"
        raise ConfigError(f"the Serve of this cluster does not take the application: {cause} {remedy}") from error
    try:
        yield
    finally:
        with suppress(RayError):  # of a Serve that has ended by itself: nothing is left to be finished
            _finish(config.replica.drain_s)


def _finish(drain_s: float) -> None:
    """Let replicas finish their requests. Serve's own end would take the way in from them first."""
    serve.delete(APP_NAME, _blocking=False)
    over_s = time.monotonic() + drain_s + _MARGIN_S
    while APP_NAME in serve.status().applications and time.monotonic() < over_s:
        time.sleep(_LOOK_S)


def _comes_up(stop: threading.Event) -> bool:
    """Wait for the application, and say what Serve says of it; False where it is to stop before."""
    said = ""
    while not stop.wait(_LOOK_S):
        app = serve.status().applications.get(APP_NAME)
        if app is None:
            continue
        if app.status == "RUNNING":
            return True
        if app.status == "DEPLOY_FAILED":
            raise _failed(app)
        now = "; ".join(found.message.partition("\n")[0] for found in app.deployments.values())  # no frames of ours
        if now not in ("", said):
            say(said := now)
    return False


def _failed(app: ApplicationStatusOverview) -> Exception:
    """Why the replicas do not start: an error of our own as what it is, although Serve only has its traceback."""
    told = "\n".join([app.message, *(found.message for found in app.deployments.values())]).rstrip()
    if not (own := _OWN_ERROR.findall(told)):
        return RuntimeError(f"the replicas do not start: {told.splitlines()[-1]}")
    name, message = own[-1]
    kind: type[E2PError] = getattr(errors, name)
    return kind.__new__(kind, f"the replicas do not start: {message}")  # past constructors that would say more


@contextmanager
def _set_by_signals(stop: threading.Event) -> Iterator[None]:
    """Within, it is set by Ctrl-C, and by the SIGTERM that a pod gets before it ends; a second one interrupts.

    Not before Ray is there: it has a handler of its own for SIGTERM, and whoever is last has it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets no other thread have handlers
        return

    def set_it(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, set_it) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--print-config",
        metavar="PATH",
        help="print the file for `serve deploy` and for a RayService instead, with PATH as the place of the\n"
        "configuration on the cluster; the other options given here are in it, but no secrets",
    )


JOB = Job(
    prog="jobs.serve",
    description="Serve texts online: the same generator as jobs.generate behind HTTP (POST /v1/generations). The\n"
    "configuration is a job's, with the sections `api`, `replica` and `tables`. What is published and current is\n"
    "looked up, the rest is written. Ctrl-C or SIGTERM finishes what runs and stops, also while it starts; a second\n"
    "one does not wait. What a cluster lacks for a replica is said and waited for; what this machine lacks is an\n"
    "error.",
    config=ServeConfig,
    call=serve_texts,
    add_options=_options,
    on_interrupt="interrupted: requests that still ran have no answer",
)


if __name__ == "__main__":
    main(JOB)

"""Processes for Ray's workers, forked from one that has imported already what they need.

torch and transformers take a worker 6 s to import (2026-11-30, a Zen 3 core): done once for all workers, and begun
before Ray is there. This is `multiprocessing.forkserver`, but for processes that a raylet begins. Ray has no such thing
(2.60), but a raylet takes any process for its worker that names itself by the id it gave. In place of Ray's script for
workers it begins `forked_worker`, which imports next to nothing and asks here for a process. For CPUs: where CUDA is at
work before a fork, it fails behind it.

Ray itself is imported behind the fork: it reads at its import which raylet has begun the process, and its random
numbers would be the same in all workers, which then made objects of the same name.
"""

from __future__ import annotations

import gc
import importlib
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from select import select
from typing import Any

from e2p_ray import forked_worker
from e2p_ray.environment import finds_ray, names_no_cluster
from e2p_ray.forked_worker import Order

# transformers imports these for models and losses that are not ours, where it finds them: 0.8 of its 3.5 s.
_NOT_NEEDED = ("accelerate", "scipy", "sklearn", "triton")
NO_FORKS: Mapping[str, str] = {}
_STDIN = 0


def own_forks(
    address: str | None, modules: Sequence[str], variables: Mapping[str, str], *, on_gpus: bool
) -> AbstractContextManager[Mapping[str, str]]:
    """`fork_server` for the Ray that a job is about to start for itself; none where it will not, or on GPUs."""
    ray = sys.modules.get("ray")
    is_there = finds_ray(address) or (ray is not None and ray.is_initialized())
    if not names_no_cluster(address) or is_there or on_gpus or sys.platform != "linux":
        return nullcontext(NO_FORKS)
    return fork_server(modules, variables)


@contextmanager
def fork_server(modules: Sequence[str], variables: Mapping[str, str]) -> Iterator[Mapping[str, str]]:
    """A server with these variables that imports these modules, for the while; yields how `ray_session` is told of it.

    The modules must neither bring Ray nor start threads. Where the server ends before its time or is late, workers
    begin as they do without it.
    """
    with tempfile.TemporaryDirectory(prefix="e2p_ray-") as folder:
        path = str(Path(folder, "server"))
        server = subprocess.Popen(
            [sys.executable, "-m", __name__, path, *modules],
            env={**os.environ, **variables},
            stdin=subprocess.PIPE,  # that it ends with this process, however that ends
            stdout=subprocess.DEVNULL,
            stderr=None if os.environ.get("E2P_DEBUG") else subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is for the job
        )
        try:
            yield {forked_worker.ADDRESS: path}
        finally:
            server.kill()
            server.communicate()


def main(path: str, modules: Sequence[str]) -> None:
    """Import, then fork for each who asks, until stdin is closed; what has been forked becomes a worker."""
    gc.disable()
    of_this = sys.path[0]
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(64)
        with _hidden(_NOT_NEEDED):
            for module in modules:
                importlib.import_module(module)
        assert "ray" not in sys.modules, "see above"
        gc.freeze()  # memory that the collector does not look at stays shared
        order = _own_order(listening)
    if order is None:
        with suppress(OSError):  # its own place, which a job that was killed leaves
            Path(path).unlink()
            Path(path).parent.rmdir()
    else:
        sys.path[sys.path.index(of_this)] = str(Path(order.arguments[0]).parent)
        _become(order)


@contextmanager
def _hidden(packages: Sequence[str]) -> Iterator[None]:
    """Within, these are not found, as if they were not installed."""
    nothing: Any = dict.fromkeys(packages)
    sys.modules.update(nothing)
    try:
        yield
    finally:
        for package in packages:
            del sys.modules[package]


def _own_order(listening: socket.socket) -> Order | None:
    """In the server None, in the end; in a process that it has forked, what that is to be."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes
    while True:
        ready, _, _ = select([listening.fileno(), _STDIN], [], [])
        if _STDIN in ready:
            return None
        asking, _ = listening.accept()
        # One who asks and is gone is none of the others' trouble; where there is no room for a process, none is said.
        with asking, suppress(OSError, ValueError):
            order, files = forked_worker.received(asking)
            try:
                if _is_forked(asking, files):
                    return order
            finally:
                for file in files:
                    os.close(file)


def _is_forked(asking: socket.socket, files: Sequence[int]) -> bool:
    """False in the server; True in a process of it with these for stdin, stdout and stderr."""
    if os.fork():
        return False
    try:
        asking.sendall(forked_worker.TAKEN)  # who has given up waiting is a worker by itself: it gets no other one
        for at, file in enumerate(files):
            os.dup2(file, at)
    except OSError:
        os._exit(1)
    return True


def _become(order: Order) -> None:
    """What a raylet's process would be."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, order.blocked_signals)
    os.setpgid(0, 0)  # as a raylet does: it ends the group of a worker that has died
    with suppress(OSError):
        forked_worker.OOM_SCORE.write_text(order.oom_score)
    resource.setrlimit(resource.RLIMIT_NOFILE, (order.max_files[0], order.max_files[1]))
    os.chdir(order.folder)
    os.environ.clear()
    os.environ.update(order.variables)
    sys.argv = list(order.arguments)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # of those that anybody may take numbers from, the only one that a fork leaves as it was
    gc.enable()
    runpy.run_path(order.arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

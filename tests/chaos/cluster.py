"""Several Ray nodes on one machine: real raylets with workers of their own, in a process tree apart from the tests'.

`python -m tests.chaos.cluster` is the root of that tree: it takes commands as JSON lines from stdin and ends, with all
its nodes, when stdin does. Its RAY_TMPDIR is its own: a Ray that another test starts does not find this cluster.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import psutil

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
_STORE_BYTES = 80 << 20  # Ray takes no less than 75 MiB
# A node that was killed refuses connections at once: it is given up after some two seconds instead of twenty. One that
# is only slow, on a machine of two cores, keeps the default time to answer.
_SYSTEM = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 4}


@dataclass(frozen=True)
class Node:
    """A node besides the head."""

    node_id: str
    raylet_pid: int
    size: tuple[int, int]  # CPUs, GPUs


class Driver:
    """A job's process, and what it has said so far."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        self._lines.extend(self._process.stdout)

    @property
    def said(self) -> str:
        return "".join(self._lines)

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def until(self, look: Callable[[], T | None], longest_s: float = 60.0) -> T:
        """What `look` finds, as soon as it finds something while the job runs."""
        deadline_s = time.monotonic() + longest_s
        while time.monotonic() < deadline_s:
            if found := look():
                return found
            assert self.is_running, f"ended before that:\n{self.said}"
            time.sleep(0.02)
        raise AssertionError(f"did not happen in {longest_s:g} s:\n{self.said}")

    def exit_code(self, longest_s: float = 180.0) -> int:
        """The job's, once it ends."""
        try:
            code = self._process.wait(longest_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {longest_s:g} s:\n{self.said}") from None
        self._reader.join()
        return code

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class RayNodes:
    """A cluster whose head holds no worker, and nodes that come and go."""

    def __init__(self, server: subprocess.Popen[str], environment: dict[str, str]) -> None:
        assert server.stdin is not None
        assert server.stdout is not None
        self._stdin: IO[str] = server.stdin
        self._stdout: IO[str] = server.stdout
        self.environment = environment
        self.address: str = self._answer()["address"]
        self.alive: list[Node] = []

    def add(self, *, num_cpus: int = 1, num_gpus: int = 0) -> Node:
        """Another node, alive."""
        node = Node(**self._ask(do="add", num_cpus=num_cpus, num_gpus=num_gpus), size=(num_cpus, num_gpus))
        self.alive.append(node)
        return node

    def kill(self, node: Node) -> int:
        """SIGKILL of a node's raylet and all its workers; returns how many processes that were."""
        self.alive.remove(node)
        return int(self._ask(do="kill", node_id=node.node_id)["num_killed"])

    def drain(self, node: Node, grace_s: int) -> None:
        """Say that a node goes in so many seconds, as cluster/drain does; `kill` makes it go."""
        self._ask(do="drain", node_id=node.node_id, grace_s=grace_s)

    def only(self, *wanted: tuple[int, int]) -> list[Node]:
        """Nodes of exactly these (CPUs, GPUs), and no other; those that are there stay."""
        found, spare = [], list(self.alive)
        for size in wanted:
            kept = next((node for node in spare if node.size == size), None)
            if kept is not None:
                spare.remove(kept)
            found.append(kept or self.add(num_cpus=size[0], num_gpus=size[1]))
        for node in spare:
            self.kill(node)
        return found

    def start(self, module: str, *words: str) -> Driver:
        """A driver on this cluster."""
        return Driver([sys.executable, "-m", module, *words, "--workers.ray_address", self.address], self.environment)

    def _ask(self, **command: Any) -> dict[str, Any]:
        self._stdin.write(json.dumps(command) + "\n")
        self._stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._stdout.readline()
        assert line, "the cluster's process ended"
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def ray_nodes() -> Iterator[RayNodes]:
    """A cluster with nothing but its head."""
    folder = tempfile.mkdtemp(prefix="e2p-")  # short: paths of Unix sockets lie below it
    environment = os.environ | {"RAY_TMPDIR": folder, "PYTHONPATH": str(ROOT), "RAY_enable_worker_prestart": "0"}
    environment.pop("RAY_ADDRESS", None)
    log = Path(folder, "cluster.log").open("wb")  # noqa: SIM115 - closed with the server
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.cluster"],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    try:
        yield RayNodes(server, environment)
    finally:
        if server.stdin is not None:
            server.stdin.close()
        try:
            server.wait(60)
        finally:
            server.kill()
            server.wait()
            log.close()
            shutil.rmtree(folder, ignore_errors=True)


class _Server:
    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        arguments = {"num_cpus": 0, "object_store_memory": _STORE_BYTES, "include_dashboard": False}
        self._cluster = Cluster(True, head_node_args=arguments | {"_system_config": _SYSTEM})
        self.address: str = self._cluster.address
        self._nodes: dict[str, Any] = {}

    def add(self, num_cpus: int, num_gpus: int) -> dict[str, Any]:
        node = self._cluster.add_node(num_cpus=num_cpus, num_gpus=num_gpus, object_store_memory=_STORE_BYTES)
        self._nodes[node.node_id] = node
        return {"node_id": node.node_id, "raylet_pid": _raylet(node)}

    def kill(self, node_id: str) -> dict[str, Any]:
        node = self._nodes.pop(node_id)
        raylet = psutil.Process(_raylet(node))
        killed = [raylet, *raylet.children(recursive=True)]
        for process in killed:  # the raylet first: nobody is left who could say that its workers went
            process.kill()
        node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        self._cluster.worker_nodes.remove(node)
        return {"num_killed": len(killed)}

    def drain(self, node_id: str, grace_s: int) -> dict[str, Any]:
        words = ["--address", self.address, "--node-id", node_id, "--deadline-remaining-seconds", str(grace_s)]
        words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the pod ends"]
        program = str(Path(sys.executable).with_name("ray"))
        subprocess.run([program, "drain-node", *words], check=True, stdout=sys.stderr)
        return {}

    def close(self) -> None:
        for node_id in list(self._nodes):
            self.kill(node_id)
        self._cluster.shutdown()  # type: ignore[no-untyped-call]


def _raylet(node: Any) -> int:
    (info,) = node.all_processes["raylet"]
    pid: int = info.process.pid
    return pid


def _serve(commands: Sequence[str] | IO[str], answers: IO[str]) -> None:
    server = _Server()
    print(json.dumps({"address": server.address}), file=answers, flush=True)
    for line in commands:
        command = json.loads(line)
        print(json.dumps(getattr(server, command.pop("do"))(**command)), file=answers, flush=True)
    server.close()


if __name__ == "__main__":
    # What Ray prints must not come between the answers.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        _serve(sys.stdin, answers)

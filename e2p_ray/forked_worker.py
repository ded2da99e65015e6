"""In place of Ray's script for workers: asks a fork server for a process that is the worker, and ends.

Run as a file, of which a raylet begins a process for each worker: it imports nothing of Ray and of this package.
Without an answer it becomes Ray's worker itself.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

ADDRESS = "E2P_FORK_SERVER"
TAKEN = b"taken"
# A raylet gives a worker 60 s to say that it is there, imports by a server that is not done included.
_MAX_WAIT_S = 30.0
OOM_SCORE = Path("/proc/self/oom_score_adj")
_NUM_FILES = 3
_MAX_READ_BYTES = 65536


@dataclass(frozen=True)
class Order:
    """What a raylet begins a process with, besides its files."""

    arguments: list[str]
    variables: dict[str, str]
    folder: str
    blocked_signals: list[int]
    oom_score: str
    max_files: list[int]  # as Ray raises it for its processes, and the most


def received(asking: socket.socket) -> tuple[Order, list[int]]:
    """What is asked for, and its stdin, stdout and stderr."""
    part, files, _, _ = socket.recv_fds(asking, _MAX_READ_BYTES, _NUM_FILES)
    said = bytearray(part)
    while part:
        part = asking.recv(_MAX_READ_BYTES)
        said += part
    return Order(**json.loads(said)), files


def ask(address: str, order: Order) -> None:
    """Have a process forked; OSError where none will be."""
    with socket.socket(socket.AF_UNIX) as server:
        server.settimeout(_MAX_WAIT_S)
        server.connect(address)
        said = json.dumps(asdict(order)).encode()
        num_sent = socket.send_fds(server, [said], range(_NUM_FILES))
        server.sendall(said[num_sent:])
        server.shutdown(socket.SHUT_WR)
        if server.recv(len(TAKEN)) != TAKEN:
            raise ConnectionError("the server has ended")


def _own_order() -> Order:
    ray = find_spec("ray")
    assert ray is not None, "a raylet has begun this"
    assert ray.origin is not None, "it is a package with files"
    script = Path(ray.origin).parent / "_private" / "workers" / "default_worker.py"
    oom_score = ""
    with suppress(OSError):
        oom_score = OOM_SCORE.read_text()
    blocked = [int(each) for each in signal.pthread_sigmask(signal.SIG_BLOCK, [])]
    max_files = list(resource.getrlimit(resource.RLIMIT_NOFILE))
    return Order([str(script), *sys.argv[1:]], dict(os.environ), os.getcwd(), blocked, oom_score, max_files)


def main() -> None:
    address = os.environ.pop(ADDRESS, "")
    order = _own_order()
    try:
        ask(address, order)
    except OSError:
        os.execv(sys.executable, [sys.executable, *order.arguments])


if __name__ == "__main__":
    main()

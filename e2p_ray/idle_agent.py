"""In place of the agent of a Ray node that nobody looks at: says that there is none, and stays as long as its raylet.

A raylet begins an agent, waits until it is known on which ports, and ends when its agent ends. Ray's own imports the
dashboard's modules at a job's start, 1.5 s of CPU time (2026-11-29, a Zen 3 core), and does nothing afterwards. This
one is run as a file, without site-packages.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")
_NONE = "-1"
_POLL_S = 1.0


def main(arguments: Sequence[str]) -> None:
    """`arguments` are those of Ray's own agent, after its path."""
    raylet = int(os.environ["RAY_RAYLET_PID"])  # not who is the parent now: it may have ended since it began this
    given = dict(argument.partition("=")[::2] for argument in arguments)
    for name in _PORTS:
        path = Path(given["--session-dir"], f"{name}_{given['--node-id']}")
        part = path.with_name(f"{path.name}.part")
        part.write_text(_NONE)
        part.rename(path)
    while os.getppid() == raylet:
        time.sleep(_POLL_S)


if __name__ == "__main__":
    main(sys.argv[1:])

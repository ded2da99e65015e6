"""A replica of the generator as a deployment of Ray Serve: it hosts the API, and hands over new settings."""

from __future__ import annotations

import asyncio
import gc
import sys
from dataclasses import asdict
from typing import Any

from ray import serve
from ray.serve import Application

from e2p_ray.batch.tally import ShardOutcome
from e2p_ray.commit import Run
from e2p_ray.config import JobConfig, ServeConfig
from e2p_ray.engine_process import engine_variables
from e2p_ray.errors import IncompatibleError
from e2p_ray.loaded import EngineFactory
from e2p_ray.serve.api import make_api
from e2p_ray.serve.gate import App
from e2p_ray.serve.service import Service
from e2p_ray.serve.shards import ShardDesk
from e2p_ray.storage import Storage

APP_NAME = "e2p_ray"
DEPLOYMENT_NAME = "generator"
# How long the model's thread waits, behind each of some hundred operations a step, for another one that runs Python (by
# Python's default 5 ms). Eight places, ten times too many requests, p99 of the accepted, two runs each: 2,018 and 2,095
# ms with 5 ms, 1,835 and 1,973 with this, 2,180 and 2,416 with 0.05.
_SWITCH_INTERVAL_S = 0.0005


class Replica:
    """One copy of the model, with its API. `reconfigure` takes {"projector_uri": ...}."""

    def __init__(self, config: ServeConfig, engine_factory: EngineFactory | None = None) -> None:
        self.service = Service(config, Storage(config.storage), engine_factory=engine_factory)
        self._desk = ShardDesk(self.service)
        self._is_configured = False
        # What is loaded stays. A full collection over its half a million objects stops everything for 120 to 230 ms,
        # half the time of a text (measured).
        gc.collect()
        gc.freeze()
        sys.setswitchinterval(_SWITCH_INTERVAL_S)

    def __serve_build_asgi_app__(self) -> App:
        return make_api(self.service)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Swap the projector between requests. What cannot be taken over is logged, and GET /v1/models says it.

        Then it raises nothing: Serve would end the replica, and with it the projector that works. But one that has
        served nobody yet must not begin with another projector than the replicas beside it: IncompatibleError, and
        Serve tries again with a new one.
        """
        uri = user_config.get("projector_uri")
        if uri is not None and not await self.service.swap(str(uri)) and not self._is_configured:
            state = self.service.swap_state
            raise IncompatibleError(f"projector.uri {uri}: {state.error if state else 'not taken over'}")
        self._is_configured = True

    async def check_health(self) -> None:
        """Serve asks this now and then, and replaces the replica where it raises."""
        if not self.service.loop.is_alive:
            raise RuntimeError(
                "the model's thread has ended by itself, or has failed at all of the last texts; this replica's log "
                "has the kind of error"
            )

    async def served_texts(self) -> dict[str, Any]:
        """What a batch asks before it sends its shards: the fields of `ServedTexts`."""
        return asdict(self._desk.served_texts)

    async def write_shard(self, row: dict[str, Any], config: JobConfig, storage: Storage, run: Run) -> dict[str, Any]:
        """Write and commit a shard of `jobs.generate --through-serve`; returns the fields of a `ShardOutcome`."""
        outcome: ShardOutcome = await asyncio.wrap_future(self._desk.write(row, config, storage, run))
        return asdict(outcome)

    async def __del__(self) -> None:
        """Serve calls this when requests are done, or have been given up."""
        if hasattr(self, "_desk"):
            self._desk.close()
            await asyncio.to_thread(self.service.close, 1.0)


def application(config: ServeConfig, *, engine_factory: EngineFactory | None = None) -> Application:
    """The application for `serve.run`, which restarts replicas; see `app.serve_file` for what swaps without."""
    replica, workers = config.replica, config.workers
    most = replica.max_waiting + config.engine.usual_rows
    options: dict[str, Any] = {
        "name": DEPLOYMENT_NAME,
        "user_config": {"projector_uri": config.projector.uri},
        "ray_actor_options": {
            "num_cpus": workers.num_cpus,
            "num_gpus": workers.num_gpus,
            "runtime_env": {"env_vars": engine_variables(config)},
        },
        # HAProxy has a log, too; a line for each of a crowd's refusals takes a tenth of what they cost.
        "logging_config": {"enable_access_log": False},
        # Twice what it takes: the replica itself says no (429) to what is too much, Serve never makes anybody wait.
        "max_ongoing_requests": 2 * most,
        "graceful_shutdown_timeout_s": replica.drain_s,
        "autoscaling_config": {
            "min_replicas": replica.min_replicas,
            "max_replicas": replica.max_replicas,
            "initial_replicas": max(replica.min_replicas, 1),
            "target_ongoing_requests": replica.target_ongoing_requests,
            "look_back_period_s": replica.look_back_s,
            "metrics_interval_s": replica.look_back_s / 3,  # as in Ray's own defaults
            "upscale_delay_s": replica.upscale_delay_s,
            "downscale_delay_s": replica.downscale_delay_s,
        },
    }
    deployment: Any = serve.deployment(serve.ingress()(Replica))
    made: Application = deployment.options(**options).bind(config, engine_factory)
    return made

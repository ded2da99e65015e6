"""Ray Data on a Ray that a job has started for itself: one machine, which does not grow, and nobody who looks at it.

Ray Data starts three actors for others: one that asks the cluster's autoscaler for nodes, on behalf of all jobs, one
that keeps figures for the dashboard, and one that knows on which node a restarted worker is. They take 1.8, 1.8 and 0.9
s of CPU time at once, when workers need it for their imports: on two cores these began their first shard 0.9 s later
for the first two (2026-11-29). Ray 2.60, whose version is pinned: none of this is public.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import ray
from ray.data._internal import stats
from ray.data._internal.cluster_autoscaler import rate_based_cluster_autoscaler
from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import AutoscalingCoordinator
from ray.data._internal.execution.operators import actor_pool_map_operator

from e2p_ray.ray_session import in_place


class _WholeMachine(AutoscalingCoordinator):
    """All that the machine has is this job's; more cannot be had."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes()}  # type: ignore[no-untyped-call]

    def request_resources(self, *_: Any, **__: Any) -> None:
        pass

    def cancel_request(self) -> None:
        pass

    def get_reserved_resources(self) -> dict[str, dict[str, float]]:
        return {node: dict(resources) for node, resources in self._nodes.items()}


class _Nobody:
    """In place of an actor that nobody asks anything: it has every method, and none does anything."""

    def __getattr__(self, name: str) -> _Nobody:
        return self

    def remote(self, *_: Any, **__: Any) -> None:
        pass


def _where_they_were(_: tuple[str, ...]) -> dict[str, str]:
    """In place of what asks where workers are by now: on one machine, where they began."""
    return {}


def no_actors_for_others() -> AbstractContextManager[None]:
    """Within, Ray Data starts no actors but those that it is asked for."""
    return in_place(
        [
            (rate_based_cluster_autoscaler, "DefaultAutoscalingCoordinator", _WholeMachine),
            (stats, "get_or_create_stats_actor", _Nobody),
            (actor_pool_map_operator, "get_or_create_actor_location_tracker", _Nobody),
            (actor_pool_map_operator, "get_actor_locations", _where_they_were),
        ]
    )

"""Ray Data on a Ray that a job has started for itself: one machine, which does not grow, and nobody who looks at it.

Ray Data starts two actors for others: one that asks the cluster's autoscaler for nodes, on behalf of all jobs, and one
that keeps figures for the dashboard. Each takes 1.8 s of CPU time at once, when workers need it for their imports: on
two cores these began their first shard 0.9 s later (2026-11-29). Ray 2.60, whose version is pinned: none of this is
public.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import ray
from ray.data._internal import stats
from ray.data._internal.cluster_autoscaler import rate_based_cluster_autoscaler
from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import AutoscalingCoordinator

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
    """In place of the actor that keeps figures: it has every method, and none does anything."""

    def __getattr__(self, name: str) -> _Nobody:
        return self

    def remote(self, *_: Any, **__: Any) -> None:
        pass


def no_actors_for_others() -> AbstractContextManager[None]:
    """Within, Ray Data starts no actors but those that it is asked for."""
    return in_place(
        [
            (rate_based_cluster_autoscaler, "DefaultAutoscalingCoordinator", _WholeMachine),
            (stats, "get_or_create_stats_actor", _Nobody),
        ]
    )

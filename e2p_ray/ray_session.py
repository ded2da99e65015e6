"""The Ray that a job runs on: found or started, and quiet."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import worker as ray_worker
from ray._private.node import Node

from e2p_ray.environment import variables_set
from e2p_ray.errors import ConfigError

# What a Ray that ends with its job needs not: the API server (without a dashboard for usage statistics; Ray waits for
# it) and the autoscaler of a cluster that has one node. With the log's reader 3.4 of the 8 s of CPU time of its start
# (2026-11-28, a Zen 3 core). Ray 2.60, whose version is pinned: how it starts is not public.
_FOR_OTHERS = ("start_api_server", "start_monitor")
_LOG_READER = "start_log_monitor"  # brings what workers print to the driver
# Nobody knows where its figures are, and nobody asks it what tasks it had. Both cost every process that it has.
_NO_FIGURES = {"RAY_enable_metrics_collection": "0", "RAY_task_events_report_interval_ms": "0"}
# The raylet looks for its own object store before that is there, and again after a second: after 20 ms, for 10 s.
_NO_WAITING = {"RAY_raylet_client_connect_timeout_milliseconds": "20", "RAY_raylet_client_num_connect_attempts": "500"}
_NONE: Mapping[str, str] = {}


@contextmanager
def ray_session(
    address: str | None, *, include_dashboard: bool = False, variables: Mapping[str, str] = _NONE
) -> Iterator[bool]:
    """The Ray of this process if it has one, else what `start_ray` finds or starts, for the while.

    Yields whether all workers have `variables` in their environment: those of a Ray that is started here. On another
    Ray they have to be asked for, by a `runtime_env`.
    """
    if ray.is_initialized():
        yield False
        return
    start_ray(address, include_dashboard=include_dashboard, variables=variables)
    try:
        yield _started_here()
    finally:
        ray.shutdown()


def start_ray(address: str | None, *, include_dashboard: bool = False, variables: Mapping[str, str] = _NONE) -> None:
    """Connect this process to the Ray at `address`, RAY_ADDRESS, or a local one, which is started with `variables`.

    A local one has no dashboard unless asked for: nobody knows its port. Without it, it has only the processes and
    keeps only the figures that a job needs. ConfigError where no Ray answers at an address.
    """
    debug = bool(os.environ.get("E2P_DEBUG"))
    of_ray = _NO_WAITING if include_dashboard else _NO_WAITING | _NO_FIGURES
    not_wanted = () if include_dashboard else _FOR_OTHERS if debug else (*_FOR_OTHERS, _LOG_READER)
    try:
        with (
            variables_set(of_ray, replace=False),  # what a user set himself comes first
            variables_set(variables, replace=True),
            _not_started(not_wanted),
        ):
            ray.init(
                address=address,
                include_dashboard=include_dashboard,
                log_to_driver=debug,
                logging_level=logging.INFO if debug else logging.ERROR,
            )
    except ConnectionError as error:
        raise ConfigError(f"workers.ray_address {address!r}: no Ray cluster answers there ({error})") from error


def _started_here() -> bool:
    """Without an address, Ray looks for one of this machine before it starts one, and says nowhere in public."""
    node: Any = ray_worker._global_node  # None for an address of Ray Client
    return node is not None and bool(node.is_head())


@contextmanager
def _not_started(names: Sequence[str]) -> Iterator[None]:
    """Within, these methods of a node start no process."""
    before = {name: getattr(Node, name) for name in names}
    for name in names:
        setattr(Node, name, _start_nothing)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Node, name, method)


def _start_nothing(node: Node, **_: Any) -> None:
    """In place of a method that starts a process of a node."""


def names_no_cluster(address: str | None) -> bool:
    """Whether neither a configuration nor the environment says where a Ray is, so that a job starts its own."""
    return address is None and not os.environ.get("RAY_ADDRESS")


def alive_nodes() -> list[Mapping[str, float]]:
    """The resources of every node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def only_machine(address: str | None) -> Mapping[str, float] | None:
    """The resources of the one machine that there is; None for a cluster, which may grow."""
    nodes = alive_nodes()
    return nodes[0] if names_no_cluster(address) and len(nodes) == 1 else None


@contextmanager
def quiet_ray_data() -> Iterator[None]:
    """Ray Data without bars and logs on the terminal, and with the errors of its functions as they were raised."""
    import ray.data  # a second of CPU time that a Ray which only serves does not need

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # else a task's typed error arrives as text
    with quiet_ray_data_log(), ray.data.DataContext.current(context):
        yield


@contextmanager
def quiet_ray_data_log() -> Iterator[None]:
    """Ray Data's log goes to its file only: outcomes and errors say what is worth saying."""
    handlers = [h for h in logging.getLogger("ray.data").handlers if isinstance(h, logging.StreamHandler)]
    levels = [handler.level for handler in handlers]
    if not os.environ.get("E2P_DEBUG"):
        for handler in handlers:
            handler.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)

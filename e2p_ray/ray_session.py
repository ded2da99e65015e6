"""The Ray that a job runs on: found or started, and quiet."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import ray
from ray._private import ray_constants, services
from ray._private import utils as ray_utils
from ray._private import worker as ray_worker
from ray._private.node import Node
from ray._private.state import GlobalState

from e2p_ray import forked_worker, idle_agent
from e2p_ray.environment import names_no_cluster, variables_set
from e2p_ray.errors import ConfigError

# What a Ray that ends with its job needs not: the API server (without a dashboard for usage statistics; Ray waits for
# it) and the autoscaler of a cluster that has one node. With the log's reader 3.4 of the 8 s of CPU time of its start
# (2026-11-28, a Zen 3 core). Ray 2.60, whose version is pinned: how it starts is not public.
_FOR_OTHERS = ("start_api_server", "start_monitor")
_LOG_READER = "start_log_monitor"  # brings what workers print to the driver
# Nobody knows where its figures are, and nobody asks it what tasks it had. Both cost every process that it has.
_NO_FIGURES = {"RAY_enable_metrics_collection": "0", "RAY_task_events_report_interval_ms": "0"}
# A worker begins when it is wanted: the driver waits for all that are begun for it, 0.7 s (2026-11-29, a Zen 3 core).
_NO_WORKERS_YET = {"RAY_prestart_worker_first_driver": "0"}
# The raylet looks for its own object store before that is there, and again after a second: after 20 ms, for 10 s.
_NO_WAITING = {"RAY_raylet_client_connect_timeout_milliseconds": "20", "RAY_raylet_client_num_connect_attempts": "500"}
_NONE: Mapping[str, str] = {}
# A node that is not there yet is looked for again after a second, which half of all starts lost (2026-11-29).
_NODE_POLL_S, _MAX_NODE_POLLS = 0.02, 500


def _nothing() -> None:
    """Done while Ray starts."""


@contextmanager
def ray_session(
    address: str | None,
    *,
    include_dashboard: bool = False,
    variables: Mapping[str, str] = _NONE,
    meanwhile: Callable[[], object] = _nothing,
    forks: Mapping[str, str] = _NONE,
) -> Iterator[bool]:
    """The Ray of this process if it has one, else what `start_ray` finds or starts, for the while.

    Yields whether all workers have `variables` in their environment: those of a Ray that is started here. On another
    Ray they have to be asked for, by a `runtime_env`. `forks` names the fork server, if any, of workers of a Ray that
    is started here.
    """
    if ray.is_initialized():
        yield False
        return
    variables = {**variables, **forks}
    start_ray(address, include_dashboard=include_dashboard, variables=variables, meanwhile=meanwhile)
    try:
        yield _started_here()
    finally:
        ray.shutdown()


def start_ray(
    address: str | None,
    *,
    include_dashboard: bool = False,
    variables: Mapping[str, str] = _NONE,
    meanwhile: Callable[[], object] = _nothing,
) -> None:
    """Connect this process to the Ray at `address`, RAY_ADDRESS, or a local one, which is started with `variables`.

    A local one has no dashboard unless asked for: nobody knows its port. Without it, it has only the processes and
    keeps only the figures that a job needs. `meanwhile` is called while its processes start; it may not be, where Ray
    was found. ConfigError where no Ray answers at an address, or where it is none.
    """
    debug = bool(os.environ.get("E2P_DEBUG"))
    of_ray = _NO_WAITING
    changes: list[tuple[Any, str, Any]] = [(services, "get_node", _node_when_there(meanwhile))]
    if not include_dashboard:
        of_ray = _NO_WAITING | _NO_FIGURES | _NO_WORKERS_YET
        changes.append((services, "_build_python_executable_command_memory_profileable", _idle_agent()))
        changes.append((ray_utils, "get_dashboard_dependency_error", _no_dashboard))
        changes += [(Node, name, _start_nothing) for name in (_FOR_OTHERS if debug else (*_FOR_OTHERS, _LOG_READER))]
    if forked_worker.ADDRESS in variables:
        changes.append((services, "start_raylet", raylet_of_forked_workers()))
    try:
        with (
            variables_set(of_ray, replace=False),  # what a user set himself comes first
            variables_set(variables, replace=True),
            in_place(changes),
        ):
            ray.init(
                address=address,
                include_dashboard=include_dashboard,
                log_to_driver=debug,
                logging_level=logging.INFO if debug else logging.ERROR,
            )
    except (ConnectionError, ValueError) as error:
        if isinstance(error, ValueError) and names_no_cluster(address):
            raise  # of something else: no address is wrong that nobody gave
        raise ConfigError(f"{_named(address)}: no Ray cluster answers there ({error})") from error


def _named(address: str | None) -> str:
    """An address by what it was set with."""
    if address not in (None, "auto"):
        return f"workers.ray_address {address!r}"
    if of_environment := os.environ.get("RAY_ADDRESS"):
        return f"RAY_ADDRESS {of_environment!r}"
    if address == "auto":
        return "no Ray is named (workers.ray_address, RAY_ADDRESS), and of this machine"
    return "the Ray that was last started on this machine (`ray stop` makes it forgotten)"


def _started_here() -> bool:
    """Without an address, Ray looks for one of this machine before it starts one, and says nowhere in public."""
    node: Any = ray_worker._global_node  # None for an address of Ray Client
    return node is not None and bool(node.is_head())


@contextmanager
def in_place(changes: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Within, these attributes of owners are others."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _start_nothing(node: Node, **_: Any) -> None:
    """In place of a method that starts a process of a node."""


def _no_dashboard() -> ImportError:
    """In place of what imports all that a dashboard needs, to see whether the agent could serve one."""
    return ImportError("no dashboard")


def _idle_agent() -> Callable[..., list[str]]:
    """In place of what says how Ray's processes in Python are begun: the agent of a node is one that does nothing."""
    begun_by: Any = services._build_python_executable_command_memory_profileable

    def command(component: str, *given: Any, **named: Any) -> list[str]:
        if component == ray_constants.PROCESS_TYPE_DASHBOARD_AGENT:
            return [sys.executable, "-I", "-S", idle_agent.__file__]
        begun: list[str] = begun_by(component, *given, **named)
        return begun

    return command


def raylet_of_forked_workers() -> Callable[..., Any]:
    """In place of what starts a raylet: its script for workers is another."""
    start_raylet: Any = services.start_raylet

    def start(*given: Any, **named: Any) -> Any:
        bound = signature(start_raylet).bind(*given, **named)
        bound.arguments["worker_path"] = forked_worker.__file__
        return start_raylet(*bound.args, **bound.kwargs)

    return start


def _node_when_there(meanwhile: Callable[[], object]) -> Callable[[str, str], Any]:
    """In place of what asks for a node as soon as its processes have begun: it is asked for when it is there."""
    get_node: Any = services.get_node

    def node(gcs_address: str, node_id: str) -> Any:
        meanwhile()
        of_ray: Any = GlobalState()  # type: ignore[no-untyped-call]
        of_ray._initialize_global_state(services._get_gcs_client_options(gcs_address))  # type: ignore[no-untyped-call]
        for _ in range(_MAX_NODE_POLLS):
            if any(found["NodeID"] == node_id for found in of_ray.node_table()):
                break
            time.sleep(_NODE_POLL_S)
        return get_node(gcs_address, node_id)

    return node


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

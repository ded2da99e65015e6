"""The Ray that a job runs on: found or started, and quiet."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray

from e2p_ray.errors import ConfigError


@contextmanager
def ray_session(address: str | None, *, include_dashboard: bool = False) -> Iterator[None]:
    """The Ray of this process if it has one, else that at `address`, RAY_ADDRESS, or a local one for the while.

    A local one has no dashboard unless asked for: nobody knows its port, and it takes 2 to 3 of the 13 s that Ray needs
    to start on two busy cores (11 of 20 processes, a third of the CPU time).
    """
    if ray.is_initialized():
        yield
        return
    debug = bool(os.environ.get("E2P_DEBUG"))
    try:
        ray.init(
            address=address,
            include_dashboard=include_dashboard,
            log_to_driver=debug,
            logging_level=logging.INFO if debug else logging.ERROR,
        )
    except ConnectionError as error:
        raise ConfigError(f"workers.ray_address {address!r}: no Ray cluster answers there ({error})") from error
    try:
        yield
    finally:
        ray.shutdown()


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

"""The Ray that a job runs on: found or started, quiet, and large enough for one worker."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from e2p_ray.config import JobConfig
from e2p_ray.errors import ConfigError


@contextmanager
def ray_session(config: JobConfig) -> Iterator[None]:
    """The Ray of this process if it has one, else `workers.ray_address`, RAY_ADDRESS, or a local one for the while."""
    if ray.is_initialized():
        yield
        return
    debug = bool(os.environ.get("E2P_DEBUG"))
    address = config.workers.ray_address
    try:
        ray.init(address=address, log_to_driver=debug, logging_level=logging.INFO if debug else logging.ERROR)
    except ConnectionError as error:
        raise ConfigError(f"workers.ray_address {address!r}: no Ray cluster answers there ({error})") from error
    try:
        yield
    finally:
        ray.shutdown()


def check_resources(config: JobConfig) -> None:
    """Refuse a worker that no node of a cluster of fixed size can hold; Ray would wait for it without a word."""
    wanted = {"CPU": config.workers.num_cpus, "GPU": config.workers.num_gpus}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    if any(all(node.get(name, 0) >= value for name, value in wanted.items()) for node in nodes):
        return
    if config.workers.ray_address is None and not os.environ.get("RAY_ADDRESS") and len(nodes) == 1:
        here = {name: nodes[0].get(name, 0) for name in wanted}
        raise ConfigError(
            f"workers.num_cpus {wanted['CPU']:g} and workers.num_gpus {wanted['GPU']:g} are more than this machine has "
            f"({here['CPU']:g} and {here['GPU']:g}). Lower them, or set workers.ray_address to a cluster"
        )


@contextmanager
def quiet_ray_data() -> Iterator[None]:
    """Ray Data's log goes to its file only: the outcomes say what is worth saying."""
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

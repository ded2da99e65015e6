"""Whether the Ray that was found has a node that is large enough for one worker, and what may keep it."""

from __future__ import annotations

from e2p_ray.config import JobConfig
from e2p_ray.errors import ConfigError
from e2p_ray.ray_session import alive_nodes, only_machine


def check_resources(config: JobConfig) -> str:
    """Refuse a worker that this machine cannot hold; Ray would wait for it without a word.

    A cluster may grow: where none of its nodes can hold one yet, what is waited for is returned; else nothing.
    """
    wanted = {"CPU": config.workers.num_cpus, "GPU": config.workers.num_gpus}
    nodes = alive_nodes()
    if any(all(node.get(name, 0) >= value for name, value in wanted.items()) for node in nodes):
        return ""
    machine = only_machine(config.workers.ray_address)
    if machine is not None:
        here = {name: machine.get(name, 0) for name in wanted}
        raise ConfigError(
            f"workers.num_cpus {wanted['CPU']:g} and workers.num_gpus {wanted['GPU']:g} are more than this machine has "
            f"({here['CPU']:g} and {here['GPU']:g}). Lower them, or set workers.ray_address to a cluster"
        )
    return (
        f"none of the cluster's {len(nodes)} nodes has the {wanted['CPU']:g} CPUs and {wanted['GPU']:g} GPUs of one "
        "worker (workers.num_cpus, workers.num_gpus)"
    )


def what_others_may_have(config: JobConfig) -> str:
    """Of a cluster, what other jobs may have taken; empty for a machine, which has none."""
    if only_machine(config.workers.ray_address) is not None:
        return ""
    return (
        f"other jobs may have the {config.workers.num_cpus:g} CPUs and {config.workers.num_gpus:g} GPUs of one worker: "
        "see `ray status`"
    )

"""Whether the Ray that was found is large enough for one worker."""

from __future__ import annotations

from e2p_ray.config import JobConfig
from e2p_ray.errors import ConfigError
from e2p_ray.ray_session import alive_nodes, only_machine


def check_resources(config: JobConfig) -> None:
    """Refuse a worker that no node of a cluster of fixed size can hold; Ray would wait for it without a word."""
    wanted = {"CPU": config.workers.num_cpus, "GPU": config.workers.num_gpus}
    if any(all(node.get(name, 0) >= value for name, value in wanted.items()) for node in alive_nodes()):
        return
    machine = only_machine(config.workers.ray_address)
    if machine is not None:
        here = {name: machine.get(name, 0) for name in wanted}
        raise ConfigError(
            f"workers.num_cpus {wanted['CPU']:g} and workers.num_gpus {wanted['GPU']:g} are more than this machine has "
            f"({here['CPU']:g} and {here['GPU']:g}). Lower them, or set workers.ray_address to a cluster"
        )

"""How many requests a shard should have."""

from __future__ import annotations

from dataclasses import dataclass

from e2p_ray.config import JobConfig
from e2p_ray.plan.pairs import num_buckets

_USUAL = 2048  # seconds to minutes of a CPU
_MOST_ON_GPU = 16384
# So many shards a plan has before they grow: sixteen GPUs are done at about the same time, and each reads ahead.
_MANY_SHARDS = 256


@dataclass(frozen=True, slots=True)
class ShardSize:
    """What is aimed at: `least`, or more, up to `most`, where that leaves `num_shards` or more of them."""

    least: int
    most: int
    num_shards: int = _MANY_SHARDS

    @classmethod
    def of(cls, config: JobConfig) -> ShardSize:
        """As configured; else more on GPUs than on CPUs.

        A 1 B model's 2,048 rows take an H200 0.4 s: less than it takes to read and commit a shard on S3, and much of it
        in half-empty waves at the end, where second tries and the texts that readers share are waited for.
        """
        given = config.plan.requests_per_shard
        return cls(given or _USUAL, given or (_MOST_ON_GPU if config.workers.num_gpus else _USUAL))

    def among(self, num_requests: int) -> int:
        """For so many requests."""
        size = self.least
        while 2 * size <= self.most and num_requests >= 2 * size * self.num_shards:
            size *= 2
        return size

    def num_buckets(self, num_requests: int) -> int:
        """Along how many buckets of contents so many requests are cut."""
        return num_buckets(num_requests, self.among(num_requests))

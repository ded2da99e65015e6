"""Users x candidates x contents -> requests -> groups -> shards; the driver's memory stays flat."""

from e2p_ray.plan.plan import Plan, PlanCounts, load_plan, make_plan
from e2p_ray.plan.shard_size import ShardSize
from e2p_ray.plan.shards import ShardEntry, largest_first, read_shard

__all__ = ["Plan", "PlanCounts", "ShardEntry", "ShardSize", "largest_first", "load_plan", "make_plan", "read_shard"]

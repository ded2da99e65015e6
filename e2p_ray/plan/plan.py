"""Users x contents x candidates -> groups -> shards: by one polars process, or by Ray shuffles around polars."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

import ray

from e2p_ray.config import JobConfig
from e2p_ray.plan.dataflow import Job, Outcome, plan_on_one_node, typed_error
from e2p_ray.plan.inputs import InputTable, Space, scan_inputs
from e2p_ray.plan.shard_size import ShardSize
from e2p_ray.plan.shards import ShardEntry, shard_uri
from e2p_ray.ray_session import ray_session
from e2p_ray.schema import checked_id
from e2p_ray.storage import Storage

_FORMAT = 2  # counts up when the same inputs give another plan
_PARTITION_BYTES = 256 << 20
_MAX_PARTITIONS = 4096


@dataclass(frozen=True, slots=True)
class PlanCounts:
    """What was planned and what was left out. A pair is a (user, content), a request a (user, content, task)."""

    num_candidates: int
    num_duplicates: int
    num_pairs: int  # distinct, those of the dead letters too
    num_requests: int
    num_groups: int
    num_contents: int
    num_users: int  # that candidates name and the users table has
    reasons: dict[str, int]  # requests without a user embedding
    dead_letters: dict[str, int]  # requests that are in no shard
    content_chars: int  # titles and bodies of the contents, each once
    request_chars: int  # the same, once a request


@dataclass(frozen=True, slots=True)
class Plan:
    """All requests of a run, cut into shards that lie under `uri`."""

    plan_id: str
    uri: str
    embedding_space: str
    embedding_dim: int
    tasks: tuple[str, ...]
    shards: tuple[ShardEntry, ...]
    counts: PlanCounts


def make_plan(
    config: JobConfig,
    storage: Storage,
    *,
    embedding_space: str,
    embedding_dim: int,
    on_progress: Callable[[str], None] | None = None,
) -> Plan:
    """Plan every candidate, or return the finished plan of the same inputs and settings.

    InputError where a table breaks its schema, IncompatibleError where no user embedding is in the projector's space.
    """
    say = on_progress or (lambda _: None)
    inputs = scan_inputs(config.inputs, storage)
    space = Space(embedding_space, embedding_dim)
    tasks = tuple(sorted(config.tasks))
    uri = f"{config.output.uri}/plans/{_plan_key(config, inputs, space, tasks)}"
    if storage.exists(manifest_uri(uri)):
        say(f"the plan {uri} is finished already")
        return load_plan(storage, uri)
    job = Job(storage, uri, space, tasks, ShardSize.of(config), config.plan.max_group_requests)
    num_bytes = _estimated_bytes(inputs, space)
    say(f"planning {inputs['candidates'].num_rows:,} candidates, about {num_bytes / 2**20:,.0f} MiB")
    try:
        if num_bytes < config.plan.single_node_bytes or not inputs["candidates"].num_rows:
            outcome = plan_on_one_node(job, inputs)
        else:
            partitions = config.plan.num_partitions or min(-(-num_bytes // _PARTITION_BYTES), _MAX_PARTITIONS)
            # It brings Ray Data: most of a second of CPU time that no other plan needs.
            from e2p_ray.plan.shuffles import plan_by_shuffles

            # Not for longer: the batch has a Ray that is started for it, or that of a service.
            with ray_session(config.workers.ray_address):
                outcome = plan_by_shuffles(job, inputs, partitions, say)
    except ray.exceptions.RayError as error:
        if typed := typed_error(error):
            raise typed from error
        raise
    plan = _finish(job, inputs["candidates"].num_rows, outcome)
    say(f"planned {plan.counts.num_requests:,} requests in {len(plan.shards):,} shards")
    return plan


def load_plan(storage: Storage, plan_uri: str) -> Plan:
    """A finished plan; ObjectNotFoundError when there is none."""
    manifest = json.loads(storage.read_bytes(manifest_uri(plan_uri)))
    return Plan(
        plan_id=manifest["plan_id"],
        uri=plan_uri,
        embedding_space=manifest["embedding_space"],
        embedding_dim=manifest["embedding_dim"],
        tasks=tuple(manifest["tasks"]),
        shards=tuple(ShardEntry(checked_id(shard_id), *row) for shard_id, *row in manifest["shards"]),
        counts=PlanCounts(**manifest["counts"]),
    )


def plan_buckets(plan: Plan, shard_size: ShardSize) -> int:
    """How many buckets of contents the plan was cut along: no shard holds contents of two."""
    return shard_size.num_buckets(plan.counts.num_pairs * len(plan.tasks))


def manifest_uri(plan_uri: str) -> str:
    return f"{plan_uri}/manifest.json"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def _plan_key(config: JobConfig, inputs: dict[str, InputTable], space: Space, tasks: tuple[str, ...]) -> str:
    """What decides the plan. Partitions and the choice of path do not."""
    size = ShardSize.of(config)  # one number where it does not grow: such plans keep the names that they had before
    return _hash(
        {
            "format": _FORMAT,
            "inputs": {name: table.files for name, table in inputs.items()},
            "requests_per_shard": size.least if size.least == size.most else [size.least, size.most],
            "max_group_requests": config.plan.max_group_requests,
            "tasks": tasks,
            "embedding_space": space.name,
            "embedding_dim": space.dim,
        }
    )


def _estimated_bytes(inputs: dict[str, InputTable], space: Space) -> int:
    """About what one process needs at its peak: twice the ids and user embeddings of pairs and users, and the texts."""
    num_rows = inputs["candidates"].num_rows + inputs["users"].num_rows
    return 2 * (num_rows * (4 * space.dim + 64) + inputs["contents"].num_bytes)


def _finish(job: Job, num_candidates: int, outcome: Outcome) -> Plan:
    """Remove what an unfinished plan left here, then write the manifest: only now there is a plan."""
    shards = sorted(outcome.shards, key=lambda shard: shard.shard_id)
    keep = {_name(uri) for uri in (*(shard_uri(job.uri, shard.shard_id) for shard in shards), *outcome.dead_letters)}
    for info in job.storage.list_objects(job.uri):
        if _name(info.uri).endswith(".parquet") and _name(info.uri) not in keep:
            job.storage.delete(info.uri)
    counts = _plan_counts(num_candidates, shards, outcome.counts)
    dead_digest = outcome.counts["dead_digest"] % (1 << 128)
    plan = Plan(
        plan_id=_hash([[shard.shard_id for shard in shards], f"{dead_digest:032x}"]),
        uri=job.uri,
        embedding_space=job.space.name,
        embedding_dim=job.space.dim,
        tasks=job.tasks,
        shards=tuple(shards),
        counts=counts,
    )
    job.storage.write_bytes(manifest_uri(job.uri), json.dumps(manifest_of(plan), ensure_ascii=False).encode())
    return plan


def _name(uri: str) -> str:
    return uri.rpartition("/")[2]


def manifest_of(plan: Plan) -> dict[str, Any]:
    """What `load_plan` reads."""
    return {
        "plan_id": plan.plan_id,
        "embedding_space": plan.embedding_space,
        "embedding_dim": plan.embedding_dim,
        "tasks": plan.tasks,
        "counts": asdict(plan.counts),
        "shards": [list(astuple(shard)) for shard in plan.shards],
    }


def _plan_counts(num_candidates: int, shards: Sequence[ShardEntry], counts: Counter[str]) -> PlanCounts:
    def named(prefix: str) -> dict[str, int]:
        return {key.removeprefix(prefix): counts[key] for key in sorted(counts) if key.startswith(prefix)}

    return PlanCounts(
        num_candidates=num_candidates,
        num_duplicates=num_candidates - counts["num_pairs"],
        num_pairs=counts["num_pairs"],
        num_requests=counts["num_requests"],
        num_groups=sum(shard.num_groups for shard in shards),
        num_contents=counts["num_contents"],
        num_users=counts["num_users"],
        reasons=named("reason:"),
        dead_letters=named("dead:"),
        content_chars=counts["content_chars"],
        request_chars=counts["request_chars"],
    )

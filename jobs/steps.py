"""The steps that several jobs take: open what the configuration names, plan, open the run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from e2p_ray.commit import Run, open_run, run_id_of
from e2p_ray.config import JobConfig
from e2p_ray.engine.manifest import BaseModelFolder, ProjectorManifest, load_manifest
from e2p_ray.plan import Plan, make_plan
from e2p_ray.storage import Storage


@dataclass(frozen=True)
class Setup:
    """What a configuration names, found to belong together; no model is loaded."""

    storage: Storage
    manifest: ProjectorManifest
    base: BaseModelFolder


def say(line: str) -> None:
    """A line of progress: stderr, so that stdout holds results only."""
    print(line, file=sys.stderr, flush=True)


def set_up(config: JobConfig) -> Setup:
    """Raises IncompatibleError when projector and base model do not belong together, before anything large is read."""
    storage = Storage(config.storage)
    manifest, base = load_manifest(config, storage)
    return Setup(storage, manifest, base)


def planned(config: JobConfig, setup: Setup, on_progress: Callable[[str], None] = say) -> Plan:
    """The plan of the configured inputs: made, or found finished."""
    return make_plan(
        config,
        setup.storage,
        embedding_space=setup.manifest.embedding_space,
        embedding_dim=setup.manifest.embedding_dim,
        on_progress=on_progress,
    )


def run_of(config: JobConfig, setup: Setup, plan: Plan) -> Run:
    """The run of a plan: the same for the same plan, texts' configuration, projector and base model."""
    projector_id, base_model_id = setup.manifest.projector_id, setup.base.base_model_id
    run_id = run_id_of(plan.plan_id, config.text_hash(), projector_id, base_model_id)
    return Run(
        run_id=run_id,
        uri=f"{config.output.uri}/runs/{run_id}",
        table_uri=config.output.table_uri,
        plan_uri=plan.uri,
        embedding_space=plan.embedding_space,
        projector_id=projector_id,
        base_model_id=base_model_id,
        shard_ids=tuple(shard.shard_id for shard in plan.shards),
    )


def opened_run(config: JobConfig, setup: Setup, plan: Plan) -> Run:
    """The run of a plan, recorded with its configuration."""
    run = run_of(config, setup, plan)
    open_run(setup.storage, run, config.resolved())
    return run

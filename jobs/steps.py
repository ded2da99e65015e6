"""The steps that several jobs take: open what the configuration names, plan, name the run, open it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from e2p_ray.commit import PublishedTable, Run, open_run, run_id_of
from e2p_ray.config import JobConfig
from e2p_ray.engine.manifest import BaseModelFolder, ProjectorManifest, load_manifest
from e2p_ray.fingerprint import TextSettings, text_settings
from e2p_ray.plan import Plan, ShardSize, make_plan
from e2p_ray.storage import Storage
from e2p_ray.update import Limits, UpdateJob, priorities_digest, update_id_of
from jobs.streams import put


@dataclass(frozen=True)
class Setup:
    """What a configuration names, found to belong together; no model is loaded."""

    storage: Storage
    manifest: ProjectorManifest
    base: BaseModelFolder


def say(line: str) -> None:
    """A line of progress: stderr, so that stdout holds results only."""
    put(sys.stderr, f"{line}\n")


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


def source_id_of(config: JobConfig, setup: Setup, plan: Plan) -> str:
    """Names all that a plan's texts are made of; it is the run id of the plan's full run."""
    return run_id_of(plan.plan_id, config.text_hash(), setup.manifest.projector_id, setup.base.base_model_id)


def opened_run(config: JobConfig, setup: Setup, run: Run) -> Run:
    """The run, recorded with its configuration."""
    open_run(setup.storage, run, config.resolved())
    return run


def full_run(config: JobConfig, setup: Setup, plan: Plan, *, again: PublishedTable | None = None) -> Run:
    """The run of every request of a plan; with `again`, another one than whatever led to this version of the table."""
    source_id = source_id_of(config, setup, plan)
    run_id = source_id
    if again is not None:
        salted = f"{plan.plan_id} {again.table_id} {again.version}"
        run_id = run_id_of(salted, config.text_hash(), setup.manifest.projector_id, setup.base.base_model_id)
    shard_ids = tuple(shard.shard_id for shard in plan.shards)
    return _run(config, setup, run_id, source_id, plan.uri, plan.embedding_space, shard_ids, again)


def update_runs(
    config: JobConfig, setup: Setup, plan: Plan, table: PublishedTable | None, limits: Limits
) -> Iterator[Run]:
    """The run of an update, still without shards; then, as long as anybody asks, the run that goes on from the last."""
    source_id, after = source_id_of(config, setup, plan), ""
    found = priorities_digest(setup.storage, config.inputs.candidates_uri, limits.priority) if limits.priority else ""
    while True:
        update_id = update_id_of(source_id, table, limits, found, after)
        run_id = run_id_of(update_id, config.text_hash(), setup.manifest.projector_id, setup.base.base_model_id)
        uri = f"{config.output.uri}/updates/{update_id}"
        yield _run(config, setup, run_id, source_id, uri, plan.embedding_space, (), table)
        after = run_id


def update_job(config: JobConfig, setup: Setup, plan: Plan, table: PublishedTable | None) -> UpdateJob:
    """What an update compares."""
    return UpdateJob(
        storage=setup.storage,
        plan=plan,
        table=table,
        settings_of=_settings_of(config, setup),
        projector_id=setup.manifest.projector_id,
        base_model_id=setup.base.base_model_id,
        candidates_uri=config.inputs.candidates_uri,
        shard_size=ShardSize.of(config),
        max_group_requests=config.plan.max_group_requests,
    )


def _settings_of(config: JobConfig, setup: Setup) -> Callable[[str, str], TextSettings]:
    """The same settings that the engine's generator will find, without an engine."""
    manifest = setup.manifest

    @cache
    def settings_of(task: str, language: str) -> TextSettings:
        return text_settings(
            config,
            task,
            prompt_id=config.tasks[task].prompt_id(language, manifest.layout, manifest.num_soft_tokens),
            projector_id=manifest.projector_id,
            base_model_id=setup.base.base_model_id,
        )

    return settings_of


def _run(
    config: JobConfig,
    setup: Setup,
    run_id: str,
    source_id: str,
    plan_uri: str,
    embedding_space: str,
    shard_ids: tuple[str, ...],
    table: PublishedTable | None,
) -> Run:
    return Run(
        run_id=run_id,
        uri=f"{config.output.uri}/runs/{run_id}",
        table_uri=config.output.table_uri,
        plan_uri=plan_uri,
        embedding_space=embedding_space,
        projector_id=setup.manifest.projector_id,
        base_model_id=setup.base.base_model_id,
        shard_ids=shard_ids,
        source_id=source_id,
        base_version=table.version if table else None,
        is_first=table is None,
    )

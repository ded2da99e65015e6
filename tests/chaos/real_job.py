"""A small job with a real engine: a tiny random model and projector; in this process, without Ray, where asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from transformers import LlamaConfig, PreTrainedConfig

from e2p_ray.batch import BatchSummary, ShardOutcome, ShardWorker
from e2p_ray.batch.tally import Tally
from e2p_ray.commit import Run, open_run, pending_shards
from e2p_ray.config import JobConfig
from e2p_ray.engine.manifest import ProjectorManifest, resolve_base_model
from e2p_ray.engine.projector import Projector, ReferenceStatistics
from e2p_ray.storage import Storage
from jobs.steps import full_run, planned, set_up
from tests import tiny_models
from tests.small_job import DIM, SPACE, TASKS, write_small_job
from tests.tiny_models import save_model_folder

LLAMA = LlamaConfig(**tiny_models.common())
FREE = ("language", "repetition", "foreign_contacts", "foreign_numbers", "foreign_names")


def write_real_job(
    folder: Path,
    *,
    model: PreTrainedConfig = LLAMA,
    save: Callable[[PreTrainedConfig, Path], Path] = save_model_folder,
    **changes: Any,
) -> JobConfig:
    """Twenty users, a hundred and twenty requests; a random model's letters pass the checks."""
    sampling = {"sampling": {"max_new_tokens": 8}, "limits": {"must_finish": False}, "max_content_tokens": 200}
    values: dict[str, Any] = {
        "num_users": 20,
        "tasks": {name: task | sampling for name, task in TASKS.items()},
        "checks": dict.fromkeys(FREE, False),
        "plan": {"requests_per_shard": 40},
        "engine": {"max_rows": 32, "num_threads": 1},
        "gates": {"max_fallback_share": 1.0, "max_dead_letter_share": 0.3, "max_same_text_share": 1.0},
    }
    config, _ = write_small_job(folder, **(values | changes))
    save(model, Path(config.base_model.uri))
    write_projector(config, seed=1, model=model)
    return config


def write_projector(
    config: JobConfig, *, seed: int, space: str = SPACE, model: PreTrainedConfig = LLAMA
) -> ProjectorManifest:
    """A projector with random weights for the job's base model as it is now, in place of the one that is there."""
    storage = Storage(config.storage)
    base = resolve_base_model(config.base_model, storage)
    torch.manual_seed(seed)
    manifest = ProjectorManifest(
        embedding_dim=DIM,
        embedding_space=space,
        d_model=model.hidden_size,
        base_model_id=base.base_model_id,
        tokenizer_hash=base.tokenizer_hash,
        output_rms=0.5,
        hidden_dim=16,
    ).with_files({})
    projector = Projector(manifest, ReferenceStatistics.of(torch.randn(64, DIM)))
    for weights in projector.parameters():
        torch.nn.init.normal_(weights, std=0.5)
    return projector.save_pretrained(storage, config.projector.uri)


def opened(config: JobConfig) -> tuple[Storage, Run]:
    """The job's run, planned and recorded."""
    setup = set_up(config)
    run = full_run(config, setup, planned(config, setup, lambda _: None))
    open_run(setup.storage, run, config.resolved())
    return setup.storage, run


def call(worker: ShardWorker, shard_id: str) -> ShardOutcome:
    """One shard by this worker."""
    (row,) = worker(pa.table({"shard_id": [shard_id], "first": [None], "end": [None]})).to_pylist()
    return ShardOutcome(**row)


def batch_here(config: JobConfig, storage: Storage, run: Run, **_: Any) -> BatchSummary:
    """`run_batch` by one worker of this process, with the engine that jobs load."""
    pending = pending_shards(storage, run)
    tally, worker = (
        Tally(len(run.shard_ids), len(run.shard_ids) - len(pending), None),
        ShardWorker(config, storage, run, None),
    )
    for shard_id in pending:
        outcome = call(worker, shard_id)
        assert not outcome.error_type, outcome
        tally.add(outcome)
    return tally.summary()

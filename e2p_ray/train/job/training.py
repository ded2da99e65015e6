"""The training job as its driver sees it: scan, prepare lessons, Ray Train around the workers, the artifact out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import ray
import torch

from e2p_ray.engine.manifest import ProjectorManifest
from e2p_ray.engine.projector import Projector, ReferenceStatistics
from e2p_ray.errors import RunError
from e2p_ray.ray_session import quiet_ray_data
from e2p_ray.train.data.inputs import PreparedLessons, Reading, prepare_lessons
from e2p_ray.train.data.joins import JoinSettings
from e2p_ray.train.job.board import TrainProgress
from e2p_ray.train.job.contract import Trained
from e2p_ray.train.job.distributed import new_board, train_on_workers
from e2p_ray.train.job.prepared import Prepared, settings_of
from e2p_ray.train.job.provenance import code_of, curves_said, inputs_of, settings_said
from e2p_ray.train.job.session import check_resources, train_session, typed_errors
from e2p_ray.train.records import Scores

_TARGETS_PER_CHUNK = 20_000


@dataclass(frozen=True, slots=True, eq=False)
class TrainOutcome:
    """A finished training. `provenance` is JSON; neither it nor anything else here names a user."""

    train_id: str
    manifest: ProjectorManifest
    provenance: dict[str, Any]
    records: tuple[dict[str, Any], ...]  # one a step: the curves
    scores: Scores | None  # of the validation lessons


def run_training(
    prepared: Prepared,
    *,
    say: Callable[[str], None] = lambda _: None,
    on_progress: Callable[[TrainProgress], None] = lambda _: None,
    begin: Callable[[], None] = lambda: None,
) -> TrainOutcome:
    """Train, or go on from the checkpoint, and write the artifact. `begin` is called once nothing is in the way.

    Raises ConfigError or InputError for inputs that cannot be learned from, RunError where the loss is not finite,
    IncompleteRunError when more workers were lost than `workers.max_failures`; calling again resumes.
    """
    config = prepared.config
    with train_session(config.workers):
        check_resources(config.workers)
        board = new_board()  # now, so that it is up when the tables are read
        say("reading the training tables")
        with quiet_ray_data(), typed_errors():
            lessons = prepare_lessons(reading_of(prepared), prepared.sources)
        say(_lessons_said(lessons))
        begin()
        trained, hashes = train_on_workers(prepared, lessons, board, say, on_progress)
        with typed_errors():
            reference = {name: torch.from_numpy(value.copy()) for name, value in ray.get(lessons.reference).items()}
    return _write_artifact(prepared, lessons, trained, hashes, ReferenceStatistics(**reference))


def reading_of(prepared: Prepared) -> Reading:
    """What the tasks that read the tables need to know."""
    config = prepared.config
    joins = JoinSettings(
        tasks=tuple(sorted(config.tasks)),
        embedding_space=config.projector.embedding_space,
        validation_share=0.0 if config.inputs.validation_uri else config.training.validation_share,
        validation_uri=config.inputs.validation_uri,
        targets_per_chunk=_TARGETS_PER_CHUNK,
        targets_uri=config.inputs.targets_uri,
        users_uri=config.inputs.users_uri,
    )
    return Reading(
        storage=prepared.storage,
        base_model=config.base_model,
        folder=prepared.folder,
        tasks=config.tasks,
        settings=settings_of(config.projector, config.training),
        joins=joins,
        max_positions=prepared.max_positions,
    )


def _lessons_said(lessons: PreparedLessons) -> str:
    counts = lessons.counts
    parts = [f"{counts.num_used['training']:,} targets of {counts.num_users['training']:,} users to train on"]
    if counts.num_used["validation"]:
        parts.append(f"{counts.num_used['validation']:,} to validate on")
    skipped = sum(sum(found.values()) for found in counts.skipped.values())
    return ", ".join([*parts, f"{skipped:,} skipped"])


def _write_artifact(
    prepared: Prepared,
    lessons: PreparedLessons,
    trained: Trained,
    hashes: dict[int, str],
    reference: ReferenceStatistics,
) -> TrainOutcome:
    if set(hashes.values()) != {trained.base_model_hash}:
        raise RunError(
            f"the workers had different base models ({sorted(set(hashes.values()))}). Make their files equal"
        )
    records = tuple(asdict(record) for record in trained.records)
    provenance = _provenance(prepared, lessons, trained, list(records))
    projector = Projector(replace(trained.manifest, trained=provenance), reference)
    projector.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in trained.weights.items()})
    manifest = projector.save_pretrained(prepared.storage, prepared.config.output.projector_uri)
    return TrainOutcome(prepared.train_id, manifest, provenance, records, trained.scores)


def _provenance(
    prepared: Prepared, lessons: PreparedLessons, trained: Trained, records: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "train_id": prepared.train_id,
        "code": code_of(),
        "inputs": inputs_of(prepared.sources),
        "settings": settings_said(prepared.config),
        "lessons": asdict(lessons.counts),
        "base_model_hash": trained.base_model_hash,
        "curves": curves_said(records),
        "seconds": round(trained.seconds_s, 3),
        "hardware": trained.hardware,
        "finished_at": datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds"),
    }

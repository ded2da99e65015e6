"""What the driver and the workers of a training hand to each other.

Ray Train's controller unpickles all of it, and only passes it on: no torch and no model's code here, which would cost
it, and the start of every training, 5 s of CPU time (measured).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from e2p_ray.config import BaseModelConfig, TrainWorkersConfig
from e2p_ray.engine.manifest import BaseModelFolder, ProjectorManifest
from e2p_ray.storage import Storage
from e2p_ray.train.records import Scores, StepRecord
from e2p_ray.train.settings import TrainSettings


@dataclass(frozen=True, slots=True)
class WorkerJob:
    """What a worker needs to know. Picklable; lessons by reference."""

    train_id: str
    storage: Storage
    base_model: BaseModelConfig
    folder: BaseModelFolder
    workers: TrainWorkersConfig
    settings: TrainSettings
    embedding_space: str
    checkpoint_uri: str
    checkpoint_every: int
    training: ray.ObjectRef[Any]
    validation: ray.ObjectRef[Any] | None
    reference: ray.ObjectRef[Any]
    board: Any


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """What the first worker brings back."""

    manifest: ProjectorManifest
    weights: dict[str, npt.NDArray[np.float32]]
    records: tuple[StepRecord, ...]
    scores: Scores | None  # of the validation lessons
    base_model_hash: str
    seconds_s: float  # of training, earlier calls included
    hardware: dict[str, str]


def run_worker(config: dict[str, Any]) -> Trained | None:
    """Ray Train's function."""
    from e2p_ray.train.job.worker import work  # the worker alone loads models

    job: WorkerJob = config["job"]
    return work(job)

"""Trains a projector on texts that were right for their users; the base model stays as it is."""

from e2p_ray.train.baselines.adapters import Adapter, AdapterKind, train_adapter
from e2p_ray.train.baselines.profile import profile_lessons
from e2p_ray.train.controls import derangement
from e2p_ray.train.fit import Alone, Fit, StepRecord, World
from e2p_ray.train.lessons import LessonTable, Ragged, Target, UserTable, make_lessons
from e2p_ray.train.loss import target_loss
from e2p_ray.train.projector import (
    TrainResult,
    check_frozen,
    fit_projector,
    new_projector,
    start_calmly,
    train_projector,
)
from e2p_ray.train.score import RowScores, score
from e2p_ray.train.settings import TrainSettings

__all__ = [
    "Adapter",
    "AdapterKind",
    "Alone",
    "Fit",
    "LessonTable",
    "Ragged",
    "RowScores",
    "StepRecord",
    "Target",
    "TrainResult",
    "TrainSettings",
    "UserTable",
    "World",
    "check_frozen",
    "derangement",
    "fit_projector",
    "make_lessons",
    "new_projector",
    "profile_lessons",
    "score",
    "start_calmly",
    "target_loss",
    "train_adapter",
    "train_projector",
]

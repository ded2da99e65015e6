"""Trains a projector on texts that were right for their users; the base model stays as it is."""

from e2p_ray.train.fit import Alone, Fit, StepRecord, World
from e2p_ray.train.lessons import Lesson, LessonTable, Row, Target, UserTable, make_lessons
from e2p_ray.train.loss import Batch, prefixes_of, row_losses, target_loss
from e2p_ray.train.projector import TrainResult, check_frozen, fit_projector, new_projector, train_projector
from e2p_ray.train.score import RowScores, score
from e2p_ray.train.settings import TrainSettings

__all__ = [
    "Alone",
    "Batch",
    "Fit",
    "Lesson",
    "LessonTable",
    "Row",
    "RowScores",
    "StepRecord",
    "Target",
    "TrainResult",
    "TrainSettings",
    "UserTable",
    "World",
    "check_frozen",
    "fit_projector",
    "make_lessons",
    "new_projector",
    "prefixes_of",
    "row_losses",
    "score",
    "target_loss",
    "train_projector",
]

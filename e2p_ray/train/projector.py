"""A new projector for a base model and its users, and its training within this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from e2p_ray.config import TaskConfig
from e2p_ray.engine.manifest import BaseModelFolder, ProjectorManifest
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.projector import Projector, ReferenceStatistics
from e2p_ray.errors import RunError
from e2p_ray.schema import Content
from e2p_ray.train.fit import Fit
from e2p_ray.train.lessons import LessonTable, Target, UserTable, make_lessons
from e2p_ray.train.records import StepRecord
from e2p_ray.train.settings import TrainSettings


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A trained projector and how it came about."""

    projector: Projector
    records: tuple[StepRecord, ...]
    num_examples: int
    num_skipped: Mapping[str, int]
    base_model_hash: str  # of the weights; equal before and after

    @property
    def losses(self) -> tuple[float, ...]:
        """Nats per target token, one a step."""
        return tuple(record.loss for record in self.records)


def train_projector(
    base: BaseModel,
    folder: BaseModelFolder,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, TaskConfig],
    users: UserTable,
    contents: Sequence[Content],
    targets: Sequence[Target],
    settings: TrainSettings,
    on_progress: Callable[[int, float], None] | None = None,
) -> TrainResult:
    """Train a new projector; `on_progress` gets the number of steps done and the step's loss.

    Targets of unknown users or contents are skipped and counted. Raises ConfigError when none is left, RunError when
    the loss is not finite or the base model changed.
    """
    lessons, skipped = make_lessons(tokenizer, tasks, users, contents, targets, settings, base.max_positions)
    projector = new_projector(base, folder, users, settings)
    start_calmly(projector, base, lessons)
    fit = fit_projector(base, projector, lessons, settings, on_progress=on_progress)
    return TrainResult(fit.finish(), tuple(fit.records), lessons.num_rows, skipped, base.weights_hash())


def fit_projector(
    base: BaseModel,
    projector: Projector,
    lessons: LessonTable,
    settings: TrainSettings,
    *,
    validation: LessonTable | None = None,
    on_progress: Callable[[int, float], None] | None = None,
) -> Fit:
    """Train a projector on lessons in this process; RunError when the base model changed."""
    before = base.weights_hash()
    fit = Fit(base, projector, lessons, settings, validation=validation)
    for record in fit.run():
        if on_progress is not None:
            on_progress(record.step, record.loss)
    check_frozen(base, before)
    return fit


def start_calmly(projector: Projector, base: BaseModel, lessons: LessonTable) -> None:
    """Let an untrained projector do no harm: its soft tokens begin as the token that stands before them.

    The mean of these tokens over the lessons, so that prompts may differ; where nothing stands before, the mean of all
    token embeddings. Measured on PENS (tests/bench/LOG.md): the loss starts at that of no soft token, not 0.2 above it.
    """
    starts = lessons.lefts.starts
    last = lessons.lefts.ids[starts[1:][np.diff(starts) > 0] - 1]
    with torch.no_grad():
        if len(last):
            ids, counts = np.unique(last, return_counts=True)
            known = base.embed(torch.from_numpy(ids.astype(np.int64)).to(base.device)).float()
            weights = torch.from_numpy(counts / counts.sum()).to(known)
            projector.start_at(weights @ known)
        else:
            projector.start_at(base.token_embeddings().mean(0))


def check_frozen(base: BaseModel, hash_before: str) -> None:
    """RunError unless the base model's weights hash to what they did before."""
    if base.weights_hash() != hash_before:
        raise RunError("the base model's weights changed while the projector was trained. This is a bug: report it")


def new_projector(
    base: BaseModel,
    folder: BaseModelFolder,
    users: UserTable,
    settings: TrainSettings,
    reference: ReferenceStatistics | None = None,
) -> Projector:
    """An untrained projector that fits this base model and these users; its start follows from the seed.

    `reference` spares the users' statistics where they are known.
    """
    training = {**asdict(settings), "target_prefix": dict(settings.target_prefix)}
    manifest = ProjectorManifest(
        embedding_dim=users.user_embeddings.shape[1],
        embedding_space=users.embedding_space,
        d_model=base.d_model,
        base_model_id=folder.base_model_id,
        tokenizer_hash=folder.tokenizer_hash,
        output_rms=base.token_embedding_rms * settings.output_scale,
        kind=settings.kind,
        layout=settings.layout,
        hidden_dim=settings.hidden_dim,
        num_soft_tokens=settings.num_soft_tokens,
        dropout=settings.dropout,
        trained={"settings": {"training": training}},
    )
    torch.manual_seed(settings.seed)
    reference = reference or ReferenceStatistics.of(torch.from_numpy(users.user_embeddings))
    return Projector(manifest, reference).to(base.device)

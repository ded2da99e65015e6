"""One projector, its held-out lessons, and the scores of every method on exactly these."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import polars as pl
from transformers import PreTrainedTokenizerBase

from e2p_ray.config import EvaluateConfig, TaskConfig
from e2p_ray.downstream.evaluation import MethodCost
from e2p_ray.engine.manifest import BaseModelFolder
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.prefixes import PrefixStore
from e2p_ray.engine.projector import Projector
from e2p_ray.errors import RunError
from e2p_ray.evaluate.data import EvaluationData
from e2p_ray.train.controls import derangement
from e2p_ray.train.lessons import LessonTable, Target, make_lessons
from e2p_ray.train.score import RowScores, score
from e2p_ray.train.settings import TrainSettings

Say = Callable[[str], None]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """One method's scores of the held-out rows, and what it cost."""

    method: str
    scores: RowScores
    cost: MethodCost


@dataclass(frozen=True, slots=True, eq=False)
class Contest:
    """What every method is given: the frozen base model, the projector, the data, how controls are trained."""

    config: EvaluateConfig
    base: BaseModel
    folder: BaseModelFolder
    tokenizer: PreTrainedTokenizerBase
    projector: Projector
    settings: TrainSettings  # the projector's own shape; the controls' training
    data: EvaluationData
    table: LessonTable  # of the held-out targets
    shown: LessonTable | None  # of the candidates of the impressions
    skipped: Mapping[str, int]  # of the held-out targets, whatever for
    say: Say

    @property
    def tasks(self) -> Mapping[str, TaskConfig]:
        return self.config.tasks

    def lessons(self, targets: tuple[Target, ...]) -> LessonTable:
        """Targets as lessons in the projector's layout."""
        contents = list(self.data.contents.values())
        positions = self.base.max_positions
        table, _ = make_lessons(
            self.tokenizer, self.tasks, self.data.users, contents, targets, self.settings, positions
        )
        return table

    def new_store(self) -> PrefixStore:
        """An empty store of shared prefixes, so that a method's cost includes its prefill."""
        return PrefixStore(self.base, self.settings.max_prefix_bytes)

    def languages(self) -> npt.NDArray[np.str_]:
        """Of every row of the table."""
        return np.array([self.data.language_of(self.data.held_out[place]) for place in self.table.source])

    def shuffled(self) -> LessonTable:
        """Every row with the user embedding of another user of its language."""
        return replace(self.table, user=shuffled_users(self.table.user, self.languages(), self.config.evaluation.seed))

    def frame(self, found: Scored) -> pl.DataFrame:
        """A method's scores as rows of the table that `downstream` measures."""
        targets = [self.data.held_out[place] for place in self.table.source]
        sizes = [self.data.history_of.get(target.user_id) for target in targets]
        return pl.DataFrame(
            {
                "method": [found.method] * len(targets),
                "task": [target.task for target in targets],
                "language": [self.data.language_of(target) for target in targets],
                "user_id": [target.user_id for target in targets],
                "content_id": [target.content_id for target in targets],
                "num_tokens": found.scores.num_tokens,
                "nll": found.scores.nll,
                "history_size": pl.Series(sizes, dtype=pl.Int64),
            }
        )


def shuffled_users(user: npt.NDArray[np.int32], languages: npt.NDArray[np.str_], seed: int) -> npt.NDArray[np.int32]:
    """Every row's user replaced by another one with rows in its language, or in any where it has no other."""
    other = user.copy()
    for number, language in enumerate(sorted(set(languages.tolist()))):
        mine = languages == language
        users = np.unique(user[mine])
        strangers = np.setdiff1d(user, users)
        if len(users) == 1 and len(strangers):
            other[mine] = strangers[(seed + number) % len(strangers)]
            continue
        places = np.searchsorted(users, user[mine])
        other[mine] = users[derangement(len(users), seed=seed + number)][places]
    return other


def finite_score(base: BaseModel, projector: Projector | None, table: LessonTable, store: PrefixStore) -> RowScores:
    """`score`. RunError where a loss is no finite number: no measure could be taken of it."""
    return refuse_non_finite(score(base, projector, table, store))


def refuse_non_finite(scores: RowScores) -> RowScores:
    """The scores as they are, or RunError."""
    num_bad = int((~np.isfinite(scores.nll)).sum())
    if num_bad:
        raise RunError(
            f"{num_bad:,} of {len(scores.nll):,} texts have a loss that is NaN or Inf. Set base_model.dtype to float32 "
            "(float16 ends at 65,504), and look at the projector and at evaluation.noise"
        )
    return scores


def soft_token_scores(
    contest: Contest, method: str, table: LessonTable, projector: Projector | None, store: PrefixStore, num_trained: int
) -> Scored:
    """Score a table with a projector's soft tokens, or without any, and time it."""
    started = time.perf_counter()
    scores = finite_score(contest.base, projector, table, store)
    seconds = time.perf_counter() - started
    num_soft = 0 if projector is None else projector.manifest.num_soft_tokens
    lefts = np.repeat(np.diff(table.lefts.starts), np.diff(table.first_row))
    rights = np.diff(table.rights.starts)
    own = rights + (num_soft or 1)  # without a soft token the content's last token is computed for every request
    cost = MethodCost(
        method,
        num_trainable_parameters=num_trained,
        num_prompt_tokens=float((lefts + rights + num_soft).mean()),
        num_own_tokens=float(own.mean()),
        rows_per_s=table.num_rows / seconds,
    )
    return Scored(method, scores, cost)

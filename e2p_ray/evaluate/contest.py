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
    say: Say

    @property
    def tasks(self) -> Mapping[str, TaskConfig]:
        return self.config.tasks

    def lessons(self, targets: tuple[Target, ...]) -> LessonTable:
        """Targets as lessons in the projector's layout."""
        return lessons_for(self, targets)

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


def lessons_for(contest: Contest, targets: tuple[Target, ...]) -> LessonTable:
    """See `Contest.lessons`."""
    table, _ = make_lessons(
        contest.tokenizer,
        contest.tasks,
        contest.data.users,
        list(contest.data.contents.values()),
        targets,
        contest.settings,
        contest.base.max_positions,
    )
    return table


def shuffled_users(user: npt.NDArray[np.int32], languages: npt.NDArray[np.str_], seed: int) -> npt.NDArray[np.int32]:
    """Every row's user replaced by another one with rows in its language; a language's only user stays."""
    other = user.copy()
    for number, language in enumerate(sorted(set(languages.tolist()))):
        mine = languages == language
        users = np.unique(user[mine])
        places = np.searchsorted(users, user[mine])
        other[mine] = users[derangement(len(users), seed=seed + number)][places]
    return other


def soft_token_scores(
    contest: Contest, method: str, table: LessonTable, projector: Projector | None, store: PrefixStore, num_trained: int
) -> Scored:
    """Score a table with a projector's soft tokens, or without any, and time it."""
    started = time.perf_counter()
    scores = score(contest.base, projector, table, store)
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

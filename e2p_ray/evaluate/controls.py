"""The controls that always run: right, shuffled and mean user, no soft token, and a constant learned one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from e2p_ray.downstream.evaluation import MethodCost
from e2p_ray.downstream.measures.methods import CONSTANT, MEAN, NO_SOFT_TOKEN, RIGHT, SHUFFLED
from e2p_ray.engine.projector import Projector
from e2p_ray.evaluate.contest import Contest, Scored, soft_token_scores
from e2p_ray.train.lessons import LessonTable
from e2p_ray.train.projector import fit_projector, new_projector, start_calmly
from e2p_ray.train.settings import TrainSettings


def num_parameters(projector: Projector) -> int:
    """Trained numbers of a projector."""
    return sum(parameter.numel() for parameter in projector.parameters())


def score_controls(contest: Contest, constant: Projector) -> list[Scored]:
    """All five on the same rows."""
    table, projector, store = contest.table, contest.projector, contest.new_store()
    trained = num_parameters(projector)
    mean = np.broadcast_to(projector.reference.mean.cpu().numpy(), table.user_embeddings.shape)
    return [
        soft_token_scores(contest, RIGHT, table, projector, store, trained),
        _untimed(soft_token_scores(contest, SHUFFLED, contest.shuffled(), projector, store, trained)),
        _untimed(soft_token_scores(contest, MEAN, replace(table, user_embeddings=mean), projector, store, trained)),
        soft_token_scores(contest, NO_SOFT_TOKEN, table, None, contest.new_store(), 0),
        soft_token_scores(contest, CONSTANT, table, constant, contest.new_store(), num_parameters(constant)),
    ]


def _untimed(scored: Scored) -> Scored:
    """Shuffled and mean users read the prefixes that the right ones left: their time would flatter them."""
    cost = scored.cost
    return replace(scored, cost=MethodCost(cost.method, None, cost.num_prompt_tokens, cost.num_own_tokens, None, None))


def train_constant(contest: Contest) -> Projector:
    """One soft token for everybody, trained on the projector's targets as long as the settings say."""
    settings = replace(contest.settings, kind="constant")
    contest.say(f"trains the constant token: {settings.num_steps:,} steps")
    return train_on(contest, contest.lessons(contest.data.training), settings)


def train_on(contest: Contest, lessons: LessonTable, settings: TrainSettings) -> Projector:
    """A new projector trained on lessons in this process."""
    projector = new_projector(contest.base, contest.folder, contest.data.users, settings)
    start_calmly(projector, contest.base, lessons)
    return fit_projector(contest.base, projector, lessons, settings).finish()

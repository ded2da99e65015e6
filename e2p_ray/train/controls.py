"""The same lessons scored with other soft tokens: what knowing the user is worth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from e2p_ray.engine.projector import Projector
from e2p_ray.train.fit import Fit
from e2p_ray.train.lessons import LessonTable
from e2p_ray.train.records import Scores

CONTROLS = ("right", "shuffled", "mean", "none")


def score_controls(fit: Fit, projector: Projector, table: LessonTable) -> Scores:
    """Right user, another user's soft token, the average user's, none at all. Every worker of the fit calls this."""
    users = table.user_embeddings
    mean = projector.reference.mean.numpy()
    tables = {
        "right": table,
        "shuffled": replace(table, user_embeddings=users[derangement(len(users), seed=0)]),
        "mean": replace(table, user_embeddings=np.broadcast_to(mean, users.shape)),
    }
    scores = {name: fit.scored(projector, changed) for name, changed in tables.items()}
    scores["none"] = fit.scored(None, table)
    return Scores({name: scores[name].nll for name in CONTROLS}, scores["right"].num_tokens, table.user)


def derangement(size: int, *, seed: int) -> npt.NDArray[np.int64]:
    """A permutation of range(size) that leaves nothing in its place (one user alone stays): one random circle."""
    order = np.random.default_rng([seed, size]).permutation(size)
    shuffled = np.empty(size, np.int64)
    shuffled[order] = np.roll(order, -1)
    return shuffled

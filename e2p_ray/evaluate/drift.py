"""Does a projector survive that user embeddings change? Within their space it should; in a refit space it cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import polars as pl

from e2p_ray.config import EvaluateConfig
from e2p_ray.downstream.evaluation import DriftPoint
from e2p_ray.downstream.measures.bootstrap import ratio_interval, user_sums
from e2p_ray.errors import IncompatibleError, InputError
from e2p_ray.evaluate.contest import Contest, Say, finite_score
from e2p_ray.evaluate.data import EvaluationData, user_table
from e2p_ray.plan.inputs import Space, latest
from e2p_ray.storage import Storage
from e2p_ray.train.data.joins import concat
from e2p_ray.train.data.tables import read_users, scan_table
from e2p_ray.train.lessons import LessonTable, UserTable
from e2p_ray.train.score import RowScores

NOISE, LATER, REFIT = "noise", "later", "refit"


def read_changed(
    config: EvaluateConfig, storage: Storage, space: Space, data: EvaluationData, say: Say
) -> dict[str, UserTable]:
    """The evaluated users' later and refit user embeddings, by kind. Raises what does not fit before a model is loaded.

    A user who is gone by then, or opted out, is not among them.
    """
    wanted = pl.Series(sorted({target.user_id for target in data.held_out}))
    found = {}
    for kind, uri in ((LATER, config.inputs.later_users_uri), (REFIT, config.inputs.refit_users_uri)):
        if uri is None:
            continue
        users = _users_now(storage, uri, wanted, space.dim)
        _judge_space(kind, space.name, users.embedding_space, uri, say)
        if len(users.user_ids) < len(wanted):
            say(
                f"{kind} users: measured on the {len(users.user_ids):,} of {len(wanted):,} evaluated ones who are there"
            )
        found[kind] = users
    return found


def _users_now(storage: Storage, uri: str, wanted: pl.Series, dim: int) -> UserTable:
    """Those of the wanted users with a user embedding in the space that most of them are in."""
    frames = [read_users(storage, piece, wanted) for piece in scan_table(storage, "users", uri).pieces]
    users = latest(concat(frames, "users"), "user_id").filter(pl.col("reason").is_null(), pl.col("dim") == dim)
    spaces = (
        users.filter(pl.col("space") != "")["space"].value_counts().sort("count", "space", descending=[True, False])
    )
    if spaces.is_empty():
        raise InputError(
            f"none of the {len(wanted):,} evaluated users has a user embedding of {dim} numbers in a named space",
            uri=uri,
            remedy="Give the same users, or leave this input out",
        )
    name = str(spaces["space"][0])
    return user_table(users.filter(pl.col("space") == name).sort("user_id"), Space(name, dim))


def _judge_space(kind: str, own: str, other: str, uri: str, say: Say) -> None:
    """Later users are in the projector's own space, refit ones are not: InputError or IncompatibleError otherwise."""
    try:
        refuse_other_space(own, other)
    except IncompatibleError as error:
        if kind == LATER:
            raise
        say(f"refit users are refused, as they should be: {error}. For the measurement they are forced")
    else:
        if kind == REFIT:
            raise InputError(
                f"names the projector's own embedding space {other!r}",
                uri=uri,
                remedy="A refit has an id of its own: give another table, or leave refit_users_uri out",
            )


def refuse_other_space(own: str, other: str) -> None:
    """Raise IncompatibleError unless both are one embedding space: what every job does before a model is loaded."""
    if own != other:
        raise IncompatibleError(
            f"the projector was trained on embedding space {own!r}, these users are in {other!r}. The same dimension "
            "is not the same space: a refit rotates it. Retrain the projector on the new space"
        )


def measure_drift(contest: Contest, changed: Mapping[str, UserTable]) -> list[DriftPoint]:
    """Loss of the right user's soft token after noise, with later user embeddings, and in a refit space by force.

    Amounts are root mean square changes in standard deviations of the projector's reference statistics. Later and refit
    ones are measured on the users who have one.
    """
    table, evaluation = contest.table, contest.config.evaluation
    std = contest.projector.reference.std.cpu().numpy()
    seen = contest.projector.std.cpu().numpy()  # infinite where no user differed, and nothing was learned
    normal = np.random.default_rng([evaluation.seed, 11]).normal(size=table.user_embeddings.shape).astype(np.float32)
    store, everybody = contest.new_store(), np.ones(table.num_rows, np.bool_)
    unmoved = finite_score(contest.base, contest.projector, table, store)
    points = [_point(contest, NOISE, 0.0, unmoved, everybody)]
    for amount in evaluation.noise:
        noisy = replace(table, user_embeddings=table.user_embeddings + np.float32(amount) * std * normal)
        scores = finite_score(contest.base, contest.projector, noisy, store)
        points.append(_point(contest, NOISE, amount, scores, everybody))
    for kind, users in changed.items():
        moved, is_there = _with_users(contest, users)
        known = is_there[table.user]
        if not known.any():  # their prompts did not fit
            contest.say(f"{kind} users: none of them is among the scored ones, so nothing is measured")
            continue
        scores, used = finite_score(contest.base, contest.projector, moved, store), np.unique(table.user[known])
        amount = float(np.sqrt(np.square((moved.user_embeddings - table.user_embeddings)[used] / seen).mean()))
        point = _point(contest, kind, amount, scores, known)
        if not known.all():
            point = replace(point, num_users=len(used), nll_without=_rows(unmoved, known).mean_nll)
        points.append(point)
    return points


def _with_users(contest: Contest, users: UserTable) -> tuple[LessonTable, npt.NDArray[np.bool_]]:
    """The held-out rows with other user embeddings where there are some, and of every user whether there is one."""
    place_of = {user_id: place for place, user_id in enumerate(users.user_ids)}
    is_there = np.array([user_id in place_of for user_id in contest.data.users.user_ids])
    places = [place_of[user_id] for user_id in contest.data.users.user_ids if user_id in place_of]
    changed = contest.table.user_embeddings.copy()
    changed[is_there] = users.user_embeddings[places]
    return replace(contest.table, user_embeddings=changed), is_there


def _rows(scores: RowScores, chosen: npt.NDArray[np.bool_]) -> RowScores:
    return RowScores(scores.nll[chosen], scores.num_tokens[chosen])


def _point(contest: Contest, kind: str, amount: float, scores: RowScores, chosen: npt.NDArray[np.bool_]) -> DriftPoint:
    """The loss of some of the rows."""
    found = _rows(scores, chosen)
    users = [contest.data.held_out[place].user_id for place in contest.table.source[chosen]]
    sums, _ = user_sums(users, np.column_stack([found.nll, found.num_tokens]))
    interval = ratio_interval(sums[:, 0], sums[:, 1], seed=contest.config.evaluation.seed)
    return DriftPoint(kind, amount, found.mean_nll, interval)

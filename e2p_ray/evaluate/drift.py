"""Does a projector survive that user embeddings change? Within their space it should; in a refit space it cannot."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from e2p_ray.downstream.evaluation import DriftPoint
from e2p_ray.downstream.measures.bootstrap import ratio_interval, user_sums
from e2p_ray.engine.prefixes import PrefixStore
from e2p_ray.errors import IncompatibleError, InputError
from e2p_ray.evaluate.contest import Contest
from e2p_ray.evaluate.data import read_user_vectors, space_of
from e2p_ray.plan.inputs import Space
from e2p_ray.storage import Storage
from e2p_ray.train.lessons import LessonTable
from e2p_ray.train.score import score

NOISE, LATER, REFIT = "noise", "later", "refit"


def measure_drift(contest: Contest, storage: Storage) -> list[DriftPoint]:
    """Loss of the right user's soft token after noise, with later user embeddings, and in a refit space by force.

    Amounts are root mean square changes in standard deviations of the projector's reference statistics.
    """
    table, evaluation = contest.table, contest.config.evaluation
    std = contest.projector.reference.std.cpu().numpy()
    normal = np.random.default_rng([evaluation.seed, 11]).normal(size=table.user_embeddings.shape).astype(np.float32)
    changes = [(NOISE, 0.0, table)]
    for amount in evaluation.noise:
        noisy = table.user_embeddings + np.float32(amount) * std * normal
        changes.append((NOISE, amount, replace(table, user_embeddings=noisy)))
    for kind, uri in ((LATER, contest.config.inputs.later_users_uri), (REFIT, contest.config.inputs.refit_users_uri)):
        if uri is None:
            continue
        space = _space_for(kind, contest, storage, uri)
        changed = _with_users(contest, storage, uri, space)
        moved = (changed.user_embeddings - table.user_embeddings)[np.unique(table.user)] / std
        changes.append((kind, float(np.sqrt(np.square(moved).mean())), changed))
    store = contest.new_store()
    return [_point(contest, kind, amount, changed, store) for kind, amount, changed in changes]


def refuse_other_space(own: str, other: str) -> None:
    """Raise IncompatibleError unless both are one embedding space: what every job does before a model is loaded."""
    if own != other:
        raise IncompatibleError(
            f"the projector was trained on embedding space {own!r}, these users are in {other!r}. The same dimension "
            "is not the same space: a refit rotates it. Retrain the projector on the new space"
        )


def _space_for(kind: str, contest: Contest, storage: Storage, uri: str) -> Space:
    manifest = contest.projector.manifest
    name = space_of(storage, uri)
    try:
        refuse_other_space(manifest.embedding_space, name)
    except IncompatibleError as error:
        if kind == LATER:
            raise
        contest.say(f"refit users are refused, as they should be: {error}. For the measurement they are forced")
    else:
        if kind == REFIT:
            raise InputError(
                f"names the projector's own embedding space {name!r}",
                uri=uri,
                remedy="A refit has an id of its own: give another table, or leave refit_users_uri out",
            )
    return Space(name, manifest.embedding_dim)


def _with_users(contest: Contest, storage: Storage, uri: str, space: Space) -> LessonTable:
    """The held-out rows with other user embeddings. InputError when a user is not there."""
    found = read_user_vectors(storage, uri, contest.data.users.user_ids, space)
    place_of = {user_id: place for place, user_id in enumerate(found.user_ids)}
    changed = contest.table.user_embeddings.copy()
    num_missing = 0
    for row in np.unique(contest.table.user).tolist():
        place = place_of.get(contest.data.users.user_ids[row])
        if place is None:
            num_missing += 1
        else:
            changed[row] = found.user_embeddings[place]
    if num_missing:
        raise InputError(
            f"{num_missing:,} of the evaluated users have no usable user embedding in it",
            uri=uri,
            remedy="Give the same users, or leave this input out",
        )
    return replace(contest.table, user_embeddings=changed)


def _point(contest: Contest, kind: str, amount: float, changed: LessonTable, store: PrefixStore) -> DriftPoint:
    found = score(contest.base, contest.projector, changed, store)
    users = [contest.data.held_out[place].user_id for place in contest.table.source]
    sums, _ = user_sums(users, np.column_stack([found.nll, found.num_tokens]))
    interval = ratio_interval(sums[:, 0], sums[:, 1], seed=contest.config.evaluation.seed)
    return DriftPoint(kind, amount, found.mean_nll, interval)

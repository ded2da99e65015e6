"""Matrix factorisation: against an independent dense reference, and by what it is for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest

from e2p_ray.errors import ConfigError
from e2p_ray.upstream.factorise import FactoriseSettings, factorise

SMALL = FactoriseSettings(num_factors=4, regularization=0.1, alpha=3.0, num_iterations=30, seed=3)


def _clicks(num_users: int, num_items: int, num_tastes: int, seed: int) -> tuple[pl.DataFrame, npt.NDArray[np.int64]]:
    """Each user clicks mostly items of his taste; item number modulo num_tastes is its taste."""
    random = np.random.default_rng(seed)
    tastes = random.integers(num_tastes, size=num_users)
    rows = []
    for user, taste in enumerate(tastes):
        for _ in range(25):
            own = random.random() < 0.8
            kind = taste if own else random.integers(num_tastes)
            item = int(random.integers(num_items // num_tastes)) * num_tastes + int(kind)
            rows.append((f"u{user:03d}", f"i{item:03d}"))
    return pl.DataFrame(rows, schema=["user_id", "item_id"], orient="row"), tastes


def _objective(
    counts: npt.NDArray[np.float64], users: npt.NDArray[np.float64], items: npt.NDArray[np.float64]
) -> float:
    """Hu, Koren and Volinsky's loss as `implicit` weighs it: confidence alpha * count where clicked, 1 elsewhere."""
    confidence = np.where(counts > 0, SMALL.alpha * counts, 1.0)
    errors = confidence * ((counts > 0) - users @ items.T) ** 2
    return float(errors.sum() + SMALL.regularization * ((users**2).sum() + (items**2).sum()))


def _reference(counts: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Dense ALS by normal equations, written apart from the library."""
    random = np.random.default_rng(0)
    confidence = np.where(counts > 0, SMALL.alpha * counts, 1.0)
    liked = (counts > 0).astype(float)
    users, items = (random.normal(scale=0.1, size=(n, SMALL.num_factors)) for n in counts.shape)
    ridge = SMALL.regularization * np.eye(SMALL.num_factors)
    for _ in range(60):
        for row in range(len(users)):
            weighted = items * confidence[row][:, None]
            users[row] = np.linalg.solve(weighted.T @ items + ridge, weighted.T @ liked[row])
        for column in range(len(items)):
            weighted = users * confidence[:, column][:, None]
            items[column] = np.linalg.solve(weighted.T @ users + ridge, weighted.T @ liked[:, column])
    return users, items


def test_as_good_as_an_independent_als() -> None:
    clicks, _ = _clicks(40, 24, 4, seed=1)
    fit = factorise(clicks, SMALL)
    counts = np.zeros((len(fit.user_ids), len(fit.item_ids)))
    for user_id, item_id in clicks.iter_rows():
        counts[fit.user_ids.index(user_id), fit.item_ids.index(item_id)] += 1
    found = _objective(counts, fit.user_embeddings.astype(float), fit.item_factors.astype(float))
    assert found == pytest.approx(_objective(counts, *_reference(counts)), rel=0.03)
    shuffled = np.random.default_rng(0).permutation(fit.user_embeddings.astype(float))
    assert _objective(counts, shuffled, fit.item_factors.astype(float)) > 1.3 * found


def test_users_of_one_taste_are_nearest_and_the_shuffled_control_fails() -> None:
    clicks, tastes = _clicks(200, 80, 5, seed=2)
    fit = factorise(clicks, FactoriseSettings(num_factors=8, seed=1))
    assert list(fit.user_ids) == [f"u{user:03d}" for user in range(200)]

    def share(vectors: npt.NDArray[np.float32]) -> float:
        centred = vectors - vectors.mean(0)
        centred = centred / np.linalg.norm(centred, axis=1, keepdims=True)
        likeness = centred @ centred.T
        np.fill_diagonal(likeness, -2)
        return float((tastes[likeness.argmax(1)] == tastes).mean())

    assert share(fit.user_embeddings) > 0.9
    assert share(np.random.default_rng(0).permutation(fit.user_embeddings)) < 0.4


def test_same_clicks_in_any_order_give_the_same_fit() -> None:
    clicks, _ = _clicks(40, 24, 4, seed=1)
    first, again = factorise(clicks, SMALL), factorise(clicks.sample(fraction=1, shuffle=True, seed=5), SMALL)
    assert first.embedding_space == again.embedding_space
    np.testing.assert_array_equal(first.user_embeddings, again.user_embeddings)


def test_another_fit_is_another_embedding_space() -> None:
    clicks, _ = _clicks(40, 24, 4, seed=1)
    spaces = {
        factorise(clicks, SMALL).embedding_space,
        factorise(clicks, FactoriseSettings(num_factors=4, seed=4)).embedding_space,
        factorise(clicks.head(len(clicks) - 1), SMALL).embedding_space,
    }
    assert len(spaces) == 3


def test_a_log_too_small_is_refused_with_the_remedy() -> None:
    clicks = pl.DataFrame({"user_id": ["a", "b"], "item_id": ["x", "y"]})
    with pytest.raises(ConfigError, match="Lower num_factors"):
        factorise(clicks, SMALL)
    empty = pl.DataFrame(schema={"user_id": pl.String, "item_id": pl.String})
    with pytest.raises(ConfigError, match="0 users and 0 items"):
        factorise(empty, SMALL)

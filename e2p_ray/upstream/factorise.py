"""A click log -> user embeddings: implicit-feedback matrix factorisation (ALS, Hu, Koren and Volinsky 2008)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
from implicit.als import AlternatingLeastSquares
from scipy.sparse import csr_matrix
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from e2p_ray.errors import ConfigError

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class FactoriseSettings:
    """The fit's settings; `alpha` weighs a click against no click."""

    num_factors: int = 24
    regularization: float = 0.05
    alpha: float = 10.0
    num_iterations: int = 15
    seed: int = 0
    num_threads: int = 1  # with one thread the same clicks give the same factors


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """One fit: user embeddings (n, d) and item factors (m, d), rows in the order of the sorted ids.

    `embedding_space` names this fit: another seed, setting or click gives another, whose axes mean other things.
    """

    user_ids: tuple[str, ...]
    user_embeddings: FloatArray
    item_ids: tuple[str, ...]
    item_factors: FloatArray
    embedding_space: str


def factorise(clicks: pl.DataFrame, settings: FactoriseSettings | None = None) -> Factors:
    """Fit the columns user_id and item_id (str); repeated pairs count as often as they occur.

    Raises ConfigError when there is no click, or fewer users or items than factors.
    """
    settings = settings or FactoriseSettings()
    counts = clicks.group_by("user_id", "item_id").agg(pl.len().alias("count"))
    user_ids, users = _numbered(counts["user_id"])
    item_ids, items = _numbered(counts["item_id"])
    if min(len(user_ids), len(item_ids)) < settings.num_factors:
        raise ConfigError(
            f"the click log has {len(user_ids)} users and {len(item_ids)} items: too few for {settings.num_factors} "
            "factors. Lower num_factors or give a longer log"
        )
    values = counts["count"].to_numpy().astype(np.float32)
    matrix = csr_matrix((values, (users, items)), shape=(len(user_ids), len(item_ids)))
    matrix.sort_indices()
    model = AlternatingLeastSquares(
        factors=settings.num_factors,
        regularization=settings.regularization,
        alpha=settings.alpha,
        iterations=settings.num_iterations,
        random_state=settings.seed,
        num_threads=settings.num_threads,
        use_gpu=False,
    )
    with threadpool_limits(1, "blas"):
        model.fit(matrix, show_progress=False)
    user_embeddings = np.ascontiguousarray(model.user_factors, np.float32)
    item_factors = np.ascontiguousarray(model.item_factors, np.float32)
    space = _space_id(settings, user_ids, user_embeddings, item_ids, item_factors)
    return Factors(tuple(user_ids), user_embeddings, tuple(item_ids), item_factors, space)


def _numbered(ids: pl.Series) -> tuple[list[str], npt.NDArray[np.int64]]:
    """The distinct ids, sorted, and every row's place among them: independent of the log's order."""
    distinct = ids.unique().sort()
    places = distinct.search_sorted(ids).to_numpy().astype(np.int64)
    return distinct.to_list(), places


def _space_id(
    settings: FactoriseSettings, user_ids: list[str], users: FloatArray, item_ids: list[str], items: FloatArray
) -> str:
    digest = hashlib.sha256(json.dumps([asdict(settings), user_ids, item_ids]).encode())
    digest.update(users.tobytes())
    digest.update(items.tobytes())
    return f"als{settings.num_factors}-{digest.hexdigest()[:12]}"

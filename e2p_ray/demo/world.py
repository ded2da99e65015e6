"""A world to try the pipeline on: readers with tastes, what they clicked, what a recommender chose for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.random import Generator, default_rng

from e2p_ray.demo.newsroom import ANGLES, LANGUAGES, TASKS, Article, make_articles
from e2p_ray.upstream.factorise import FactoriseSettings, Factors, factorise

_NOW = datetime(2026, 3, 2, 6, 0, tzinfo=UTC)
_TIMESTAMP = pa.timestamp("us", tz="UTC")
_NUM_PAST = 100  # articles per language that were read before
_NUM_TRAINING = 60  # articles per language with texts to learn from
_CLICKS = (40, 70)
_LIKES_BEST = (0.55, 0.8)  # share of clicks on the best-liked angle
_TRAINING_USERS = 0.7  # the first of them, in a random order, have texts to learn from
_JOB_USERS = 0.6  # the last of them get recommendations: half of those were never trained on
_TARGETS_PER_USER = 4  # articles, each with a text of every task
_CANDIDATES_PER_USER = 4
_OPTED_OUT, _NEVER_SAID = 0.03, 0.02

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Reader:
    """A user as only the world knows him: how much he likes every angle."""

    user_id: str
    language: str
    taste: tuple[float, ...]
    personalize: bool | None

    @property
    def ranking(self) -> list[str]:
        return [ANGLES[i] for i in np.argsort(self.taste)[::-1]]

    def best(self, article: Article) -> str:
        return next(angle for angle in self.ranking if article.angle(angle) is not None)


@dataclass(frozen=True, slots=True)
class World:
    """Where the tables are and how large they became."""

    folder: Path
    embedding_space: str
    embedding_dim: int
    num_users: int
    num_contents: int
    num_candidates: int
    num_targets: int
    num_clicks: int

    def uri(self, table: str) -> str:
        return str(self.folder / f"{table}.parquet")


def write_world(folder: Path, *, seed: int = 7, num_users: int = 1000, num_contents: int = 140) -> World:
    """Write users, contents, candidates, targets, targets_held_out, clicks, truth and truth_contents (Parquet).

    `num_contents` are written about, half of them in each language; the contents table also holds the training
    articles that the targets belong to. The held-out targets are of fresh articles. The same seed gives the same files
    on the same machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    readers = _readers(num_users, default_rng([seed, 1]))
    past = make_articles("past", _NUM_PAST, seed)
    training = make_articles("learn", _NUM_TRAINING, seed)
    fresh = make_articles("news", num_contents // len(LANGUAGES), seed)
    clicks = _clicks(readers, past, default_rng([seed, 2]))
    factors = factorise(clicks, FactoriseSettings(seed=seed))
    learners, served = _split(readers, default_rng([seed, 3]))
    tables = {
        "clicks": clicks.to_arrow(),
        "users": _users(readers, factors),
        "contents": _contents(training + fresh),
        "targets": _targets(learners, training, default_rng([seed, 4])),
        "targets_held_out": _targets(served, fresh, default_rng([seed, 6])),
        "candidates": _candidates(served, fresh, default_rng([seed, 5])),
        "truth": _truth(readers, learners),
        "truth_contents": _truth_contents(training + fresh),
    }
    for name, table in tables.items():
        pq.write_table(table, folder / f"{name}.parquet", compression="zstd")
    return World(
        folder,
        factors.embedding_space,
        factors.user_embeddings.shape[1],
        len(readers),
        len(fresh),
        tables["candidates"].num_rows,
        tables["targets"].num_rows,
        tables["clicks"].num_rows,
    )


def _readers(num_users: int, random: Generator) -> list[Reader]:
    readers = []
    for number in range(num_users):
        best = random.uniform(*_LIKES_BEST)
        rest = random.dirichlet(np.full(len(ANGLES) - 1, 0.6)) * (1 - best)
        taste = np.insert(rest, favourite := int(random.integers(len(ANGLES))), best)
        assert int(taste.argmax()) == favourite, "the best-liked angle has more than half"
        said = random.random()
        personalize = False if said < _OPTED_OUT else None if said < _OPTED_OUT + _NEVER_SAID else True
        language = LANGUAGES[number % len(LANGUAGES)]
        readers.append(Reader(f"u-{language}-{number:05d}", language, tuple(map(float, taste)), personalize))
    return readers


def _clicks(readers: Sequence[Reader], past: Sequence[Article], random: Generator) -> pl.DataFrame:
    """Teasers that were clicked: item_id is `content_id/angle`, some articles being far more popular than others."""
    rows: list[tuple[str, str, datetime]] = []
    shelves = {language: _shelves(past, language, random) for language in LANGUAGES}
    for reader in readers:
        taste = np.array(reader.taste)
        for angle in random.choice(ANGLES, size=random.integers(*_CLICKS), p=taste / taste.sum()):
            items, popularity = shelves[reader.language][angle]
            ago = timedelta(minutes=int(random.integers(1, 60 * 24 * 30)))
            rows.append((reader.user_id, str(random.choice(items, p=popularity)), _NOW - ago))
    kinds: list[tuple[str, pl.DataType]] = [
        ("user_id", pl.String()),
        ("item_id", pl.String()),
        ("clicked_at", pl.Datetime("us", "UTC")),
    ]
    return pl.DataFrame(rows, schema=pl.Schema(kinds), orient="row")


def _shelves(past: Sequence[Article], language: str, random: Generator) -> dict[str, tuple[list[str], FloatArray]]:
    shelves = {}
    for angle in ANGLES:
        items = [f"{a.content_id}/{angle}" for a in past if a.language == language and a.angle(angle) is not None]
        popularity = random.pareto(2.0, len(items)) + 0.3
        shelves[angle] = (items, popularity / popularity.sum())
    return shelves


def _split(readers: Sequence[Reader], random: Generator) -> tuple[list[Reader], list[Reader]]:
    order = [readers[i] for i in random.permutation(len(readers))]
    return order[: round(_TRAINING_USERS * len(order))], order[round((1 - _JOB_USERS) * len(order)) :]


def _users(readers: Sequence[Reader], factors: Factors) -> pa.Table:
    row_of = {user_id: row for row, user_id in enumerate(factors.user_ids)}
    vectors = factors.user_embeddings[[row_of[reader.user_id] for reader in readers]]
    dim = vectors.shape[1]
    return pa.table(
        {
            "user_id": pa.array([reader.user_id for reader in readers], pa.string()),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1), pa.float32()), dim),
            "embedding_space": pa.array([factors.embedding_space] * len(readers), pa.string()),
            "personalize": pa.array([reader.personalize for reader in readers], pa.bool_()),
            "updated_at": pa.array([_NOW] * len(readers), _TIMESTAMP),
            "locale": pa.array([reader.language for reader in readers], pa.string()),
        }
    )


def _contents(articles: Sequence[Article]) -> pa.Table:
    columns = {name: pa.array([getattr(a, name) for a in articles], pa.string()) for name in _CONTENT_COLUMNS}
    return pa.table({**columns, "updated_at": pa.array([_NOW] * len(articles), _TIMESTAMP)})


_CONTENT_COLUMNS = ("content_id", "title", "body", "language")


def _targets(readers: Sequence[Reader], articles: Sequence[Article], random: Generator) -> pa.Table:
    """Texts that were right for their user. The column `task` says which prompt each answers."""
    rows = []
    for reader in readers:
        mine = [article for article in articles if article.language == reader.language]
        for place in random.choice(len(mine), size=min(_TARGETS_PER_USER, len(mine)), replace=False):
            told = mine[place].angle(reader.best(mine[place]))
            assert told is not None
            for task in TASKS:
                rows.append((reader.user_id, mine[place].content_id, task, told.texts[task][0], 1.0))
    names = ("user_id", "content_id", "task", "text", "weight")
    kinds = (pa.string(), pa.string(), pa.string(), pa.string(), pa.float32())
    columns = zip(*rows, strict=True)
    return pa.table({n: pa.array(c, k) for n, c, k in zip(names, columns, kinds, strict=True)})


def _candidates(served: Sequence[Reader], fresh: Sequence[Article], random: Generator) -> pa.Table:
    """A recommender that knows the tastes a little: articles with liked angles, much noise."""
    rows = []
    for reader in served:
        mine = [article for article in fresh if article.language == reader.language]
        taste = dict(zip(ANGLES, reader.taste, strict=True))
        liked = np.array([sum(taste[told.angle] for told in article.angles) for article in mine])
        scores = liked + random.gumbel(scale=0.3, size=len(mine))
        for rank, place in enumerate(np.argsort(-scores)[:_CANDIDATES_PER_USER], start=1):
            rows.append((reader.user_id, mine[place].content_id, rank, float(scores[place]), "demo-recommender"))
    names = ("user_id", "content_id", "rank", "score", "source")
    kinds = (pa.string(), pa.string(), pa.int32(), pa.float32(), pa.string())
    columns = zip(*rows, strict=True)
    return pa.table({n: pa.array(c, k) for n, c, k in zip(names, columns, kinds, strict=True)})


def _truth(readers: Sequence[Reader], learners: Sequence[Reader]) -> pa.Table:
    learned = {reader.user_id for reader in learners}
    return pa.table(
        {
            "user_id": pa.array([reader.user_id for reader in readers], pa.string()),
            "language": pa.array([reader.language for reader in readers], pa.string()),
            "angle": pa.array([reader.ranking[0] for reader in readers], pa.string()),
            "ranking": pa.array([reader.ranking for reader in readers], pa.list_(pa.string())),
            "in_targets": pa.array([reader.user_id in learned for reader in readers], pa.bool_()),
        }
    )


def _truth_contents(articles: Sequence[Article]) -> pa.Table:
    told = [(article, angle) for article in articles for angle in article.angles]
    return pa.table(
        {
            "content_id": pa.array([article.content_id for article, _ in told], pa.string()),
            "language": pa.array([article.language for article, _ in told], pa.string()),
            "angle": pa.array([angle.angle for _, angle in told], pa.string()),
            "markers": pa.array([list(angle.markers) for _, angle in told], pa.list_(pa.string())),
        }
    )

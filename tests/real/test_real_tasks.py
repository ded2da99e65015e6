"""The real tasks' tables: of the schema, without leaks, split as they say, user embeddings from training texts only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow.parquet as pq
import pytest
from polars.testing import assert_frame_equal

from e2p_ray.schema import validate_schema
from e2p_ray.upstream.factorise import FactoriseSettings, factorise
from tests.real.data import FOLDER, needs_real_data
from tests.real.huffpost import write_huffpost
from tests.real.mind_titles import fold_in
from tests.real.pens import write_pens
from tests.real.persona import read_dialogues
from tests.real.tables import SPLITS, RealTask
from tests.real.task import WRITERS
from tests.real.vectors import History, VectorSettings, Written, fit_vectors

DATA = FOLDER / "data"
SMALL = VectorSettings(num_style=3, num_words=3, min_users=2)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, RealTask]:
    folder = tmp_path_factory.mktemp("real")
    return {name: write(DATA, folder / name) for name, write in WRITERS.items()}


def _read(task: RealTask, table: str) -> pl.DataFrame:
    return pl.read_parquet(task.uri(table))


def _vectors(task: RealTask, table: str) -> npt.NDArray[np.float32]:
    return np.array(_read(task, table)["embedding"].to_numpy(), np.float32)


def _num_leaks(contents: pl.DataFrame, targets: pl.DataFrame) -> int:
    """Targets that can be read off their own content, whatever the case and the spaces."""
    both = targets.join(contents.select("content_id", "title", "body"), on="content_id", how="left")
    told = [
        any(" ".join(text.lower().split()) in " ".join(told.lower().split()) for told in (title, body))
        for text, title, body in both.select("text", "title", "body").iter_rows()
    ]
    return sum(told)


@needs_real_data
@pytest.mark.real
class TestTables:
    @pytest.mark.parametrize("name", WRITERS)
    def test_have_the_schema_and_belong_together(self, tasks: Mapping[str, RealTask], name: str) -> None:
        task = tasks[name]
        targets = {split: _read(task, f"targets_{split}") for split in SPLITS}
        for table in ("users", "users_later", "users_refit", "contents", *(f"targets_{split}" for split in SPLITS)):
            schema = pq.read_schema(task.uri(table))
            validate_schema(table.partition("_")[0], schema, task.uri(table))
            assert not any(_read(task, table).null_count().row(0)), table
        users, contents = _read(task, "users"), _read(task, "contents")
        assert users["user_id"].is_unique().all()
        assert contents["content_id"].is_unique().all()
        assert (contents["body"].str.strip_chars() != "").all()
        assert (task.num_users, task.num_contents) == (len(users), len(contents))
        for split, frame in targets.items():
            assert task.num_targets[split] == len(frame) > 400
            assert frame["user_id"].is_in(users["user_id"].implode()).all()
            assert frame["content_id"].is_in(contents["content_id"].implode()).all()
            assert not frame.select("user_id", "content_id").is_duplicated().any()
            assert set(frame["task"]) == {task.task}
        assert f"{task.num_targets['test']:,} test" in task.describe()

    @pytest.mark.parametrize("name", WRITERS)
    def test_no_target_stands_in_its_own_content(self, tasks: Mapping[str, RealTask], name: str) -> None:
        contents = _read(tasks[name], "contents")
        for split in SPLITS:
            assert _num_leaks(contents, _read(tasks[name], f"targets_{split}")) == 0
        targets = _read(tasks[name], "targets_test")
        planted = targets.head(1).join(contents, on="content_id").select("content_id", "text")
        spoiled = contents.join(planted, on="content_id", how="left").with_columns(
            body=pl.when(pl.col("text").is_not_null())
            .then(pl.format("{} {}", "body", pl.col("text").str.to_uppercase()))
            .otherwise("body")
        )
        assert _num_leaks(spoiled, targets) >= 1, "the control: a planted leak is found"

    @pytest.mark.parametrize("name", WRITERS)
    def test_later_and_refit_users(self, tasks: Mapping[str, RealTask], name: str) -> None:
        task = tasks[name]
        now, later, refit = (_read(task, table) for table in ("users", "users_later", "users_refit"))
        assert now["user_id"].to_list() == later["user_id"].to_list() == refit["user_id"].to_list()
        assert set(now["embedding_space"]) == set(later["embedding_space"]) == {task.embedding_space}
        assert set(refit["embedding_space"]) == {task.refit_space} != {task.embedding_space}
        vectors = {table: _vectors(task, table) for table in ("users", "users_later", "users_refit")}
        assert all(np.isfinite(v).all() and v.shape == (len(now), task.embedding_dim) for v in vectors.values())
        assert (vectors["users"].std(0) > 0.05).all(), "no constant axis"
        drift = _mean_cosine(vectors["users"], vectors["users_later"])
        assert 0.5 < drift < 0.999, "later history moves the users, and leaves them where they belong"
        assert abs(_mean_cosine(vectors["users"], vectors["users_refit"])) < 0.3, "the control: another space"


def _mean_cosine(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """Over users, after both were centred."""
    one, other = one - one.mean(0), other - other.mean(0)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(np.mean((one * other).sum(1)[lengths > 0] / lengths[lengths > 0]))


@needs_real_data
@pytest.mark.real
class TestSplits:
    def test_pens_by_article_and_content_by_others(self, tasks: Mapping[str, RealTask]) -> None:
        raw = pl.read_parquet(DATA / "pens_headlines.parquet").with_columns(
            text=pl.col("text").str.replace_all(r"\s+", " ").str.strip_chars()
        )
        bodies = dict(_read(tasks["pens"], "contents").select("content_id", "body").iter_rows())
        own = raw.group_by("user_id", "content_id").agg("text")
        written = {(user_id, article): texts for user_id, article, texts in own.iter_rows()}
        articles = {}
        for split in SPLITS:
            targets = _read(tasks["pens"], f"targets_{split}")
            articles[split] = set(targets["content_id"].str.head(-2))
            for user_id, content_id, text in targets.select("user_id", "content_id", "text").iter_rows():
                mine = written[user_id, content_id[:-2]]
                assert text in mine
                assert mine[0] not in bodies[content_id].split(" / "), "his own headline is no part of the content"
        assert not articles["train"] & articles["validation"]
        assert not articles["test"] & (articles["train"] | articles["validation"])

    def test_huffpost_by_time(self, tasks: Mapping[str, RealTask]) -> None:
        raw = pl.read_parquet(DATA / "huffpost.parquet").with_columns(pl.col("title").str.strip_chars())
        dates: dict[tuple[str, str], list[str]] = {}
        for byline, title, date in raw.select("byline", "title", "date").iter_rows():
            dates.setdefault((byline, " ".join(title.split())), []).append(date)
        days: dict[str, dict[str, list[str]]] = {}
        for split in SPLITS:
            for byline, title in _read(tasks["huffpost"], f"targets_{split}").select("user_id", "text").iter_rows():
                days.setdefault(byline, {}).setdefault(split, []).append(min(dates[byline, title]))
        judged = {byline: own for byline, own in days.items() if "test" in own}
        assert len(judged) > 70
        for own in judged.values():
            assert max(own["train"]) < min(own["test"])
            assert max(own["train"]) < min(own.get("validation", ["9"])) <= max(own.get("validation", ["9"]))
            assert max(own.get("validation", ["0"])) < min(own["test"])

    def test_mind_by_article_and_clicks_not_in_the_embedding(self, tasks: Mapping[str, RealTask]) -> None:
        log = pl.read_parquet(DATA / "mind_impressions.parquet")
        articles = [set(_read(tasks["mind"], f"targets_{split}")["content_id"]) for split in SPLITS]
        assert not articles[0] & articles[1]
        assert not articles[2] & (articles[0] | articles[1])
        users = _read(tasks["mind"], "users")
        sizes = dict(users.select("user_id", "history_size").iter_rows())
        histories = dict(log.select("user_id", "history").iter_rows())
        for user_id, content_id in _read(tasks["mind"], "targets_train").select("user_id", "content_id").iter_rows():
            assert content_id in histories[user_id][sizes[user_id] :]
        shown = _read(tasks["mind"], "impressions")
        clicks = shown.group_by("impression_id").agg(pl.col("clicked").sum().alias("clicks"), pl.len())
        assert tasks["mind"].num_impressions == len(clicks) > 300
        assert (clicks["clicks"] > 0).all()
        assert (clicks["clicks"] < clicks["len"]).all()

    @pytest.mark.parametrize("name", ["persona", "persona_new"])
    def test_persona_by_dialogue(self, tasks: Mapping[str, RealTask], name: str) -> None:
        lines = {
            dialogue.user_id(speaker): {line.lower() for line in own}
            for dialogue in read_dialogues(DATA)
            for speaker, own in dialogue.personas.items()
        }
        users = {split: set(_read(tasks[name], f"targets_{split}")["user_id"]) for split in SPLITS}
        dialogues = {split: {user_id[:5] for user_id in own} for split, own in users.items()}
        assert not dialogues["train"] & dialogues["test"]
        assert not dialogues["validation"] & (dialogues["train"] | dialogues["test"])
        twins = sum(any(len(lines[one] & lines[other]) > 1 for other in users["train"]) for one in users["test"])
        if name == "persona_new":
            assert twins == 0
        else:
            assert twins > len(users["test"]) / 2, "the control: the data's characters recur, the check finds them"


def _rewritten(source: Path, folder: Path, *, column: str, where: pl.Series) -> Path:
    """A copy of a table in which the chosen rows say something else."""
    folder.mkdir()
    table = pl.read_parquet(source)
    said = pl.when(pl.Series(where)).then(pl.format("Why {} of 7?", pl.col(column).str.to_uppercase()))
    table.with_columns(said.otherwise(column).alias(column)).write_parquet(folder / source.name)
    return folder


@needs_real_data
@pytest.mark.real
class TestUserEmbeddings:
    @pytest.mark.parametrize("name", ["pens", "huffpost"])
    def test_know_nothing_of_unseen_articles(self, tasks: Mapping[str, RealTask], tmp_path: Path, name: str) -> None:
        source = DATA / ("pens_headlines.parquet" if name == "pens" else "huffpost.parquet")
        column = "text" if name == "pens" else "title"
        write = write_pens if name == "pens" else write_huffpost
        table = pl.read_parquet(source)
        for split, same in (("test", True), ("train", False)):
            targets = _read(tasks[name], f"targets_{split}")
            if name == "pens":
                chosen = table["content_id"].is_in(targets["content_id"].str.head(-2).implode())
            else:
                rows = table[targets["content_id"].str.tail(-1).cast(pl.Int64).to_list()]
                # Copies of these articles too: only the first of several is kept.
                chosen = (
                    table.select("title", "body").to_struct().is_in(rows.select("title", "body").to_struct().implode())
                )
            copy = _rewritten(source, tmp_path / split, column=column, where=chosen)
            changed = write(copy, tmp_path / f"{split}-out")
            users = _read(tasks[name], "users")
            assert users.equals(_read(changed, "users")) == same, split

    def test_same_seed_same_tables(self, tasks: Mapping[str, RealTask], tmp_path: Path) -> None:
        again = WRITERS["huffpost"](DATA, tmp_path)
        paths = sorted(tasks["huffpost"].folder.iterdir())
        assert len(paths) == 7
        for path in paths:
            assert_frame_equal(pl.read_parquet(path), pl.read_parquet(tmp_path / path.name), check_exact=True)
        assert again.describe() == tasks["huffpost"].describe()


def _people() -> History:
    """Four short, plain writers and four loud, long ones, each with words of his own."""
    random = np.random.default_rng(0)
    subjects = ("trains", "cheese", "chess", "rain")
    history = {}
    for number in range(8):
        loud = number >= 4
        words = [subjects[number % 4], "news", "today", "again", "town", "people"]
        texts = []
        for _ in range(12):
            chosen = [words[0], *random.permutation(words)[: 5 if loud else 2]]
            texts.append(Written(f"{' '.join(chosen).title()}!" if loud else " ".join(chosen)))
        history[f"u{number}"] = texts
    return history


def test_axes_are_standardised_and_tell_writers_apart() -> None:
    history = _people()
    settings = VectorSettings(num_style=2, num_words=4, min_users=2, char_ngram=0, prior_texts=0.0)
    fit = fit_vectors(history, settings)
    measures = fit.measure(history)
    for axes, means in ((fit.style, measures.style), (fit.words, measures.words)):
        projected = axes.project(means)
        np.testing.assert_allclose(projected.T @ projected / len(history), np.eye(projected.shape[1]), atol=1e-6)
    vectors = fit.project(measures)
    assert (np.sign(vectors[:4, 0]) == -np.sign(vectors[4:, 0])).all(), "loud and plain lie on the first style axis"
    distances = np.linalg.norm(vectors[:, None, 2:] - vectors[None, :, 2:], axis=2) + 9 * np.eye(8)
    assert distances.argmin(1).tolist() == [4, 5, 6, 7, 0, 1, 2, 3], "who writes of the same is nearest by words"


def test_a_basis_holds_for_other_texts_and_a_rotation_is_another_space() -> None:
    history = _people()
    fit = fit_vectors(history, SMALL)
    vectors = fit.project(fit.measure(history))
    some = {user_id: history[user_id] for user_id in ("u5", "u2")}
    np.testing.assert_allclose(fit.project(fit.measure(some)), vectors[[5, 2]], atol=1e-5)
    turned = fit.rotated(1)
    others = turned.project(turned.measure(history))
    np.testing.assert_allclose(others @ others.T, vectors @ vectors.T, atol=1e-4)
    assert np.abs(others - vectors).max() > 0.3
    assert len({fit.embedding_space, turned.embedding_space, fit.rotated(2).embedding_space}) == 3
    assert fit_vectors(history, SMALL).embedding_space == fit.embedding_space


def test_few_texts_are_no_strong_opinion() -> None:
    history = _people()
    fit = fit_vectors(history, SMALL)
    full, single = (fit.project(fit.measure({"u7": texts})) for texts in (history["u7"], history["u7"][:1]))
    assert np.linalg.norm(single) < np.linalg.norm(full)


def test_folding_in_gives_back_the_users_of_the_fit() -> None:
    random = np.random.default_rng(1)
    clicks = {
        f"u{user:02d}": [f"i{2 * int(item) + user % 2:02d}" for item in random.integers(10, size=12)]
        for user in range(30)
    }
    frame = pl.DataFrame(
        [(user_id, item) for user_id, items in clicks.items() for item in items],
        schema=["user_id", "item_id"],
        orient="row",
    )
    settings = FactoriseSettings(num_factors=4, num_iterations=60)
    fit = factorise(frame, settings)
    folded = fold_in(fit, settings, [clicks[user_id] for user_id in fit.user_ids])
    assert _mean_cosine(folded, fit.user_embeddings) > 0.999
    swapped = fold_in(fit, settings, [clicks[user_id] for user_id in reversed(fit.user_ids)])
    assert _mean_cosine(swapped, fit.user_embeddings) < 0.9, "the control: another user's clicks"

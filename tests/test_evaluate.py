"""Evaluation of a projector in a small world where the truth is known, against plain forward passes of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch import nn
from transformers import AutoModelForCausalLM

from e2p_ray.config import EvaluateConfig, StorageConfig, TaskConfig
from e2p_ray.downstream.evaluation import Evaluation
from e2p_ray.engine.manifest import resolve_base_model
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.projector import Projector
from e2p_ray.engine.prompt import PromptLayout, load_tokenizer
from e2p_ray.errors import ConfigError, E2PError, IncompatibleError, InputError
from e2p_ray.evaluate import data, evaluate
from e2p_ray.evaluate.contest import shuffled_users
from e2p_ray.plan.inputs import Space
from e2p_ray.schema import Content
from e2p_ray.storage import Storage
from e2p_ray.train.lessons import Target, UserTable
from e2p_ray.train.projector import train_projector
from e2p_ray.train.settings import TrainSettings
from jobs import evaluate as job
from jobs.cli import run_job
from tests.plan_world import with_broken
from tests.train_world import (
    DIM,
    NUM_CONTENTS,
    NUM_USERS,
    SPACE,
    TEXTS,
    contents_table,
    targets_table,
    users_table,
    vectors,
    write_train_world,
)

TASK = {"prompts": {"default": {"cue_before": "\n>"}}, "sampling": {"max_new_tokens": 8}}
METHODS = ("profile_text", "profile_text_constant", "prefix_tuning", "lora", "lora_profile_text")
_FIRST_HELD_OUT = 6  # contents c6 to c9 are never trained on
Rows = list[tuple[str, str, str, str, float]]


def _rows(contents: range) -> Rows:
    return [
        (f"user-{user:03d}", f"c{content}", "headline", TEXTS[bool(vector[0] > 0)], 1.0)
        for user, vector in enumerate(vectors())
        for content in contents
        if (user + content) % 2
    ]


def _users(**columns: Any) -> pa.Table:
    likes = ["likes money" if vector[0] > 0 else "likes peace" for vector in vectors()]
    sizes = pa.array([3 + n for n in range(NUM_USERS)], pa.int64())
    return users_table(**({"profile_text": likes, "history_size": sizes} | columns))


def _changed(matrix: np.ndarray[Any, Any], space: str) -> pa.Table:
    return _users(
        embedding=pa.array(list(matrix.astype(np.float32)), pa.list_(pa.float32(), DIM)),
        embedding_space=[space] * NUM_USERS,
    )


def _impressions() -> pa.Table:
    """Both texts are shown to every user, on two unseen contents; the one for him was clicked."""
    shown = [
        (f"i{user}", f"user-{user:03d}", f"c{content}", text, right == bool(vector[0] > 0))
        for user, vector in enumerate(vectors()[:20])
        for content, (right, text) in zip((7, 8), TEXTS.items(), strict=True)
    ]
    names = ("impression_id", "user_id", "content_id", "text", "clicked")
    return pa.table(dict(zip(names, map(list, zip(*shown, strict=True)), strict=True)))


@dataclass(frozen=True)
class Place:
    """A world with its trained projector, and the values of an evaluation of it."""

    values: dict[str, Any]
    storage: Storage

    def config(self, **changes: Any) -> EvaluateConfig:
        merged = {name: self.values.get(name, {}) | section for name, section in changes.items()}
        return EvaluateConfig.model_validate(self.values | merged)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder, storage = tmp_path_factory.mktemp("evaluate"), Storage(StorageConfig())
    trained, held_out = _rows(range(_FIRST_HELD_OUT)), _rows(range(_FIRST_HELD_OUT, NUM_CONTENTS))
    rotation = np.linalg.qr(np.random.default_rng(8).normal(size=(DIM, DIM)))[0]
    bad = [
        ("nobody", "c7", "headline", "x", 1.0),
        (f"user-{NUM_USERS - 1:03d}", "c7", "headline", "opted out", 1.0),
        ("user-000", "gone", "headline", "x", 1.0),
        ("user-000", "c7", "headline", " ", 1.0),
        trained[0],
    ]
    tables = {
        "users": _users(),
        "targets": targets_table([*trained]),
        "held_out": targets_table([*held_out, *bad]),
        "later": _changed(vectors() + 0.05, SPACE),
        "refit": _changed(vectors() @ rotation, "space-2"),
        "impressions": _impressions(),
    }
    config, _ = write_train_world(folder, tables=tables)
    values = {
        "inputs": {
            "users_uri": f"{folder}/in/users.parquet",
            "contents_uri": f"{folder}/in/contents.parquet",
            "targets_uri": f"{folder}/in/held_out.parquet",
            "training_targets_uri": f"{folder}/in/targets.parquet",
            "impressions_uri": f"{folder}/in/impressions.parquet",
            "later_users_uri": f"{folder}/in/later.parquet",
            "refit_users_uri": f"{folder}/in/refit.parquet",
        },
        "output": {"uri": f"{folder}/evaluation"},
        "base_model": {"uri": str(folder / "base"), "device": "cpu"},
        "projector": {"uri": f"{folder}/projector"},
        "tasks": {"headline": TASK},
        "training": {"num_steps": 25},  # of the controls and baselines
        "evaluation": {"num_retrieval_texts": 20, "num_retrieval_users": 10, "num_written": 20, "noise": [1.0, 4.0]},
    }
    found = resolve_base_model(config.base_model, storage)
    base = BaseModel.load(found.path, "float32", torch.device("cpu"))
    users = UserTable([f"user-{n:03d}" for n in range(NUM_USERS - 1)], vectors()[: NUM_USERS - 1], SPACE)
    names = ("content_id", "title", "body", "language")
    contents = [Content(*row) for row in zip(*(contents_table()[name].to_pylist() for name in names), strict=True)]
    settings = TrainSettings(
        num_steps=120,
        contents_per_step=4,
        learning_rate=0.1,
        warmup_steps=4,
        hidden_dim=16,
        num_soft_tokens=2,
        output_scale=4.0,  # a random model listens to nothing smaller
    )
    targets = [Target(*row) for row in trained]
    tasks = {"headline": TaskConfig.model_validate(TASK)}
    result = train_projector(base, found, load_tokenizer(found.path), tasks, users, contents, targets, settings)
    result.projector.save_pretrained(storage, f"{folder}/projector")
    return Place(values, storage)


@pytest.fixture(scope="module")
def found(place: Place) -> tuple[Evaluation, list[str]]:
    said: list[str] = []
    return evaluate(place.config(evaluation={"methods": METHODS}), place.storage, said.append), said


def test_the_right_user_beats_every_control(found: tuple[Evaluation, list[str]]) -> None:
    evaluation, _ = found
    right = evaluation.score("right")
    assert right is not None
    for method in ("shuffled", "mean", "no_soft_token", "constant"):
        score = evaluation.score(method)
        assert score is not None
        assert score.gain is not None
        assert score.gain.low > 0, method
        assert right.nll_per_token.value < score.nll_per_token.value, method
    none, constant = evaluation.score("no_soft_token"), evaluation.score("constant")
    assert none is not None
    assert constant is not None
    assert constant.nll_per_token.value < none.nll_per_token.value, "the task alone can be learned, too"
    assert "it personalises" in evaluation.lines()


def test_scores_are_those_of_plain_forward_passes(place: Place, found: tuple[Evaluation, list[str]]) -> None:
    """Every row alone through transformers' own attention, its soft token put between the tokens' embeddings."""
    uri = place.values["base_model"]["uri"]
    model = AutoModelForCausalLM.from_pretrained(uri, attn_implementation="eager").eval()
    tokenizer = load_tokenizer(Path(uri))
    projector = Projector.from_pretrained(place.storage, place.values["projector"]["uri"])
    tasks = {"headline": TaskConfig.model_validate(TASK)}
    layout = PromptLayout(tokenizer, "content_first", tasks, num_soft_tokens=2, max_positions=512)
    names = ("content_id", "title", "body", "language")
    rows = zip(*(contents_table()[name].to_pylist() for name in names), strict=True)
    contents = {row[0]: Content(*row) for row in rows}
    rows_by_method: dict[str, list[float]] = {"right": [], "no_soft_token": []}
    num_tokens = 0
    for user_id, content_id, task, text, _ in _rows(range(_FIRST_HELD_OUT, NUM_CONTENTS)):
        user = int(user_id.removeprefix("user-"))
        if user == NUM_USERS - 1:
            continue
        left = layout.segments(contents[content_id], task).left
        target = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        embed = model.get_input_embeddings()
        soft = projector(torch.from_numpy(vectors()[user : user + 1]))[0]
        num_tokens += len(target)
        for method, middle in (("right", soft), ("no_soft_token", soft[:0])):
            parts = [embed(torch.tensor(left)), middle, embed(torch.tensor(target[:-1]))]
            with torch.no_grad():
                logits = model(inputs_embeds=torch.cat(parts)[None]).logits[0, -len(target) :]
                loss = nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum")
            rows_by_method[method].append(float(loss))
    for method, losses in rows_by_method.items():
        score = found[0].score(method)
        assert score is not None
        assert score.nll_per_token.value == pytest.approx(sum(losses) / num_tokens, rel=1e-5)
    assert abs(sum(rows_by_method["right"]) - sum(rows_by_method["no_soft_token"])) > 1, "the control differs"


def test_retrieval_ranking_and_drift(found: tuple[Evaluation, list[str]]) -> None:
    evaluation, said = found
    for one in evaluation.retrieval:
        if one.method == "constant":
            assert one.centred.top_1.value == pytest.approx(one.chance_top_1), "it cannot tell users apart"
        else:
            # 15 texts: 1.2 times chance and more on one kind of CPU, 1.195 on another, whose training rounds otherwise.
            assert one.centred.mrr.value > 1.1 * one.chance_mrr, "half of the users want the same text"
    ranking = {one.method: one for one in evaluation.ranking}
    assert ranking["gain"].auc.low > 0.5
    assert ranking["gain_shuffled"].auc.value < ranking["gain"].auc.value
    losses = {(point.kind, point.amount): point.nll_per_token for point in evaluation.drift}
    assert losses["noise", 0.0] < losses["noise", 1.0] < losses["noise", 4.0]
    later, refit = (next(p.nll_per_token for p in evaluation.drift if p.kind == kind) for kind in ("later", "refit"))
    assert later == pytest.approx(losses["noise", 0.0], rel=0.05)
    assert refit > 1.1 * later
    assert any("are refused" in line and "space-2" in line for line in said)


def test_texts_are_written_and_costs_stand_beside_quality(found: tuple[Evaluation, list[str]]) -> None:
    evaluation, _ = found
    measured = {one.method: one for one in evaluation.texts}
    assert {"right", "shuffled", "no_soft_token", "constant"} <= set(measured)
    assert measured["right"].num_texts == 20
    assert measured["right"].variety is not None
    right, profile, lora = (evaluation.cost(method) for method in ("right", "profile_text", "lora"))
    assert right.num_own_tokens == 2.0
    assert right.latency_ms is not None
    assert right.num_prompt_tokens is not None
    assert profile.num_own_tokens is not None
    assert profile.num_own_tokens > len("likes money")
    assert lora.num_own_tokens == 1.0
    assert lora.num_trainable_parameters


def test_no_user_is_named_anywhere(place: Place, found: tuple[Evaluation, list[str]]) -> None:
    evaluation, said = found
    written = evaluation.to_json() + evaluation.lines() + "\n".join(said)
    assert "user-0" not in written
    assert Evaluation.from_json(evaluation.to_json()) == evaluation


def test_unusable_targets_are_counted(found: tuple[Evaluation, list[str]]) -> None:
    said = "\n".join(found[1])
    for words in ("4 held-out targets: user_without_embedding", "1 held-out targets: missing_content",
                  "1 held-out targets: empty_text", "1 held-out targets: trained_on"):  # fmt: skip
        assert f"skipped {words}" in said
    assert "0% of them on contents that were trained on" in said


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"inputs": {"targets_uri": "{in}/targets.parquet"}}, InputError, "trained_on"),
        ({"inputs": {"later_users_uri": "{in}/refit.parquet"}}, IncompatibleError, "refit rotates it"),
        ({"inputs": {"refit_users_uri": "{in}/later.parquet"}}, InputError, "own embedding space"),
        ({"inputs": {"impressions_uri": "{in}/targets.parquet"}}, InputError, "impression_id"),
        ({"projector": {"uri": "{in}/nothing"}}, ConfigError, "no projector artifact"),
        ({"compare": {"other": "{in}/nothing"}}, ConfigError, "evaluation.json"),
    ],
)
def test_wrong_inputs_have_clear_errors(
    place: Place, changes: dict[str, Any], error: type[E2PError], words: str
) -> None:
    folder = place.values["inputs"]["users_uri"].removesuffix("/users.parquet")
    filled = {n: {k: v.format(**{"in": folder}) for k, v in section.items()} for n, section in changes.items()}
    quick = {"num_retrieval_texts": 0, "num_written": 0, "noise": ()}
    config = place.config(**filled, evaluation=quick, training={"num_steps": 1})
    with pytest.raises(error, match=words):
        job.run_evaluation(config)


@pytest.mark.parametrize(
    ("table", "column", "row", "read"),
    [
        (targets_table(), "text", 4, lambda storage, uri: data.read_targets(storage, uri, "headline")),
        (users_table(), "user_id", 4, lambda storage, uri: data.read_user_vectors(storage, uri, [], Space(SPACE, DIM))),
        (users_table(), "embedding_space", 0, data.space_of),
        (contents_table(), "body", 4, lambda storage, uri: data._contents(storage, uri, pl.Series(["c1"]))),
    ],
    ids=["targets", "users", "space", "contents"],
)
def test_bytes_that_are_no_text_are_named(
    table: pa.Table, column: str, row: int, read: Callable[[Storage, str], Any], tmp_path: Path
) -> None:
    uri = str(tmp_path / "table.parquet")
    pq.write_table(with_broken(table, column, row), uri, row_group_size=3)
    with pytest.raises(InputError, match=f"{uri}, column '{column}', row {row} .counted from 0.: not UTF-8"):
        read(Storage(), uri)
    pq.write_table(table, uri, row_group_size=3)
    read(Storage(), uri)


def test_a_profile_is_needed_where_it_is_asked_for(place: Place, tmp_path: Path) -> None:
    place.storage.write_table(f"{tmp_path}/users.parquet", users_table())
    quick = {"num_retrieval_texts": 0, "num_written": 0, "noise": (), "methods": ["profile_text"]}
    config = place.config(
        inputs={"users_uri": f"{tmp_path}/users.parquet"}, evaluation=quick, training={"num_steps": 1}
    )
    with pytest.raises(ConfigError, match="profile_text"):
        evaluate(config, place.storage, lambda line: None)


def test_the_job_writes_result_and_page(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = {"num_retrieval_texts": 0, "num_written": 0, "noise": []}
    values = place.values | {"output": {"uri": str(tmp_path / "first")}, "evaluation": quick}
    values = values | {"training": {"num_steps": 2}}
    path = tmp_path / "eval.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    assert run_job(job.JOB, ["--config", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "shuffled user" in shown
    page = (tmp_path / "first" / "report.html").read_text("utf-8")
    assert "user-0" not in page
    path.write_text(
        yaml.safe_dump(
            values | {"compare": {"before": str(tmp_path / "first")}, "output": {"uri": str(tmp_path / "b")}}
        )
    )
    assert run_job(job.JOB, ["--config", str(path)]) == 0
    assert "before" in (tmp_path / "b" / "comparison.html").read_text("utf-8")


def test_shuffled_users_are_others_of_the_same_language() -> None:
    random = np.random.default_rng(0)
    user = random.integers(40, size=400).astype(np.int32)
    languages = np.where(user % 2 == 0, "en", "ja")
    other = shuffled_users(user, languages, seed=0)
    assert (other != user).all()
    assert (other % 2 == user % 2).all()
    assert len(set(zip(user.tolist(), other.tolist(), strict=True))) == len(set(user.tolist())), "one for one"

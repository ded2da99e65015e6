"""Evaluation of a projector in a small world where the truth is known, against plain forward passes of transformers."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from deltalake import write_deltalake
from torch import nn
from transformers import AutoModelForCausalLM

from e2p_ray.config import EvaluateConfig, StorageConfig, TaskConfig
from e2p_ray.downstream.evaluation import Evaluation
from e2p_ray.downstream.measures.methods import label_of
from e2p_ray.downstream.pages.evaluation_page import render_evaluation
from e2p_ray.engine.manifest import resolve_base_model
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.projector import Projector
from e2p_ray.engine.prompt import PromptLayout, load_tokenizer
from e2p_ray.errors import ConfigError, E2PError, IncompatibleError, InputError, RunError
from e2p_ray.evaluate import data, evaluate
from e2p_ray.evaluate.contest import shuffled_users
from e2p_ray.evaluate.drift import read_changed
from e2p_ray.plan.inputs import Space, content_rows, latest
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

TASK: dict[str, Any] = {"prompts": {"default": {"cue_before": "\n>"}}, "sampling": {"max_new_tokens": 8}}
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
    assert {"right user's gain", "shuffled user's gain"} <= {label_of(method) for method in ranking}
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


def _write(uri: str, tables: list[pa.Table]) -> str:
    """A folder with one file a table; an empty one becomes a file without row groups, as polars writes it."""
    Path(uri).mkdir()
    for number, table in enumerate(tables):
        with pq.ParquetWriter(f"{uri}/part-{number}.parquet", table.schema) as writer:
            if len(table):
                writer.write_table(table)
    return uri


def _read(place: Place, folder: Path, **tables: list[pa.Table]) -> data.EvaluationData:
    """What is read of these tables, and of the world's own where none is given."""
    uris = {f"{name}_uri": _write(f"{folder}/{name}", files) for name, files in tables.items()}
    return data.read_data(place.config(inputs=uris), place.storage, Space(SPACE, DIM))


def _cast(table: pa.Table, column: str, kind: pa.DataType) -> pa.Table:
    at = table.schema.get_field_index(column)
    values = table[column].dictionary_encode() if pa.types.is_dictionary(kind) else table[column].cast(kind)
    return table.set_column(at, column, values)


_HELD_OUT = targets_table([*_rows(range(_FIRST_HELD_OUT, NUM_CONTENTS))])
_SHOWN = _impressions()
_TEXT = pa.dictionary(pa.int32(), pa.string())
_NUMBERED = _SHOWN.set_column(0, "impression_id", [pa.array(range(len(_SHOWN)), pa.int64())])


@pytest.mark.parametrize(
    ("name", "whole", "files"),
    [
        (
            "contents",
            contents_table(),
            [
                _cast(contents_table()[:3], "updated_at", pa.timestamp("us")),
                _cast(contents_table()[3:6], "updated_at", pa.timestamp("ms", "UTC")),
                contents_table()[6:],
            ],
        ),
        ("contents", contents_table(), [contents_table()[:5], _cast(contents_table()[5:], "body", _TEXT)]),
        ("targets", _HELD_OUT, [_cast(_HELD_OUT, "text", _TEXT)]),
        ("targets", _HELD_OUT, [_HELD_OUT[:9], _cast(_HELD_OUT[9:], "user_id", _TEXT)]),
        ("targets", _HELD_OUT, [_cast(_HELD_OUT[:9], "weight", pa.float64()), _HELD_OUT[9:]]),
        ("users", _users(), [_users()[:0], _users()]),
        ("users", _users(), [_users()[:9].drop_columns("profile_text"), _cast(_users()[9:], "profile_text", _TEXT)]),
        ("users", _users(), [_cast(_users(), "history_size", pa.float32())]),
        ("impressions", _SHOWN, [_SHOWN[:9], _SHOWN[9:].append_column("score", [[1.0] * len(_SHOWN[9:])])]),
        ("impressions", _SHOWN, [_cast(_cast(_SHOWN, "clicked", pa.int8()), "text", _TEXT)]),
        ("impressions", _NUMBERED, [_NUMBERED[:9], _cast(_NUMBERED[9:], "impression_id", pa.string())]),
    ],
)
def test_every_form_of_a_table_is_read_alike(
    place: Place, tmp_path: Path, name: str, whole: pa.Table, files: list[pa.Table]
) -> None:
    (tmp_path / "whole").mkdir()
    expected = _read(place, tmp_path / "whole", **{name: [whole]})
    found = _read(place, tmp_path, **{name: files})
    for one in ("users.user_ids", "contents", "held_out", "training", "history_of", "num_skipped"):
        assert attrgetter(one)(found) == attrgetter(one)(expected), one
    without = files[0]["user_id"].to_pylist() if "profile_text" not in files[0].column_names and name == "users" else []
    assert found.profile_of == {user: text for user, text in expected.profile_of.items() if user not in without}
    assert found.impressions is not None
    assert expected.impressions is not None
    assert found.impressions.equals(expected.impressions)
    assert len(found.impressions) == len(_SHOWN)


def test_a_history_that_is_no_finite_number_is_unknown(place: Place, tmp_path: Path) -> None:
    sizes = [float("nan"), float("inf"), None, *[4.0] * (NUM_USERS - 3)]
    found = _read(place, tmp_path, users=[_users(history_size=pa.array(sizes, pa.float64()))])
    assert found.history_of == dict.fromkeys(found.users.user_ids[3:], 4)


@pytest.mark.parametrize(
    ("name", "table", "column"),
    [
        ("impressions", _cast(_SHOWN, "clicked", pa.string()), "clicked"),
        ("impressions", _SHOWN.drop_columns("text"), "text"),
        ("users", _users(history_size=["many"] * NUM_USERS), "history_size"),
        ("users", _users(profile_text=[["a", "list"]] * NUM_USERS), "profile_text"),
    ],
)
def test_a_column_of_another_kind_is_named(
    place: Place, tmp_path: Path, name: str, table: pa.Table, column: str
) -> None:
    with pytest.raises(InputError, match=f"part-0.parquet, column '{column}': "):
        _read(place, tmp_path, **{name: [table]})


@pytest.mark.parametrize("first", [0, 1])
def test_of_two_copies_of_a_content_the_one_is_read_that_was_trained_on(
    place: Place, tmp_path: Path, first: int
) -> None:
    copies = [contents_table(), contents_table().set_column(2, "body", [["another body"] * NUM_CONTENTS])]
    table = pa.concat_tables([copies[first], copies[1 - first]])
    chosen = latest(content_rows(table), "content_id").select("content_id", "body")
    found = _read(place, tmp_path, contents=[table]).contents
    assert {content_id: content.body for content_id, content in found.items()} == dict(chosen.iter_rows())


def test_files_that_a_delta_table_no_longer_names_are_not_read(place: Place, tmp_path: Path) -> None:
    uris = {}
    for name, table in (("targets", _HELD_OUT), ("impressions", _SHOWN)):
        uris[f"{name}_uri"] = f"{tmp_path}/{name}"
        write_deltalake(f"{tmp_path}/{name}", table)
        write_deltalake(f"{tmp_path}/{name}", table[:6], mode="overwrite")
        assert len(list((tmp_path / name).glob("*.parquet"))) == 2
    found = data.read_data(place.config(inputs=uris), place.storage, Space(SPACE, DIM))
    assert len(found.held_out) == 6
    assert found.impressions is not None
    assert len(found.impressions) == 6


def test_impressions_with_a_pair_that_was_trained_on_are_left_out_whole(place: Place, tmp_path: Path) -> None:
    learned = _rows(range(_FIRST_HELD_OUT))[0]
    more = pa.table(
        {
            "impression_id": ["learned", "learned", "unseen"],
            "user_id": [learned[0]] * 3,
            "content_id": [learned[1], "c7", "c8"],
            "text": ["what was trained on", "what was shown beside it", "another time"],
            "clicked": [True, False, True],
        }
    )
    found = _read(place, tmp_path, impressions=[_SHOWN, more])
    assert found.impressions is not None
    assert set(found.impressions["impression_id"]) == {*_SHOWN["impression_id"].to_pylist(), "unseen"}
    assert found.num_trained_impressions == 1


def test_rows_without_key_text_or_weight_are_counted(place: Place, tmp_path: Path) -> None:
    bad = [
        (None, "c7", "headline", "x", 1.0),
        ("user-000", None, "headline", "x", 1.0),
        ("user-000", "c7", "headline", None, 1.0),
        ("user-000", "c7", "headline", "x", 0.0),
        ("user-000", "c7", "headline", "x", -1.0),
        ("user-000", "c7", "headline", "x", float("nan")),
        ("user-000", "c7", "another", "x", 1.0),
    ]
    found = _read(place, tmp_path, targets=[_HELD_OUT, targets_table(bad)])
    counted = {"user_without_embedding": 3, "missing_content": 1, "empty_text": 1, "bad_weight": 3, "other_task": 1}
    opted_out = sum(user == f"user-{NUM_USERS - 1:03d}" for user in _HELD_OUT["user_id"].to_pylist())
    assert found.num_skipped == counted | {"user_without_embedding": 1 + opted_out}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"inputs": {"targets_uri": "{in}/targets.parquet"}}, InputError, "trained_on"),
        ({"inputs": {"later_users_uri": "{in}/refit.parquet"}}, IncompatibleError, "refit rotates it"),
        ({"inputs": {"later_users_uri": "{in}/nothing.parquet"}}, InputError, "no Parquet file here"),
        ({"inputs": {"later_users_uri": "{in}/strangers.parquet"}}, InputError, "none of the 29 evaluated users"),
        ({"inputs": {"refit_users_uri": "{in}/later.parquet"}}, InputError, "own embedding space"),
        ({"inputs": {"impressions_uri": "{in}/targets.parquet"}}, InputError, "impression_id"),
        ({"inputs": {"impressions_uri": "{in}/unfit.parquet"}}, InputError, "none of its impressions"),
        ({"inputs": {"users_uri": "{in}/plain.parquet"}, "evaluation": {"methods": ["profile_text"]}},
         ConfigError, "profile_text"),
        ({"projector": {"uri": "{in}/nothing"}}, ConfigError, "no projector artifact"),
        ({"projector": {"uri": "{in}/prompted"}}, ConfigError, "trained with other prompts"),
        ({"compare": {"other": "{in}/nothing"}}, ConfigError, "evaluation.json"),
    ],
)  # fmt: skip
def test_wrong_inputs_have_clear_errors(
    place: Place, changes: dict[str, Any], error: type[E2PError], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them before a model is loaded, so that nothing that was measured is lost."""
    monkeypatch.setattr(BaseModel, "load", lambda *_: pytest.fail("a model was loaded"))
    folder = place.values["inputs"]["users_uri"].removesuffix("/users.parquet")
    strangers = _users(user_id=[f"stranger-{n}" for n in range(NUM_USERS)])
    for name, table in {
        "strangers": strangers,
        "plain": users_table(),
        "unfit": _SHOWN.set_column(1, "user_id", [["nobody"] * len(_SHOWN)]),
    }.items():
        place.storage.write_table(f"{folder}/{name}.parquet", table)
    projector = Projector.from_pretrained(place.storage, place.values["projector"]["uri"])
    other: dict[str, Any] = {"settings": {"tasks": {"headline": {"prompts": {}}}}}
    Projector(replace(projector.manifest, trained=other), projector.reference).save_pretrained(
        place.storage, f"{folder}/prompted"
    )
    filled = {
        name: {key: value.format(**{"in": folder}) if isinstance(value, str) else value for key, value in each.items()}
        for name, each in changes.items()
    }
    quick = {"num_retrieval_texts": 0, "num_written": 0, "noise": ()} | filled.pop("evaluation", {})
    config = place.config(**filled, evaluation=quick, training={"num_steps": 1})
    with pytest.raises(error, match=words):
        job.run_evaluation(config)


@pytest.mark.parametrize(
    ("table", "column", "row", "read"),
    [
        (targets_table(), "text", 4, lambda storage, uri: data.read_all_targets(storage, uri, ("headline",))),
        (
            users_table(),
            "user_id",
            4,
            lambda storage, uri: data.read_all_users(storage, uri, pl.Series(["u"]), Space(SPACE, DIM)),
        ),
        (_SHOWN, "text", 4, lambda storage, uri: data._shown(storage, storage.parquet_files(uri)[0])),
        (contents_table(), "body", 4, lambda storage, uri: data._contents(storage, uri, pl.Series(["c1"]))),
    ],
    ids=["targets", "users", "impressions", "contents"],
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


def _quick(place: Place, **changes: Any) -> EvaluateConfig:
    """An evaluation of likelihoods alone."""
    quick = {"num_retrieval_texts": 0, "num_written": 0, "noise": ()} | changes.pop("evaluation", {})
    return place.config(**({"evaluation": quick, "training": {"num_steps": 1}} | changes))


def test_a_profile_without_room_is_refused_before_anything_is_trained(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[evaluate.__module__], "train_constant", lambda _: pytest.fail("it trains"))
    narrow = TASK | {"sampling": {"max_new_tokens": 450}}  # of 512; a profile takes 64
    config = _quick(place, evaluation={"methods": ["profile_text"]}, tasks={"headline": narrow})
    with pytest.raises(ConfigError, match="no room"):
        evaluate(config, place.storage, lambda line: None)


def test_later_users_are_measured_on_those_who_are_still_there(place: Place, tmp_path: Path) -> None:
    """Of two evaluated users one is gone and one opted out; the others' loss is that of these users alone."""
    later = _users(personalize=[n not in (1, NUM_USERS - 1) for n in range(NUM_USERS)])[1:]
    here = [f"user-{n:03d}" for n in range(2, NUM_USERS - 1)]
    place.storage.write_table(f"{tmp_path}/later.parquet", later)
    own = targets_table([row for row in _rows(range(_FIRST_HELD_OUT, NUM_CONTENTS)) if row[0] in here])
    place.storage.write_table(f"{tmp_path}/own.parquet", own)
    none: dict[str, str | None] = {"refit_users_uri": None, "impressions_uri": None}
    inputs = none | {"later_users_uri": f"{tmp_path}/later.parquet"}
    said: list[str] = []
    found = evaluate(_quick(place, inputs=inputs), place.storage, said.append)
    (_, point) = found.drift
    inputs = none | {"later_users_uri": None, "targets_uri": f"{tmp_path}/own.parquet"}
    (expected,) = evaluate(_quick(place, inputs=inputs), place.storage, said.append).drift
    assert (point.kind, point.amount, point.num_users) == ("later", 0.0, len(here))
    assert point.nll_per_token == pytest.approx(expected.nll_per_token, rel=1e-6)
    assert point.nll_without == pytest.approx(expected.nll_per_token, rel=1e-6)
    assert point.nll_per_token != pytest.approx(found.drift[0].nll_per_token, rel=1e-6), "the control: of all users"
    assert "later users: measured on the 27 of 29 evaluated ones who are there" in said
    for shown in (found.lines(), render_evaluation(found)):
        assert f"{len(here)} users, {point.nll_without:.3f} without drift" in shown


def test_the_space_of_later_users_is_that_of_most(place: Place, tmp_path: Path) -> None:
    spaces = [None, "odd", *[SPACE] * (NUM_USERS - 2)]
    place.storage.write_table(f"{tmp_path}/later.parquet", _users(embedding_space=pa.array(spaces, pa.string())))
    config = place.config(inputs={"later_users_uri": f"{tmp_path}/later.parquet", "refit_users_uri": None})
    space = Space(SPACE, DIM)
    read = data.read_data(config, place.storage, space)
    found = read_changed(config, place.storage, space, read, lambda line: None)
    assert found["later"].embedding_space == SPACE
    assert found["later"].user_ids == [f"user-{n:03d}" for n in range(2, NUM_USERS - 1)]


def test_losses_that_are_no_numbers_are_an_error(place: Place) -> None:
    inputs = {"refit_users_uri": None, "later_users_uri": None, "impressions_uri": None}
    config = _quick(place, inputs=inputs, evaluation={"noise": [1e38]})
    with pytest.raises(RunError, match="have a loss that is NaN or Inf"):
        evaluate(config, place.storage, lambda line: None)
    with pytest.raises(ValueError, match="finite number"):
        _quick(place, evaluation={"noise": [float("inf")]})


def test_names_that_the_checks_allow_are_no_foreign_ones(place: Place, tmp_path: Path) -> None:
    named = [(*row[:3], "Mayor Peter Jackson in peace", 1.0) for row in _rows(range(_FIRST_HELD_OUT, NUM_CONTENTS))]
    place.storage.write_table(f"{tmp_path}/targets.parquet", targets_table([*named]))
    none = {"refit_users_uri": None, "later_users_uri": None, "impressions_uri": None}
    inputs = none | {"targets_uri": f"{tmp_path}/targets.parquet"}
    shares = []
    for allow in ((), ("Peter Jackson",)):
        config = _quick(place, inputs=inputs, evaluation={"num_written": 4}, checks={"allow": allow})
        texts = evaluate(config, place.storage, lambda line: None).texts
        shares.append(next(one.faithfulness.faithful.value for one in texts if one.method == "reference"))
    assert shares == [0.0, 1.0]


def test_what_was_skipped_stands_on_the_page(place: Place, tmp_path: Path) -> None:
    """What has no prompt, too: two contents are in a language without one."""
    languages = ["xx" if n in (7, 8) else "en" for n in range(NUM_CONTENTS)]
    contents = contents_table()
    place.storage.write_table(
        f"{tmp_path}/contents.parquet",
        contents.set_column(contents.schema.get_field_index("language"), "language", [languages]),
    )
    prompts = {"en": TASK["prompts"]["default"]}
    none = {"refit_users_uri": None, "later_users_uri": None, "impressions_uri": None}
    config = _quick(
        place,
        inputs=none | {"contents_uri": f"{tmp_path}/contents.parquet"},
        tasks={"headline": TASK | {"prompts": prompts}},
    )
    found = evaluate(config, place.storage, lambda line: None)
    rows = [row for row in _rows(range(7, 9)) if row[0] != f"user-{NUM_USERS - 1:03d}"]
    assert f"{len(rows)} no_prompt" in found.about["skipped"]
    assert "1 trained_on" in found.about["skipped"]


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


def test_a_result_that_cannot_be_written_was_at_least_shown(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    none = {"refit_users_uri": None, "later_users_uri": None, "impressions_uri": None}
    config = _quick(place, inputs=none, output={"uri": f"{tmp_path}/file/evaluation"})
    with pytest.raises((E2PError, OSError)):
        job.run_evaluation(config)
    assert "shuffled user" in capsys.readouterr().out


def test_lora_without_its_package_is_refused_first(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    for methods in (["lora"], ["prefix_tuning", "lora_profile_text"]):
        with pytest.raises(ConfigError, match="needs peft"):
            job.run_evaluation(_quick(place, evaluation={"methods": methods}))
    job.require_extra(_quick(place, evaluation={"methods": ["prefix_tuning"]}))


def test_an_interrupted_evaluation_does_not_say_that_it_resumes(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "eval.yaml"
    path.write_text(yaml.safe_dump(place.values), "utf-8")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(BaseModel, "load", interrupted)
    assert run_job(job.JOB, ["--config", str(path)]) == 130
    said = capsys.readouterr().err
    assert "interrupted. Nothing is kept" in said
    assert "resumes" not in said


def test_shuffled_users_are_others_of_the_same_language() -> None:
    random = np.random.default_rng(0)
    user = random.integers(40, size=400).astype(np.int32)
    languages = np.where(user % 2 == 0, "en", "ja")
    other = shuffled_users(user, languages, seed=0)
    assert (other != user).all()
    assert (other % 2 == user % 2).all()
    assert len(set(zip(user.tolist(), other.tolist(), strict=True))) == len(set(user.tolist())), "one for one"
    alone = np.where(user == 7, "fr", languages)
    assert (shuffled_users(user, alone, seed=0) != user).all(), "the only one of a language has one of another's"

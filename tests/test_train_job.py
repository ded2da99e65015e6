"""jobs.train over real Ray: two workers against one, killed and resumed, bad inputs, what it writes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import pyarrow as pa
import pytest
import ray
import torch
import yaml
from deltalake import DeltaTable, write_deltalake

from e2p_ray.config import TrainConfig
from e2p_ray.downstream.measures.bootstrap import Interval
from e2p_ray.downstream.pages.training_page import TrainingReport, build_report, render_html, render_terminal
from e2p_ray.engine.manifest import BaseModelFolder, resolve_base_model
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.projector import Projector
from e2p_ray.errors import ConfigError, InputError, StorageError
from e2p_ray.plan.inputs import Piece, stable_hash
from e2p_ray.ray_session import quiet_ray_data
from e2p_ray.schema import Content
from e2p_ray.storage import Storage
from e2p_ray.train.data.inputs import LessonCounts, prepare_lessons
from e2p_ray.train.data.tables import SourceTable, read_contents, read_users, scan_tables
from e2p_ray.train.fit import Fit
from e2p_ray.train.job.board import TrainProgress
from e2p_ray.train.job.prepared import Prepared, finished_manifest, prepare, settings_of
from e2p_ray.train.job.provenance import curves_said
from e2p_ray.train.job.session import typed_errors
from e2p_ray.train.job.training import reading_of
from e2p_ray.train.lessons import LessonTable, Target, UserTable, make_lessons
from e2p_ray.train.projector import new_projector, start_calmly
from jobs import train, validate
from jobs.cli import run_job
from jobs.train_progress import TrainLine, training_text
from tests.plan_world import with_broken
from tests.s3 import IS_LONG, S3Server
from tests.tiny_models import byte_tokenizer, configs, random_model
from tests.train_world import (
    DIM,
    NUM_USERS,
    SPACE,
    TASKS,
    contents_table,
    target_rows,
    targets_table,
    updated,
    users_table,
    vectors,
    write_train_world,
)

ROOT = Path(__file__).resolve().parent.parent
# Two workers add the same numbers in another order, and batch them otherwise.
SAME_CURVE = 2e-4
NUM_KILLED_STEPS = 150 if IS_LONG else 100  # enough to be killed twice before the end


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("E2P_") and not name.startswith("E2P_TEST_"):
            monkeypatch.delenv(name)


@dataclass(frozen=True)
class Finished:
    """A job that came to its end."""

    config: TrainConfig
    path: Path
    said: str  # on stderr
    shown: str  # on stdout
    record: dict[str, Any]  # training.json
    page: str


def _run(path: Path, *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of jobs.train."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_job(train.JOB, ["--config", str(path), *words])
    return code, out.getvalue(), err.getvalue()


def _finished(config: TrainConfig, path: Path, said: str, shown: str) -> Finished:
    storage = Storage(config.storage)
    record = json.loads(storage.read_bytes(f"{config.output.uri}/training.json"))
    page = storage.read_bytes(f"{config.output.uri}/report.html").decode()
    return Finished(config, path, said, shown, record, page)


def _plain_lessons(config: TrainConfig, held_out: set[str]) -> tuple[LessonTable, LessonTable]:
    """The lessons by `make_lessons` from the rows that the tables were made of: no table is read, no Ray runs."""
    users = UserTable([f"user-{n:03d}" for n in range(NUM_USERS - 1)], vectors()[: NUM_USERS - 1], SPACE)
    columns = [contents_table()[name].to_pylist() for name in ("content_id", "title", "body", "language")]
    contents = [Content(*row) for row in zip(*columns, strict=True)]
    targets = [Target(*row) for row in sorted(target_rows(), key=lambda row: (row[1], row[2], row[0]))]
    tables = []
    for held in (False, True):
        part = [target for target in targets if (target.content_id in held_out) == held]
        settings = settings_of(config.projector, config.training)
        tables.append(make_lessons(byte_tokenizer(), config.tasks, users, contents, part, settings, 512)[0])
    return tables[0], tables[1]


def _lessons(prepared: Prepared) -> tuple[LessonTable, LessonTable | None, LessonCounts]:
    with quiet_ray_data(), typed_errors():
        found = prepare_lessons(reading_of(prepared), prepared.sources)
        validation = None if found.validation is None else ray.get(found.validation)
        return ray.get(found.training), validation, found.counts


def _content_ids(table: LessonTable) -> set[str]:
    """The contents of lessons, recognised by their texts."""
    columns = [contents_table()[name].to_pylist() for name in ("content_id", "title", "body")]
    id_of = {f"{title}\n\n{body}": content_id for content_id, title, body in zip(*columns, strict=True)}
    texts = (str(byte_tokenizer().decode(table.lefts[at], skip_special_tokens=True)) for at in range(len(table)))
    return {id_of[text.rpartition("\n")[0]] for text in texts}


def _assert_same_lessons(found: LessonTable, wanted: LessonTable) -> None:
    for name in ("lefts", "rights", "targets"):
        assert np.array_equal(getattr(found, name).ids, getattr(wanted, name).ids), name
        assert np.array_equal(getattr(found, name).starts, getattr(wanted, name).starts), name
    assert np.array_equal(found.first_row, wanted.first_row)
    assert np.array_equal(found.weight, wanted.weight)
    assert np.array_equal(found.user_embeddings[found.user], wanted.user_embeddings[wanted.user])


# -- one training on two workers, from and to a real S3 server


@pytest.fixture(scope="module")
def finished(s3_server: S3Server, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two workers of two contents each."""
    folder = tmp_path_factory.mktemp("two")
    config, path = write_train_world(
        folder,
        place=s3_server.new_bucket(),
        storage=s3_server.config,
        training={"contents_per_step": 2},
        workers={"num_workers": 2},
    )
    code, shown, said = _run(path)
    assert code == 0, said
    return _finished(config, path, said, shown)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> BaseModelFolder:
    """The base model of all these tests."""
    config, _ = write_train_world(tmp_path_factory.mktemp("base"))
    return resolve_base_model(config.base_model, Storage())


def _alone(
    folder: BaseModelFolder, config: TrainConfig, lessons: LessonTable, held: LessonTable, **changes: Any
) -> Fit:
    """The same training in this process, by one worker with all the contents."""
    settings = settings_of(config.projector, config.training)
    count = settings.contents_per_step * config.workers.num_workers
    settings = replace(settings, contents_per_step=count, **changes)
    base = BaseModel.load(folder.path, "float32", torch.device("cpu"))
    used = np.unique(lessons.user)
    users = UserTable((), lessons.user_embeddings[used], SPACE)
    projector = new_projector(base, folder, users, settings)
    start_calmly(projector, base, lessons)
    fit = Fit(base, projector, lessons, settings, validation=held)
    list(fit.run())
    return fit


def test_two_workers_train_as_one_with_twice_the_contents(finished: Finished, folder: BaseModelFolder) -> None:
    config = finished.config
    _, validation, _ = _lessons(prepare(config))
    assert validation is not None
    lessons, held = _plain_lessons(config, _content_ids(validation))
    fit = _alone(folder, config, lessons, held)
    assert [r["step"] for r in finished.record["records"]] == list(range(1, 13))
    for name in ("loss", "gradient_norm", "validation_loss", "num_tokens", "learning_rate"):
        wanted = [getattr(record, name) for record in fit.records]
        found = [record[name] for record in finished.record["records"]]
        assert [v is None for v in found] == [v is None for v in wanted]
        numbers = [v for v in wanted if v is not None]
        assert [v for v in found if v is not None] == pytest.approx(numbers, rel=SAME_CURVE), name
    losses = [record["loss"] for record in finished.record["records"]]
    control = _alone(folder, config, lessons, held, seed=1)
    assert [r.loss for r in control.records] != pytest.approx(losses, rel=SAME_CURVE)
    # and what the artifact holds is what this process trained
    artifact = Projector.from_pretrained(Storage(config.storage), config.output.projector_uri)
    for name, value in fit.finish().state_dict().items():
        torch.testing.assert_close(artifact.state_dict()[name], value, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(artifact.reference.mean, fit.projector.reference.mean)


def test_the_artifact_tells_where_it_comes_from(finished: Finished, folder: BaseModelFolder) -> None:
    config, storage = finished.config, Storage(finished.config.storage)
    artifact = Projector.from_pretrained(storage, config.output.projector_uri)
    trained = artifact.manifest.trained
    assert artifact.manifest.embedding_space == SPACE
    assert artifact.manifest.projector_id == finished.record["projector_id"]
    base = BaseModel.load(folder.path, "float32", torch.device("cpu"))
    assert trained["base_model_hash"] == base.weights_hash(), "as it is on disk: nothing trained it"
    lessons = trained["lessons"]
    given = sum(lessons["num_used"].values()) + sum(lessons["skipped"]["training"].values())
    assert given == lessons["num_targets"]["training"] == len(target_rows())
    assert lessons["skipped"] == {"training": {"opted_out": 4}}
    for name, said in trained["inputs"].items():
        info = storage.info(said["uri"])
        assert info is not None
        assert said["files"] == [info._asdict()], name
    curves, records = trained["curves"], finished.record["records"]
    validated = [r["validation_loss"] for r in records if r["validation_loss"] is not None]
    assert curves["best_validation_loss"] == min(validated)
    assert curves["last_loss"] == records[-1]["loss"]
    assert trained["code"]["version"]
    assert trained["settings"]["tasks"]["headline"]["prompts"]["default"]["cue_before"] == "\n>"
    assert finished.record["provenance"] == trained
    assert "resumes" not in finished.said


def test_the_gain_is_measured_on_held_out_contents(finished: Finished) -> None:
    gain, lessons = finished.record["gain"], finished.record["provenance"]["lessons"]
    assert gain["num_targets"] == lessons["num_used"]["validation"] > 0
    assert gain["losses"]["right"]["value"] == pytest.approx(
        finished.record["provenance"]["curves"]["best_validation_loss"], rel=1e-5
    )
    for name, found in gain["gains"].items():
        wanted = gain["losses"][name]["value"] - gain["losses"]["right"]["value"]
        assert found["value"] == pytest.approx(wanted, abs=1e-9)
        assert found["low"] <= found["value"] <= found["high"]
    assert "the average user" in finished.shown
    assert "over the average user" in finished.page


def test_no_output_names_a_user_or_holds_their_embedding(finished: Finished) -> None:
    def signs_of(number: np.float32) -> set[str]:
        """How it begins where it is written in full, or in four digits, or rounded to them."""
        return {repr(abs(float(number)))[:8], f"{abs(number):.4f}"}

    texts = [finished.page, json.dumps(finished.record), finished.shown, finished.said]
    for text in texts:
        assert "user-0" not in text
        for vector in vectors()[:5]:
            assert not any(sign in text for sign in signs_of(vector[0]))
    for vector in vectors()[:5]:
        for leak in (json.dumps(vector.tolist()), str(vector), f"{vector[0]:.4f}"):
            assert any(sign in leak for sign in signs_of(vector[0])), "control: a leak would be seen"
    assert "user-0" in str(target_rows()), "control: this is how they are named"


def test_the_jobs_take_the_artifact(finished: Finished, tmp_path: Path) -> None:
    values = yaml.safe_load(finished.path.read_text(encoding="utf-8"))
    for name in ("training", "workers"):
        del values[name]
    candidates = pa.table(
        {
            "user_id": ["user-001"],
            "content_id": ["c1"],
            "rank": pa.array([1], pa.int32()),
            "score": pa.array([1.0], pa.float32()),
            "source": ["x"],
        }
    )
    uri = values["inputs"].pop("targets_uri").replace("targets", "candidates")
    Storage(finished.config.storage).write_table(uri, candidates)
    values["inputs"]["candidates_uri"] = uri
    values["projector"] = {"uri": finished.config.output.projector_uri}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert run_job(validate.JOB, ["--config", str(path)]) == 0


def test_a_finished_training_is_not_done_again(finished: Finished) -> None:
    storage, uri = Storage(finished.config.storage), f"{finished.config.output.uri}/training.json"
    before = storage.info(uri)
    code, shown, said = _run(finished.path)
    assert (code, shown) == (0, "")
    assert f"is finished: projector {finished.record['projector_id']}" in said
    assert storage.info(uri) == before
    assert not list(storage.list_objects(f"{finished.config.output.uri}/checkpoints")), "nothing is left behind"
    other = finished.config.model_copy(
        update={"training": finished.config.training.model_copy(update={"num_steps": 13})}
    )
    assert prepare(other).train_id != finished.record["train_id"], "control: another training"
    same = finished.config.model_copy(
        update={"training": finished.config.training.model_copy(update={"checkpoint_every": 1})}
    )
    assert prepare(same).train_id == finished.record["train_id"]


def test_a_training_whose_artifact_is_damaged_is_not_finished(finished: Finished) -> None:
    config, prepared = finished.config, prepare(finished.config)
    storage, record_uri = prepared.storage, f"{config.output.uri}/training.json"
    assert finished_manifest(prepared, record_uri) is not None
    for name in ("model.safetensors", "reference.safetensors"):
        uri = f"{config.output.projector_uri}/{name}"
        whole = storage.read_bytes(uri)
        storage.write_bytes(uri, whole[:-1] + bytes([whole[-1] ^ 1]))
        assert finished_manifest(prepared, record_uri) is None, f"{name} is damaged"
        storage.delete(uri)
        assert finished_manifest(prepared, record_uri) is None, f"{name} is missing"
        storage.write_bytes(uri, whole)
    assert finished_manifest(prepared, record_uri) is not None


# -- killed


def _start(path: Path, log: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "jobs.train", "--config", str(path), *words]
    command += ["--workers.ray_address", ray.get_runtime_context().gcs_address]
    with log.open("ab") as stream:
        return subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream)


def _checkpoint(config: TrainConfig) -> str | None:
    """The version of the checkpoint that is there."""
    found = [info.version for info in Storage(config.storage).list_objects(f"{config.output.uri}/checkpoints")]
    return found[0] if found else None


def _killed_after_a_checkpoint(config: TrainConfig, path: Path, log: Path, *words: str) -> str:
    """The version of the checkpoint that the driver was killed behind."""
    process = _start(path, log, *words)
    while (first := _checkpoint(config)) is None:
        assert process.poll() is None, log.read_text(encoding="utf-8")
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not Storage().exists(f"{config.output.uri}/training.json"), "it was killed before its end"
    return first


def _kill_a_worker() -> None:
    """Of this process's Ray: others may run on this machine."""
    children = psutil.Process().children(recursive=True)
    (worker,) = [child for child in children if "RayTrainWorker" in _command_of(child)]
    worker.kill()


def _command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # it has ended since, perhaps as a zombie
        return ""


@pytest.fixture(scope="module")
def continued(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Its driver was killed, and then, by the same command, a worker."""
    place = tmp_path_factory.mktemp("continued")
    config, path = write_train_world(
        place,
        training={"num_steps": NUM_KILLED_STEPS, "checkpoint_every": 10, "validate_every": 25},
        projector={"dropout": 0.1},
    )
    log = place / "log"
    first = _killed_after_a_checkpoint(config, path, log)

    over = threading.Event()

    def kill_a_worker_after_the_next_checkpoint() -> None:
        while _checkpoint(config) == first and not over.is_set():
            time.sleep(0.01)
        _kill_a_worker()

    with ThreadPoolExecutor(1) as aside:
        killing = aside.submit(kill_a_worker_after_the_next_checkpoint)
        code, shown, said = _run(path)
        over.set()
        killing.result()
    assert code == 0, said
    assert log.read_text(encoding="utf-8").count("resumes at step") == 0
    return _finished(config, path, said, shown)


@pytest.mark.timeout(600)
def test_killed_driver_and_lost_worker_continue_the_curve(continued: Finished, folder: BaseModelFolder) -> None:
    config, found = continued.config, continued.record["records"]
    assert continued.said.count("resumes at step") == 2, continued.said
    assert "Traceback" not in continued.said
    _, validation, _ = _lessons(prepare(config))
    assert validation is not None
    whole = _alone(folder, config, *_plain_lessons(config, _content_ids(validation)))
    assert [record["step"] for record in found] == list(range(1, NUM_KILLED_STEPS + 1))
    assert [record["loss"] for record in found] == pytest.approx([r.loss for r in whole.records], rel=2e-3)
    assert [record["loss"] for record in found[:30]] == pytest.approx(
        [r.loss for r in whole.records[:30]], rel=SAME_CURVE
    )
    shifted = [r.loss for r in whole.records[1:31]]
    assert [record["loss"] for record in found[:30]] != pytest.approx(shifted, rel=2e-3), "control: a step too late"


@pytest.mark.timeout(600)
def test_training_once_more_is_resumed_by_the_same_command(continued: Finished) -> None:
    config, path = continued.config, continued.path
    storage, uri = Storage(), f"{config.output.uri}/training.json"
    finished = storage.info(uri)
    code, _, said = _run(path)
    assert (code, storage.info(uri)) == (0, finished), "control: it is finished"
    assert "resumes" not in said
    code, _, said = _run(path, "--again", "--workers.num_cpus", "1000")
    assert code != 0, said
    assert (_run(path)[0], storage.info(uri)) == (0, finished), "what cannot begin unmakes nothing"

    _killed_after_a_checkpoint(config, path, path.with_name("log"), "--again")
    code, _, said = _run(path, "--again")
    assert code == 0, said
    assert "resumes at step" in said
    assert storage.info(uri) != finished


def test_a_workers_error_keeps_its_type_and_a_bad_checkpoint_is_named(ray_cluster: None, tmp_path: Path) -> None:
    """A base model that computes nothing but NaN."""
    model = random_model(configs()["llama"])
    model.model.norm.weight.data.fill_(torch.nan)
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    config, path = write_train_world(tmp_path)
    uri = f"{config.output.uri}/checkpoints/{prepare(config).train_id}.safetensors"
    Storage().write_bytes(uri, b"not a checkpoint")
    code, shown, said = _run(path)
    assert code == 1, said
    assert not shown
    assert "jobs.train: the loss became" in said
    assert "training.learning_rate" in said
    assert f"{uri} is not used, it is damaged" in said
    assert "Traceback" not in said
    assert len(said.splitlines()) < 8, said


# -- inputs


def test_lessons_are_those_of_the_plain_rows(ray_cluster: None, tmp_path: Path) -> None:
    """Files in several pieces, in another order, with the users twice: the lessons do not change."""
    config, _ = write_train_world(tmp_path)
    training, validation, counts = _lessons(prepare(config))
    assert validation is not None
    held_out = _content_ids(validation)
    assert 0 < len(held_out) < 5
    assert not held_out & _content_ids(training), "no content is on both sides"
    for found, wanted in zip((training, validation), _plain_lessons(config, held_out), strict=True):
        _assert_same_lessons(found, wanted)
    assert counts.num_used == {"training": training.num_rows, "validation": validation.num_rows}

    in_folder = Path(config.output.uri).parent / "in"
    rows = list(reversed(target_rows()))
    for name, table in (
        ("targets/part-1", targets_table(rows[:50])),
        ("targets/part-0", targets_table(rows[50:])),
        ("users/new", users_table()),
        ("users/old", users_table(updated_at=pa.array([0] * NUM_USERS, pa.timestamp("us", "UTC")))),
    ):
        Storage().write_table(f"{in_folder}/{name}.parquet", table)
    inputs = {"users_uri": f"{in_folder}/users", "targets_uri": f"{in_folder}/targets"}
    changed = config.model_copy(update={"inputs": config.inputs.model_copy(update=inputs)})
    again, held, _ = _lessons(prepare(changed))
    assert held is not None
    _assert_same_lessons(again, training)
    _assert_same_lessons(held, validation)


def _bad_users() -> pa.Table:
    """Users 0 to 7 cannot be used, each for another reason."""
    rows: list[Any] = [list(vector) for vector in vectors()]
    rows[0], rows[1], rows[2] = None, rows[1][:3], [0.0] * DIM
    rows[3] = [float("nan")] * DIM
    rows[4] = [None, *rows[4][1:]]
    rows[7] = [*rows[7][:-1], 1e20]
    personalize = [n != 5 for n in range(NUM_USERS)]
    spaces = [SPACE if n != 6 else "space-0" for n in range(NUM_USERS)]
    return users_table(
        embedding=pa.array(rows, pa.list_(pa.float32())),
        personalize=pa.array([None if n == 5 else p for n, p in enumerate(personalize)]),
        embedding_space=spaces,
    )


def test_every_bad_row_is_skipped_and_counted(ray_cluster: None, tmp_path: Path) -> None:
    good: list[tuple[Any, ...]] = [(f"user-{9 + n % 2:03d}", f"c{n}", "headline", "good", None) for n in range(8)]
    good += [(f"user-{n:03d}", "c0", "headline", "good", 2.5) for n in range(11, 25)]
    bad: list[tuple[Any, ...]] = [(f"user-{n:03d}", "c0", "headline", "bad", 1.0) for n in range(8)]
    bad += [
        ("nobody", "c0", "headline", "bad", 1.0),
        (None, "c0", "headline", "bad", 1.0),
        ("user-010", "gone", "headline", "bad", 1.0),
        ("user-010", "blank", "headline", "bad", 1.0),
        ("user-010", "c0", "headline", " \u3000", 1.0),
        ("user-010", "c0", "headline", None, 1.0),
        ("user-010", "c0", "headline", "bad", 0.0),
        ("user-010", "c0", "headline", "bad", -1.0),
        ("user-010", "c0", "headline", "bad", float("nan")),
        ("user-010", "c0", "poem", "bad", 1.0),
        ("user-010", "c2", "narrow", "bad", 1.0),
        ("user-010", "c2", "english", "bad", 1.0),
    ]
    contents = contents_table().drop_columns("updated_at").to_pylist()
    contents.append({"content_id": "blank", "title": " ", "body": "", "language": "en"})
    table = pa.Table.from_pylist(contents).append_column("updated_at", updated(len(contents)))
    narrow = {"prompts": {"default": {"cue_before": "x" * 600}}}
    config, _ = write_train_world(
        tmp_path,
        tables={"users": _bad_users(), "contents": table, "targets": targets_table([*good, *bad])},
        projector={"embedding_space": SPACE},
        tasks={**TASKS, "narrow": narrow, "english": {"prompts": {"en": {}}}},
    )
    training, validation, counts = _lessons(prepare(config))
    assert validation is not None
    assert counts.skipped == {
        "training": {
            "bad_weight": 3,
            "embedding_far_longer": 1,
            "embedding_non_finite": 2,
            "embedding_null": 1,
            "embedding_other_space": 1,
            "embedding_wrong_size": 1,
            "embedding_zero": 1,
            "empty_content": 1,
            "empty_text": 2,
            "missing_content": 1,
            "no_prompt": 1,
            "opted_out": 1,
            "other_task": 1,
            "prompt_too_long": 1,
            "unknown_user": 2,
        }
    }
    assert sum(counts.num_used.values()) == len(good)
    assert sum(counts.skipped["training"].values()) + len(good) == counts.num_targets["training"]
    assert Counter([*training.weight.tolist(), *validation.weight.tolist()]) == Counter({1.0: 8, 2.5: 14})
    assert counts.num_contents_without_target == 11 - 8


def test_a_lone_content_is_for_training(ray_cluster: None, tmp_path: Path) -> None:
    """Whatever the hash of its id says."""
    lone = contents_table().slice(0, 1).set_column(0, "content_id", pa.array(["article-11"]))
    targets = targets_table([(f"user-{n:03d}", "article-11", "headline", "text", 1.0) for n in range(4)])
    config, _ = write_train_world(tmp_path, tables={"contents": lone, "targets": targets})
    assert stable_hash(pl.Series(["article-11"]))[0] < config.training.validation_share * 2.0**64
    training, validation, _ = _lessons(prepare(config))
    assert training.num_rows == 4
    assert validation is None


def test_validation_of_its_own_table(ray_cluster: None, tmp_path: Path) -> None:
    trained = next(row for row in target_rows() if row[0] != f"user-{NUM_USERS - 1:03d}")
    pairs = {(user, content) for user, content, *_ in target_rows()}
    number = next(n for n in range(NUM_USERS - 1) if (f"user-{n:03d}", trained[1]) not in pairs)
    held = [(user, trained[1], "headline", "held", 1.0) for user in (f"user-{number:03d}", "nobody")] + [trained]
    config, _ = write_train_world(
        tmp_path, tables={"validation": targets_table(held)}, training={"max_target_tokens": 19}
    )
    uri = config.inputs.users_uri.replace("users", "validation")
    config = config.model_copy(update={"inputs": config.inputs.model_copy(update={"validation_uri": uri})})
    training, validation, counts = _lessons(prepare(config))
    assert validation is not None
    assert validation.num_rows == 1
    assert np.array_equal(validation.user_embeddings, vectors()[number : number + 1])
    assert training.num_rows == len(target_rows()) - 4
    assert counts.skipped == {"training": {"opted_out": 4}, "validation": {"trained_on": 1, "unknown_user": 1}}
    longer = [
        text for user, _, _, text, _ in target_rows() if len(text) + 1 > 19 and user != f"user-{NUM_USERS - 1:03d}"
    ]
    assert counts.num_truncated == {"training": len(longer), "validation": 0}
    assert 0 < len(longer) < training.num_rows
    Storage().write_table(uri, targets_table(held[1:]))
    with pytest.raises(InputError, match=r"validation.*none of the 2 targets can be used \(.*trained_on 1"):
        _lessons(prepare(config))


def _same(table: pa.Table) -> pa.Table:
    vector = vectors()[0]
    return users_table(embedding=pa.array([vector] * NUM_USERS, pa.list_(pa.float32(), DIM)))


def _sizes() -> pa.Array:
    return pa.array([list(v)[: DIM - n % 2] for n, v in enumerate(vectors())], pa.list_(pa.float32()))


@pytest.mark.parametrize(
    ("tables", "error", "said"),
    [
        (
            {"users": users_table(embedding_space=[f"space-{n % 2}" for n in range(NUM_USERS)])},
            ConfigError,
            "several embedding spaces: 'space-0' \\(15 users\\), 'space-1' \\(14 users\\).*projector.embedding_space",
        ),
        ({"users": users_table(embedding=_sizes())}, InputError, "several sizes: 6 \\(15 users\\), 5 \\(14 users\\)"),
        (
            {"users": _same(users_table())},
            InputError,
            "users.parquet, column 'embedding': all 26 users of the targets have one and the same user embedding",
        ),
        (
            {"targets": targets_table([("user-001", f"c{n}", "headline", "x", 1.0) for n in range(4)])},
            InputError,
            "users.parquet, column 'embedding': all targets are of one user",
        ),
        (
            {"targets": targets_table([])},
            InputError,
            "targets.parquet: none of the 0 targets can be used \\(nothing skipped\\)",
        ),
        (
            {"targets": targets_table([("nobody", "c1", "headline", "x", 1.0), ("user-001", "c1", "reason", "", 1.0)])},
            InputError,
            "targets.parquet: none of the 2 targets can be used \\(.*unknown_user 1",
        ),
        (
            {"targets": targets_table(task=False)},
            InputError,
            "targets.parquet, column 'task', row 0 .counted from 0.: the config.* has 2 tasks.*Write the task's name",
        ),
        (
            {"targets": targets_table([*target_rows()[:7], ("user-001", "c1", None, "x", 1.0)])},
            InputError,
            "column 'task', row 7",
        ),
        *(
            ({name: with_broken(table, column, 1)}, InputError, f"{name}.parquet, column '{column}', row 1 .*not UTF-8")
            for name, table, column in (
                ("users", users_table(), "user_id"),
                ("contents", contents_table(), "body"),
                ("targets", targets_table(), "text"),
            )
        ),
    ],
    ids=[
        *("spaces", "sizes", "constant", "one_user", "empty", "unusable", "no_task", "null_task"),
        *("users_no_text", "contents_no_text", "targets_no_text"),
    ],
)
def test_inputs_that_cannot_be_learned_from(
    tables: dict[str, pa.Table], error: type[Exception], said: str, ray_cluster: None, tmp_path: Path
) -> None:
    config, _ = write_train_world(tmp_path, tables=tables)
    with pytest.raises(error, match=said):
        _lessons(prepare(config))


def test_a_target_without_a_task_has_the_only_one(ray_cluster: None, tmp_path: Path) -> None:
    config, _ = write_train_world(
        tmp_path, tables={"targets": targets_table(task=False)}, tasks={"headline": TASKS["headline"]}
    )
    training, _, counts = _lessons(prepare(config))
    assert sum(counts.num_used.values()) == len(target_rows()) - 4
    assert training.num_rows


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"training": {"num_step": 3}}, 2, "training.num_step: unknown key; did you mean num_steps?"),
        ({"inputs": {"targets_uri": "nowhere"}}, 3, "nowhere: no Parquet file here"),
        ({"training": {"seed": 1 << 64}}, 2, "training.seed: "),
        ({"training": {"patience": 2, "validation_share": 0.0}}, 2, "something to validate on"),
        ({"base_model": {"dtype": "float16"}}, 2, "base_model.dtype bfloat16"),
        ({"base_model": {"uri": "nowhere"}}, 2, "neither a folder nor a hub model"),
    ],
)
def test_a_wrong_configuration_is_said_before_ray_starts(
    change: dict[str, dict[str, Any]], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _, path = write_train_world(tmp_path)
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, section in change.items():
        values[name] |= section
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    found, shown, err = _run(path)
    assert found == code, err
    assert said in err
    assert not shown


def test_a_delta_table_is_read_as_of_its_last_version(tmp_path: Path) -> None:
    config, _ = write_train_world(tmp_path)
    uri = str(tmp_path / "delta targets")
    write_deltalake(uri, targets_table(target_rows()[:10]))
    write_deltalake(uri, targets_table(target_rows()[:3]), mode="overwrite")
    inputs = config.inputs.model_copy(update={"targets_uri": uri})
    table = scan_tables(inputs, Storage())["targets"]
    assert (table.delta_version, table.num_rows) == (1, 3)
    assert len([*Path(uri).glob("*.parquet")]) == 2, "control: the old file is still there"
    assert scan_tables(config.inputs, Storage())["targets"].delta_version is None


def _targets_at(config: TrainConfig, uri: Path | str) -> SourceTable:
    inputs = config.inputs.model_copy(update={"targets_uri": str(uri)})
    return scan_tables(inputs, Storage())["targets"]


def test_every_file_that_a_delta_table_names_is_read_by_whatever_way_it_is_named(tmp_path: Path) -> None:
    config, _ = write_train_world(tmp_path)
    languages = ["日本語", "x y", "a:b", "100 %", "a/b", None]
    rows = target_rows()[: len(languages)]
    table = targets_table(rows).append_column("language", pa.array(languages, pa.string()))
    uri = tmp_path / "delta"
    write_deltalake(str(uri), targets_table(target_rows()[:9]).append_column("language", pa.array(["old"] * 9)))
    write_deltalake(str(uri), table, partition_by=["language"], mode="overwrite", schema_mode="overwrite")
    (tmp_path / "link").symlink_to(uri)
    (tmp_path / "beside").mkdir()
    for name in (uri, tmp_path / "link", f"{tmp_path}/beside/../delta", f"{tmp_path}//delta/", f"file://{uri}"):
        found = _targets_at(config, name)
        assert (found.delta_version, len(found.files), found.num_rows) == (1, len(rows), len(rows)), name
        ids = [_read_ids(piece) for piece in found.pieces]
        assert sorted(row for part in ids for row in part) == sorted(row[0] for row in rows)

    gone = min(Path(info.uri) for info in _targets_at(config, uri).files)
    gone.unlink()
    with pytest.raises(InputError, match=f"{re.escape(str(gone))}: version 1 of the Delta table .* names this file"):
        _targets_at(config, uri)


def _read_ids(piece: Piece) -> list[str]:
    with Storage().open_parquet(piece.info) as file:
        ids: list[str] = file.read_row_groups(list(piece.row_groups), columns=["user_id"])["user_id"].to_pylist()
        return ids


def test_rows_that_deletion_vectors_delete_are_not_trained_on(tmp_path: Path) -> None:
    config, _ = write_train_world(tmp_path)
    uri = tmp_path / "delta"
    write_deltalake(str(uri), targets_table())
    assert _targets_at(config, uri).num_rows == len(target_rows())
    features = {"readerFeatures": ["deletionVectors"], "writerFeatures": ["deletionVectors"]}
    protocol = {"protocol": {"minReaderVersion": 3, "minWriterVersion": 7} | features}
    log = uri / "_delta_log"
    (log / f"{1:020d}.json").write_text(json.dumps(protocol) + "\n", encoding="utf-8")
    assert _targets_at(config, uri).num_rows == len(target_rows()), "the control: a table that may have some has none"
    actions = map(json.loads, (log / f"{0:020d}.json").read_text(encoding="utf-8").splitlines())
    (added,) = (action["add"] for action in actions if "add" in action)
    vector = {"storageType": "u", "pathOrInlineDv": "ab^-aqEH.-t@S}K{vb[*k^", "offset": 4, "sizeInBytes": 40}
    removed = {name: added[name] for name in ("path", "partitionValues", "size")} | {"dataChange": True}
    lines = ({"remove": removed}, {"add": added | {"deletionVector": vector | {"cardinality": 1}}})
    (log / f"{2:020d}.json").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(InputError, match=f"{re.escape(str(uri))}: has deletion vectors.*Purge them"):
        _targets_at(config, uri)


def test_trouble_with_a_delta_table_on_s3_is_not_its_own_fault(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = write_train_world(tmp_path)
    storage, uri = Storage(s3_server.config), f"{s3_server.new_bucket()}/targets"
    write_deltalake(uri, targets_table(), storage_options=storage.delta_options(uri))
    inputs = config.inputs.model_copy(update={"targets_uri": uri})
    troubles = ["the answer was 403 Forbidden", "the answer was 403 Forbidden"]

    def troubled(*words: Any, **options: Any) -> DeltaTable:
        if troubles:
            raise OSError(troubles.pop())
        return DeltaTable(*words, **options)

    monkeypatch.setattr("e2p_ray.storage.DeltaTable", troubled)
    assert scan_tables(inputs, storage)["targets"].num_rows == len(target_rows())
    assert not troubles, "it was tried again"
    troubles.append("no route to host")
    with pytest.raises(StorageError, match=f"could not open the Delta table {uri}: no route to host"):
        scan_tables(inputs, storage)


def test_string_views_are_read_as_strings(tmp_path: Path) -> None:
    """As delta-rs leaves them behind a DELETE: Arrow has no filter for them."""
    config, _ = write_train_world(tmp_path)
    storage = Storage()

    def rows() -> list[pl.DataFrame]:
        found = scan_tables(config.inputs, storage)
        users, contents = (table_of[name] for name in ("user_id", "content_id"))
        return [
            *(read_users(storage, piece, users) for piece in found["users"].pieces),
            *(read_contents(storage, piece, contents) for piece in found["contents"].pieces),
        ]

    targets = pl.DataFrame(target_rows(), orient="row")
    table_of = {"user_id": targets[:, 0], "content_id": targets[:, 1]}
    expected = rows()
    for info in (info for name in ("users", "contents") for info in scan_tables(config.inputs, storage)[name].files):
        table = storage.read_table(info.uri)
        for place, field in enumerate(table.schema):
            if pa.types.is_string(field.type):
                table = table.set_column(place, field.name, table[field.name].cast(pa.string_view()))
        storage.write_table(info.uri, table)
        assert pa.string_view() in storage.read_table(info.uri).schema.types, "the control"
    for one, other in zip(rows(), expected, strict=True):
        assert len(one)
        assert one.equals(other)


def test_a_task_that_only_folders_name_is_not_taken_for_another(tmp_path: Path) -> None:
    """With one task configured, targets without a column `task` are all of it."""
    config, _ = write_train_world(tmp_path, tasks={"headline": TASKS["headline"]})
    for name in TASKS:
        table = targets_table([row for row in target_rows() if row[2] == name], task=False)
        Storage().write_table(f"{tmp_path}/hive/task={name}/part-0.parquet", table)
    write_deltalake(str(tmp_path / "delta"), targets_table(), partition_by=["task"])
    for uri in (tmp_path / "hive", tmp_path / "delta"):
        with pytest.raises(InputError, match=r"task=headline/.*column 'task': is in the name of a folder only"):
            _targets_at(config, uri)
    one = _targets_at(config, tmp_path / "hive" / "task=headline")
    assert one.num_rows == len(target_rows()) / len(TASKS), "control: the table of one task is one"


# -- what is told of it


def _report(**changes: Any) -> TrainingReport:
    record = {
        "step": 1,
        "loss": 2.0,
        "learning_rate": 0.1,
        "gradient_norm": 1.0,
        "num_tokens": 9,
        "validation_loss": None,
    }
    count = {"training": 1, "validation": 0}
    provenance = {
        "train_id": "abc",
        "code": {"version": "0", "commit": None},
        "inputs": {"users": {"uri": "<b>users</b>"}},
        "lessons": {
            "num_used": count,
            "num_truncated": {"training": 1_234, "validation": 0},
            "num_users": count,
            "num_contents": count,
            "skipped": {"training": {"opted_out": 3}},
        }
        | {"num_contents_without_target": 2},
        "base_model_hash": "0",
        "curves": curves_said([record]),
        "seconds": 1.0,
        "hardware": {"device": "cpu"},
        "finished_at": "2026-01-01T00:00:00+00:00",
    }
    values = {"nll": None, "num_tokens": None, "user": None} | changes
    return build_report(projector_id="p", projector_uri="/p", provenance=provenance, records=[record], **values)


def test_a_report_without_held_out_targets_says_so() -> None:
    report = _report()
    assert report.gain is None
    assert "whether it personalises is not measured" in render_terminal(report)
    page = render_html(report)
    assert "Nothing was held out" in page
    assert "opted out" in page
    for text in (page, render_terminal(report)):
        assert "1,234 targets were longer than training.max_target_tokens" in text
    assert "<b>users</b>" not in page
    assert "&lt;b&gt;users&lt;/b&gt;" in page
    assert json.loads(report.to_json())["gain"] is None


def test_the_gain_is_a_ratio_of_sums_over_users() -> None:
    random = np.random.default_rng(0)
    tokens, user = random.integers(1, 9, 40), random.integers(0, 12, 40).astype(np.int32)
    right = random.uniform(1, 2, 40) * tokens
    nll = {"right": right, "shuffled": right + 0.5 * tokens, "mean": right - tokens, "none": right * 2}
    gain = _report(nll=nll, num_tokens=tokens, user=user).gain
    assert gain is not None
    assert gain.losses["right"].value == pytest.approx(right.sum() / tokens.sum())
    assert gain.gains["shuffled"] == Interval(pytest.approx(0.5), pytest.approx(0.5), pytest.approx(0.5))  # type: ignore[arg-type]
    assert gain.gains["mean"].value == pytest.approx(-1)
    assert gain.gains["none"].low < gain.gains["none"].value < gain.gains["none"].high
    assert (gain.num_targets, gain.num_users, gain.num_tokens) == (40, len(set(user.tolist())), tokens.sum())


# -- words on the terminal


def test_progress_says_what_is_left() -> None:
    progress = TrainProgress(200, 120, 20, 1.5, 1.75, num_tokens=5000, seconds_s=10.0)
    assert training_text(progress) == (
        "[############........] 120/200 steps, loss 1.500, validation 1.750, 10.0 steps/s, 500 tokens/s, 8 s left, "
        "10 s so far"
    )
    assert "starting" in training_text(TrainProgress(200, 0, 0))
    assert "start 2 of the workers" in training_text(replace(progress, num_starts=2))


def test_the_progress_line_ends_before_another_is_written() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with TrainLine(stream) as line:
        line(TrainProgress(10, 1, 0, 2.0))
        line.say("resumes at step 1")
        line(TrainProgress(10, 2, 0, 2.0))
    assert "\nresumes at step 1\n" in stream.getvalue()
    assert stream.getvalue().endswith("\n")
    assert "2/10 steps" in stream.getvalue()

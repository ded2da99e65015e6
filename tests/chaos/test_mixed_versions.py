"""Artifacts replaced during a run, wrong and rotated embedding spaces: refused, never mixed in what is published."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import DeltaTable

import e2p_ray.batch.worker
import jobs.generate
import jobs.publish
import jobs.whole_run
from e2p_ray import errors
from e2p_ray.batch import ShardWorker
from e2p_ray.commit import pending_shards, publish
from e2p_ray.config import JobConfig
from e2p_ray.engine.engine import load_engine
from e2p_ray.engine.fake import FakeEngine
from e2p_ray.engine.manifest import load_manifest
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.projector import Projector
from e2p_ray.errors import ConservationError, IncompatibleError
from e2p_ray.storage import Storage
from jobs.cli import run_job
from jobs.whole_run import generate_run
from tests import tiny_models
from tests.chaos.conservation import assert_conserved, readers_see
from tests.chaos.real_job import LLAMA, batch_here, call, opened, write_projector, write_real_job
from tests.small_job import SPACE, fake_engine, users_table, write_small_job
from tests.test_jobs import expected_keys
from tests.tiny_models import write_letters_only
from tests.update_world import serial_batch
from tests.waiting import wait_until

FILES = ("model.safetensors", "reference.safetensors", "config.json")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobConfig:
    """A real job; the fixture's model writes letters."""
    write_letters_only(monkeypatch)
    return write_real_job(tmp_path)


def write_base_model(config: JobConfig, seed: int) -> None:
    """Another base model in the same folder: the same configuration and tokenizer, other weights."""
    tiny_models.random_model(LLAMA, seed=seed).save_pretrained(config.base_model.uri, safe_serialization=True)


def replace_projector(config: JobConfig) -> None:
    write_projector(config, seed=2)


def replace_both(config: JobConfig) -> None:
    write_base_model(config, seed=2)
    write_projector(config, seed=1)


def replace_base_model_alone(config: JobConfig) -> None:
    write_base_model(config, seed=2)


def replace_space(config: JobConfig) -> None:
    write_projector(config, seed=1, space="space-2")


def _mix(config: JobConfig, *names: str) -> None:
    """These files of another projector, the others as they were: somebody is copying one over the other."""
    here, there = Path(config.projector.uri), Path(config.projector.uri + "-old")
    shutil.copytree(here, there)
    write_projector(config, seed=2)
    for name in set(FILES) - set(names):
        shutil.copy(there / name, here / name)


def new_manifest_old_weights(config: JobConfig) -> None:
    _mix(config, "config.json")


def old_manifest_new_weights(config: JobConfig) -> None:
    _mix(config, "model.safetensors", "reference.safetensors")


def old_reference_alone(config: JobConfig) -> None:
    _mix(config, "config.json", "model.safetensors")


@pytest.mark.parametrize(
    ("swap", "said"),
    [
        (replace_projector, "opened with projector_id"),
        (replace_both, "opened with projector_id"),
        (replace_space, "opened with projector_id"),
        (replace_base_model_alone, "was trained for base model"),
        (new_manifest_old_weights, "not the file that config.json names"),
        (old_manifest_new_weights, "not the file that config.json names"),
        (old_reference_alone, "not the file that config.json names"),
    ],
)
def test_a_worker_that_loads_another_artifact_refuses(
    swap: Callable[[JobConfig], None], said: str, config: JobConfig
) -> None:
    """The first worker has the old one in memory and goes on; what is published is of the old one alone."""
    storage, run = opened(config)
    first = ShardWorker(config, storage, run, None)
    assert not call(first, run.shard_ids[0]).error_type
    swap(config)
    second = ShardWorker(config, storage, run, None)
    outcome = call(second, run.shard_ids[1])
    assert (outcome.error_type, outcome.fatal) == ("IncompatibleError", True)
    assert said in outcome.message
    assert pending_shards(storage, run) == list(run.shard_ids[1:])
    for shard_id in run.shard_ids[1:]:
        assert not call(first, shard_id).error_type
    publish(storage, run, config.gates, config.inputs.users_uri)
    assert_conserved(config, expected_keys(20))
    rows = DeltaTable(config.output.table_uri).to_pyarrow_table()
    for name in ("projector_id", "base_model_id", "embedding_space"):
        assert set(rows[name].to_pylist()) == {getattr(run, name)}


def test_control_rows_of_another_projector_are_not_published(
    config: JobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that does not look is found out at publish."""
    monkeypatch.setattr(e2p_ray.batch.worker, "refuse_other_artifacts", lambda *_: None)
    storage, run = opened(config)
    worker = ShardWorker(config, storage, run, None)
    for shard_id in run.shard_ids[1:]:
        assert not call(worker, shard_id).error_type
    replace_projector(config)
    assert not call(ShardWorker(config, storage, run, None), run.shard_ids[0]).error_type
    with pytest.raises(ConservationError, match=rf"{run.shard_ids[0]} \(has rows of another projector_id\)"):
        publish(storage, run, config.gates, config.inputs.users_uri)
    assert readers_see(config) is None


@pytest.mark.parametrize("what", ["projector", "base model"])
def test_replaced_while_it_is_being_loaded(what: str, config: JobConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(config.storage)
    load_engine(config, storage)  # the control
    if what == "projector":
        plain = Projector.from_pretrained

        def late(storage: Storage, uri: str) -> Projector:
            replace_projector(config)
            return plain(storage, uri)

        monkeypatch.setattr(Projector, "from_pretrained", late)
    else:
        load = BaseModel.load

        def later(*arguments: Any) -> BaseModel:
            write_base_model(config, seed=2)
            return load(*arguments)

        monkeypatch.setattr(BaseModel, "load", later)
    with pytest.raises(IncompatibleError, match="replaced while it was being loaded"):
        load_engine(config, storage)


def test_the_command_after_a_replacement_makes_a_run_of_its_own(
    config: JobConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replaced between plan and load: exit code 3, the old version stays; again: everything by the new one."""
    monkeypatch.setattr(jobs.whole_run, "run_batch", batch_here)
    generate_run(config)
    old = readers_see(config)
    replace_projector(config)

    def swapped(config: JobConfig, *arguments: Any, **_: Any) -> Any:
        write_projector(config, seed=3)
        storage, run = arguments
        outcome = call(ShardWorker(config, storage, run, None), run.shard_ids[0])
        raise getattr(errors, outcome.error_type)(outcome.message)

    monkeypatch.setattr(jobs.whole_run, "run_batch", swapped)
    assert run_job(jobs.generate.JOB, ["--config", str(tmp_path / "job.yaml")]) == 3
    assert readers_see(config) == old
    monkeypatch.setattr(jobs.whole_run, "run_batch", batch_here)
    generate_run(config)
    assert_conserved(config, expected_keys(20))
    manifest, _ = load_manifest(config, Storage(config.storage))
    rows = DeltaTable(config.output.table_uri).to_pyarrow_table()
    assert set(rows["projector_id"].to_pylist()) == {manifest.projector_id}


class Replacing:
    """An engine factory before whose second call somebody replaces the projector's manifest.

    The first waits for it: a worker alone would have all shards done before another one is there.
    """

    def __init__(self, folder: Path) -> None:
        self._first, self._loaded, self._replaced = (folder / name for name in ("first", "loaded", "replaced"))

    def __call__(self, config: JobConfig, storage: Storage) -> FakeEngine:
        try:
            self._first.touch(exist_ok=False)
        except FileExistsError:
            wait_until(self._loaded.exists, "the first worker has loaded")
            manifest, _ = load_manifest(config, storage)
            other = replace(manifest, trained={"name": "another"}).with_files({})
            storage.write_bytes(f"{config.projector.uri}/config.json", other.to_json().encode())
            self._replaced.touch()
            return fake_engine(config, storage)
        engine = fake_engine(config, storage)
        self._loaded.touch()
        wait_until(self._replaced.exists, "the projector is replaced")
        return engine


def test_replaced_between_the_loads_of_two_workers(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = {"num_cpus": 1, "min_size": 2, "max_size": 2}
    config, _ = write_small_job(tmp_path, num_users=20, plan={"requests_per_shard": 10}, workers=workers)
    with pytest.raises(IncompatibleError, match=r"opened with projector_id .* replaced meanwhile"):
        generate_run(config, engine_factory=Replacing(tmp_path))
    assert readers_see(config) is None
    monkeypatch.setattr(jobs.whole_run, "run_batch", serial_batch)
    generate_run(config, engine_factory=fake_engine)
    assert_conserved(config, expected_keys(20))


# -- embedding spaces


def with_space(users: pa.Table, space: str, every: int) -> pa.Table:
    """Another fit of as many dimensions for every so many users."""
    spaces = [space if n % every == 0 else old for n, old in enumerate(users["embedding_space"].to_pylist())]
    return users.set_column(users.column_names.index("embedding_space"), "embedding_space", pa.array(spaces))


def test_a_rotated_space_is_refused_and_the_old_version_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jobs.whole_run, "run_batch", serial_batch)
    config, path = write_small_job(tmp_path, num_users=20)
    generate_run(config, engine_factory=fake_engine)
    old = readers_see(config)
    storage, users = Storage(config.storage), users_table(20)
    storage.write_table(config.inputs.users_uri, with_space(users, "space-2", every=1))
    for words in ([], ["--full"]):
        assert run_job(jobs.generate.JOB, ["--config", str(path), *words]) == 3
        assert "'space-2'" in capsys.readouterr().err
        assert readers_see(config) == old
    storage.write_table(config.inputs.users_uri, users)
    report = generate_run(config, engine_factory=fake_engine)
    assert report.version is not None
    assert report.version.already_published


def test_users_of_a_rotated_space_get_no_text_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.whole_run, "run_batch", serial_batch)
    config, _ = write_small_job(tmp_path, num_users=20)
    generate_run(config, engine_factory=fake_engine)
    users = with_space(users_table(20), "space-2", every=4)
    rotated = set(users.filter(pc.equal(users["embedding_space"], "space-2"))["user_id"].to_pylist())
    Storage(config.storage).write_table(config.inputs.users_uri, users)
    generate_run(config, engine_factory=fake_engine)
    assert_conserved(config, expected_keys(20))
    rows = DeltaTable(config.output.table_uri).to_pyarrow_table().to_pylist()
    assert {row["embedding_space"] for row in rows} == {SPACE}, "of the projector that wrote them"
    found = Counter((row["personalized"], row["reason"]) for row in rows if row["user_id"] in rotated)
    assert set(found) == {(False, "embedding_other_space"), (False, "opted_out")}
    others = [row for row in rows if row["user_id"] not in rotated]
    assert any(row["personalized"] for row in others), "the control"


def test_a_space_that_changes_between_plan_and_publish_is_the_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts are of the user embeddings that were planned; the next run sees the other space, and refuses it."""
    monkeypatch.setattr(jobs.whole_run, "run_batch", serial_batch)
    config, path = write_small_job(tmp_path, num_users=20)
    report = generate_run(config, engine_factory=fake_engine, publish_it=False)
    storage = Storage(config.storage)
    storage.write_table(config.inputs.users_uri, with_space(users_table(20), "space-2", every=1))
    assert run_job(jobs.publish.JOB, ["--config", str(path), "--run", report.run_id]) == 0
    seen = assert_conserved(config, expected_keys(20)).seen
    assert seen.run_id == report.run_id
    assert run_job(jobs.generate.JOB, ["--config", str(path)]) == 3
    assert readers_see(config) == seen

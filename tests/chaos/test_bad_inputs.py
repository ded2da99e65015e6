"""Damaged, drifting and vanishing files: the error names the file, nothing is published, the old table stays."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jobs.generate
import jobs.publish
import jobs.whole_run
from e2p_ray.batch import ShardWorker
from e2p_ray.commit import load_run, pending_shards
from e2p_ray.config import JobConfig
from e2p_ray.storage import ObjectInfo, Storage, parquet_bytes
from jobs.cli import run_job
from jobs.whole_run import generate_run
from tests.chaos.conservation import Seen, assert_conserved, readers_see
from tests.chaos.real_job import call
from tests.s3 import IS_LONG
from tests.small_job import candidates_table, contents_table, fake_engine, users_table, write_small_job
from tests.test_jobs import expected_keys
from tests.update_world import serial_batch

TABLES: dict[str, Callable[[], pa.Table]] = {
    "users": lambda: users_table(20),
    "contents": lambda: contents_table(6),
    "candidates": lambda: candidates_table(20, 6, 3),
}
TYPED = {"users": "personalize", "contents": "title", "candidates": "user_id"}  # columns that drift


def _generate(config: JobConfig, _: argparse.Namespace) -> None:
    generate_run(config, engine_factory=fake_engine)


JOB = replace(jobs.generate.JOB, call=_generate)


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.whole_run, "run_batch", serial_batch)


def flip_a_page(path: Path) -> None:
    """One bit, in the middle of the first column's pages."""
    data = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 0x10
    path.write_bytes(data)


def flip_the_footer(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-8:-4] = bytes(4)  # its length
    path.write_bytes(data)


def cut_the_footer(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def keep_half(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def be_text(path: Path) -> None:
    path.write_text("user_id,content_id\n", encoding="utf-8")


def drift_in_type(path: Path) -> None:
    table, name = pq.read_table(path), TYPED[path.parent.name]
    table = table.set_column(table.column_names.index(name), name, pa.array(range(table.num_rows), pa.int64()))
    path.write_bytes(parquet_bytes(table))


def lose_a_column(path: Path) -> None:
    path.write_bytes(parquet_bytes(pq.read_table(path).drop_columns(TYPED[path.parent.name])))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "one flipped bit": flip_a_page,
    "wrong footer": flip_the_footer,
    "no footer": cut_the_footer,
    "half a file": keep_half,
    "nothing": empty,
    "text": be_text,
    "another type": drift_in_type,
    "a column less": lose_a_column,
}
FEW = {"users": list(DAMAGES), "contents": ["one flipped bit", "another type"], "candidates": ["one flipped bit"]}
CASES = [(table, what) for table in TABLES for what in DAMAGES if IS_LONG or what in FEW[table]]


def write_job(folder: Path) -> tuple[JobConfig, Path]:
    """A job whose tables are folders of three files each."""
    inputs = {f"{name}_uri": f"{folder}/tables/{name}" for name in TABLES}
    config, path = write_small_job(folder, inputs=inputs, num_users=20)
    for name in TABLES:
        Path(inputs[f"{name}_uri"]).unlink()
    write_tables(config)
    return config, path


def write_tables(config: JobConfig) -> None:
    for name, make in TABLES.items():
        table = make()
        third = -(-table.num_rows // 3)
        for number in range(3):
            part = parquet_bytes(table.slice(number * third, third))
            Storage().write_bytes(f"{getattr(config.inputs, f'{name}_uri')}/part-{number}.parquet", part)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[JobConfig, Path, Seen]:
    """A job whose table is published; nothing that is damaged later may change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs.whole_run, "run_batch", serial_batch)
        config, path = write_job(tmp_path_factory.mktemp("shown"))
        generate_run(config, engine_factory=fake_engine)
    return config, path, assert_conserved(config, expected_keys(20)).seen


def assert_refused(config: JobConfig, path: Path, victim: Path, old: Seen | None, capsys: Any) -> str:
    """Exit code 3, the file is named, readers see what they saw."""
    assert run_job(JOB, ["--config", str(path)]) == 3
    said = str(capsys.readouterr().err)
    assert str(victim) in said
    assert "Traceback" not in said
    assert readers_see(config) == old
    return said


@pytest.mark.parametrize(("table", "what"), CASES)
def test_a_damaged_file_is_named_and_nothing_is_published(
    table: str, what: str, shown: tuple[JobConfig, Path, Seen], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, path, old = shown
    write_tables(config)
    victim = Path(getattr(config.inputs, f"{table}_uri"), "part-1.parquet")
    DAMAGES[what](victim)
    said = assert_refused(config, path, victim, old, capsys)
    if what in ("another type", "a column less"):
        assert f"column '{TYPED[table]}'" in said
    first, first_path = write_job(tmp_path)  # the same where nothing is published yet
    victim = Path(getattr(first.inputs, f"{table}_uri"), "part-1.parquet")
    DAMAGES[what](victim)
    assert_refused(first, first_path, victim, None, capsys)
    assert not list(Storage().list_objects(f"{first.output.uri}/runs"))


def test_control_a_further_column_and_other_files_are_no_damage(
    shown: tuple[JobConfig, Path, Seen], tmp_path: Path
) -> None:
    config, _ = write_job(tmp_path)
    part = Path(config.inputs.users_uri, "part-1.parquet")
    table = pq.read_table(part)
    part.write_bytes(parquet_bytes(table.append_column("shoe_size", pa.array([42.0] * table.num_rows))))
    Path(config.inputs.users_uri, "_SUCCESS").touch()
    generate_run(config, engine_factory=fake_engine)
    assert assert_conserved(config, expected_keys(20)).seen.texts == shown[2].texts


@pytest.mark.parametrize("table", TABLES)
def test_a_file_that_vanishes_after_it_was_listed_is_named(
    table: str,
    shown: tuple[JobConfig, Path, Seen],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, path, old = shown
    write_tables(config)
    victim = Path(getattr(config.inputs, f"{table}_uri"), "part-1.parquet")
    plain = Storage.parquet_files

    def then_gone(self: Storage, uri: str) -> list[ObjectInfo]:
        found = plain(self, uri)
        if table in uri:
            victim.unlink()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "parquet_files", then_gone)
        assert "gone since it was listed" in assert_refused(config, path, victim, old, capsys)


def damaged(path: Path) -> Iterator[str]:
    """Each way to damage a file, done; the file is as it was in between."""
    data = path.read_bytes()
    for name, damage in DAMAGES.items():
        if name not in ("another type", "a column less"):
            damage(path)
            yield name
            path.write_bytes(data)


def test_a_users_table_that_is_damaged_before_publishing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it nobody knows who opted out."""
    config, path = write_job(tmp_path)
    generate_run(config, engine_factory=fake_engine, publish_it=False)
    victim = Path(config.inputs.users_uri, "part-2.parquet")
    for _ in damaged(victim):
        assert run_job(jobs.publish.JOB, ["--config", str(path)]) == 3
        assert str(victim) in capsys.readouterr().err
        assert readers_see(config) is None
    assert run_job(jobs.publish.JOB, ["--config", str(path)]) == 0
    assert_conserved(config, expected_keys(20))


def test_a_damaged_shard_of_the_plan_fails_alone(tmp_path: Path) -> None:
    """Its error names the file; the other shards go on, and nothing is published without it."""
    config, path = write_job(tmp_path)
    report = generate_run(config, engine_factory=fake_engine, publish_it=False)
    storage, run = Storage(), load_run(Storage(), config.output.uri, report.run_id)
    bad = run.shard_ids[0]
    for shard_id in run.shard_ids:
        storage.delete(run.marker_uri(shard_id))
        storage.delete(run.data_uri(shard_id))
    worker = ShardWorker(config, storage, run, fake_engine)
    for _ in damaged(Path(run.planned_uri(bad))):
        outcome = call(worker, bad)
        assert (outcome.error_type, outcome.fatal) == ("ShardError", False)
        assert run.planned_uri(bad) in outcome.message
    for shard_id in run.shard_ids[1:]:
        assert not call(worker, shard_id).error_type
    assert pending_shards(storage, run) == [bad]
    assert run_job(jobs.publish.JOB, ["--config", str(path), "--run", run.run_id]) == 5
    assert readers_see(config) is None
    assert not call(worker, bad).error_type
    assert run_job(jobs.publish.JOB, ["--config", str(path), "--run", run.run_id]) == 0
    assert_conserved(config, expected_keys(20))


def test_an_update_from_a_damaged_version_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The published file that rows would be carried over from is damaged: it is named, and no version follows."""
    config, path = write_job(tmp_path)
    report = generate_run(config, engine_factory=fake_engine)
    victim = sorted(Path(config.output.table_uri, "data", report.run_id).iterdir())[0]
    users = Path(config.inputs.users_uri, "part-0.parquet")
    table = pq.read_table(users)
    users.write_bytes(parquet_bytes(table.slice(1)))  # something changed, so there is an update to be made
    data = victim.read_bytes()
    flip_a_page(victim)
    assert run_job(JOB, ["--config", str(path)]) == 3
    assert str(victim) in capsys.readouterr().err
    victim.write_bytes(data)
    seen = readers_see(config)
    assert seen is not None
    assert seen.version == 0

"""jobs.backfill and limited jobs.generate as people call them: on Ray, and on a real S3 server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import jobs.whole_run
from e2p_ray.batch import run_batch
from e2p_ray.config import JobConfig
from e2p_ray.engine.manifest import ProjectorManifest, read_manifest
from e2p_ray.storage import Storage
from e2p_ray.update import Limits
from jobs import backfill, generate
from jobs.cli import run_job
from jobs.whole_run import generate_run
from tests.s3 import S3Server
from tests.small_job import fake_engine
from tests.update_world import World, make_world, serial_batch


def other_projector(config: JobConfig, uri: str) -> ProjectorManifest:
    """The configured projector, trained otherwise, at another place."""
    storage = Storage(config.storage)
    manifest = replace(read_manifest(storage, config.projector.uri), trained={"run": "later"}).with_files({})
    storage.write_bytes(f"{uri}/config.json", manifest.to_json().encode())
    return manifest


def with_fake_engine(monkeypatch: pytest.MonkeyPatch, batch: Any = run_batch, **options: Any) -> None:
    """The jobs' own entry points with the fake engine in the workers, on real Ray unless `batch` is another."""

    def run(*arguments: Any, **named: Any) -> Any:
        return batch(*arguments, **named | {"engine_factory": fake_engine} | options)

    monkeypatch.setattr(jobs.whole_run, "run_batch", run)


def test_backfill_on_a_real_s3_server(
    s3_server: S3Server,
    tmp_path: Path,
    ray_cluster: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = make_world(tmp_path, monkeypatch, place=s3_server.new_bucket(), storage=s3_server.config)
    with_fake_engine(monkeypatch)
    world.write()
    job_file = ["--config", str(tmp_path / "job.yaml")]
    assert run_job(generate.JOB, job_file) == 0
    before = world.rows()
    uri = f"{world.config.output.uri}/projector-2"
    manifest = other_projector(world.config, uri)
    capsys.readouterr()
    assert run_job(backfill.JOB, [*job_file, "--projector", uri]) == 0
    shown = capsys.readouterr()
    after = world.rows()
    assert set(after) == set(before) == set(world.wanted())
    assert {row["projector_id"] for row in after.values()} == {manifest.projector_id}
    assert all(after[key]["text"] == row["text"] for key, row in before.items())
    num_texts = len(before)
    assert f"update: {num_texts} rows written, 0 carried over, 0 removed, 0 deferred" in shown.out
    assert f"causes: projector_changed {num_texts}" in shown.out
    assert f"drafts: 0 texts changed, {num_texts} are the same; 100.0% of" in shown.out
    assert f"set projector.uri to {uri}" in shown.err
    assert run_job(backfill.JOB, [*job_file, "--projector", uri]) == 0
    assert "nothing to do: version 1" in capsys.readouterr().err
    pages = [i.uri for i in world.storage.list_objects(world.config.output.uri) if i.uri.endswith("report.html")]
    changed = ["What changed" in world.storage.read_bytes(uri).decode() for uri in pages]
    assert sorted(changed) == [False, True]  # the first run changed nothing, it had nothing before it


def test_limited_generation_on_ray_goes_on_where_it_stopped(
    tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(tmp_path, monkeypatch)
    with_fake_engine(monkeypatch)
    world.write()
    command = ["--config", str(tmp_path / "job.yaml")]
    limited = [*command, "--max-requests", "50", "--max-seconds", "0.000001", "--priority", "score"]
    gates = ["--gates.max_dead_letter_share", "0"]
    assert run_job(generate.JOB, [*limited, *gates]) == 0
    shown = capsys.readouterr()
    assert "the time is over" in shown.err
    assert "Run the same command again" in shown.out
    first = world.rows()
    assert 0 < len(first) < len(world.wanted())
    assert run_job(generate.JOB, [*limited, *gates]) == 0
    assert first.items() < world.rows().items()
    assert run_job(generate.JOB, [*command, *gates]) == 0
    assert set(world.rows()) == set(world.wanted())
    assert "deferred" not in capsys.readouterr().out.splitlines()[-1]
    assert run_job(generate.JOB, [*command, "--full", "--max-requests", "3"]) == 2
    assert run_job(generate.JOB, [*command, "--priority", "score"]) == 2
    assert run_job(generate.JOB, [*command, "--max-requests", "0"]) == 2


def test_shards_that_failed_are_trouble_even_under_a_limit(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_world(tmp_path, monkeypatch)

    def broken(config: JobConfig, storage: Storage) -> Any:
        engine = fake_engine(config, storage)

        def generate(groups: Any) -> Any:
            raise OSError("the disk is full")

        engine.generate = generate  # type: ignore[method-assign]
        return engine

    with_fake_engine(monkeypatch, engine_factory=broken)
    world.write()
    command = ["--config", str(tmp_path / "job.yaml"), "--max-seconds", "0.000001"]
    assert run_job(generate.JOB, command) == 5
    said = capsys.readouterr().err
    assert "the disk is full" in said
    assert "not begun, as the time was over" in said
    assert "died" not in said
    with_fake_engine(monkeypatch)
    assert run_job(generate.JOB, command) == 0


def test_without_a_new_projector_nothing_is_to_be_done(world: World) -> None:
    world.run()
    report = generate_run(world.config, limits=Limits(max_requests=1), action="backfill")
    assert report.version is not None
    assert report.version.already_published


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Not run yet, and without Ray."""
    return make_world(tmp_path, monkeypatch)


def test_options_of_generate_and_backfill_reach_the_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with_fake_engine(monkeypatch, serial_batch)
    world.write()
    job_file = ["--config", str(world.folder / "job.yaml")]
    assert run_job(generate.JOB, [*job_file, "--no-publish"]) == 0
    assert not Path(world.config.output.table_uri, "_delta_log").exists()
    assert run_job(generate.JOB, job_file) == 0
    before = world.rows()
    assert set(before) == set(world.wanted())
    uri = f"{world.config.output.uri}/projector-2"
    manifest = other_projector(world.config, uri)
    limited = [*job_file, "--projector", f"{uri}/", "--max-requests", "4", "--priority", "rank"]
    assert run_job(backfill.JOB, [*limited, "--no-publish"]) == 0
    assert world.rows() == before
    assert run_job(backfill.JOB, limited) == 0
    after = world.rows()
    written = {key for key, row in after.items() if row["projector_id"] == manifest.projector_id}
    assert len(written) == 4
    assert {key: row for key, row in after.items() if key not in written} == {
        key: row for key, row in before.items() if key not in written
    }
    others = [world.candidates[key[:2]] for key in before if key not in written]
    assert min(world.candidates[key[:2]] for key in written) >= max(others)
    assert run_job(generate.JOB, [*job_file, "--full"]) == 0
    assert len({row["run_id"] for row in world.rows().values()}) == 1


@pytest.mark.parametrize("uri", ["", " "])
def test_an_empty_projector_is_a_wrong_option(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(tmp_path, monkeypatch)
    assert run_job(backfill.JOB, ["--config", str(world.folder / "job.yaml"), "--projector", uri]) == 2
    assert "--projector: give the URI of a projector" in capsys.readouterr().err


def test_a_projector_at_a_place_that_is_none_is_a_wrong_option(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_job(backfill.JOB, ["--config", str(world.folder / "job.yaml"), "--projector", "gs://bucket/p"]) == 2
    assert "--projector 'gs://bucket/p': " in capsys.readouterr().err

"""The list of versions: compared with what was done, one after the other, and with what lies in the table's folder."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from deltalake import DeltaTable

import jobs.history
import jobs.rollback
from e2p_ray.commit.history import read_history
from e2p_ray.commit.rollback import rollback
from jobs.cli import run_job
from tests.s3 import place_on
from tests.test_commit import opened
from tests.update_world import make_world


def test_versions_and_what_made_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world, began = make_world(tmp_path, monkeypatch), datetime.now(UTC).replace(microsecond=0)
    first = world.run()
    world.projector = "projector-2"
    second = world.run()
    world.users["user-003"] = replace(world.users["user-003"], personalize=False)
    third = world.run()
    job_file = ["--config", str(tmp_path / "job.yaml")]
    assert run_job(jobs.rollback.JOB, [*job_file, "--version", "1"]) == 0
    world.table().optimize.compact()
    world.table().delete("user_id = 'user-004'")
    storage, table_uri = world.storage, world.config.output.table_uri
    found = read_history(storage, table_uri, 50)
    assert [(v.version, v.made_by, v.run_id) for v in found] == [
        (5, "delete", ""),  # version 4 is upkeep
        (3, "rollback to 1", second.run_id),
        (2, "generate", third.run_id),
        (1, "backfill", second.run_id),
        (0, "generate", first.run_id),
    ]
    assert [v.is_current for v in found] == [True, False, False, False, False]
    assert [v.is_published for v in found] == [False, True, True, True, True]
    assert all(v.is_readable for v in found)
    for version in found:
        rows = DeltaTable(table_uri, version.version).to_pyarrow_table()
        assert version.num_rows == rows.num_rows
        assert began <= version.committed_at <= datetime.now(UTC)
        if version.version < 3:  # later ones show rows of an older run
            assert set(rows["projector_id"].to_pylist()) == {version.projector_id}
    assert len({v.projector_id for v in found if v.run_id}) == 2
    assert [v.version for v in read_history(storage, table_uri, 2)] == [5, 3]

    gone = found[-1].run_id
    victims = sorted(storage.list_objects(f"{table_uri}/data/{gone}"))[:2]
    for info in victims:
        storage.delete(info.uri)
    after = {v.version: v for v in read_history(storage, table_uri, 50)}
    assert after[0].missing_files == tuple(info.uri[len(table_uri) + 1 :] for info in victims)
    assert {v for v, found in after.items() if not found.is_readable} == {0}
    capsys.readouterr()
    assert run_job(jobs.history.JOB, job_file) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("5 (now)")
    assert "no: 2 files gone" in lines[5]
    assert run_job(jobs.history.JOB, [*job_file, "--json", "--limit", "2"]) == 0
    (newest, before) = json.loads(capsys.readouterr().out)
    assert (newest["version"], before["made_by"], before["is_readable"]) == (5, "rollback to 1", True)
    assert {"base_model_id", "source_id", "num_deferred", "num_files", "missing_files"} <= before.keys()
    for none in ("0", "-1"):
        assert run_job(jobs.history.JOB, [*job_file, f"--limit={none}"]) == 2
        assert "--limit" in capsys.readouterr().err


def test_nothing_published(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path, monkeypatch)
    assert read_history(world.storage, world.config.output.table_uri, 50) == ()
    assert run_job(jobs.history.JOB, ["--config", str(tmp_path / "job.yaml")]) == 0
    assert "nothing is published here" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_log_that_no_longer_reaches_back(place: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Old log entries go when a checkpoint holds what they said."""
    storage, output_uri = place_on(place, request, tmp_path)
    world = opened(storage, output_uri)
    world.commit_pending()
    world.publish()
    world.with_run("run2").publish()
    rollback(storage, output_uri, world.users_uri, version=0)
    assert [v.is_readable for v in read_history(storage, world.run.table_uri, 9)] == [True] * 3
    world.delta().create_checkpoint()
    storage.delete(f"{world.run.table_uri}/_delta_log/{0:020d}.json")
    found = read_history(storage, world.run.table_uri, 9)
    assert [(v.version, v.is_readable, v.num_files) for v in found] == [(2, True, 4), (1, False, None)]

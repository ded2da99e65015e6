"""A run's progress from its objects: before, in the middle, after; figures counted here, from rows and known times."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from e2p_ray.commit import commit_shard, load_run, pending_shards
from e2p_ray.commit.failures import ShardFailure, failures_uri, forget_failures, write_failure
from e2p_ray.commit.progress import run_progress
from e2p_ray.storage import ObjectInfo, Storage
from e2p_ray.update import Limits
from jobs.status import main
from tests.s3 import PLACES, place_on
from tests.test_commit import NOW, STATS, World, opened
from tests.update_world import make_world


@pytest.fixture(params=PLACES)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    """Four shards of 18 requests, none done, and a manifest as a plan ends with."""
    made = opened(*place_on(request.param, request, tmp_path))
    manifest = {"shards": [[shard_id, 18, 3, 1000, 7] for shard_id in made.run.shard_ids]}
    made.storage.write_bytes(f"{made.run.plan_uri}/manifest.json", json.dumps(manifest).encode())
    return made


def commit(world: World, shard_id: str, start_s: float, stop_s: float, **changes: Any) -> None:
    moments: dict[str, Any] = {
        "started_at": NOW + timedelta(seconds=start_s),
        "finished_at": NOW + timedelta(seconds=stop_s),
    }
    commit_shard(world.storage, world.run, shard_id, *world.results(shard_id), replace(STATS, **moments, **changes))


@pytest.mark.parametrize("world", ["local", "s3"], indirect=True)
def test_progress_at_every_stage(world: World) -> None:
    storage, run = world.storage, world.run
    none = run_progress(storage, run)
    assert (none.num_done, none.num_pending_requests, none.rows_per_s, none.left_s) == (0, 72, None, None)
    assert none.plan_error_codes == {"null_key": 2, "unknown_user": 1}
    commit(world, "shard0", 0, 6)
    commit(world, "shard1", 4, 10, worker="host:2")  # at the same time: ten seconds in all
    some = run_progress(storage, run, NOW + timedelta(seconds=25))
    assert [shard.shard_id for shard in some.pending] == ["shard2", "shard3"]
    assert (some.num_done, some.num_requests, some.num_pending_requests) == (2, 36, 36)
    assert (some.generating_s, some.rows_per_s, some.left_s, some.idle_s) == (10.0, 3.6, 10.0, 15.0)
    assert some.num_workers == 2
    rows = [row for shard_id in ("shard0", "shard1") for row in world.results(shard_id)[0]]
    assert some.statuses == Counter(str(row.status) for row in rows)
    assert some.reasons == Counter(str(row.reason) for row in rows if row.reason)
    assert some.error_codes == {"non_finite_logits": 2}
    commit(world, "shard2", 3600, 3604)  # resumed an hour later: the pause is no work
    resumed = run_progress(storage, run)
    assert (resumed.generating_s, resumed.num_pending_requests) == (14.0, 18)
    commit(world, "shard3", 3604, 3606, num_carried=10, num_deferred=5)
    done = run_progress(storage, run)
    assert (done.pending, done.left_s, done.num_generated) == ((), 0.0, 54 + 3)
    assert (done.versions, done.is_current) == ((), False)
    world.publish()
    assert (run_progress(storage, run).versions, run_progress(storage, run).is_current) == ((0,), True)
    world.with_run("run2").publish()
    assert (run_progress(storage, run).versions, run_progress(storage, run).is_current) == ((0,), False)


def test_what_is_known_of_pending_shards(world: World) -> None:
    world.commit("shard0")
    world.storage.delete(world.run.marker_uri("shard0"))  # as after a kill between data and marker
    world.storage.delete(world.run.planned_uri("shard2"))
    found = {
        s.shard_id: (s.num_requests, s.has_data, s.is_planned) for s in run_progress(world.storage, world.run).pending
    }
    assert found == {
        "shard0": (18, True, True),
        "shard1": (18, False, True),
        "shard2": (18, False, False),
        "shard3": (18, False, True),
    }
    world.storage.write_bytes(f"{world.run.uri}/pieces/shard1/000000-000009.parquet", b"")
    assert [s.num_pieces for s in run_progress(world.storage, world.run).pending] == [0, 1, 0, 0]
    world.storage.delete(f"{world.run.plan_uri}/manifest.json")
    commit(world, "shard0", 0, 6)
    without = run_progress(world.storage, world.run)
    assert (without.num_pending_requests, without.left_s) == (None, None)


def test_why_shards_failed_is_shown_until_they_are_done(world: World) -> None:
    storage, run = world.storage, world.run
    first = ShardFailure("shard1", 1, "StorageError", "s3 is away", NOW, "host:1")
    last = replace(first, attempt=2, error_type="WorkerDied", message="no word " * 999, worker="")
    write_failure(storage, run, first)
    write_failure(storage, run, replace(first, shard_id="shard0"))
    write_failure(storage, run, last)
    found = {shard.shard_id: shard.failure for shard in run_progress(storage, run).pending}
    assert found["shard0"] == replace(first, shard_id="shard0")
    assert (found["shard2"], found["shard3"]) == (None, None)
    kept = found["shard1"]
    assert kept is not None
    assert replace(kept, message=last.message) == last, "the last one counts"
    assert 2000 < len(kept.message) < 2010
    assert run_progress(storage, run).num_failed == 2
    world.commit("shard0")
    assert [shard.failure for shard in run_progress(storage, run).pending] == [kept, None, None]
    forget_failures(storage, run, ["shard1"])
    assert [info.name for info in storage.list_objects(failures_uri(run))] == ["shard1.json"]


def test_a_failure_that_is_forgotten_meanwhile_is_none(world: World) -> None:
    """By the job that has just committed the shard, between listing and reading."""
    for shard_id in ("shard0", "shard1"):
        write_failure(world.storage, world.run, ShardFailure(shard_id, 1, "StorageError", "s3 is away", NOW, "host:1"))

    class Late(Storage):
        def list_objects(self, uri: str) -> Iterator[ObjectInfo]:
            found = list(super().list_objects(uri))
            if uri == failures_uri(world.run):
                forget_failures(world.storage, world.run, ["shard1"])
            return iter(found)

    assert run_progress(world.storage, world.run).num_failed == 2, "control"
    found = run_progress(Late(world.storage.config), world.run)
    assert [shard.shard_id for shard in found.pending if shard.failure] == ["shard1"]


def test_failed_shards_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    world = make_world(tmp_path, monkeypatch)
    report = world.run(publish_it=False)
    run = load_run(world.storage, world.config.output.uri, report.run_id)
    for shard_id in run.shard_ids:
        world.storage.delete(run.marker_uri(shard_id))
    bad = run.shard_ids[-1]
    write_failure(world.storage, run, ShardFailure(bad, 2, "ValueError", "no such token", NOW, "host:7"))
    monkeypatch.setattr("jobs.status._MAX_NAMED", 1)
    words = [report.run_id, "--config", str(tmp_path / "job.yaml")]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert f"{len(run.shard_ids)} pending, 1 of these failed" in shown
    why = "failed at 2026-01-02 03:04:05 UTC, attempt 2 on host:7: ValueError: no such token"
    assert [why in line for line in shown.splitlines() if bad in line] == [True]
    assert run.shard_ids[0] not in shown
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_failed"] == 1
    assert found["pending"][-1]["failure"]["message"] == "no such token"
    assert found["pending"][0]["failure"] is None


def test_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    world = make_world(tmp_path, monkeypatch)
    job_file = ["--config", str(tmp_path / "job.yaml")]
    assert main(job_file) == 2
    assert "there is no run" in capsys.readouterr().err
    report = world.run(publish_it=False)
    run = load_run(world.storage, world.config.output.uri, report.run_id)
    for shard_id in run.shard_ids[:3]:
        world.storage.delete(run.marker_uri(shard_id))
    assert main([report.run_id, *job_file]) == 0
    shown = capsys.readouterr().out
    assert f"{len(run.shard_ids) - 3} of {len(run.shard_ids)} done, 3 pending" in shown
    assert all(shard_id in shown for shard_id in run.shard_ids[:3])
    assert shown.count("its writer stopped before the marker") == 3
    assert main([*job_file, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["run_id"] == report.run_id
    assert [shard["shard_id"] for shard in found["pending"]] == pending_shards(world.storage, run)
    assert found["num_requests"] + found["num_pending_requests"] == len(world.wanted())
    assert found["left_s"] > 0
    report = world.run()
    assert main([report.run_id, *job_file]) == 0
    shown = capsys.readouterr().out
    assert "as version 0" in shown
    assert "pending shard" not in shown
    assert main(["nope", *job_file]) == 2
    assert "there is no such run" in capsys.readouterr().err
    assert main(["", *job_file]) == main(["--run", "", *job_file]) == 2, "not another run than was asked for"
    assert "'' is not an id" in capsys.readouterr().err


def test_carried_and_deferred_rows_are_no_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path, monkeypatch)
    world.run()
    world.projector = "projector-2"
    report = world.run(Limits(max_requests=9))
    progress = run_progress(world.storage, load_run(world.storage, world.config.output.uri, report.run_id))
    assert progress.num_generated == 9
    assert progress.num_requests == len(world.wanted())


def test_the_operators_jobs_load_neither_ray_nor_torch() -> None:
    import subprocess
    import sys

    names = ", ".join(f"jobs.{name}" for name in ("history", "rollback", "status", "vacuum"))
    code = f"import sys, {names}; print(sorted({{'ray', 'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""Vacuum: exactly what nobody needs goes, by name, compared with a list that the test keeps itself."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from deltalake import DeltaTable

import e2p_ray.commit.vacuum as vacuum_module
import jobs.vacuum
from e2p_ray.commit import open_run
from e2p_ray.commit.rollback import rollback
from e2p_ray.commit.vacuum import OrphanKind, vacuum
from e2p_ray.errors import IncompatibleError, PublishConflictError
from e2p_ray.storage import Storage
from e2p_ray.update import Limits
from jobs.cli import run_job
from tests.s3 import place_on
from tests.test_commit import World, opened, run_at, users_table, write_plan
from tests.update_world import make_world

HOUR_S = 3600.0
OLD_S, LIMIT_S = 100 * HOUR_S, 50 * HOUR_S


def run_of(world: World, name: str, plan: str | None = None) -> World:
    """Another run, with a plan of its own if it is named; nothing is committed."""
    run = run_at(world.output_uri, name)
    made = replace(world, run=replace(run, plan_uri=f"{world.output_uri}/{plan}") if plan else run)
    if plan:
        write_plan(made)
        finish_plan(made)
    open_run(world.storage, made.run, {})
    return made


def finish_plan(world: World) -> None:
    manifest = {"shards": [[shard_id, 18, 3, 1000, 7] for shard_id in world.run.shard_ids]}
    world.storage.write_bytes(f"{world.run.plan_uri}/manifest.json", json.dumps(manifest).encode())


def age(world: World, uri: str, seconds: float = OLD_S) -> None:
    """All objects below, or one: as if they had been written then."""
    moment = time.time() - seconds
    for path in [*Path(uri).rglob("*"), Path(uri)]:
        os.utime(path, (moment, moment))


def age_commits(world: World, seconds: float) -> None:
    """All commits so far, as if they had been made then."""
    for path in Path(world.run.table_uri, "_delta_log").glob("*.json"):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for line in lines:
            if "commitInfo" in line:
                line["commitInfo"]["timestamp"] -= int(seconds * 1000)
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def objects(world: World) -> set[str]:
    """Everything below the output, temporary files as well."""
    root = Path(world.output_uri)
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def below(world: World, *folders: str) -> set[str]:
    return {name for name in objects(world) if name.startswith(tuple(f"{folder}/" for folder in folders))}


def write(world: World, name: str, *, old: bool) -> str:
    uri = f"{world.output_uri}/{name}"
    world.storage.write_bytes(uri, b"stray")
    age(world, uri, OLD_S if old else 0.0)
    return name


def rows_at(world: World, version: int) -> pl.DataFrame:
    return pl.DataFrame(DeltaTable(world.run.table_uri, version).to_pyarrow_table())


def make_old_world(tmp_path: Path) -> tuple[World, set[str]]:
    """Published versions, unfinished and abandoned runs, strays; and the names of all that has to go."""
    output_uri = str(tmp_path / "out")
    first = World(Storage(), output_uri, run_at(output_uri, "expired"))
    write_plan(first)
    finish_plan(first)
    first.write_users(users_table())
    open_run(first.storage, first.run, {})
    first.commit_pending()
    first.publish()  # version 0: replaced before the limit
    second = run_of(first, "replaced", "plans/second")
    second.commit_pending()
    second.publish()  # version 1: replaced within the limit
    third = run_of(first, "shown", "plans/third")
    third.commit_pending()
    third.write_users(users_table(refusing={"u5"}))
    pending = run_of(first, "pending", "plans/pending")
    pending.commit("shard0")
    pending.commit("shard1")
    update = run_of(first, "begun", "updates/begun")
    abandoned = run_of(first, "abandoned", "updates/abandoned")
    abandoned.commit("shard0")
    complete = run_of(first, "complete", "plans/complete")
    complete.commit_pending()
    run_of(first, "newest", "plans/newest")
    first.storage.delete(f"{output_uri}/runs/newest/run.json")
    age(first, output_uri)
    age_commits(first, OLD_S)
    assert third.publish().version == 2  # now: all four files are replaced by others, for u5
    originals = {f"generations/data/shown/shard{n}.parquet" for n in range(4)}
    age(first, f"{output_uri}/plans/newest/manifest.json", OLD_S - HOUR_S)  # the plan that was finished last
    pending.commit("shard2")  # within the limit: it was resumed
    age(first, update.run.record_uri, LIMIT_S - HOUR_S)  # opened within the limit, nothing done yet
    gone = below(first, "runs/expired", "generations/data/expired", "plans/plan")
    gone |= below(first, "runs/abandoned", "generations/data/abandoned", "updates/abandoned")
    gone |= below(first, "runs/complete", "generations/data/complete", "plans/complete")
    gone |= originals
    for name in (
        "generations/data/shown/shard0-0123456789abcdef.parquet",
        "generations/part-00000-never-committed.parquet",
        "generations/data/ghost/shard0.parquet",
        "runs/pending/markers/shard9.json",
        "runs/shown/dead_letters/shard9.parquet",
        "runs/pending/pieces/shard0/000000-000009.parquet",  # the shard is committed
        "runs/pending/failures/shard0.json",
        "runs/nobody/notes.json",
        "plans/third/shards/shard9.parquet",
        "plans/unfinished/shards/shard0.parquet",
        f"generations/data/pending/.shard3.parquet.{'0' * 32}.tmp",
        f"runs/pending/markers/.shard3.json.{'0' * 32}.tmp",
        f"audit/.00000001.json.{'0' * 32}.tmp",
        f"generations/_delta_log/.{3:020d}.json.{'0' * 32}.tmp",  # of a purge
        f"generations/_delta_log/{3:020d}.json#1",  # of a commit
    ):
        gone.add(write(first, name, old=True))
    for name in (  # what must stay: young, or not ours to remove
        "generations/data/shown/shard1-0123456789abcdef.parquet",
        "generations/part-00001-never-committed.parquet",
        "generations/data/ghost2/shard0.parquet",
        "runs/shown/markers/shard9.json",
        "plans/unfinished2/shards/shard0.parquet",
        f"generations/data/pending/.shard2.parquet.{'0' * 32}.tmp",
        f"audit/.00000002.json.{'0' * 32}.tmp",
        f"generations/_delta_log/{4:020d}.json#1",
    ):
        write(first, name, old=False)
    for name in (
        "runs/notes.txt",
        "elsewhere/old.parquet",
        "generations/_change_data/x.parquet",
        "audit/00000000.json",
    ):
        write(first, name, old=True)
    write(first, "runs/pending/pieces/shard3/000000-000009.parquet", old=True)  # the next try goes on with it
    write(first, "runs/pending/failures/shard3.json", old=True)
    return third, gone


def test_exactly_what_nobody_needs_goes(tmp_path: Path) -> None:
    world, gone = make_old_world(tmp_path)
    storage, before = world.storage, objects(world)
    assert gone < before
    versions = {version: rows_at(world, version) for version in (1, 2)}
    dry = vacuum(storage, world.output_uri, max_age_s=LIMIT_S, dry_run=True)
    assert {orphan.uri[len(world.output_uri) + 1 :] for orphan in dry} == gone
    assert len(dry) == len(gone)
    assert {orphan.kind for orphan in dry} == set(OrphanKind)
    assert sum(o.size_bytes for o in dry) == sum(Path(world.output_uri, name).stat().st_size for name in gone)
    assert objects(world) == before
    assert vacuum(storage, world.output_uri, max_age_s=LIMIT_S, dry_run=False) == dry
    assert before - objects(world) == gone
    assert objects(world) <= before
    assert vacuum(storage, world.output_uri, max_age_s=LIMIT_S, dry_run=False) == ()
    for version, rows in versions.items():
        assert rows_at(world, version).equals(rows)
    with pytest.raises(FileNotFoundError):  # the control: version 0 needed what went
        rows_at(world, 0)


def test_what_is_kept_can_be_used(tmp_path: Path) -> None:
    world, _ = make_old_world(tmp_path)
    vacuum(world.storage, world.output_uri, max_age_s=LIMIT_S, dry_run=False)
    pending = replace(
        world, run=replace(run_at(world.output_uri, "pending"), plan_uri=f"{world.output_uri}/plans/pending")
    )
    pending.commit_pending()
    pending.publish()
    done = rollback(world.storage, world.output_uri, world.users_uri, version=1)  # with titles for u5
    assert (done.run_id, done.num_files_suppressed) == ("replaced", 4)
    begun = replace(world, run=replace(run_at(world.output_uri, "begun"), plan_uri=f"{world.output_uri}/updates/begun"))
    begun.commit_pending()
    begun.publish()


def test_the_limit_decides(tmp_path: Path) -> None:
    world, gone = make_old_world(tmp_path)
    assert vacuum(world.storage, world.output_uri, max_age_s=2 * OLD_S, dry_run=True) == ()
    everything = vacuum(world.storage, world.output_uri, max_age_s=0, dry_run=False)
    names = {orphan.uri[len(world.output_uri) + 1 :] for orphan in everything}
    assert names > gone
    left = objects(world)
    data = {name for name in left if name.startswith("generations/data/")}
    assert data == {uri[len(world.output_uri) + 1 :] for uri in world.delta().file_uris()}
    assert {name.split("/")[1] for name in left if name.startswith("runs/")} == {"shown", "notes.txt"}


@pytest.mark.parametrize("place", ["local", "s3"])
def test_on_both_kinds_of_storage(place: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    storage, output_uri = place_on(place, request, tmp_path)
    world = opened(storage, output_uri)
    world.commit_pending()
    world.publish()
    second = world.with_run("run2")
    second.publish()
    run_of(world, "begun").commit("shard0")
    assert vacuum(storage, output_uri, max_age_s=HOUR_S, dry_run=False) == ()
    time.sleep(1.1)  # S3 tells times in seconds
    orphans = vacuum(storage, output_uri, max_age_s=0, dry_run=False)
    kept = {info.uri for info in storage.list_objects(output_uri)}
    assert not kept & {orphan.uri for orphan in orphans}
    assert not [uri for uri in kept if "/run1/" in uri or "/begun/" in uri]
    assert [uri for uri in kept if "/data/run2/" in uri and uri.endswith(".parquet")]
    assert second.published().num_rows == 4 * 17


def test_a_table_that_changes_meanwhile_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, _ = make_old_world(tmp_path)
    before, look = objects(world), vacuum_module._live

    def then_publish(*arguments: Any) -> Any:
        found = look(*arguments)
        rollback(world.storage, world.output_uri, world.users_uri, version=1)
        return found

    monkeypatch.setattr(vacuum_module, "_live", then_publish)
    with pytest.raises(PublishConflictError, match="was changed meanwhile; nothing was removed"):
        vacuum(world.storage, world.output_uri, max_age_s=LIMIT_S, dry_run=False)
    assert before <= objects(world)


@pytest.mark.parametrize("num_deleted", [6, 48, 54, 62])  # markers are gone, and dead letters of one plan or another
def test_a_killed_vacuum_leaves_nothing_that_looks_complete(num_deleted: int, tmp_path: Path) -> None:
    """Manifests go first, then markers."""
    world, gone = make_old_world(tmp_path)
    plans = {name: below(world, name) for name in ("plans/plan", "updates/abandoned", "plans/complete")}
    assert any(f"{name}/manifest.json" in found for name, found in plans.items())

    class Dying(Storage):
        num_left = num_deleted

        def delete(self, uri: str) -> None:
            self.num_left -= 1
            if self.num_left < 0:
                raise KeyboardInterrupt
            super().delete(uri)

    with pytest.raises(KeyboardInterrupt):
        vacuum(Dying(), world.output_uri, max_age_s=LIMIT_S, dry_run=False)
    left = objects(world)
    for run_id in ("expired", "complete", "abandoned"):
        markers = {Path(name).stem for name in left if name.startswith(f"runs/{run_id}/markers/")}
        data = {Path(name).stem for name in left if name.startswith(f"generations/data/{run_id}/")}
        assert markers <= data
    for name, whole in plans.items():
        assert f"{name}/manifest.json" not in left or whole <= left
    vacuum(world.storage, world.output_uri, max_age_s=LIMIT_S, dry_run=False)
    assert not objects(world) & gone


def test_deletion_vectors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, _ = make_old_world(tmp_path)
    log = Path(world.run.table_uri, "_delta_log", f"{3:020d}.json")
    feature = {"minReaderVersion": 3, "minWriterVersion": 7}
    features = {"readerFeatures": ["deletionVectors"], "writerFeatures": ["deletionVectors"]}
    info = {"timestamp": int(time.time() * 1000), "operation": "SET TBLPROPERTIES"}
    lines = [{"commitInfo": info}, {"protocol": feature | features}]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(IncompatibleError, match="deletion vectors"):
        vacuum(world.storage, world.output_uri, max_age_s=LIMIT_S, dry_run=False)


def test_the_job_after_real_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Full run, update with a limit, backfill; then only what the newest version needs, and another update on top."""
    world = make_world(tmp_path, monkeypatch)
    world.run()
    world.projector = "projector-2"
    world.run(Limits(max_requests=20))
    world.run()
    rows = world.rows()
    job_file = ["--config", str(tmp_path / "job.yaml")]
    assert run_job(jobs.vacuum.JOB, [*job_file, "--older-than", "-1"]) == 2
    capsys.readouterr()
    assert run_job(jobs.vacuum.JOB, job_file) == 0
    assert "removed" in capsys.readouterr().out
    assert world.storage.exists(f"{world.config.output.table_uri}/_delta_log/{0:020d}.json")
    assert len(list(world.storage.list_objects(f"{world.config.output.uri}/runs"))) > 10  # a week is kept
    assert run_job(jobs.vacuum.JOB, [*job_file, "--older-than", "0", "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert "dry run: nothing was removed" in dry
    assert run_job(jobs.vacuum.JOB, [*job_file, "--older-than", "0"]) == 0
    assert capsys.readouterr().out.replace("removed", "dry run: nothing was removed") == dry
    assert world.rows() == rows
    world.run()
    assert not world.calls
    world.contents["content-01"] = replace(world.contents["content-01"], title="Another")
    assert world.run().causes == {"content_changed": 12}

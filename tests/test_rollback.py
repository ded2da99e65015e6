"""Rollback: one commit, consent as it is now, refusals by name, races; and what later runs make of it."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import DeltaTable, write_deltalake

import e2p_ray.commit.rollback as rollback_module
import jobs.rollback
from e2p_ray.commit import open_run
from e2p_ray.commit.rollback import RolledBack, rollback
from e2p_ray.errors import ConfigError, InputError, PublishConflictError
from e2p_ray.schema import RequestKey
from e2p_ray.storage import Storage
from jobs.cli import run_job
from tests.s3 import PLACES, place_on
from tests.test_commit import World, assert_conserved, opened, run_at, users_table, write_plan
from tests.update_world import make_world

NUM_ROWS, NUM_FILES = 4 * 17, 4


def make(storage: Storage, output_uri: str) -> World:
    """Two published versions: run1, then run2."""
    world = opened(storage, output_uri)
    world.commit_pending("run1")
    world.publish()
    world.with_run("run2").publish()
    return world


@pytest.fixture(params=PLACES)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    return make(*place_on(request.param, request, tmp_path))


@pytest.fixture
def local(tmp_path: Path) -> World:
    return make(Storage(), str(tmp_path / "out"))


def back(world: World, version: int | None = None, **options: Any) -> RolledBack:
    return rollback(world.storage, world.output_uri, world.users_uri, version=version, **options)


def run_ids(world: World) -> set[str]:
    return set(world.published()["run_id"].to_pylist())


def commit_actions(world: World, version: int) -> tuple[set[str], set[str]]:
    """Paths added and removed by one commit, from the log itself."""
    log = world.storage.read_bytes(f"{world.run.table_uri}/_delta_log/{version:020d}.json").decode().splitlines()
    lines = [json.loads(line) for line in log]
    return tuple({line[kind]["path"] for line in lines if kind in line} for kind in ("add", "remove"))  # type: ignore[return-value]


@pytest.mark.parametrize("world", ["local", "s3"], indirect=True)
def test_back_to_a_version_in_one_commit(world: World) -> None:
    before = world.delta().version()
    old = DeltaTable(world.run.table_uri, 0, storage_options=world.storage.delta_options(world.run.table_uri))
    rows = pl.DataFrame(old.to_pyarrow_table()).sort("user_id", "content_id")
    assert run_ids(world) == {"run2"}  # the control: something is to be rolled back
    assert back(world, 0) == RolledBack(before + 1, 0, "run1", NUM_ROWS, NUM_FILES, 0, already=False)
    assert world.delta().version() == before + 1
    assert pl.DataFrame(world.published()).sort("user_id", "content_id").equals(rows)
    entry = world.delta().history(1)[0]
    named = {name: entry[name] for name in ("action", "rolled_back_to", "rolled_back_from", "run_id", "projector_id")}
    assert named == {
        "action": "rollback", "rolled_back_to": "0", "rolled_back_from": "1", "run_id": "run1", "projector_id": "p",
    }  # fmt: skip
    assert back(world, 0) == RolledBack(before + 1, 0, "run1", NUM_ROWS, NUM_FILES, 0, already=True)
    assert back(world, before + 1).already  # by the rollback's own number
    assert back(world, run_id="run1").already
    assert world.delta().version() == before + 1
    assert back(world, run_id="run2").version == before + 2
    assert run_ids(world) == {"run2"}


def test_publish_takes_a_rollback_for_what_it_shows(local: World) -> None:
    back(local, 0)
    assert local.publish().already_published
    second = replace(local, run=run_at(local.output_uri, "run2"))
    assert not second.publish().already_published
    assert run_ids(local) == {"run2"}


@pytest.mark.parametrize(
    ("version", "run_id", "message"),
    [
        (7, None, "there is no version 7; the newest is 3"),
        (-1, None, "there is no version -1"),
        (2, None, r"version 2 is no published version \(OPTIMIZE made it\)"),
        (None, "run9", "no version shows run run9"),
    ],
)
def test_what_is_no_published_version_is_refused(
    version: int | None, run_id: str | None, message: str, local: World
) -> None:
    local.delta().optimize.compact()
    local.with_run("run3").publish()
    with pytest.raises(ConfigError, match=message):
        back(local, version, run_id=run_id)
    assert local.delta().version() == 3


def test_without_a_table_there_is_nothing_to_go_back_to(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing is published here"):
        rollback(Storage(), str(tmp_path), "users.parquet", version=0)


def test_files_that_are_gone_are_named(world: World) -> None:
    gone = world.run.data_uri("shard2")
    data = world.storage.read_bytes(gone)
    world.storage.delete(gone)
    with pytest.raises(InputError, match=r"1 of the 4 data files of version 0 are gone: data/run1/shard2\.parquet"):
        back(world, 0)
    assert run_ids(world) == {"run2"}
    world.storage.write_bytes(gone, data)
    back(world, 0)  # the control: with the file it goes


def test_who_opted_out_since_is_not_shown_again(world: World) -> None:
    world.write_users(users_table(refusing={"u5"}, gone={"u4"}))
    personal = DeltaTable(world.run.table_uri, 0, storage_options=world.storage.delta_options(world.run.table_uri))
    texts = {row["text"] for row in personal.to_pyarrow_table().to_pylist() if row["user_id"] in ("u4", "u5")}
    assert any(text.startswith("run1 u5") for text in texts)  # the control: version 0 holds what must not be seen
    done = back(world, 0)
    assert (done.num_files_suppressed, done.num_rows, done.already) == (4, NUM_ROWS, False)
    table = world.published()
    theirs = table.filter(pc.is_in(table["user_id"], pa.array(["u4", "u5"])))
    assert Counter(theirs["status"].to_pylist()) == {"suppressed": theirs.num_rows}
    assert set(theirs["arm"].to_pylist()) == {"title"}
    assert not texts & set(table["text"].to_pylist())
    others = table.filter(pc.is_in(table["user_id"], pa.array(["u3"])))
    assert set(others["status"].to_pylist()) == {"ok"}
    assert back(world, 0) == replace(done, already=True)
    assert int(world.delta().history(1)[0]["num_files_suppressed"]) == 4
    found = world.delta().to_pyarrow_table(filters=[("content_id", "=", "c2-1")])  # statistics still let readers skip
    assert set(found["content_id"].to_pylist()) == {"c2-1"}


def test_who_opted_out_and_has_no_title_is_left_out(local: World) -> None:
    planned_uri = local.run.planned_uri("shard0")
    rows = local.storage.read_table(planned_uri)
    place = rows.schema.get_field_index("title")
    local.storage.write_table(planned_uri, rows.set_column(place, rows.schema.field(place), [["\n"] * rows.num_rows]))
    local.write_users(users_table(refusing={"u5"}))
    done = back(local, 0)
    letters = local.storage.read_table(local.run.untitled_uri("shard0"))
    assert set(letters["user_id"].to_pylist()) == {"u5"}
    assert (letters.num_rows, done.num_rows) == (3, NUM_ROWS - 3)
    assert "" not in assert_conserved(local)["text"].to_pylist()
    assert back(local, 0) == replace(done, already=True)


class OneShardWorld(World):
    """User u5 is in the first shard only, so that what becomes of u5 changes one file of four."""

    def planned(self, shard_id: str) -> list[RequestKey]:
        return [key for key in super().planned(shard_id) if shard_id == "shard0" or key.user_id != "u5"]


def one_shard_world(folder: Path) -> OneShardWorld:
    """With its run published."""
    output_uri = str(folder / "out")
    world = OneShardWorld(Storage(), output_uri, run_at(output_uri, "run1"))
    write_plan(world)
    world.write_users(users_table())
    open_run(world.storage, world.run, {})
    world.commit_pending()
    world.publish()
    return world


def test_no_commit_adds_and_removes_one_path(tmp_path: Path) -> None:
    """Delta forbids it, and Spark would lose the file: publishes and rollbacks that share files with what is shown."""
    world = one_shard_world(tmp_path)
    world.write_users(users_table(refusing={"u5"}))
    assert world.publish().version == 1
    rows = world.published()
    assert set(rows.filter(pc.equal(rows["user_id"], "u5"))["status"].to_pylist()) == {"suppressed"}
    assert world.publish().already_published
    assert back(world, 0).already  # with the consent of now, version 0 is what is shown
    world.write_users(users_table())
    assert back(world, 0).version == 2
    world.write_users(users_table(refusing={"u5"}))
    done = back(world, 0)
    assert (done.version, done.num_files_suppressed) == (3, 1)
    assert pl.DataFrame(world.published()).sort(RequestKey._fields).equals(pl.DataFrame(rows).sort(RequestKey._fields))
    assert back(world, 0).already
    assert back(world, 3).already
    for version in (1, 2, 3):
        added, removed = commit_actions(world, version)
        assert added
        assert removed
        assert not added & removed, version


def test_without_the_titles_nobody_is_shown_what_they_refused(local: World) -> None:
    local.write_users(users_table(refusing={"u5"}))
    for shard_id in local.run.shard_ids:
        local.storage.delete(local.run.planned_uri(shard_id))
    with pytest.raises(InputError, match=r"1 users opted out since run run1, and the titles .* are gone"):
        back(local, 0)
    assert run_ids(local) == {"run2"}
    local.write_users(users_table())
    assert back(local, 0).run_id == "run1"  # the control: nobody refused, no title is needed


def test_deleted_rows_come_back_only_when_that_is_meant(local: World) -> None:
    local.delta().delete("user_id = 'u5'")
    for goal in (0, 1):
        with pytest.raises(
            PublishConflictError, match=r"deleted from .* in version 2 would come back\. Give --restore"
        ):
            back(local, goal)
    assert "u5" not in local.published()["user_id"].to_pylist()
    assert not back(local, 1, restore_deleted=True).already
    assert "u5" in local.published()["user_id"].to_pylist()
    assert back(local, 1).already


def test_rows_that_others_took_out_come_back_only_when_that_is_meant(local: World) -> None:
    """By a merge, an overwrite, a repair; Spark's merges count by other names, some engines' not at all."""
    rows = pa.table({"user_id": ["u5"], "text": ["x"]})

    def merge() -> Any:
        return local.delta().merge(rows, "t.user_id = s.user_id", source_alias="s", target_alias="t")

    merge().when_matched_update({"text": "s.text"}).execute()
    write_deltalake(local.run.table_uri, local.published().slice(0, 1), mode="append")
    assert not back(local, 1).already, "control: no row was taken out"
    merge().when_matched_delete().execute()
    assert "u5" not in local.published()["user_id"].to_pylist()
    with pytest.raises(PublishConflictError, match=r"in version 5 would come back\. Give --restore"):
        back(local, 1)
    assert "u5" not in local.published()["user_id"].to_pylist()
    assert not back(local, 1, restore_deleted=True).already
    assert "u5" in local.published()["user_id"].to_pylist()
    newest = local.delta().version()
    write_deltalake(local.run.table_uri, local.published().slice(0, 1), mode="overwrite")
    merges = [{"operationMetrics": {"numTargetRowsDeleted": number}} for number in ("0", "2")]
    others = [{"operation": "MERGE"} | values for values in (*merges, {})]
    replaced = ("CREATE OR REPLACE TABLE AS SELECT", "REPLACE TABLE")
    others += [{"operation": operation} for operation in ("TRUNCATE", "FSCK", *replaced)]
    for version, values in enumerate(others, newest + 2):
        uri = f"{local.run.table_uri}/_delta_log/{version:020d}.json"
        local.storage.write_bytes(uri, json.dumps({"commitInfo": {"timestamp": 1} | values}).encode())
    named = ", ".join(str(newest + place) for place in (1, 3, 4, 5, 6, 7, 8))
    with pytest.raises(PublishConflictError, match=f"in version {named} would come back"):
        back(local, newest)


def test_of_two_that_commit_at_once_one_wins(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another publisher commits after the rollback has looked at the table."""
    third = world.with_run("run3")
    look = rollback_module._refuse_missing

    def then_lose(*arguments: Any) -> None:
        look(*arguments)
        third.publish()

    monkeypatch.setattr(rollback_module, "_refuse_missing", then_lose)
    with pytest.raises(PublishConflictError, match="was changed while it was being rolled back to version 0"):
        back(world, 0)
    assert run_ids(world) == {"run3"}
    assert world.delta().version() == 2


@pytest.mark.parametrize("refusing", [set(), {"u5"}])
def test_racing_rollbacks(refusing: set[str], local: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """To two versions at once: one wins. `restore` and the overwrite that consent needs are both tried."""
    local.with_run("run3").publish()
    local.write_users(users_table(refusing=refusing))
    meeting, look = Barrier(2), rollback_module._refuse_missing

    def meet(*arguments: Any) -> None:
        look(*arguments)
        meeting.wait(60)

    monkeypatch.setattr(rollback_module, "_refuse_missing", meet)

    def race(version: int) -> str:
        try:
            return back(local, version).run_id
        except PublishConflictError:
            return "conflict"

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(race, (0, 1)))
    assert answers.count("conflict") == 1
    assert run_ids(local) == set(answers) - {"conflict"}
    assert local.delta().version() == 3


# -- the job, and what later runs make of it


def test_the_job_and_the_next_incremental_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_world(tmp_path, monkeypatch)
    first = world.run()
    shown = dict(world.shown)
    user, text = "user-003", "content-00"
    world.contents[text] = replace(world.contents[text], title="Another title")
    world.run()
    new_rows = world.rows()
    job_file = ["--config", str(tmp_path / "job.yaml")]
    assert run_job(jobs.rollback.JOB, [*job_file, "--version", "0"]) == 0
    assert f"version 0, run {first.run_id}" in capsys.readouterr().out
    assert run_job(jobs.rollback.JOB, [*job_file, "--run", first.run_id]) == 0
    assert "nothing was changed" in capsys.readouterr().out
    assert {row["run_id"] for row in world.rows().values()} == {first.run_id}
    world.shown = shown
    expected = world.causes()
    assert expected == {"content_changed": 12}  # the control: the rollback left something to do
    report = world.run()
    assert report.causes == expected
    assert report.version is not None
    assert {key: row["text"] for key, row in world.rows().items()} == {k: r["text"] for k, r in new_rows.items()}
    world.run()
    assert not world.calls
    world.users[user] = replace(world.users[user], personalize=False)
    world.write()
    assert run_job(jobs.rollback.JOB, [*job_file, "--version", "0"]) == 0
    assert {row["status"] for key, row in world.rows().items() if key[0] == user} == {"suppressed"}
    world.run()  # an incremental run on a rolled back table with suppressed rows ends with what is wanted
    assert world.rows().keys() == world.wanted().keys()
    assert run_job(jobs.rollback.JOB, [*job_file, "--version", "99"]) == 2
    assert "there is no version 99" in capsys.readouterr().err
    assert run_job(jobs.rollback.JOB, job_file) == 2
    assert "give either --version N or --run RUN_ID" in capsys.readouterr().err

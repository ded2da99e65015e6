"""Opting out before a run, during it and after it: nothing personal of that user is shown after the next publish."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import jobs.generate
import jobs.publish
import jobs.purge
from e2p_ray.commit import load_run, publish
from e2p_ray.commit.users_in import Users
from e2p_ray.config import JobConfig
from e2p_ray.downstream.report import Report
from e2p_ray.engine.fake import FakeEngine
from e2p_ray.errors import GateError
from e2p_ray.storage import Storage
from jobs.cli import run_job
from tests.chaos.conservation import assert_conserved
from tests.update_world import World, make_world

USER = "user-004"  # of those whose texts a report shows


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = make_world(tmp_path, monkeypatch)
    data = made.config.model_dump(mode="json") | {"storage": {}}
    made.config = JobConfig.model_validate(data)
    return made


def opt_out(world: World, user_id: str = USER) -> None:
    world.users[user_id] = replace(world.users[user_id], personalize=False)
    world.write()


def personal_rows(world: World, user_id: str = USER) -> list[dict[str, Any]]:
    """What readers see that was written for this user."""
    rows = [row for key, row in world.rows().items() if key[0] == user_id]
    assert rows
    return [row for row in rows if row["personalized"] or row["arm"] == "soft_token" or row["status"] == "ok"]


def sampled_users(world: World, run_id: str) -> set[str]:
    """Whose texts the report shows; the page shows no others."""
    folder = Path(world.config.output.uri, "runs", run_id)
    report = Report.from_json((folder / "report.json").read_bytes())
    shown = {text.user_id for sample in report.samples for text in sample.texts}
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert {user_id for user_id in world.users if user_id in page} == shown
    return shown


def assert_suppressed(world: World, run_id: str) -> None:
    assert not personal_rows(world)
    assert USER not in sampled_users(world, run_id)
    assert_conserved(world.config, set(world.wanted()))


def during(world: World, user_id: str = USER) -> Callable[[JobConfig, Storage], FakeEngine]:
    """The world's engine; the user opts out while the second shard is being written."""

    def engine(config: JobConfig, storage: Storage) -> FakeEngine:
        made, calls = world.engine(config, storage), iter(range(1000))
        generate = made.generate

        def writing(groups: Any) -> Iterator[Any]:
            if next(calls) == 2:
                opt_out(world, user_id)
            return generate(groups)

        made.generate = writing  # type: ignore[method-assign]
        return made

    return engine


def test_who_stays_is_shown(world: World) -> None:
    """The control: without opting out there are personal rows, and a sample in the report."""
    report = world.run()
    assert personal_rows(world)
    assert USER in sampled_users(world, report.run_id)


def test_before_a_run(world: World) -> None:
    opt_out(world)
    assert_suppressed(world, world.run().run_id)


def test_while_shards_are_generated(world: World) -> None:
    report = world.run(engine=during(world))
    assert_suppressed(world, report.run_id)
    assert_suppressed(world, world.run().run_id)  # and stays so


def test_between_generation_and_publish(world: World, tmp_path: Path) -> None:
    """The report that was written before names a sample of the user until then."""
    report = world.run(publish_it=False)
    assert USER in sampled_users(world, report.run_id)
    opt_out(world)
    assert run_job(jobs.publish.JOB, ["--config", str(tmp_path / "job.yaml")]) == 0
    assert_suppressed(world, report.run_id)


def test_between_the_report_and_publish(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the seconds between the two: the report is written again after publishing."""

    def late(*arguments: Any) -> Any:
        opt_out(world)
        return publish(*arguments)

    monkeypatch.setattr("jobs.whole_run.publish", late)
    assert_suppressed(world, world.run().run_id)


def test_a_closed_gate_shows_nobody_who_opted_out(world: World) -> None:
    """Nothing is published, but the report is there to say why."""
    gates = world.config.gates.model_copy(update={"max_fallback_share": 0.0})
    world.config = world.config.model_copy(update={"gates": gates})
    with pytest.raises(GateError, match="max_fallback_share"):
        world.run(engine=during(world))
    (run_id,) = (folder.name for folder in Path(world.config.output.uri, "runs").iterdir())
    assert USER not in sampled_users(world, run_id)
    assert sampled_users(world, run_id)


def test_after_publish_the_next_run_takes_it_back(world: World) -> None:
    world.run()
    assert personal_rows(world)
    opt_out(world)
    assert_suppressed(world, world.run().run_id)


def test_after_publish_a_purge_removes_all_of_it(world: World, tmp_path: Path) -> None:
    report = world.run()
    opt_out(world)
    names = tmp_path / "names"
    names.write_text(f"{USER}\n", encoding="utf-8")
    assert run_job(jobs.purge.JOB, ["--config", str(tmp_path / "job.yaml"), "--users", str(names)]) == 0
    assert not any(key[0] == USER for key in world.rows())
    assert USER not in sampled_users(world, report.run_id)
    storage = world.storage
    run = load_run(storage, world.config.output.uri, report.run_id)
    assert not any(
        Users([USER]).in_parquet(storage, info)
        for uri in (run.table_uri, run.uri, run.plan_uri)
        for info in storage.list_objects(uri)
        if info.name.endswith(".parquet")
    )
    assert_conserved(world.config, {key for key in world.wanted() if key[0] != USER})

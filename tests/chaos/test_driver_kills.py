"""SIGKILL of a job at every kind of call it makes to storage and to Delta, then the same command again."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from e2p_ray.commit.audit import verify_log
from e2p_ray.commit.vacuum import vacuum
from e2p_ray.config import JobConfig
from e2p_ray.downstream.report import Report
from e2p_ray.storage import Storage
from e2p_ray.storage.local import is_unfinished
from tests.chaos import worlds
from tests.chaos.conservation import assert_conserved, assert_old_or_new, readers_see
from tests.chaos.forks import Ended, Forks, Job
from tests.chaos.steps import Death, Step
from tests.chaos.worlds import OPTED_OUT, Scenario
from tests.s3 import IS_LONG, S3Server

SEED = 5
# Of a scenario: its calls to die at, chosen by the seed, besides those that are always taken. Long: the whole publish.
NUM_RANDOM = {"first": 40, "update": 40, "publish": 1000} if IS_LONG else {"first": 2, "update": 2, "publish": 2}
NUM_CHAINS = 6 if IS_LONG else 1


@pytest.fixture(scope="module")
def first(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    return worlds.first(forks, tmp_path_factory.mktemp("first"))


def always(scenario: Scenario) -> list[Death]:
    """The commit from all sides, files that are torn, and what follows the commit."""
    commit = [Death(0, how, "commit", delay_us=300) for how in ("before", "within", "after")]
    others = {
        "first": [
            Death(0, "torn", "markers"),
            Death(1, "after", "audit"),
        ],  # between the log's first entry and its head
        "update": [Death(0, "torn", "run")],
        "publish": [Death(0, "torn", "data"), Death(1, "before", "audit"), Death(0, "torn", "report")],
    }
    return commit + others[scenario.name]


def chosen(scenario: Scenario, chance: random.Random) -> list[Death]:
    """Before every call, after every write, in the middle of every write: as many as are asked for."""
    deaths = [Death(step.number) for step in scenario.steps]
    for step in scenario.steps:
        if step.commits:
            deaths += [Death(0, "within", "commit", delay_us=chance.randrange(50, 4000)) for _ in range(8)]
        elif step.writes:
            deaths += [Death(step.number, how) for how in ("after", "torn")]
    picked = chance.sample(deaths, min(NUM_RANDOM[scenario.name], len(deaths)))
    return always(scenario) + picked


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["first", "update", "publish"])
def test_killed_anywhere_and_started_again(
    name: str, forks: Forks, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    scenario = request.getfixturevalue("first") if name == "first" else getattr(worlds, name)(forks, tmp_path)
    kills, num_late, num_rows, num_new = Counter[str](), 0, 0, 0
    for death in chosen(scenario, random.Random(f"{SEED} {name}")):
        scenario.restore()
        ended = forks.run(_dying(scenario.job, death))
        if not ended.was_killed:  # an alarm that came after the end
            assert (death.how, ended.code) == ("within", 0), (death, ended)
            num_late += 1
        else:
            kills[_last(ended).stage] += 1
        num_new += _assert_seen(scenario, death, ended)
        worlds.done(forks, scenario.job)
        num_rows += _assert_whole(scenario)
    print(
        f"\n{name}: {kills.total()} kills ({num_late} alarms came late), {num_new} of them after the commit,", end=" "
    )
    print(f"{num_rows:,} rows and dead letters checked; by stage: {dict(kills)}")
    assert kills.total() >= len(always(scenario)) - 1 + min(NUM_RANDOM[name], 2) - 1


def _dying(job: Job, death: Death) -> Job:
    return Job(job.verb, job.config_path, job.options, death)


def _last(ended: Ended) -> Step:
    return ended.steps[-1]


def _assert_seen(scenario: Scenario, death: Death, ended: Ended) -> bool:
    """Right after the kill: all of the old or all of the new; the new only if the commit was begun."""
    is_new = assert_old_or_new(scenario.config, scenario.old, scenario.new)
    begun = [step.number for step in ended.steps if step.commits]
    if is_new:
        assert begun, "nobody committed"
    if (death.stage, death.how) == ("commit", "before"):
        assert not is_new
    if (death.stage, death.how) == ("commit", "after"):
        assert is_new
    return is_new


def _assert_whole(scenario: Scenario) -> int:
    """After the same command again: everything once, nothing left over that vacuum does not take, nobody's old text."""
    config, storage = scenario.config, Storage(scenario.config.storage)
    conserved = assert_conserved(config, scenario.planned)
    assert conserved.seen.texts == scenario.new.texts
    assert not verify_log(storage, config.output.uri).problems
    if scenario.name == "publish":
        _assert_not_shown(config, conserved.seen.run_id)
    vacuum(storage, config.output.uri, max_age_s=0.0, dry_run=False)
    assert not [found.info.uri for found in storage.list_dated(config.output.uri) if is_unfinished(found.info.name)]
    assert assert_conserved(config, scenario.planned).seen.texts == scenario.new.texts
    return conserved.num_rows + conserved.num_dead_letters


def _assert_not_shown(config: JobConfig, run_id: str) -> None:
    """The report of the published run has samples, and none of somebody who opted out before it was published."""
    folder = Path(config.output.uri, "runs", run_id)
    report = Report.from_json((folder / "report.json").read_bytes())
    shown = {text.user_id for sample in report.samples for text in sample.texts}
    assert shown
    assert not shown & set(OPTED_OUT)
    assert report.version is not None
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert not [user_id for user_id in OPTED_OUT if user_id in page]


@pytest.mark.timeout(900)
def test_killed_again_and_again_on_a_real_s3_server(
    s3_server: S3Server, forks: Forks, first: Scenario, tmp_path: Path
) -> None:
    """One output, killed further and further on; at the commit the request is on its way when the process dies."""
    num_kills = num_rows = 0
    for number in range(NUM_CHAINS):
        chance = random.Random(f"{SEED} s3 {number}")
        bucket, storage = s3_server.new_bucket(), s3_server.config
        config, path = worlds.small_job(tmp_path / str(number), place=bucket, storage=storage)
        job, deaths = Job("generate", str(path)), [
            Death(chance.randrange(2), chance.choice(["before", "after"]), chance.choice(["markers", "data"])),
            Death(0, "before", "report"),
            Death(0, "within", "commit", chance.randrange(100, 20_000)) if IS_LONG else Death(0, "before", "commit"),
            Death(0, "after", "commit"),
        ]  # fmt: skip
        for death in deaths:
            ended = forks.run(_dying(job, death))
            num_kills += ended.was_killed
            assert ended.was_killed or readers_see(config), ended.said[-4000:]
            assert_old_or_new(config, None, first.new)
        worlds.done(forks, job)
        conserved = assert_conserved(config, first.planned)
        assert conserved.seen.texts == first.new.texts
        assert conserved.seen.version == 0
        num_rows += conserved.num_rows + conserved.num_dead_letters
    print(f"\nS3 ({s3_server.name}): {num_kills} kills, {num_rows:,} rows and dead letters checked")
    assert num_kills >= 3 * NUM_CHAINS

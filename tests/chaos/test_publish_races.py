"""Two publishers and one table: one wins, the other says so, and readers see one run whole."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from deltalake import DeltaTable

from e2p_ray.commit.audit import verify_log
from e2p_ray.config import JobConfig
from e2p_ray.storage import Storage
from tests.chaos.conservation import assert_conserved, readers_see
from tests.chaos.forks import Ended, Forks, Job
from tests.chaos.worlds import planned_keys
from tests.s3 import IS_LONG, S3Server
from tests.small_job import write_small_job

NUM_RACES = {"local": 38, "s3": 12} if IS_LONG else {"local": 6, "s3": 2}
_PLANNED = planned_keys(12, 2, 2)
_RUNS = ("red", "green", "blue")  # two of them race, the third may be the one that is shown


@dataclass(frozen=True)
class Track:
    """An output with three complete runs of one plan, none of them published."""

    config: JobConfig
    path: Path
    run_ids: tuple[str, ...]

    @property
    def storage(self) -> Storage:
        return Storage(self.config.storage)

    def shown(self) -> tuple[str, int]:
        """The run that readers see whole, and the version; ("", -1) while there is none."""
        seen = readers_see(self.config)
        if seen is None:
            return "", -1
        uri = self.config.output.table_uri
        rows = DeltaTable(uri, storage_options=self.storage.delta_options(uri)).to_pyarrow_table(columns=["run_id"])
        assert set(rows["run_id"].to_pylist()) == {seen.run_id}, "rows of two runs"
        assert_conserved(self.config, _PLANNED)
        return seen.run_id, seen.version

    def begin_at(self, version: int) -> None:
        """Let all runs have begun where this version, or no table (-1), was what readers saw."""
        for run_id in self.run_ids:
            uri = f"{self.config.output.uri}/runs/{run_id}/run.json"
            base = {"is_first": version < 0, "base_version": None if version < 0 else version}
            self.storage.write_bytes(uri, json.dumps(json.loads(self.storage.read_bytes(uri)) | base).encode())

    def publisher(self, run_id: str, lag_s: float) -> Job:
        return Job("publish", str(self.path), ("--run", run_id), meets=True, lag_s=lag_s)


def track_on(kind: str, request: pytest.FixtureRequest, forks: Forks, folder: Path) -> Track:
    options = {}
    if kind == "s3":
        server: S3Server = request.getfixturevalue("s3_server")
        options = {"place": server.new_bucket(), "storage": server.config}
    config, path = write_small_job(folder, num_users=12, num_contents=2, per_user=2, **options)  # type: ignore[arg-type]
    run_ids = []
    for word in _RUNS:
        ended = forks.run(Job("generate", str(path), ("--no-publish", "--checks.deny", f'["{word}"]')))
        assert ended.code == 0, ended.said[-4000:]
        run_ids += re.findall(r"^run ([0-9a-f]{16}): ", ended.said, re.MULTILINE)
    assert len(set(run_ids)) == len(_RUNS)
    return Track(config, path, tuple(run_ids))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["local", "s3"])
def test_one_wins_and_the_other_says_so(
    kind: str, forks: Forks, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    track = track_on(kind, request, forks, tmp_path)
    chance = random.Random(f"3 {kind}")
    ends, num_rows = Counter[str](), 0
    for number in range(NUM_RACES[kind]):
        if kind == "local" and number % 4 == 3:  # as if nothing had ever been published
            shutil.rmtree(Path(track.config.output.table_uri, "_delta_log"))
        before, version = track.shown()
        track.begin_at(version)
        racers = chance.sample([run_id for run_id in track.run_ids if run_id != before], 2)
        if number % 3 == 2:  # two publishers of one run
            racers[1] = racers[0]
        jobs = [track.publisher(run_id, chance.choice([0.0, chance.uniform(0, 0.02)])) for run_id in racers]
        ended = forks.run_together(jobs)
        winner, now = track.shown()
        assert now == version + 1, "one commit"
        ends.update(_how(racers, ended, winner))
        num_rows += _PLANNED.total()
    assert not verify_log(track.storage, track.config.output.uri).problems
    print(f"\n{kind}: {NUM_RACES[kind]} races, {num_rows:,} rows checked: {dict(ends)}")
    assert ends["won"] == NUM_RACES[kind]
    assert ends["lost"] + ends["published already"] == NUM_RACES[kind]
    assert ends["published already"] == sum(number % 3 == 2 for number in range(NUM_RACES[kind]))


def _how(racers: list[str], ended: list[Ended], winner: str) -> Iterator[str]:
    for run_id, one in zip(racers, ended, strict=True):
        if racers[0] == racers[1]:
            assert one.code == 0, one.said
            yield "published already" if "it was published already" in one.said else "won"
        elif run_id == winner:
            assert one.code == 0, one.said
            assert "published already" not in one.said
            yield "won"
        else:
            assert one.code == 4, one.said
            assert re.search(rf"was (changed|published first) since .*run {run_id} began", one.said), one.said
            assert "Run jobs.generate again: it starts from the table as it is" in one.said
            yield "lost"


def test_publishers_that_do_not_meet_both_publish(forks: Forks, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The control: it is the race that refuses one of them, not the other's run."""
    track = track_on("local", request, forks, tmp_path)
    for number, run_id in enumerate(track.run_ids[:2]):
        track.begin_at(number - 1)
        ended = forks.run(Job("publish", str(track.path), ("--run", run_id)))
        assert ended.code == 0, ended.said
        assert track.shown() == (run_id, number)
    ended = forks.run(Job("publish", str(track.path), ("--run", track.run_ids[2])))
    assert (ended.code, track.shown()) == (4, (run_id, 1)), "it began before that was published"

"""The audit log: every entry once and in order, and no change to it goes unnoticed; on files and on a real S3."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import jobs.audit
import jobs.publish
from e2p_ray.commit.audit import Entry, record, verify_log
from e2p_ray.storage import ObjectInfo, Storage
from jobs.cli import run_job
from jobs.whole_run import generate_run
from tests.s3 import place_on
from tests.update_world import make_world

NUM_ENTRIES = 5


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Storage, str]:
    return place_on(request.param, request, tmp_path)


@pytest.fixture
def written(tmp_path: Path) -> tuple[Storage, Path]:
    """A log of five entries as files."""
    storage = Storage()
    for number in range(NUM_ENTRIES):
        record(storage, str(tmp_path), "publish", {"run_id": f"run{number}", "version": number})
    return storage, tmp_path / "audit"


def found(storage: Storage, folder: Path) -> list[tuple[int, str]]:
    return [(problem.number, problem.kind) for problem in verify_log(storage, str(folder.parent)).problems]


def path(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.json"


def test_entries_follow_each_other(place: tuple[Storage, str]) -> None:
    storage, uri = place
    assert verify_log(storage, uri).entries == ()
    made = [record(storage, uri, "publish", {"run_id": "r", "version": number}) for number in range(3)]
    log = verify_log(storage, uri)
    assert list(log.entries) == made
    assert not log.problems
    previous = "0" * 64
    for number, entry in enumerate(made):  # the chain, computed here
        data = storage.read_bytes(f"{uri}/audit/{number:08d}.json")
        assert json.loads(data)["previous"] == previous == entry.previous
        previous = hashlib.sha256(data).hexdigest()
    assert log.head == previous
    assert "@" in made[0].who
    assert verify_log(storage, uri, previous).problems == ()
    assert verify_log(storage, uri, "f" * 64).problems, "control: a hash that no entry has"
    (problem,) = verify_log(storage, f"{uri}-gone", previous).problems
    assert (problem.number, problem.kind) == (0, "removed"), "of a log that is gone as a whole, too"


def test_writers_at_once_lose_no_entry(place: tuple[Storage, str]) -> None:
    storage, uri = place
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda n: record(storage, uri, "publish", {"version": n}), range(18)))
    log = verify_log(storage, uri)
    assert not log.problems
    assert [entry.number for entry in log.entries] == list(range(18))
    assert sorted(entry.ids["version"] for entry in log.entries) == list(range(18))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("num_entries", [0, 3])
def test_a_job_that_records_meanwhile_is_nobody_who_tampers(num_entries: int, when: str, tmp_path: Path) -> None:
    uri = str(tmp_path)

    class Busy(Storage):
        is_done = False

        def list_objects(self, uri: str) -> Iterator[ObjectInfo]:
            found = list(super().list_objects(uri))
            if not self.is_done:
                self.is_done = True
                record(Storage(), str(tmp_path), "publish", {"version": 9})
                found = list(super().list_objects(uri)) if when == "before" else found
            return iter(found)

    for number in range(num_entries):
        record(Storage(), uri, "publish", {"version": number})
    log = verify_log(Busy(), uri)
    assert not log.problems
    assert len(log.entries) == num_entries + (when == "before")
    path(tmp_path / "audit", num_entries).unlink()
    assert [problem.number for problem in verify_log(Storage(), uri).problems] == [num_entries], "control"


def test_what_is_no_id_is_not_written_down(tmp_path: Path) -> None:
    values: dict[str, str | int] = {
        "text": "Anna likes bridges",
        "japanese": "橋が好き",
        "model": "org/name@0abc",
        "none": "",
        "count": 3,
    }
    entry = record(Storage(), str(tmp_path), "purge", values)
    assert entry.ids["model"] == "org/name@0abc"
    assert (entry.ids["none"], entry.ids["count"]) == ("", 3)
    assert str(entry.ids["text"]).startswith("sha256-")
    data = path(tmp_path / "audit", 0).read_text(encoding="utf-8")
    assert "Anna" not in data
    assert "橋" not in data


@pytest.mark.parametrize("number", range(NUM_ENTRIES))
def test_a_changed_entry_is_found_and_named(written: tuple[Storage, Path], number: int) -> None:
    storage, folder = written
    assert found(storage, folder) == [], "control: the log as it was written is whole"
    entry = Entry(**json.loads(path(folder, number).read_bytes()))
    forged = Entry(entry.number, entry.at, "somebody@else", entry.action, entry.ids, entry.previous)
    path(folder, number).write_bytes(forged.to_bytes())
    assert found(storage, folder) == [(number, "changed")]


@pytest.mark.parametrize("number", range(NUM_ENTRIES))
def test_a_removed_entry_is_found_and_named(written: tuple[Storage, Path], number: int) -> None:
    storage, folder = written
    path(folder, number).unlink()
    assert found(storage, folder) == [(number, "removed")]
    record(storage, str(folder.parent), "publish", {"run_id": "later"})
    assert found(storage, folder) == [(number, "removed")], "and stays found when the log goes on"


@pytest.mark.parametrize("number", range(1, NUM_ENTRIES))
def test_an_entry_put_in_between_is_found(written: tuple[Storage, Path], number: int) -> None:
    """The later entries make room: renumbered, everything else as it was."""
    storage, folder = written
    for old in range(NUM_ENTRIES - 1, number - 1, -1):
        values = json.loads(path(folder, old).read_bytes()) | {"number": old + 1}
        path(folder, old + 1).write_bytes(Entry(**values).to_bytes())
    previous = hashlib.sha256(path(folder, number - 1).read_bytes()).hexdigest()
    forged = Entry(number, "2026-01-01T00:00:00.000+00:00", "a@b", "publish", {}, previous)
    path(folder, number).write_bytes(forged.to_bytes())
    assert (number, "inserted") in found(storage, folder)


def test_other_damage_is_found(written: tuple[Storage, Path]) -> None:
    storage, folder = written
    (folder / "note.txt").write_text("hello")
    assert found(storage, folder) == [(NUM_ENTRIES, "inserted")]
    (folder / "note.txt").unlink()
    path(folder, 2).write_bytes(path(folder, 2).read_bytes() + b" ")
    assert found(storage, folder) == [(2, "changed")]
    path(folder, 2).write_bytes(path(folder, 2).read_bytes()[:-1])
    (folder / "head.json").unlink()
    assert found(storage, folder) == [(NUM_ENTRIES, "removed")]


def test_jobs_record_what_they_publish_and_jobs_audit_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_world(tmp_path, monkeypatch)
    first = world.run()
    world.users["user-005"] = world.users["user-006"]
    world.write()
    second = generate_run(world.config, engine_factory=world.engine, action="backfill")
    assert first.version is not None
    assert second.version is not None
    job = ["--config", str(tmp_path / "job.yaml")]
    assert run_job(jobs.publish.JOB, [*job, "--run", second.run_id]) == 0
    capsys.readouterr()
    assert run_job(jobs.audit.JOB, [*job, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["action"], line["ids"]["run_id"], line["ids"]["version"]) for line in lines] == [
        ("generate", first.run_id, 0),
        ("backfill", second.run_id, 1),
        ("publish", second.run_id, 1),
    ]
    assert not [user for user in world.users if user in json.dumps(lines)]
    assert run_job(jobs.audit.JOB, job) == 0
    assert "last hash" in capsys.readouterr().out
    last = verify_log(world.storage, world.config.output.uri).head
    assert run_job(jobs.audit.JOB, [*job, "--known", f" {last.upper()}"]) == 0
    for known in ("abc", last[:-1], ""):
        assert run_job(jobs.audit.JOB, [*job, "--known", known]) == 2
        said = capsys.readouterr().err
        assert f"--known {known!r} is no hash: give all 64 digits" in said
        assert "changed" not in said
    assert run_job(jobs.audit.JOB, [*job, "--known", "f" * 64]) == 1, "the control"
    assert "no entry has the known hash" in capsys.readouterr().err
    file = path(tmp_path / "out" / "audit", 1)
    file.write_bytes(file.read_bytes().replace(b"backfill", b"generate"))
    assert run_job(jobs.audit.JOB, job) == 1
    assert "entry 1 was changed" in capsys.readouterr().err

"""No rows, one row, and a disk that is full: what the job says, what readers see, and the same command again."""

from __future__ import annotations

import os
import random
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

import jobs.whole_run
from e2p_ray.config import JobConfig
from e2p_ray.errors import GateError, IncompatibleError, StorageError
from e2p_ray.storage import Storage
from jobs.whole_run import generate_run
from tests.chaos import worlds
from tests.chaos.conservation import assert_conserved, assert_old_or_new, readers_see
from tests.chaos.forks import Forks, Job
from tests.s3 import IS_LONG
from tests.small_job import candidates_table, fake_engine, users_table
from tests.update_world import serial_batch

NUM_FULL = 40 if IS_LONG else 5
_DISK_BYTES = 2 << 20


@pytest.fixture(autouse=True)
def _workers_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.whole_run, "run_batch", serial_batch)


def small(folder: Path) -> JobConfig:
    return worlds.small_job(folder, gates={"max_fallback_share": 1.0, "max_dead_letter_share": 0.2})[0]


# -- few rows


def test_no_candidates_publish_nothing(tmp_path: Path) -> None:
    """An empty plan is more likely a broken upstream than a wish: the gate holds, with and without an older version."""
    config = small(tmp_path)
    storage, uri = Storage(), config.inputs.candidates_uri
    whole = storage.read_table(uri)
    storage.write_table(uri, whole.slice(0, 0))
    with pytest.raises(GateError, match=r"no text at all: publishing it would empty the table\. See its plan"):
        generate_run(config, engine_factory=fake_engine)
    assert readers_see(config) is None
    storage.write_table(uri, whole)
    generate_run(config, engine_factory=fake_engine)
    old = assert_conserved(config, worlds.planned_keys()).seen
    storage.write_table(uri, whole.slice(0, 0))
    for full in (False, True):
        with pytest.raises(GateError, match="no text at all"):
            generate_run(config, engine_factory=fake_engine, full=full)
        assert not assert_old_or_new(config, None, old) or readers_see(config) == old


def test_one_candidate_is_published(tmp_path: Path) -> None:
    config = small(tmp_path)
    table = candidates_table(worlds.NUM_USERS, worlds.NUM_CONTENTS, worlds.PER_USER).slice(9, 1)
    Storage().write_table(config.inputs.candidates_uri, table)
    report = generate_run(config, engine_factory=fake_engine)
    pair = (table["user_id"][0].as_py(), table["content_id"][0].as_py())
    conserved = assert_conserved(config, {(*pair, "headline"), (*pair, "explanation")})
    assert (conserved.num_rows, conserved.num_dead_letters, report.num_requests) == (2, 0, 2)


def test_an_empty_users_table_is_refused(tmp_path: Path) -> None:
    """Every candidate would be a dead letter; an older version stays."""
    config = small(tmp_path)
    generate_run(config, engine_factory=fake_engine)
    old = readers_see(config)
    Storage().write_table(config.inputs.users_uri, users_table(worlds.NUM_USERS).slice(0, 0))
    with pytest.raises((GateError, IncompatibleError)) as refused:
        generate_run(config, engine_factory=fake_engine)
    assert refused.value.exit_code in (3, 4)
    assert readers_see(config) == old


def test_one_user_without_an_embedding_is_published(tmp_path: Path) -> None:
    """Nobody can be personalised, and nobody is lost."""
    config = small(tmp_path)
    users = users_table(worlds.NUM_USERS)
    nulls = pa.nulls(users.num_rows, users.schema.field("embedding").type)
    Storage().write_table(config.inputs.users_uri, users.set_column(1, "embedding", nulls))
    generate_run(config, engine_factory=fake_engine)
    seen = assert_conserved(config, worlds.planned_keys()).seen
    assert {status for _, status, _ in seen.texts.values()} == {"fallback", "suppressed"}
    assert not any(arm == "soft_token" for _, _, arm in seen.texts.values())


# -- a full disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, text=True) if os.geteuid() == 0 else None
    if done is None or done.returncode:
        pytest.skip("a disk can be made small by root only" if done is None else f"no mount here: {done.stderr}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.timeout(900)
def test_a_full_disk_is_named_and_nothing_is_half_visible(forks: Forks, disk: Path, tmp_path: Path) -> None:
    """Room runs out anywhere between the first file of the plan and the commit, the report and the audit log."""
    config, path = worlds.small_job(tmp_path, output={"uri": str(disk / "out")})
    job, planned = Job("generate", str(path)), worlds.planned_keys()
    used = _free(disk)
    worlds.done(forks, job)
    used -= _free(disk)
    new = assert_conserved(config, planned).seen
    chance, stopped, num_rows = random.Random(14), Counter[str](), 0
    for number in range(NUM_FULL):
        subprocess.run(["rm", "-rf", config.output.uri], check=True)
        room = int(used * (number + chance.random()) / NUM_FULL) & ~4095
        (disk / "ballast").write_bytes(bytes(_free(disk) - room))
        ended = forks.run(job)
        assert ended.code == 5, (room, ended.said[-2000:])
        assert re.search(rf"{disk}/out/\S+: .*No space left on device", ended.said, re.DOTALL), ended.said[-2000:]
        assert "Traceback" not in ended.said
        stopped[ended.steps[-1].stage] += 1
        assert_old_or_new(config, None, new)
        (disk / "ballast").unlink()
        worlds.done(forks, job)
        conserved = assert_conserved(config, planned)
        assert conserved.seen.texts == new.texts
        num_rows += conserved.num_rows + conserved.num_dead_letters
    print(f"\nfull disks: {NUM_FULL}, {num_rows:,} rows checked; full at: {dict(stopped)}")
    assert len(stopped) > 2


def test_no_room_for_temporary_files_is_said(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large sets of keys are compared on disk, in another place than the output."""
    config = small(tmp_path)
    monkeypatch.setattr("e2p_ray.commit.spool._MAX_MEMORY_BYTES", 10)
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    (disk / "ballast").write_bytes(bytes(_free(disk)))
    with pytest.raises(StorageError, match=rf"temporary files in {disk}: No space left on device\. .* TMPDIR"):
        generate_run(config, engine_factory=fake_engine)
    assert readers_see(config) is None
    (disk / "ballast").unlink()
    generate_run(config, engine_factory=fake_engine)
    assert_conserved(config, worlds.planned_keys())


def _free(disk: Path) -> int:
    found = os.statvfs(disk)
    return found.f_bavail * found.f_frsize

"""S3 that fails on purpose, under a whole job: it succeeds with bounded retries, or ends soon and says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from e2p_ray.config import JobConfig, StorageConfig
from e2p_ray.errors import AccessDeniedError, ConservationError, InputError, StorageError
from e2p_ray.storage import Storage, parquet_bytes
from jobs import whole_run
from jobs.whole_run import generate_run
from tests.chaos.conservation import assert_conserved, readers_see
from tests.faulty import Faulty, Stormy, faulty_s3, stormy_s3
from tests.s3 import IS_LONG, S3Server
from tests.small_job import fake_engine, write_small_job
from tests.test_jobs import expected_keys
from tests.update_world import serial_batch

publishing = import_module("e2p_ray.commit.publish")  # the package has a function of this name

BAD_WEATHER = {
    "slow_down": 0.20,
    "internal": 0.02,
    "reset": 0.03,
    "lost_answer": 0.02,
    "truncate": 0.03,
    "slow": 0.02,
    "denied": 0.01,
}
DENIED_S = 0.4
# With the default of eight tries, one call in ten thousand meets eight faults in a row: one storm in fifty.
MAX_ATTEMPTS = 12
NUM_STORMS = 10 if IS_LONG else 1


@pytest.fixture(scope="module")
def stormy(s3_server: S3Server) -> Iterator[Stormy]:
    with stormy_s3(s3_server.endpoint_url) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def faulty(s3_server: S3Server) -> Iterator[Faulty]:
    with faulty_s3(s3_server.endpoint_url) as proxy:
        yield proxy


def through(server: S3Server, endpoint_url: str, **changes: object) -> StorageConfig:
    return server.config.model_copy(update={"endpoint_url": endpoint_url, "read_timeout_s": 5.0, **changes})


def job_through(stormy: Stormy, server: S3Server, folder: Path, **changes: object) -> JobConfig:
    """A job whose every byte goes through the proxy; its inputs are written in fair weather."""
    stormy.brew(0)
    config, _ = write_small_job(
        folder,
        place=server.new_bucket(),
        storage=through(server, stormy.endpoint_url, **changes),
        num_users=20,
        plan={"requests_per_shard": 20},
        workers={"num_cpus": 1, "max_size": 2},
    )
    return config


def rows_of(config: JobConfig) -> dict[tuple[str, ...], tuple[object, ...]]:
    """All of the published rows but when and by which run they were written."""
    options = Storage(config.storage).delta_options(config.output.table_uri)
    rows = DeltaTable(config.output.table_uri, storage_options=options).to_pyarrow_table()
    rows = rows.drop_columns(["generated_at", "run_id"])
    return {(r["user_id"], r["content_id"], r["task"]): tuple(r.values()) for r in rows.to_pylist()}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards are written in this process: what is tested is the driver's storage."""
    monkeypatch.setattr(whole_run, "run_batch", serial_batch)


@pytest.fixture(scope="module")
def calm(
    stormy: Stormy, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[tuple[str, ...], tuple[object, ...]], int]:
    """The published rows of a job that nothing disturbed, and how many requests it took."""
    config = job_through(stormy, s3_server, tmp_path_factory.mktemp("calm"))
    stormy.brew(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_run, "run_batch", serial_batch)
        generate_run(config, engine_factory=fake_engine)
    num_requests = stormy.counts().total()
    assert_conserved(config, expected_keys(20))
    return rows_of(config), num_requests


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(NUM_STORMS))
def test_a_whole_job_through_a_storm(
    seed: int,
    stormy: Stormy,
    s3_server: S3Server,
    tmp_path: Path,
    calm: tuple[dict[tuple[str, ...], tuple[object, ...]], int],
    ray_cluster: None,
) -> None:
    config = job_through(stormy, s3_server, tmp_path, max_attempts=MAX_ATTEMPTS)
    stormy.brew(seed, DENIED_S, **BAD_WEATHER)
    report = generate_run(config, engine_factory=fake_engine)
    counts = stormy.counts()
    stormy.brew(0)
    assert report.version is not None
    assert report.version.version == 0
    assert_conserved(config, expected_keys(20))
    rows, num_calm = calm
    assert rows_of(config) == rows
    num_faults = counts.total() - counts["ok"] - counts["slow"]
    print(f"storm {seed}: {counts.total()} requests, {num_faults} failed: {dict(counts)}; calm: {num_calm}")
    assert num_faults > 0.15 * counts.total(), "the control: there was a storm"
    # As was asked for, as far as chance allows: 20 % 503, 5 % connections that were reset.
    assert counts["slow_down"] > 0.13 * counts.total()
    assert counts["reset"] + counts["lost_answer"] > 0.01 * counts.total()
    assert {"slow_down", "reset", "denied", "truncate"} <= counts.keys()
    # What was served is what the job needed and what came twice: answers that were lost or cut, and looks after these.
    assert counts["ok"] + counts["slow"] <= 1.3 * num_calm
    assert counts.total() <= 2.5 * num_calm


PERMANENT = [
    ("slow_down", "from the start", StorageError, "in 3 tries: SlowDown"),
    ("denied", "from the start", AccessDeniedError, "in 3 tries: AccessDenied .*Check the credentials"),
    ("reset", "at publish", StorageError, "could not open .* max_retries"),
    ("denied", "at publish", AccessDeniedError, "in 3 tries: (AccessDenied|denied) .*Check the credentials"),
    ("slow_down", "at the commit", StorageError, "could not (open|publish)"),
    ("reset", "at the commit", StorageError, "could not (open|publish)"),
    ("denied", "at the commit", AccessDeniedError, "in 3 tries: denied"),
]


def test_what_does_not_pass_ends_the_job_and_publishes_nothing(
    stormy: Stormy, s3_server: S3Server, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One job, ended by one trouble after another; once it is over, the same command finishes."""
    config = job_through(stormy, s3_server, tmp_path, max_attempts=3)
    steps = {"at publish": (whole_run, "publish"), "at the commit": (publishing, "_try_commit")}
    for fault, when, kind, said in PERMANENT:
        stormy.brew(0)
        with monkeypatch.context() as patch:
            if when in steps:
                _trouble_before(patch, *steps[when], partial(stormy.brew, 0, **{fault: 1.0}))
            else:
                stormy.brew(0, **{fault: 1.0})
            with pytest.raises(kind, match=said) as caught:
                generate_run(config, engine_factory=fake_engine)
        assert caught.value.exit_code == 5
        counts = stormy.counts()
        assert counts.keys() == {fault}
        # Eight threads read a run back, with three tries each; Delta's client has its own tries within ours.
        assert counts.total() <= (24 if when == "at publish" else 12), (fault, when)
        stormy.brew(0)
        assert readers_see(config) is None
    generate_run(config, engine_factory=fake_engine)
    assert_conserved(config, expected_keys(20))


def _trouble_before(patch: pytest.MonkeyPatch, module: ModuleType, name: str, begin: Callable[[], None]) -> None:
    plain = getattr(module, name)

    def troubled(*arguments: Any, **named: Any) -> Any:
        begin()
        return plain(*arguments, **named)

    patch.setattr(module, name, troubled)


def test_a_denial_that_passes_is_waited_for(
    s3_server: S3Server, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the same kind of call was allowed before, a denial is tried as often as a 503; elsewhere a few times."""
    monkeypatch.setattr("e2p_ray.storage.s3._FIRST_WAIT_S", 0.001)
    storage, root = Storage(through(s3_server, faulty.endpoint_url)), s3_server.new_bucket()
    faulty.plan(["denied"] * 4)
    storage.write_bytes(f"{root}/a", b"bytes")
    assert faulty.num_requests == 5
    faulty.plan(["denied"] * 7)
    storage.write_bytes(f"{root}/a", b"bytes")
    assert faulty.num_requests == 8
    for verb, tries in (
        (lambda: storage.read_bytes(f"{root}/a"), 5),
        (lambda: storage.write_bytes(f"{root}/a", b""), 8),
    ):
        faulty.plan([], after="denied")
        with pytest.raises(AccessDeniedError, match=f"in {tries} tries: AccessDenied"):
            verb()
        assert faulty.num_requests == tries


def test_bytes_that_changed_on_their_way_are_fetched_again(
    s3_server: S3Server, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right length, wrong bytes: found by the hash that their writer left, or by the pages' checksums."""
    monkeypatch.setattr("e2p_ray.storage.s3._FIRST_WAIT_S", 0.001)
    storage, root = Storage(through(s3_server, faulty.endpoint_url)), s3_server.new_bucket()
    table = pa.table({"user_id": [f"user-{n}" for n in range(500)]})
    faulty.plan([])
    storage.write_table(f"{root}/t.parquet", table)
    faulty.plan(["corrupt", "truncate", "corrupt"])
    assert storage.read_bytes(f"{root}/t.parquet") == parquet_bytes(table)
    assert faulty.num_requests == 4
    faulty.plan([], after="corrupt")
    with pytest.raises(StorageError, match="other bytes arrived than were written"):
        storage.read_bytes(f"{root}/t.parquet")
    faulty.plan(["ok", "ok", "corrupt"])  # a look, the footer, the pages
    with pytest.raises(InputError, match=r"t\.parquet: not a whole Parquet file, or damaged"):
        storage.read_table(f"{root}/t.parquet")
    faulty.plan([])
    assert storage.read_table(f"{root}/t.parquet").equals(table)


def test_control_without_a_hash_wrong_bytes_pass(s3_server: S3Server, faulty: Faulty) -> None:
    """What another program wrote has none: only a Parquet file's own checksums, or TLS, could tell."""
    import boto3.session

    keys = s3_server.config
    assert keys.access_key_id is not None
    assert keys.secret_access_key is not None
    session = boto3.session.Session(
        keys.access_key_id.get_secret_value(), keys.secret_access_key.get_secret_value(), region_name="us-east-1"
    )
    root = s3_server.new_bucket()
    client = session.client("s3", endpoint_url=s3_server.endpoint_url)
    client.put_object(Bucket=root.removeprefix("s3://"), Key="a", Body=b"as it was written")
    faulty.plan(["corrupt"])
    found = Storage(through(s3_server, faulty.endpoint_url)).read_bytes(f"{root}/a")
    assert len(found) == len(b"as it was written")
    assert found != b"as it was written"


def test_a_shard_with_wrong_bytes_is_not_published(tmp_path: Path, here: None) -> None:
    """Right length, wrong bytes, on the disk: the marker's hash tells, and nothing is published."""
    config, _ = write_small_job(tmp_path, num_users=20)
    report = generate_run(config, engine_factory=fake_engine, publish_it=False)
    victim = sorted(Path(config.output.table_uri, "data", report.run_id).iterdir())[0]
    data = bytearray(victim.read_bytes())
    data[len(data) // 3] ^= 0x41
    victim.write_bytes(data)
    with pytest.raises(ConservationError, match="is not the one that was committed") as caught:
        generate_run(config, engine_factory=fake_engine)
    assert caught.value.exit_code == 4
    assert readers_see(config) is None

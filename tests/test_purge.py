"""Purging users: nothing of them is left anywhere, nothing else changes, and a killed purge is finished by another."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

import jobs.publish
import jobs.purge
from e2p_ray.batch.pieces import Piece
from e2p_ray.commit import ShardStats, load_run
from e2p_ray.commit.audit import verify_log
from e2p_ray.commit.failures import ShardFailure, write_failure
from e2p_ray.commit.history import read_history
from e2p_ray.commit.purge import find_users, purge_users, read_user_ids
from e2p_ray.commit.purge_table import read_state, swap_files
from e2p_ray.commit.rollback import rollback
from e2p_ray.commit.shard import data_bytes, rows_of
from e2p_ray.commit.users_in import Users
from e2p_ray.commit.vacuum import vacuum
from e2p_ray.engine.fake import FakeEngine
from e2p_ray.errors import IncompatibleError, InputError, PublishConflictError, StorageError
from e2p_ray.plan import load_plan
from e2p_ray.schema import DeadLetter, ErrorCode, RequestKey
from e2p_ray.storage import Storage
from e2p_ray.update import Limits
from jobs.cli import run_job
from jobs.whole_run import generate_run
from tests.plan_world import with_broken
from tests.s3 import IS_LONG, PLACES
from tests.small_job import first_groups
from tests.test_commit import opened, users_table
from tests.test_rollback import one_shard_world
from tests.update_world import User, World, content, make_world, vector

GONE = ("user-004", "user-007")
USERS = Users(GONE)


def silent(_: str) -> None:
    pass


def purge(world: World, storage: Storage | None = None, users: Users = USERS) -> Any:
    storage = storage or world.storage
    uri = world.config.output.uri
    return purge_users(storage, uri, users, find_users(storage, uri, users), silent)


@pytest.fixture(params=PLACES)
def lived_in(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A published table of four versions, one with copies by consent, and a run that was not finished.

    On S3 in long runs only: making it takes a minute there. With "cut", its log begins at a checkpoint.
    """
    if request.param != "s3":
        return lived(make_world(tmp_path, monkeypatch), is_cut=request.param == "cut")
    server = request.getfixturevalue("s3_server")
    place = {"place": server.new_bucket(), "storage": server.config}
    return lived(make_world(tmp_path, monkeypatch, **place))


def lived(world: World, *, is_cut: bool = False) -> World:
    world.candidates["user-004", "content-gone"] = 0.5  # dead letters of the plan
    world.run(engine=failing(world))
    world.contents["content-01"] = content(1, note=" Changed.")
    world.run()
    world.users["user-004"] = User(vector(77))
    world.run(limits=Limits(max_requests=1), engine=failing(world))
    if is_cut:
        world.table().create_checkpoint()
        for version in range(world.table().version()):
            world.storage.delete(f"{world.config.output.table_uri}/_delta_log/{version:020d}.json")
    world.run()
    world.contents["content-02"] = content(2, note=" Changed.")
    stop_after(world, num_shards=1)
    return world


def failing(world: World) -> Any:
    """The world's engine, with a dead letter of a user who is to go, and one of another."""

    def engine(config: Any, storage: Storage) -> FakeEngine:
        made = world.engine(config, storage)
        for key in sorted(world.wanted()):
            if key[0] in ("user-004", "user-005") and key[2] == "headline":
                made._errors[RequestKey(*key)] = ErrorCode.NON_FINITE_LOGITS
        return made

    return engine


def stop_after(world: World, num_shards: int, **options: Any) -> None:
    """A run that dies after so many shards."""

    def engine(config: Any, storage: Storage) -> FakeEngine:
        made, calls = world.engine(config, storage), Counter[str]()
        generate = made.generate

        def some(groups: Any) -> Any:
            known, groups = first_groups(groups)
            calls["first"] += any(r.user_embedding is not None for g in known for r in g.requests)
            if calls["first"] > num_shards:
                raise RuntimeError("killed here")
            return generate(groups)

        made.generate = some  # type: ignore[method-assign]
        return made

    with pytest.raises(AssertionError, match="killed here"):
        world.run(engine=engine, **options)


# -- an independent look at everything


def objects(world: World) -> dict[str, bytes]:
    """Every object below the output, by its path there."""
    uri = world.config.output.uri
    return {info.uri[len(uri) + 1 :]: world.storage.read_bytes(info.uri) for info in world.storage.list_objects(uri)}


def mentions(found: dict[str, bytes], user_ids: tuple[str, ...] = GONE) -> dict[str, int]:
    """How often any of these ids is anywhere: in bytes, in cells of Parquet, in its metadata; by the kind of place."""
    counts: Counter[str] = Counter()
    for path, data in found.items():
        text = data.decode("utf-8", "replace")
        if path.endswith(".parquet"):
            table = pq.read_table(pa.BufferReader(data))
            text += str(table.to_pylist()) + str(table.schema.metadata)
        kind = "log" if "_delta_log" in path else re.sub(r"/[0-9a-f]{16}/", "/", path).split("/")[0]
        kind = "dead letters" if "dead_letters" in path else "pages" if "report" in path else kind
        counts[kind] += sum(text.count(user_id) for user_id in user_ids)
    return {kind: number for kind, number in counts.items() if number}


def other_rows(found: dict[str, bytes], known: set[str]) -> dict[str, list[dict[str, Any]]]:
    """The rows of everybody else, by file."""
    tables = {p: pq.read_table(pa.BufferReader(found[p])) for p in known if p in found and "_delta_log" not in p}
    return {path: [row for row in t.to_pylist() if row["user_id"] not in GONE] for path, t in tables.items()}


def versions(world: World) -> Iterator[list[dict[str, Any]]]:
    """What readers see of every version that the log reaches back to, without the users who go; sorted."""
    for version in range(min(entry["version"] for entry in world.table().history()), world.table().version() + 1):
        uri, options = world.config.output.table_uri, world.storage.delta_options(world.config.output.table_uri)
        rows = DeltaTable(uri, version=version, storage_options=options).to_pyarrow_table().to_pylist()
        yield sorted((row for row in rows if row["user_id"] not in GONE), key=lambda r: [r[n] for n in KEY])


KEY = RequestKey._fields


@pytest.mark.parametrize("lived_in", [*PLACES, "cut"], indirect=True)
def test_nothing_is_left_and_nothing_else_changes(lived_in: World) -> None:
    world = lived_in
    before, seen, version = objects(world), list(versions(world)), world.table().version()
    parquet = {path for path in before if path.endswith(".parquet")}
    places = mentions(before)
    expected = {"generations", "log", "plans", "updates", "dead letters", "pages"}
    assert expected <= places.keys(), f"control: the ids are found where they are, {places}"
    checkpoints = {path: data for path, data in before.items() if ".checkpoint" in path}
    assert not checkpoints or mentions(checkpoints)["log"], "control: in the checkpoint, too"
    done = purge(world)
    after = objects(world)
    assert mentions(after) == {}
    assert done.version == version + 1
    assert checkpoints.keys() <= after.keys(), "what only they know of is not lost"
    assert vacuum(world.storage, world.config.output.uri, max_age_s=3600, dry_run=True) == ()
    now = list(versions(world))
    assert now[:-1] == seen, "every older version is readable, and has the rows of everybody else"
    assert now[-1] == seen[-1]
    assert world.table().to_pyarrow_table().num_rows == len(now[-1])
    assert other_rows(after, parquet) == other_rows(before, parquet)
    untouched = {path for path in parquet if pc.any(USERS.among(_user_ids(before[path]))).as_py() is not True}
    untouched = {path for path in untouched if not any(user.encode() in before[path] for user in GONE)}
    assert untouched, "some files hold nothing of them"
    assert all(after[path] == before[path] for path in untouched if "_delta_log" not in path)


def _user_ids(data: bytes) -> pa.ChunkedArray:
    table = pq.read_table(pa.BufferReader(data))
    return table["user_id"] if "user_id" in table.column_names else pa.chunked_array([[]], pa.string())


def test_markers_manifests_and_runs_stay_true(lived_in: World) -> None:
    world = lived_in
    purge(world)
    found = objects(world)
    num_markers = 0
    for path, data in found.items():
        if "/markers/" not in path:
            continue
        marker = json.loads(data)
        file = found[f"generations/data/{marker['run_id']}/{marker['shard_id']}.parquet"]
        assert (marker["data_size_bytes"], marker["data_sha256"]) == (len(file), hashlib.sha256(file).hexdigest())
        table = pq.read_table(pa.BufferReader(file))
        letters = json.loads(table.schema.metadata[b"e2p_ray.shard"])["dead_letters"]
        assert (marker["num_rows"], marker["num_requests"]) == (table.num_rows, table.num_rows + len(letters))
        num_markers += 1
    assert num_markers > 5
    for path in found:
        if path.endswith("manifest.json"):
            plan = load_plan(world.storage, f"{world.config.output.uri}/{path.removesuffix('/manifest.json')}")
            for shard in plan.shards:
                file = found[path.replace("manifest.json", f"shards/{shard.shard_id}.parquet")]
                table = pq.read_table(pa.BufferReader(file))
                assert (shard.num_requests, shard.num_bytes) == (table.num_rows, len(file))
                assert shard.num_groups == len(set(table["group"].to_pylist()))


def test_again_there_is_nothing_to_do(lived_in: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = lived_in
    file = tmp_path / "users.parquet"
    pq.write_table(pa.table({"user_id": list(GONE)}), file)
    job = ["--config", str(tmp_path / "job.yaml"), "--users", str(file)]
    before = objects(world)
    assert run_job(jobs.purge.JOB, [*job, "--dry-run"]) == 0
    said = capsys.readouterr()
    assert objects(world) == before, "a dry run changes nothing"
    rows = [row for row in world.table().to_pyarrow_table().to_pylist() if row["user_id"] in GONE]
    assert re.search(rf"visible table\s+{len(rows)}\n", said.out)
    assert run_job(jobs.purge.JOB, job) == 0
    said = capsys.readouterr()
    assert "still in" in said.err, "the users are in the inputs, and this is said"
    pages = [path for path in objects(world) if path.endswith("report.html")]
    assert pages == [path for path in before if path.endswith("report.html")], "pages are made again"
    first = objects(world)
    assert mentions(first) == {}
    assert run_job(jobs.purge.JOB, job) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert objects(world) == first
    log = verify_log(world.storage, world.config.output.uri)
    assert not log.problems
    assert [entry.action for entry in log.entries][-2:] == ["purge_begun", "purge"]
    assert log.entries[-1].ids["num_users"] == 2
    assert log.entries[-1].ids["users_digest"] == hashlib.sha256("\n".join(GONE).encode()).hexdigest()


def test_the_next_jobs_go_on(lived_in: World, tmp_path: Path) -> None:
    world = lived_in
    del world.contents["content-02"]
    world.contents["content-02"] = content(2)  # as it is published
    purge(world)
    report = world.run()
    assert report.version is not None
    assert report.version.already_published, "the inputs are the same, and the purged plan is found again"
    assert not world.calls
    job = ["--config", str(tmp_path / "job.yaml"), "--run", report.run_id]
    version = world.table().version()
    assert run_job(jobs.publish.JOB, job) == 0
    assert world.table().version() == version or {row["user_id"] for row in world.rows().values()}.isdisjoint(GONE)
    for user in GONE:
        del world.users[user]
    world.candidates = {pair: score for pair, score in world.candidates.items() if pair[0] not in GONE}
    report = world.run()
    assert {key for key in world.wanted() if key[0] != "user-005"} <= set(world.rows())
    assert world.calls.keys() <= {key for key in world.wanted() if key[0] == "user-005"}, "nothing else is written anew"


def test_a_first_run_that_was_interrupted_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path, monkeypatch)
    stop_after(world, num_shards=3)
    done = [path for path in objects(world) if "/markers/" in path]
    assert len(done) == 3
    assert purge(world).version is None, "nothing is visible yet"
    assert mentions(objects(world)) == {}
    world.calls.clear()
    report = generate_run(world.config, engine_factory=world.engine)  # the inputs are those of the purged plan
    assert report.version is not None
    expected = {key for key in world.wanted() if key[0] not in GONE}
    assert set(world.rows()) == expected
    num_called = len(world.calls)
    assert 0 < num_called < len(expected), "what was committed was not generated again"
    assert not [key for key in world.calls if key[0] in GONE]


class Dying(Storage):
    """A storage whose process is killed before its n-th write."""

    num_left = 0

    def _count(self) -> None:
        self.num_left -= 1
        if self.num_left < 0:
            raise KeyboardInterrupt

    def write_bytes(self, uri: str, data: bytes) -> None:
        self._count()
        super().write_bytes(uri, data)

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        self._count()
        return super().put_if_absent(uri, data)

    def delete(self, uri: str) -> None:
        self._count()
        super().delete(uri)


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_killed_purge_is_finished_by_the_next(is_cut: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed again and again, each time some writes later, going on from what the last one left."""
    world = lived(make_world(tmp_path, monkeypatch), is_cut=is_cut)
    world.table().create_checkpoint()
    seen, num_kills = list(versions(world)), 0
    for num_writes in range(0, 1000, 3 if IS_LONG else 13):
        storage = Dying()
        storage.num_left = num_writes
        try:
            purge(world, storage)
            break
        except KeyboardInterrupt:
            num_kills += 1
            current = world.table().to_pyarrow_table().to_pylist()
            rows = sorted((row for row in current if row["user_id"] not in GONE), key=lambda r: [r[n] for n in KEY])
            assert rows == seen[-1], "readers see all others at any moment"
    assert num_kills > 2
    assert mentions(objects(world)) == {}
    now = list(versions(world))
    assert now[: len(seen)] == seen
    assert len(now) == len(seen) + 1


def test_notes_of_failures_that_name_them_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path, monkeypatch)
    report = world.run(publish_it=False)
    run = load_run(world.storage, world.config.output.uri, report.run_id)
    said = [
        "1 request(s) planned, but without a result: user-004/content-01/headline",
        "not: user-006/content-01/headline",
    ]
    said.append("AssertionError: 1 missing: [RequestKey(user_id='user-007', content_id='content-01')]")
    now = datetime(2026, 1, 2, tzinfo=UTC)
    for shard_id, message in zip(run.shard_ids[:3], said, strict=True):
        write_failure(world.storage, run, ShardFailure(shard_id, 1, "ShardError", message, now, "host:1"))
    assert find_users(world.storage, world.config.output.uri, USERS).by_place()["notes of failures"] == 2
    purge(world)
    assert mentions(objects(world)) == {}
    assert [path.rpartition("/")[2] for path in objects(world) if "/failures/" in path] == [f"{run.shard_ids[1]}.json"]


def test_pieces_of_shards_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those without these users: requests have other places in a shard that lost some."""
    world = make_world(tmp_path, monkeypatch)
    report = world.run(publish_it=False)
    run = load_run(world.storage, world.config.output.uri, report.run_id)
    now = datetime(2026, 1, 2, tzinfo=UTC)
    stats = ShardStats(1, 0, 0, 0, 0, 0.0, now, now, "host:1")
    for place, user in enumerate(("user-004", "user-006")):
        letter = DeadLetter(user, "content-01", "headline", ErrorCode.POISON, "m", run.shard_ids[0], run.run_id)
        piece = Piece(run.shard_ids[0], place, place + 1)
        world.storage.write_bytes(piece.uri(run), data_bytes(rows_of(()), (letter,), stats))
    assert purge(world, users=Users(["user-999"])).num_objects == 0
    assert len([path for path in objects(world) if "/pieces/" in path]) == 2, "control: nobody was purged"
    purge(world)
    assert not [path for path in objects(world) if "/pieces/" in path]
    assert mentions(objects(world)) == {}


def _actions(path: Path) -> list[str]:
    return [text for text in path.read_text().splitlines() if not text.startswith('{"commitInfo"')]


def test_the_log_of_others_is_cleaned_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A condition that somebody deleted by, a checkpoint, a file that a killed writer left, other users' names."""
    world = make_world(tmp_path, monkeypatch)
    world.run()
    world.table().delete("user_id = 'user-004' or user_id = 'user-006'")
    world.table().delete("user_id = 'user-008'")
    source = pa.table({"user_id": ["user-004", "user-009"]})
    same = "t.user_id = s.user_id AND t.user_id != 'user-007'"
    merge = world.table().merge(source, same, source_alias="s", target_alias="t")
    merge.when_matched_delete("t.user_id = 'user-004'").when_matched_delete("t.user_id = 'user-009'").execute()
    log = tmp_path / "out" / "generations" / "_delta_log"
    spark = [["(user_id#12 = user-004)"], ["(user_id#12 IN (user-007,user-011))"], ["(user_id#12 = user-010)"]]
    for version, predicate in enumerate(spark, world.table().version() + 1):
        info = {"operation": "DELETE", "operationParameters": {"predicate": json.dumps(predicate)}}
        line = {"commitInfo": {"timestamp": 1, "engineInfo": "Apache-Spark/4.0.0", **info}}
        (log / f"{version:020d}.json").write_text(json.dumps(line) + "\n")
    assert mentions({path: data for path, data in objects(world).items() if path.endswith(f"{4:020d}.json")})
    world.table().create_checkpoint()
    left = tmp_path / "out" / "plans" / f".x.parquet.{'0' * 32}.tmp"
    left.write_bytes(b"user-004")
    torn = log / f"{9:020d}.json#1"  # Delta's own, killed within a commit
    torn.write_bytes(b'{"add":{"stats":"{\\"minValues\\":{\\"user_id\\":\\"user-004')
    (tmp_path / "out" / "note.bin").write_bytes(b"?")
    (tmp_path / "out" / "events.json").write_text(
        '{"user_id": "user-004", "x": 1}\n{"user_id": "user-008", "x": "a\u2028b"}\n'
        'no JSON\n[{"user_id": "user-007"}, 2]\n'
    )
    hadoop = b"crc\x00\x00\x00\x02\x00\xaa\xbb\xcc\xdd"  # what its local files have beside each
    checksums = [log / f".{name}.crc" for name in (f"{0:020d}.json", f"{6:020d}.json", "_last_checkpoint")]
    for path in checksums:
        path.write_bytes(hadoop)
    (log / f"{0:020d}.crc").write_text(json.dumps({"allFiles": [{"stats": {"minValues": {"user_id": "user-004"}}}]}))
    (log / f"{1:020d}.crc").write_text(json.dumps({"allFiles": []}))
    (log / f"{2:020d}.crc").write_text(json.dumps({"allFiles": [{"stats": {"maxValues": {"text": "a text"}}}]}))
    compacted = log / f"{0:020d}.{0:020d}.compacted.json"
    compacted.write_text("\n".join(before := _actions(log / f"{0:020d}.json")) + "\n")
    seen = list(versions(world))
    done = purge(world)
    assert mentions(objects(world)) == {}
    assert list(versions(world))[: len(seen)] == seen
    kept = (tmp_path / "out" / "events.json").read_text().split("\n")
    assert kept == ['{"user_id": "user-008", "x": "a\u2028b"}', "no JSON", "[2]", ""]
    assert [path.exists() for path in checksums] == [False, True, False], "those of files that are others now go"
    assert checksums[1].read_bytes() == hadoop
    assert _actions(compacted) == _actions(log / f"{0:020d}.json") != before
    assert [(log / f"{version:020d}.crc").exists() for version in (0, 1, 2)] == [False, True, False]
    assert not left.exists()
    assert not torn.exists()
    assert done.unread == (f"{world.config.output.uri}/note.bin",)
    text = "".join(path.read_text() for path in log.glob("*.json"))
    for stays in ("user_id = 'user-008'", "t.user_id = 'user-009'", "user-010"):
        assert stays in text, "control: who stays keeps the name in the log"
    assert [entry["operation"] for entry in world.table().history(4)][1:] == ["DELETE"] * 3
    assert world.table().to_pyarrow_table().num_rows == len(list(versions(world))[-1]) > 0


@pytest.mark.parametrize("is_first", [True, False])
def test_a_publish_between_look_and_purge_is_a_conflict(is_first: bool, tmp_path: Path) -> None:
    """What was found in files of nobody may be what readers see by then, and may not be rewritten under them."""
    made = opened(Storage(), str(tmp_path / "out"))
    made.commit_pending()
    users, later = Users(["u5"]), made
    if not is_first:
        made.publish()
        later = made.with_run("run2")
    survey = find_users(made.storage, made.output_uri, users)
    later.publish()
    before = later.published()
    with pytest.raises(PublishConflictError, match=r"was changed while users were being purged\..*same command again"):
        purge_users(made.storage, made.output_uri, users, survey, silent)
    assert later.published().equals(before)
    purge_users(made.storage, made.output_uri, users, find_users(made.storage, made.output_uri, users), silent)
    assert set(later.published()["user_id"].to_pylist()) == {f"u{user}" for user in range(5)}


def test_a_publish_within_a_purge_is_a_conflict(tmp_path: Path) -> None:
    made = opened(Storage(), str(tmp_path / "out"))
    made.commit_pending()
    made.publish()
    later, users = made.with_run("run2"), Users(["u5"])

    class Busy(Storage):
        def put_if_absent(self, uri: str, data: bytes) -> bool:
            is_first = super().put_if_absent(uri, data)
            later.publish()
            return is_first

    survey = find_users(made.storage, made.output_uri, users)
    with pytest.raises(PublishConflictError, match="was changed while users were being purged"):
        purge_users(Busy(), made.output_uri, users, survey, silent)
    assert set(later.published()["run_id"].to_pylist()) == {"run2"}, "and readers can read it"
    purge_users(made.storage, made.output_uri, users, find_users(made.storage, made.output_uri, users), silent)
    assert set(later.published()["user_id"].to_pylist()) == {f"u{user}" for user in range(5)}


@pytest.mark.parametrize("order", [("u5", "u4"), ("u4", "u5")])
def test_after_two_purges_a_run_is_still_what_was_published(order: tuple[str, str], tmp_path: Path) -> None:
    """One of them is in one file only: of the others there is no second copy."""
    made = one_shard_world(tmp_path)
    uri = made.output_uri
    for number, user in enumerate(order, 1):
        users = Users([user])
        assert purge_users(made.storage, uri, users, find_users(made.storage, uri, users), silent).version == number
        assert made.publish().already_published
    assert rollback(made.storage, uri, made.users_uri, version=2).already
    made.write_users(users_table(refusing={"u3"}))  # the titles are found by the file's name
    assert rollback(made.storage, uri, made.users_uri, version=1).num_files_suppressed == 4
    table = made.published()
    assert set(table.filter(pc.equal(table["user_id"], "u3"))["status"].to_pylist()) == {"suppressed"}
    assert set(table["user_id"].to_pylist()) == {"u0", "u1", "u2", "u3"}


def test_the_log_says_nothing_of_values_in_files_that_are_gone(tmp_path: Path) -> None:
    """A compaction notes the first and the last text; once its files are gone, nobody can say whose these were."""
    made = opened(Storage(), str(tmp_path / "out"))
    made.commit_pending("zz")
    made.publish()
    made.delta().optimize.compact()
    made.delta().create_checkpoint()
    made.with_run("run2").publish()
    vacuum(made.storage, made.output_uri, max_age_s=-60, dry_run=False)
    users, log = Users(["u5"]), tmp_path / "out" / "generations" / "_delta_log"

    def said() -> str:
        tables = [str(pq.read_table(path).to_pylist()) for path in log.glob("*.parquet")]
        return "".join([*tables, *(path.read_text() for path in log.glob("*.json"))])

    assert said().count("zz u5") >= 2, "control"
    rows = made.published().num_rows
    purge_users(made.storage, made.output_uri, users, find_users(made.storage, made.output_uri, users), silent)
    assert "u5" not in said()
    assert said().count("numRecords") > 8
    assert made.published().num_rows < rows
    assert [entry.num_rows for entry in read_history(made.storage, made.run.table_uri, 9)] == [56, 56, 68]


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("user_id\nuser-004\n", 1, "a header"),
        ("user_id,asked_at\nuser-004,2026-11-28\n", 1, "a header"),
        ("UserID;name\nuser-004;x\n", 1, "a header"),
        ('user-004\n"user-007"\n', 2, "a quote before the id"),
        ('"user-004","x"\n', 1, "a quote before the id"),
        ("'user-004'\n", 1, "a quote before the id"),
        ("user-004\n\n user-007\n", 3, "blanks before or after"),
        ("user-004\t\n", 1, "blanks before or after"),
    ],
)
def test_a_list_that_would_be_misread_is_refused(text: str, line: int, said: str, tmp_path: Path) -> None:
    file = tmp_path / "users.txt"
    file.write_text(text, encoding="utf-8-sig")
    with pytest.raises(InputError) as caught:
        read_user_ids(Storage(), str(file))
    assert caught.value.line == line
    assert str(caught.value).startswith(f"{file}, line {line}: {said}")
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own bytes
    assert (str(again), again.line) == (str(caught.value), line)
    assert "user-00" not in str(caught.value), "no message names a user"


def test_ids_of_every_form_are_read(tmp_path: Path) -> None:
    text, parquet = tmp_path / "users.txt", tmp_path / "users.parquet"
    plain = ["user-004", "a,b", "a b", 'it"s', "user_id", "山田", "a\u2028b", "a\x85b"]
    text.write_bytes("\r\n".join([*plain, "", "  "]).encode("utf-8-sig"))
    assert read_user_ids(Storage(), str(text)).ids == set(plain)
    odd = [*plain, " a ", '"a"', "user_id,x"]
    pq.write_table(pa.table({"user_id": odd}), parquet)
    assert read_user_ids(Storage(), str(parquet)).ids == set(odd)


def test_ids_that_are_no_text_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "users.parquet"
    pq.write_table(with_broken(pa.table({"user_id": ["user-004", None, "user-007"]}), "user_id", 2), file)
    with pytest.raises(InputError, match=f"{file}, column 'user_id', row 2 .counted from 0.: not UTF-8"):
        read_user_ids(Storage(), str(file))


@pytest.mark.parametrize("kind", [pa.float64(), pa.binary(), pa.list_(pa.int64())])
def test_ids_of_a_type_that_no_table_has_are_refused(kind: pa.DataType, tmp_path: Path) -> None:
    file, ids = tmp_path / "users.parquet", pa.array([4, 7])
    whole = {pa.float64(): ids.cast(pa.float64()), pa.binary(): ids.cast(pa.string()).cast(pa.binary())}
    pq.write_table(pa.table({"user_id": whole.get(kind, pa.array([[4], [7]]))}), file)
    with pytest.raises(InputError, match=f"{file}, column 'user_id': is (double|binary|list.*), not string"):
        read_user_ids(Storage(), str(file))
    for plain in (ids, ids.cast(pa.string()).dictionary_encode()):  # control
        pq.write_table(pa.table({"user_id": plain}), file)
        assert read_user_ids(Storage(), str(file)).ids == {"4", "7"}


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    world = make_world(tmp_path, monkeypatch)
    world.run()
    job = ["--config", str(tmp_path / "job.yaml")]
    assert run_job(jobs.purge.JOB, job) == 2
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    assert run_job(jobs.purge.JOB, [*job, "--users", str(empty)]) == 3
    assert run_job(jobs.purge.JOB, [*job, "--users", str(tmp_path / "none")]) == 5
    said = capsys.readouterr().err
    some = tmp_path / "some.txt"
    some.write_text("user-004\nuser-005,2026-11-28\nnobody\n")
    assert run_job(jobs.purge.JOB, [*job, "--users", str(some), "--dry-run"]) == 0
    assert "2 of these 3 ids are nowhere" in capsys.readouterr().err
    some.write_text("user-004\nuser-005\n")
    assert run_job(jobs.purge.JOB, [*job, "--users", str(some), "--dry-run"]) == 0
    assert "nowhere" not in capsys.readouterr().err, "control"
    assert "--users FILE" in said
    assert "no user id here" in said
    assert "there is no object" in said
    # Another commit between the look and the purge's own.
    state = read_state(world.storage, world.config.output.table_uri)
    hits = [hit.info for hit in find_users(world.storage, world.config.output.uri, USERS).hits]
    visible = [info for info in hits if state.path_of(info.uri) in state.active]
    world.table().delete("user_id = 'user-008'")
    with pytest.raises(PublishConflictError, match="same command again"):
        swap_files(world.storage, state, [USERS.out_of_parquet(world.storage, info) for info in visible])
    world.table().alter.add_feature(_feature(), allow_protocol_versions_increase=True)
    with pytest.raises(IncompatibleError, match="cannot be purged"):
        purge(world)


def _feature() -> Any:
    from deltalake import TableFeatures

    return TableFeatures.DeletionVectors


def test_a_writer_that_brings_them_back_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control of the proof: it reads what is there, not what was meant to be."""
    world = make_world(tmp_path, monkeypatch)
    world.run()

    class Forgetful(Storage):
        def write_bytes(self, uri: str, data: bytes) -> None:
            if "/plans/" not in uri:
                super().write_bytes(uri, data)

    with pytest.raises(StorageError, match="still hold"):
        purge(world, Forgetful())


def test_ids_are_whole_values_not_parts_of_others() -> None:
    users = Users(["1", "a'b"])
    assert users.in_json({"rows": [{"user_id": "1"}, {"user_id": "11"}, {"content_id": "1"}]}) == 1
    assert users.out_of_json({"rows": [{"user_id": "1"}, {"user_id": "11"}]}) == {"rows": [{"user_id": "11"}]}
    stats = {"stats": json.dumps({"minValues": {"user_id": "1", "content_id": "1"}})}
    assert json.loads(users.out_of_json(stats)["stats"]) == {"minValues": {"content_id": "1"}}
    assert users.in_json({"predicate": "user_id = 'a''b'"}) == 1
    assert users.in_json({"predicate": "user_id = 'a'"}) == 0
    restore = {"operation": "RESTORE", "operationParameters": {"version": "1"}}
    assert (users.in_json(restore), users.out_of_json(restore)) == (0, restore), "a number is nobody's name"
    merge = {"matchedPredicates": json.dumps([{"actionType": "delete", "predicate": "t.user_id = '1'"}])}
    assert users.in_json(merge) == 1
    kept = [{"actionType": "delete", "predicate": "redacted"}]
    assert json.loads(users.out_of_json(merge)["matchedPredicates"]) == kept
    for text, number in (("[a b = x", 0), ('["(x = a\'b)"]', 1), ('["(x <=1)", "(y = 2)"]', 1), ("[x] = 11", 0)):
        assert users.in_json({"predicate": text}) == number
    assert users.out_of_json({"predicate": '["(x <=1)", "(y = 2)"]'}) == {"predicate": '["redacted", "(y = 2)"]'}
    assert users.in_html('<td class="id">1</td><td>1</td><td class="id">a&#x27;b</td>') == 2
    assert "1" not in repr(users)
    assert users.among(pa.array(["1", None, "11"])).to_pylist() == [True, False, False]

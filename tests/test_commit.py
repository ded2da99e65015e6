"""Commit, verify, publish: on local files and on a real S3 server, with kills, races and tampering."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from e2p_ray.commit import (
    PublishedVersion,
    Run,
    ShardStats,
    check_gates,
    commit_shard,
    load_run,
    open_run,
    pending_shards,
    publish,
    read_markers,
    read_published,
    run_id_of,
    verify,
)
from e2p_ray.commit.purge import find_users
from e2p_ray.commit.spool import HashSpool, hash_rows, is_among
from e2p_ray.commit.users_in import Users
from e2p_ray.commit.vacuum import vacuum
from e2p_ray.config import GatesConfig
from e2p_ray.errors import (
    ConfigError,
    ConservationError,
    GateError,
    IncompatibleError,
    IncompleteRunError,
    InputError,
    PublishConflictError,
    ShardError,
)
from e2p_ray.schema import (
    DEAD_LETTERS,
    GENERATIONS,
    Arm,
    DeadLetter,
    ErrorCode,
    FinishReason,
    Generation,
    Reason,
    RequestKey,
    Status,
    planned_schema,
    to_table,
)
from e2p_ray.storage import ObjectInfo, Storage, parquet_bytes
from tests.plan_world import with_broken
from tests.s3 import IS_LONG, PLACES, place_on

GATES = GatesConfig(max_fallback_share=0.9, max_dead_letter_share=0.9)
NUM_SHARDS, NUM_USERS, NUM_CONTENTS = 4, 6, 3
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

# The server behind these children has everything imported: a child that is to be killed starts at once.
FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["tests.test_commit"])


def users_table(refusing: set[str] = frozenset(), gone: set[str] = frozenset()) -> pa.Table:  # type: ignore[assignment]
    ids = [f"u{user}" for user in range(NUM_USERS) if f"u{user}" not in gone]
    return pa.table(
        {
            "user_id": ids,
            "embedding": pa.array([[0.5] * 4] * len(ids), pa.list_(pa.float32(), 4)),
            "embedding_space": ["space"] * len(ids),
            "personalize": [user not in refusing for user in ids],
            "updated_at": pa.array([NOW] * len(ids), pa.timestamp("us", tz="UTC")),
        }
    )


@dataclass(frozen=True)
class World:
    """A plan made by hand, and what a generator would make of it."""

    storage: Storage
    output_uri: str
    run: Run

    @property
    def users_uri(self) -> str:
        return f"{self.output_uri}/users.parquet"

    def planned(self, shard_id: str) -> list[RequestKey]:
        number = int(shard_id.removeprefix("shard"))
        contents = [f"c{number}-{content}" for content in range(NUM_CONTENTS)]
        return [RequestKey(f"u{user}", content, "headline") for content in contents for user in range(NUM_USERS)]

    def all_planned(self) -> list[RequestKey]:
        return [key for shard_id in self.run.shard_ids for key in self.planned(shard_id)]

    def results(self, shard_id: str, writer: str = "w") -> tuple[list[Generation], list[DeadLetter]]:
        """One dead letter, one fallback, one suppressed row, the others personalised."""
        dead, fallback, suppressed, *others = self.planned(shard_id)
        rows = [self.row(key, f"{writer} {key.user_id} {key.content_id}") for key in others]
        reason = Reason.TOO_LONG
        rows.append(replace(self.row(fallback, "title"), status=Status.FALLBACK, reason=reason, personalized=False))
        reason = Reason.OPTED_OUT
        rows.append(replace(self.row(suppressed, "plain"), status=Status.SUPPRESSED, reason=reason, personalized=False))
        letter = DeadLetter(*dead, ErrorCode.NON_FINITE_LOGITS, f"by {writer}", shard_id, self.run.run_id)
        return rows, [letter]

    def row(self, key: RequestKey, text: str) -> Generation:
        ids = {"projector_id": "p", "base_model_id": "b", "prompt_id": "q", "embedding_space": "space"}
        return Generation(
            *key, text, Status.OK, None, True, Arm.SOFT_TOKEN, 9, 5, -0.5, FinishReason.END_TOKEN, "print",
            **ids, run_id=self.run.run_id, generated_at=datetime.now(UTC),
        )  # fmt: skip

    def commit(self, shard_id: str, writer: str = "w", storage: Storage | None = None) -> None:
        commit_shard(storage or self.storage, self.run, shard_id, *self.results(shard_id, writer), STATS)

    def commit_pending(self, writer: str = "w") -> None:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda shard_id: self.commit(shard_id, writer), pending_shards(self.storage, self.run)))

    def write_users(self, table: pa.Table) -> None:
        self.storage.write_table(self.users_uri, table)

    def publish(self, gates: GatesConfig = GATES) -> PublishedVersion:
        return publish(self.storage, self.run, gates, self.users_uri)

    def delta(self) -> DeltaTable:
        return DeltaTable(self.run.table_uri, storage_options=self.storage.delta_options(self.run.table_uri))

    def published(self) -> pa.Table:
        """What readers see; Polars and deltalake have to agree."""
        table = pa.Table.from_batches(self.delta().to_pyarrow_table().to_batches(), GENERATIONS)
        options = self.storage.delta_options(self.run.table_uri)
        scanned = pl.scan_delta(self.run.table_uri, storage_options=options).collect()
        order = [(name, "ascending") for name in RequestKey._fields]
        assert scanned.sort(RequestKey._fields)["text"].to_list() == table.sort_by(order)["text"].to_pylist()
        return table

    def with_run(self, name: str) -> World:
        """Another run of the same plan, everything committed."""
        world = replace(self, run=run_at(self.output_uri, name))
        open_run(self.storage, world.run, {})
        world.commit_pending(writer=name)
        return world

    def rewrite(self, shard_id: str, change: Callable[[pa.Table], pa.Table]) -> None:
        """Change a committed shard's rows and make its marker fit: only the keys can tell."""
        uri = self.run.data_uri(shard_id)
        data = parquet_bytes(change(pq.read_table(pa.BufferReader(self.storage.read_bytes(uri)))))
        self.storage.write_bytes(uri, data)
        marker = json.loads(self.storage.read_bytes(self.run.marker_uri(shard_id)))
        marker |= {"data_size_bytes": len(data), "data_sha256": hashlib.sha256(data).hexdigest()}
        self.storage.write_bytes(self.run.marker_uri(shard_id), json.dumps(marker).encode())


STATS = ShardStats(18, 180, 90, 85, 0, 1.5, NOW, NOW + timedelta(seconds=1.5), "host:1")


def run_at(output_uri: str, name: str) -> Run:
    shard_ids = tuple(f"shard{number}" for number in range(NUM_SHARDS))
    places = (f"{output_uri}/runs/{name}", f"{output_uri}/generations", f"{output_uri}/plans/plan")
    return Run(name, *places, "space", "p", "b", shard_ids)


def write_plan(world: World) -> None:
    for shard_id in world.run.shard_ids:
        rows = [
            {**key._asdict(), "group": 0, "title": f"Title of {key.content_id} 見出し", "body": "b", "language": "en"}
            for key in world.planned(shard_id)
        ]
        world.storage.write_table(world.run.planned_uri(shard_id), pa.Table.from_pylist(rows, planned_schema(4)))
    codes = [("u-unknown", ErrorCode.UNKNOWN_USER), ("", ErrorCode.NULL_KEY), ("", ErrorCode.NULL_KEY)]
    letters = [DeadLetter(user, "c0-0", "headline", code, "m", "plan", "") for user, code in codes]
    world.storage.write_table(f"{world.run.plan_uri}/dead_letters/part-0.parquet", to_table(letters, DEAD_LETTERS))


def opened(storage: Storage, output_uri: str, resolved_config: dict[str, Any] | None = None) -> World:
    """A world with a plan, a users table and an open run `run1` without a shard."""
    made = World(storage, output_uri, run_at(output_uri, "run1"))
    write_plan(made)
    made.write_users(users_table())
    open_run(storage, made.run, resolved_config or {})
    return made


# On files as well only in the long variant: tests/chaos kills and races jobs on files, and what is on S3 is harder.
on_s3 = pytest.mark.parametrize("world", ["local", "s3"] if IS_LONG else ["s3"], indirect=True)


@pytest.fixture(params=["local", "s3"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    """A plan of four shards, a users table, a run that is open and has nothing yet."""
    return opened(*place_on(request.param, request, tmp_path), {"storage": {"secret_access_key": "**********"}})


@pytest.fixture
def local(tmp_path: Path) -> World:
    """The same on local files only, all shards committed."""
    made = opened(Storage(), str(tmp_path / "out"))
    made.commit_pending()
    return made


def assert_conserved(world: World) -> pa.Table:
    """Every planned key exactly once, counted here and not by the code under test."""
    table = world.published()
    letters: list[RequestKey] = []
    for info in world.storage.list_objects(world.run.dead_letters_uri):
        rows = world.storage.read_table(info.uri).to_pylist()
        letters += [RequestKey(row["user_id"], row["content_id"], row["task"]) for row in rows]
    visible = [RequestKey(*key) for key in zip(*(table[name].to_pylist() for name in RequestKey._fields), strict=True)]
    assert Counter(visible + letters) == Counter(dict.fromkeys(world.all_planned(), 1))
    return table


# -- runs


def test_a_run_from_nothing_to_published(world: World) -> None:
    storage, run = world.storage, world.run
    assert pending_shards(storage, run) == list(run.shard_ids)
    with pytest.raises(IncompleteRunError, match="4 of 4 shards"):
        world.publish()
    world.commit_pending()
    assert pending_shards(storage, run) == []
    published = world.publish()
    assert published == PublishedVersion(0, 4 * 17, 4, already_published=False)
    table = assert_conserved(world)
    assert table.schema.names == GENERATIONS.names
    assert Counter(table["status"].to_pylist()) == {"ok": 60, "fallback": 4, "suppressed": 4}
    entry = world.delta().history(1)[0]
    assert (entry["run_id"], entry["projector_id"], entry["base_model_id"]) == ("run1", "p", "b")
    actions = pl.DataFrame(world.delta().get_add_actions(flatten=True))
    assert sorted(actions["path"]) == [f"data/run1/shard{number}.parquet" for number in range(4)]
    assert actions["num_records"].to_list() == [17] * 4
    assert set(actions["min.user_id"]) == {"u0"}
    assert set(actions["max.user_id"]) == {"u5"}
    assert load_run(storage, world.output_uri, "run1") == run


def test_readers_skip_files_by_their_statistics(local: World) -> None:
    local.publish()
    found = local.delta().to_pyarrow_table(filters=[("content_id", "=", "c2-1")])
    assert set(found["content_id"].to_pylist()) == {"c2-1"}
    assert found.num_rows == NUM_USERS


def test_markers_say_what_a_report_needs(local: World) -> None:
    marker = read_markers(local.storage, local.run)[1]
    assert marker["shard_id"] == "shard1"
    assert (marker["num_requests"], marker["num_rows"]) == (18, 17)
    assert marker["statuses"] == {"fallback": 1, "ok": 15, "suppressed": 1}
    assert marker["reasons"] == {"opted_out": 1, "too_long": 1}
    assert marker["error_codes"] == {"non_finite_logits": 1}
    assert marker["stats"]["num_computed_tokens"] == 90
    assert datetime.fromisoformat(marker["stats"]["started_at"]) == NOW
    data = local.storage.read_bytes(local.run.data_uri("shard1"))
    assert (marker["data_size_bytes"], marker["data_sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def test_verify_counts(local: World) -> None:
    summary = verify(local.storage, local.run)
    assert (summary.num_requests, summary.num_rows, summary.num_dead_letters) == (4 * 18 + 3, 4 * 17, 4 + 3)
    assert summary.error_codes == {"non_finite_logits": 4, "null_key": 2, "unknown_user": 1}
    assert summary.fallback_share == 4 / 64
    assert summary.dead_letter_share == 7 / 75
    assert summary.num_texts == {"headline": 60}
    assert summary.same_text_shares == {"headline": 1 / 60}


def test_a_run_is_recorded_once(local: World) -> None:
    open_run(local.storage, local.run, {"another": "configuration"})
    assert json.loads(local.storage.read_bytes(local.run.record_uri))["config"] == {}
    with pytest.raises(IncompatibleError, match="another projector_id"):
        open_run(local.storage, replace(local.run, projector_id="p2"), {})
    with pytest.raises(ConfigError, match="no such run"):
        load_run(local.storage, local.output_uri, "run9")


def test_the_places_of_a_run_move_with_its_output(local: World, tmp_path: Path) -> None:
    (tmp_path / "out").rename(tmp_path / "moved")
    run = load_run(local.storage, f"{tmp_path}/moved", "run1")
    assert run.plan_uri == f"{tmp_path}/moved/plans/plan"
    assert publish(local.storage, run, GATES, f"{tmp_path}/moved/users.parquet").num_rows == 4 * 17


def test_run_ids() -> None:
    parts = ("plan", "text", "projector", "base")
    assert run_id_of(*parts) == run_id_of(*parts)
    others = {run_id_of(*(f"{part}x" if i == j else part for i, part in enumerate(parts))) for j in range(4)}
    assert len(others | {run_id_of(*parts)}) == 5
    assert run_id_of("ab", "c", "d", "e") != run_id_of("a", "bc", "d", "e")
    assert len(run_id_of(*parts)) == 16


@pytest.mark.parametrize("bad", ["", "..", "../x", "a/b", "a b", "a%2f", ".hidden", "-x", "a\n", "あ", "x" * 129])
def test_ids_never_leave_their_folder(bad: str) -> None:
    with pytest.raises(ConfigError, match="is not an id"):
        replace(run_at("out", "run1"), shard_ids=(bad,))
    with pytest.raises(ConfigError, match="is not an id"):
        run_at("out", "run1").data_path(bad)
    with pytest.raises(ConfigError, match="is not an id"):
        load_run(Storage(), "out", bad)


# -- shards


def test_a_shard_with_other_keys_than_planned_is_refused(world: World) -> None:
    rows, letters = world.results("shard0")
    foreign = replace(rows[0], user_id="u99")
    cases = [
        (rows[1:], letters, "1 request(s) planned, but without a result: u3/c0-0/headline"),
        ([*rows, foreign], letters, "1 request(s) not planned: u99/c0-0/headline"),
        ([foreign, *rows[1:]], letters, "not planned: u99/c0-0/headline"),
        ([*rows, rows[0]], letters, "1 request(s) with more than one result: u3/c0-0/headline"),
        (rows, [*letters, letters[0]], "with more than one result"),
        ([], [], "18 request(s) planned, but without a result: u0/c0-0/headline, "),
    ]
    for generations, dead_letters, message in cases:
        with pytest.raises(ShardError) as caught:
            commit_shard(world.storage, world.run, "shard0", generations, dead_letters, STATS)
        assert message in str(caught.value)
    assert pending_shards(world.storage, world.run) == list(world.run.shard_ids)
    assert not world.storage.exists(world.run.data_uri("shard0"))


def test_writers_of_one_shard_end_with_the_same_result(world: World) -> None:
    """Texts, dead letters and times of the writers differ; no mixture of them may be seen."""

    def write(writer: int) -> None:
        rows, letters = world.results("shard0", f"writer{writer}")
        if writer % 2:  # this one has a text for the request that the others have as a dead letter
            rows, letters = [*rows, world.row(letters[0].key, f"writer{writer} rescued")], []
        commit_shard(world.storage, world.run, "shard0", rows, letters, STATS)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, range(6)))
    data = world.storage.read_bytes(world.run.data_uri("shard0"))
    write(6)  # long after, as a node that was thought lost
    write(7)
    assert world.storage.read_bytes(world.run.data_uri("shard0")) == data
    world.commit_pending("another")
    world.publish()
    table = assert_conserved(world)
    texts = table.filter(pc.match_substring(table["content_id"], "c0-"))["text"].to_pylist()
    assert len({text.split()[0] for text in texts if text.startswith("writer")}) == 1


class SuicidalStorage(Storage):
    """Kills its process, as the kernel would, right after a number of writes."""

    num_writes_left = 1

    def write_bytes(self, uri: str, data: bytes) -> None:
        super().write_bytes(uri, data)
        self._count()

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        written = super().put_if_absent(uri, data)
        self._count()
        return written

    def _count(self) -> None:
        self.num_writes_left -= 1
        if not self.num_writes_left:
            os.kill(os.getpid(), 9)


def suicidal(storage: Storage, num_writes: int) -> Storage:
    dying = SuicidalStorage(storage.config)
    dying.num_writes_left = num_writes
    return dying


def in_child(function: Callable[..., None], *arguments: Any) -> int | None:
    process = FORKS.Process(target=function, args=arguments)
    process.start()
    process.join(100)
    return process.exitcode


def commit_and_die(world: World, shard_id: str, num_writes: int) -> None:
    world.commit(shard_id, "killed", suicidal(world.storage, num_writes))


@on_s3
def test_killed_at_every_step_of_a_shard(world: World) -> None:
    """Data, dead letters, marker: a process killed after each of them, then a run of the same command again."""
    for shard_id, num_writes in zip(world.run.shard_ids, (1, 2, 3), strict=False):
        assert in_child(commit_and_die, world, shard_id, num_writes) == -9
        assert world.storage.exists(world.run.data_uri(shard_id))
        assert world.storage.exists(world.run.dead_letter_uri(shard_id)) == (num_writes > 1)
    assert pending_shards(world.storage, world.run) == ["shard0", "shard1", "shard3"]
    world.commit_pending("resumed")
    world.publish()
    texts = assert_conserved(world)["text"].to_pylist()
    assert sum(text.startswith("killed") for text in texts) == 45  # what was durable is kept, not made again
    assert sum(text.startswith("resumed") for text in texts) == 15


def test_a_data_file_that_is_no_shard_is_named(local: World) -> None:
    local.storage.delete(local.run.marker_uri("shard0"))
    local.storage.write_bytes(local.run.data_uri("shard0"), b"not Parquet")
    with pytest.raises(ShardError, match=r"shard0\.parquet is not a shard's data file\. Delete it"):
        local.commit("shard0")


@pytest.mark.parametrize(
    ("known", "new"),
    [(b'"non_finite_logits"', b'"a_new_code"'), (b'"error_code"', b'"a_new_field": 1, "error_code"')],
    ids=["code", "field"],
)
def test_a_shard_of_a_newer_release_is_named(local: World, known: bytes, new: bytes) -> None:
    """Its dead letters may have codes and fields that are not known here."""
    uri = local.run.data_uri("shard0")
    table = local.storage.read_table(uri)
    before = (table.schema.metadata or {})[b"e2p_ray.shard"]
    footer = before.replace(known, new)
    assert footer != before
    local.storage.write_table(uri, table.replace_schema_metadata({b"e2p_ray.shard": footer}))
    marker = json.loads(local.storage.read_bytes(local.run.marker_uri("shard0")))
    written = local.storage.read_bytes(uri)
    marker |= {"data_size_bytes": len(written), "data_sha256": hashlib.sha256(written).hexdigest()}
    local.storage.write_bytes(local.run.marker_uri("shard0"), json.dumps(marker).encode())
    said = r"^\S+shard0\.parquet has dead letters that this version does not know\. Install the newer one$"
    with pytest.raises(IncompatibleError, match=said):  # and not that the file should be deleted
        verify(local.storage, local.run)
    local.storage.delete(local.run.marker_uri("shard0"))
    with pytest.raises(IncompatibleError, match=said):
        local.commit("shard0")


# -- conservation


def drop(rows: pa.Table) -> pa.Table:
    return rows.slice(1)


def double(rows: pa.Table) -> pa.Table:
    return pa.concat_tables([rows, rows.slice(0, 1)])


def swap(rows: pa.Table) -> pa.Table:
    """The same number of rows, one of them of another user."""
    users = rows["user_id"].to_pylist()
    field = rows.schema.field("user_id")
    return rows.set_column(0, field, pa.array(["u77", *users[1:]]))


def lose_and_double(rows: pa.Table) -> pa.Table:
    """What a retry does when it goes wrong: one row lost, one there twice, the count right."""
    return pa.concat_tables([rows.slice(1), rows.slice(1, 1)])


@pytest.mark.parametrize("world", PLACES, indirect=True)
@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (drop, ["1 request(s) planned, but without a result: u1/c1-0/headline"]),
        (double, ["1 request(s) with more than one result: u1/c1-0/headline"]),
        (swap, ["without a result: u1/c1-0/headline", "not planned: u77/c1-0/headline"]),
        (lose_and_double, ["without a result: u1/c1-0/headline", "more than one result: u2/c1-0/headline"]),
    ],
)
def test_wrong_rows_are_caught(change: Callable[[pa.Table], pa.Table], messages: list[str], world: World) -> None:
    world.commit_pending()
    world.rewrite("shard1", lambda rows: rows)
    verify(world.storage, world.run)  # the control: rewriting alone is not caught
    world.rewrite("shard1", change)
    with pytest.raises(ConservationError) as caught:
        world.publish()
    for message in messages:
        assert message in str(caught.value)
    assert not DeltaTable.is_deltatable(world.run.table_uri, world.storage.delta_options(world.run.table_uri))


def test_one_request_in_two_shards_is_caught(local: World) -> None:
    planned = local.storage.read_table(local.run.planned_uri("shard0"))
    rows = planned.to_pylist()
    rows[5] |= {"content_id": "c1-0"}  # u5/c1-0 is planned in shard1 too
    local.storage.write_table(local.run.planned_uri("shard0"), pa.Table.from_pylist(rows, planned.schema))

    def move(rows: pa.Table) -> pa.Table:
        mine = pc.and_(pc.equal(rows["user_id"], "u5"), pc.equal(rows["content_id"], "c0-0"))
        return rows.set_column(1, rows.schema.field(1), pc.if_else(mine, "c1-0", rows["content_id"]))

    local.rewrite("shard0", move)
    with pytest.raises(ConservationError, match=r"1 request\(s\) in more than one place: u5/c1-0/headline"):
        verify(local.storage, local.run)


def test_a_dead_letter_of_the_plan_that_has_a_text_is_caught(local: World) -> None:
    letter = DeadLetter("u4", "c0-1", "headline", ErrorCode.UNKNOWN_USER, "m", "plan", "")
    uri = f"{local.run.plan_uri}/dead_letters/part-1.parquet"
    local.storage.write_table(uri, to_table([letter], DEAD_LETTERS))
    with pytest.raises(ConservationError, match="in more than one place: u4/c0-1/headline"):
        verify(local.storage, local.run)


def test_tampered_objects_are_caught(local: World) -> None:
    storage, run = local.storage, local.run
    data = storage.read_bytes(run.data_uri("shard2"))
    storage.write_bytes(run.data_uri("shard2"), data[:100] + bytes([data[100] ^ 1]) + data[101:])
    storage.delete(run.data_uri("shard0"))
    storage.write_table(run.dead_letter_uri("shard3"), to_table([], DEAD_LETTERS))
    with pytest.raises(ConservationError) as caught:
        verify(storage, run)
    for problem in ("shard0 (or its dead letter file is missing)", "shard2 (is not the one that was committed)",
                    "shard3 (has other dead letters than its dead letter file)", "generate again"):  # fmt: skip
        assert problem in str(caught.value)
    for shard_id in ("shard0", "shard2", "shard3"):  # the remedy it names
        storage.delete(run.data_uri(shard_id))
        storage.delete(run.marker_uri(shard_id))
    local.commit_pending("again")
    local.publish()
    assert_conserved(local)


# -- gates


def test_gates_refuse(local: World) -> None:
    summary = verify(local.storage, local.run)
    check_gates(summary, GATES)
    with pytest.raises(GateError, match=r"max_dead_letter_share is 0\.093, the limit 0\.05: look at its dead letters"):
        check_gates(summary, GatesConfig(max_dead_letter_share=0.05))
    with pytest.raises(GateError, match=r"max_fallback_share is 0\.062, the limit 0\.06: look at the reasons"):
        check_gates(summary, GatesConfig(max_dead_letter_share=1, max_fallback_share=0.06))
    with pytest.raises(GateError, match="no text at all"):
        check_gates(replace(summary, num_rows=0), GATES)
    with pytest.raises(GateError):
        local.publish(GatesConfig(max_dead_letter_share=0.0))
    assert not DeltaTable.is_deltatable(local.run.table_uri)


def test_the_same_text_for_everybody_is_refused(local: World) -> None:
    def same(rows: pa.Table) -> pa.Table:
        texts = pc.if_else(rows["personalized"], "Read this!", rows["text"])
        return rows.set_column(3, rows.schema.field(3), texts)

    for shard_id in ("shard0", "shard1", "shard2"):
        local.rewrite(shard_id, same)
    with pytest.raises(GateError, match=r"max_same_text_share is 0\.750, the limit 0\.5: look at the texts of task"):
        local.publish()


# -- consent


def test_consent_is_checked_again_when_publishing(world: World) -> None:
    world.commit_pending()
    before = {row["user_id"]: row for row in users_table().to_pylist()}
    latest = [
        {**before["u3"], "personalize": False, "updated_at": NOW + timedelta(days=1)},  # his latest word is no
        {**before["u4"], "personalize": False, "updated_at": NOW - timedelta(days=1)},  # his latest word is yes
    ]
    users = users_table(refusing={"u1"}, gone={"u2"})
    world.write_users(pa.concat_tables([users, pa.Table.from_pylist(latest, users.schema)]))
    published = world.publish()
    table = assert_conserved(world)
    refused = table.filter(pc.is_in(table["user_id"], pa.array(["u1", "u2", "u3"])))
    assert set(refused["status"].to_pylist()) == {"suppressed"}
    assert set(refused["personalized"].to_pylist()) == {False}
    rewritten = refused.filter(pc.equal(refused["arm"], "title"))
    assert rewritten.num_rows == 4 * (3 * NUM_CONTENTS - 1)  # the first u2 of each shard was suppressed when planned
    for row in rewritten.to_pylist():
        assert row["text"] == f"Title of {row['content_id']} 見出し"
        assert (row["reason"], row["mean_logprob"], row["fingerprint"]) == ("opted_out", None, "")
    others = table.filter(pc.is_in(table["user_id"], pa.array(["u0", "u4", "u5"])))
    assert set(others["status"].to_pylist()) == {"ok"}
    assert all(uri.rpartition("/")[2].startswith("shard") and "-" in uri.rpartition("/")[2]
               for uri in world.delta().file_uris())  # fmt: skip
    assert world.publish() == replace(published, already_published=True)


def test_where_there_is_no_title_the_row_is_left_out_and_accounted_for(local: World) -> None:
    def titled(rows: pa.Table) -> pa.Table:
        names = {"c0-1": " \n ", "c0-2": " Line one\nline two\t x "}
        titles = [names.get(row["content_id"], row["title"]) for row in rows.to_pylist()]
        return rows.set_column(rows.schema.get_field_index("title"), rows.schema.field("title"), [titles])

    planned_uri = local.run.planned_uri("shard0")
    local.storage.write_table(planned_uri, titled(local.storage.read_table(planned_uri)))
    local.write_users(users_table(refusing={"u5"}))
    published = local.publish()
    assert (published.num_rows, published.num_files, published.num_untitled) == (4 * 17 - 1, 4, 1)
    rows = {(row["user_id"], row["content_id"]): row["text"] for row in assert_conserved(local).to_pylist()}
    assert rows["u5", "c0-2"] == "Line one line two x"
    assert "" not in rows.values()
    (letter,) = local.storage.read_table(local.run.untitled_uri("shard0")).to_pylist()
    assert (letter["user_id"], letter["content_id"], letter["error_code"]) == ("u5", "c0-1", "empty_content")
    again = local.publish()
    assert (again.already_published, again.num_untitled) == (True, 1)
    local.write_users(users_table(refusing={"u4", "u5"}))
    assert local.publish().num_untitled == 2
    assert_conserved(local)
    verify(local.storage, local.run)
    vacuum(local.storage, local.output_uri, max_age_s=0, dry_run=False)
    assert_conserved(local)
    found = find_users(local.storage, local.output_uri, Users(["u5"]))
    assert local.run.untitled_uri("shard0") in [hit.info.uri for hit in found.hits]


def test_an_opt_out_after_publishing_is_taken_in_by_publishing_again(local: World) -> None:
    local.publish()
    local.write_users(users_table(refusing={"u5"}))
    assert local.publish() == PublishedVersion(1, 4 * 17, 4, already_published=False)
    table = assert_conserved(local)
    assert set(table.filter(pc.equal(table["user_id"], "u5"))["arm"].to_pylist()) == {"title"}


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_ids_of_every_kind_of_string_opt_out(kind: pa.DataType, local: World) -> None:
    users = users_table(refusing={"u5"})
    ids = pa.chunked_array([[*users["user_id"].to_pylist(), None]]).cast(kind)
    users = pa.concat_tables([users, users.slice(0, 1)]).set_column(0, "user_id", ids)
    local.write_users(users)
    assert local.storage.read_schema(local.users_uri).field("user_id").type == kind
    local.publish()
    table = assert_conserved(local)
    assert set(table.filter(pc.equal(table["user_id"], "u5"))["arm"].to_pylist()) == {"title"}
    assert "u3" in table.filter(pc.equal(table["arm"], "soft_token"))["user_id"].to_pylist()


def test_a_null_switch_means_no(local: World) -> None:
    users = users_table()
    local.write_users(users.set_column(3, "personalize", pa.nulls(NUM_USERS, pa.bool_())))
    local.publish()
    assert set(local.published()["status"].to_pylist()) == {"suppressed"}


def test_bytes_that_are_no_text_in_the_users_table_are_named(local: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second of three batches: the row is the file's."""
    monkeypatch.setattr("e2p_ray.storage._BATCH_ROWS", 2)
    local.write_users(with_broken(users_table(), "user_id", 3))
    said = f"{local.users_uri}, column 'user_id', row 3 .counted from 0.: not UTF-8. Write it anew"
    with pytest.raises(InputError, match=said):
        local.publish()
    assert read_published(local.storage, local.run.table_uri) is None
    local.write_users(users_table())
    assert local.publish().version == 0, "the control"


# -- publishing


def test_publishing_twice_changes_nothing(world: World) -> None:
    world.commit_pending()
    first = world.publish()
    assert world.publish() == replace(first, already_published=True)
    assert world.delta().version() == 0


def begun(world: World, name: str, *, is_first: bool = False, version: int | None = None) -> World:
    """Another run that is committed, as one of a job that found no table or this version of it; read back."""
    made = replace(world, run=replace(run_at(world.output_uri, name), is_first=is_first, base_version=version))
    open_run(world.storage, made.run, {})
    made.commit_pending(writer=name)
    assert load_run(world.storage, world.output_uri, name) == made.run
    return made


def test_a_run_does_not_undo_what_was_published_since_it_began(local: World) -> None:
    one, other = begun(local, "run2", is_first=True), begun(local, "run3", is_first=True)
    one.publish()
    with pytest.raises(PublishConflictError, match=r"published first since run run3 began\. Run jobs\.generate again"):
        other.publish()
    assert one.publish().already_published
    full, late = begun(local, "run4", version=0), begun(local, "run5", version=0)
    local.delta().optimize.compact()
    assert full.publish().version == local.delta().version(), "upkeep is no change"
    full.write_users(users_table(refusing={"u5"}))
    assert not full.publish().already_published, "the table shows this very run"
    with pytest.raises(PublishConflictError, match="changed since version 0, from which run run5 began"):
        late.publish()
    later = begun(local, "run6", version=local.delta().version())
    local.delta().delete("user_id = 'u4'")
    with pytest.raises(PublishConflictError, match="changed since version"):
        later.publish()
    assert "u4" not in local.published()["user_id"].to_pylist()
    assert set(local.published()["run_id"].to_pylist()) == {"run4"}


def test_of_two_runs_from_one_version_the_second_is_refused_while_it_is_published(
    local: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.publish()
    one, other = begun(local, "run2", version=0), begun(local, "run3", version=0)
    publishing = importlib.import_module("e2p_ray.commit.publish")
    actions = publishing.add_actions

    def overtaken(*arguments: Any) -> Any:
        monkeypatch.undo()
        one.publish()
        return actions(*arguments)

    monkeypatch.setattr(publishing, "add_actions", overtaken)
    with pytest.raises(PublishConflictError, match=r"changed since version 0.*Run jobs\.generate again"):
        other.publish()
    assert set(local.published()["run_id"].to_pylist()) == {"run2"}


def test_a_run_of_an_older_release_is_published_as_it_was(local: World) -> None:
    local.publish()
    old = begun(local, "run2", is_first=True)
    record = json.loads(local.storage.read_bytes(old.run.record_uri))
    del record["is_first"], record["base_version"]
    local.storage.write_bytes(old.run.record_uri, json.dumps(record).encode())
    old = replace(old, run=load_run(local.storage, local.output_uri, "run2"))
    assert old.publish().version == 1


@pytest.mark.parametrize("name", ["a b", "a#b?c", "100%", "日本", "x//y"])
def test_an_output_may_have_such_a_name(name: str, tmp_path: Path) -> None:
    for scheme in [""] if set(name) & set("#?") else ["", "file://"]:
        world = opened(Storage(), f"{scheme}{tmp_path}/{scheme[:4]}{name}")
        world.commit_pending()
        assert world.publish().version == 0
        world.write_users(users_table(refusing={"u5"}))
        assert world.publish().version == 1
        shown = read_published(world.storage, world.run.table_uri)
        assert shown is not None
        assert all(map(world.storage.exists, shown.file_uris))
        assert world.delta().to_pyarrow_table().num_rows == 4 * 17
        replaced = {world.run.data_uri(shard_id) for shard_id in world.run.shard_ids}
        orphans = vacuum(world.storage, world.output_uri, max_age_s=0, dry_run=True)
        assert {orphan.uri for orphan in orphans if "/generations/" in orphan.uri} == replaced


def test_versions_follow_each_other_and_can_be_restored(world: World) -> None:
    world.commit_pending("run1")
    world.publish()
    second = world.with_run("run2")
    assert second.publish() == PublishedVersion(1, 4 * 17, 4, already_published=False)
    assert set(second.published()["run_id"].to_pylist()) == {"run2"}
    old = DeltaTable(world.run.table_uri, version=0, storage_options=world.storage.delta_options(world.run.table_uri))
    assert set(old.to_pyarrow_table()["run_id"].to_pylist()) == {"run1"}
    world.delta().restore(0)
    assert set(assert_conserved(world)["run_id"].to_pylist()) == {"run1"}
    assert world.publish().already_published
    assert second.publish() == PublishedVersion(3, 4 * 17, 4, already_published=False)
    assert set(second.published()["run_id"].to_pylist()) == {"run2"}


def test_rows_deleted_from_the_table_stay_deleted(local: World) -> None:
    published = local.publish()
    local.delta().delete("user_id = 'u5'")
    assert local.publish() == replace(published, version=1, already_published=True)
    assert "u5" not in local.published()["user_id"].to_pylist()
    local.write_users(users_table(refusing={"u4"}))
    with pytest.raises(PublishConflictError, match="would come back"):
        local.publish()
    assert "u5" not in local.published()["user_id"].to_pylist()


def test_upkeep_and_vacuum_leave_a_run_as_it_was(local: World) -> None:
    local.publish()
    pending = local.with_run("run2")  # generated, not published
    local.delta().optimize.compact()
    local.delta().vacuum(full=True, dry_run=False)
    assert_conserved(local)
    assert local.publish().already_published
    pending.publish()
    assert_conserved(pending)


@on_s3
def test_readers_see_one_run_or_the_other(world: World) -> None:
    runs = [world.with_run(f"run{number}") for number in (2, 3)]
    runs[0].publish()
    options = world.storage.delta_options(world.run.table_uri)

    def switch() -> None:
        for turn in (1, 0, 1):
            runs[turn].publish()

    seen: set[str] = set()
    with ThreadPoolExecutor(1) as pool:
        switching = pool.submit(switch)
        while not switching.done():
            frame = pl.scan_delta(world.run.table_uri, storage_options=options).select("run_id", "user_id").collect()
            assert frame.height == 4 * 17
            assert frame["run_id"].n_unique() == 1
            seen |= set(frame["run_id"])
        switching.result()
    assert world.delta().version() == 3
    assert seen <= {"run2", "run3"}


class MeetingStorage(Storage):
    """Waits for the other publishers once each of them has looked at the table."""

    def __init__(self, storage: Storage, barrier: Barrier) -> None:
        super().__init__(storage.config)
        self._barrier: Barrier | None = barrier

    def list_objects(self, uri: str) -> Iterator[ObjectInfo]:
        if self._barrier is not None:
            self._barrier.wait(60)
            self._barrier = None
        return super().list_objects(uri)


def publish_together(world: World, barrier: Barrier, answers: Any) -> None:
    try:
        published = publish(MeetingStorage(world.storage, barrier), world.run, GATES, world.users_uri)
        answers.put((world.run.run_id, "already" if published.already_published else "won"))
    except PublishConflictError as error:
        answers.put((world.run.run_id, "conflict" if "was changed while" in str(error) else str(error)))


def race(worlds: list[World]) -> Counter[str]:
    barrier, answers = FORKS.Barrier(len(worlds)), FORKS.Queue()
    processes = [FORKS.Process(target=publish_together, args=(world, barrier, answers)) for world in worlds]
    for process in processes:
        process.start()
    said = [answers.get(timeout=100) for _ in processes]
    for process in processes:
        process.join()
    won = [run_id for run_id, answer in said if answer == "won"]
    assert set(worlds[0].published()["run_id"].to_pylist()) == set(won)
    return Counter(answer for _, answer in said)


def test_of_six_publishers_one_wins(world: World) -> None:
    """Each with a run of its own: at the first publish, then at a later one."""
    worlds = [world.with_run(f"racer{number}") for number in range(6)]
    assert race(worlds) == {"won": 1, "conflict": 5}
    winner = world.published()["run_id"][0].as_py()
    losers = [racer for racer in worlds if racer.run.run_id != winner]
    assert race(losers[:3]) == {"won": 1, "conflict": 2}
    assert world.delta().version() == 1


def test_one_wins_over_an_emptied_table_too(local: World) -> None:
    """With nothing to replace, the library left to itself would put the files of all publishers side by side."""
    local.publish()
    local.delta().delete()
    assert race([local.with_run(f"racer{number}") for number in range(3)]) == {"won": 1, "conflict": 2}


@on_s3
def test_publishers_of_one_run_all_succeed(world: World) -> None:
    world.commit_pending()
    assert race([world] * 4) == {"won": 1, "already": 3}
    assert world.delta().version() == 0
    assert_conserved(world)


def publish_and_die(world: World, step: str) -> None:
    storage = world.storage
    if step.startswith("write"):
        storage = suicidal(storage, int(step[-1]))
    else:
        commit = DeltaTable.create_write_transaction

        def die(*arguments: Any, **options: Any) -> None:
            if step == "after commit":
                commit(*arguments, **options)
            os.kill(os.getpid(), 9)

        DeltaTable.create_write_transaction = die  # type: ignore[method-assign]
    publish(storage, world.run, GATES, world.users_uri)


@on_s3
def test_killed_at_every_step_of_publishing(world: World) -> None:
    world.commit_pending("run1")
    world.publish()
    second = world.with_run("run2")
    second.write_users(users_table(refusing={"u5"}))
    for step in ("write 1", "write 3", "before commit", "after commit"):
        assert in_child(publish_and_die, second, step) == -9
        run_ids = set(second.published()["run_id"].to_pylist())
        assert run_ids == ({"run2"} if step == "after commit" else {"run1"})
    assert second.publish() == PublishedVersion(1, 4 * 17, 4, already_published=True)
    table = assert_conserved(second)
    assert set(table.filter(pc.equal(table["user_id"], "u5"))["status"].to_pylist()) == {"suppressed"}


# -- large sets of hashes


def test_hash_spool_against_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("e2p_ray.commit.spool._MAX_MEMORY_BYTES", 1000)  # so that it goes to disk
    rng = random.Random(1)
    users = [f"u{rng.randrange(5000)}" for _ in range(20_000)]
    counts = Counter(users)
    with HashSpool() as spool:
        for start in range(0, len(users), 1500):
            spool.add(hash_rows(pa.array(users[start : start + 1500])))
        assert spool.num_hashes == len(users)
        assert spool.max_count() == max(counts.values())
        distinct = sorted(counts)
        found = is_among(hash_rows(pa.array(distinct)), spool.repeated())
        assert [user for user, twice in zip(distinct, found, strict=True) if twice] == [
            user for user in distinct if counts[user] > 1
        ]
        spool.add(hash_rows(pa.array(["another"])))  # adding after reading
        assert sum(frame.height for frame in spool.frames()) == len(distinct) + 1


def test_hash_ranks_keep_the_highest() -> None:
    with HashSpool() as spool:
        spool.add(hash_rows(pa.array(["a", "b", "a"])), np.array([5, 7, 4], dtype=np.uint64))
        spool.add(hash_rows(pa.array(["a"])), np.array([2], dtype=np.uint64))
        assert sorted(row for frame in spool.frames() for row in frame.select("count", "rank").rows()) == [
            (1, 7),
            (3, 5),
        ]


def test_hashes_tell_columns_apart() -> None:
    rows = [("a", "bc", "t"), ("ab", "c", "t"), ("abc", "", "t"), ("", "abc", "t"), ("bc", "a", "t"), ("a", "t", "bc")]
    hashes = hash_rows(*(pa.array(column) for column in zip(*rows, strict=True)))
    assert len({tuple(pair) for pair in hashes.tolist()}) == len(rows)
    many = hash_rows(pa.array([f"user-{i}" for i in range(200_000)]))
    for half in (0, 1):  # each half alone spreads over all 64 bits
        assert len(np.unique(many[:, half])) == 200_000
        assert abs(np.unpackbits(many[:, half].copy().view(np.uint8)).mean() - 0.5) < 0.002
    assert abs(np.corrcoef(many[:, 0].astype(float), many[:, 1].astype(float))[0, 1]) < 0.01

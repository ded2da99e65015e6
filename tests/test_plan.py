"""The plan against a planner in plain Python, over messy tables, by both ways, on disk and on S3."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from deltalake import DeltaTable, write_deltalake

from e2p_ray.commit.consent import refusing
from e2p_ray.config import JobConfig
from e2p_ray.errors import IncompatibleError, InputError, ShardError
from e2p_ray.plan import Plan, ShardSize, inputs, largest_first, load_plan, make_plan, read_shard
from e2p_ray.plan.inputs import stable_hash
from e2p_ray.plan.pairs import ContentJoin
from e2p_ray.plan.shards import count_requests
from e2p_ray.schema import DEAD_LETTERS, Group, Reason, planned_schema
from e2p_ray.storage import Storage
from tests.plan_world import (
    DIM,
    SPACE,
    START,
    TASKS,
    Key,
    Outcome,
    World,
    broken,
    candidate,
    content,
    job,
    messy_world,
    reference_plan,
    upload,
    user,
    write_files,
)
from tests.s3 import S3Server

STORAGE = Storage()


def plan_of(config: JobConfig, storage: Storage = STORAGE) -> Plan:
    return make_plan(config, storage, embedding_space=SPACE, embedding_dim=DIM)


def plan_world(world: World, folder: Path, num_files: int = 1, **settings: Any) -> Plan:
    return plan_of(job(world.write(folder / "in", num_files), folder / "out", **settings))


def shard_ids(plan: Plan) -> list[str]:
    return [shard.shard_id for shard in plan.shards]


def groups_of(plan: Plan, storage: Storage = STORAGE) -> dict[str, list[Group]]:
    return {shard_id: read_shard(storage, plan.uri, shard_id) for shard_id in shard_ids(plan)}


def rows_of(plan: Plan, storage: Storage = STORAGE) -> list[tuple[Key, Outcome]]:
    """Every request of every shard; a key that comes twice is here twice."""
    rows = []
    for group in (group for groups in groups_of(plan, storage).values() for group in groups):
        texts = (group.content.title, group.content.body, group.content.language)
        for request in group.requests:
            assert request.key[1:] == (group.content.content_id, group.task)
            vector = None if request.user_embedding is None else tuple(request.user_embedding.tolist())
            reason = None if request.reason is None else request.reason.value
            key = (request.key.user_id, request.key.content_id, request.key.task)
            rows.append((key, (*texts, reason, vector)))
    return rows


def letters_of(plan: Plan, storage: Storage = STORAGE) -> list[tuple[Key, str]]:
    found = []
    for info in storage.list_objects(f"{plan.uri}/dead_letters"):
        table = storage.read_table(info.uri)
        assert table.schema == DEAD_LETTERS
        found += [((r["user_id"], r["content_id"], r["task"]), r["error_code"]) for r in table.to_pylist()]
    return found


def assert_as_reference(plan: Plan, world: World, storage: Storage = STORAGE) -> None:
    planned, dead = reference_plan(world)
    rows, letters = rows_of(plan, storage), letters_of(plan, storage)
    assert sorted(key for key, _ in rows) == sorted(planned)
    assert sorted(letters) == sorted(dead.items())
    for key, outcome in rows:
        assert outcome in planned[key], key
    counts = plan.counts
    assert counts.num_candidates == len(world.candidates)
    assert counts.num_duplicates == len(world.candidates) - counts.num_pairs
    assert counts.num_pairs * len(TASKS) == len(planned) + len(dead)
    assert counts.num_requests == len(planned) == sum(shard.num_requests for shard in plan.shards)
    assert counts.num_contents == len({key[1] for key in planned})
    whole = [row for row in world.candidates if row["user_id"] and row["content_id"]]
    assert counts.num_users == len({row["user_id"] for row in whole} & {row["user_id"] for row in world.users})
    assert counts.dead_letters == {code: list(dead.values()).count(code) for code in set(dead.values())}
    reasons = [outcome[3] for _, outcome in rows if outcome[3]]
    assert counts.reasons == {reason: reasons.count(reason) for reason in set(reasons)}
    assert counts.request_chars == sum(len(title) + len(body) for _, (title, body, *_) in rows)
    assert counts.content_chars == sum(len(t) + len(b) for _, t, b in {(key[1], o[0], o[1]) for key, o in rows})


@pytest.mark.parametrize("seed", range(8))
def test_messy_tables_as_the_reference_says(seed: int, tmp_path: Path) -> None:
    world = messy_world(seed)
    plan = plan_world(world, tmp_path, requests_per_shard=50, max_group_requests=20)
    assert_as_reference(plan, world)
    assert plan.counts.reasons.keys() == {reason for reason in Reason if reason.startswith(("opted", "embedding"))}
    assert plan.counts.dead_letters.keys() == {"null_key", "unknown_user", "missing_content", "empty_content"}


def test_the_largest_shards_come_first(tmp_path: Path) -> None:
    plan = plan_world(messy_world(0), tmp_path, requests_per_shard=50, max_group_requests=20)
    ordered = largest_first(STORAGE, plan.uri, shard_ids(plan)[1:])
    assert sorted(ordered) == sorted(shard_ids(plan)[1:])
    sizes = [(Path(plan.uri) / "shards" / f"{shard_id}.parquet").stat().st_size for shard_id in ordered]
    assert sizes == sorted(sizes, reverse=True)
    assert ordered != shard_ids(plan)[1:], "the control: the plan's order is another one"


def test_reference_tells_a_wrong_plan(tmp_path: Path) -> None:
    world = messy_world(0)
    plan = plan_world(world, tmp_path)
    for wrong in (replace(world, candidates=world.candidates[:-40]), replace(world, users=world.users[:-40])):
        with pytest.raises(AssertionError):
            assert_as_reference(plan, wrong)


def test_row_order_files_and_copies_change_nothing(tmp_path: Path) -> None:
    world = messy_world(1)
    first = plan_world(world, tmp_path / "a", requests_per_shard=40)
    again = replace(world, candidates=world.candidates + world.candidates[:100]).shuffled(5)
    second = plan_world(again, tmp_path / "b", num_files=4, requests_per_shard=40)
    assert shard_ids(second) == shard_ids(first)
    assert len(first.shards) > 10
    assert second.plan_id == first.plan_id
    assert second.uri.rpartition("/")[2] != first.uri.rpartition("/")[2]
    assert second.counts.num_duplicates == first.counts.num_duplicates + 100


@pytest.fixture
def ray_data_log() -> Iterator[StringIO]:
    """What Ray Data prints."""
    log, printed = logging.getLogger("ray.data"), StringIO()
    handler = logging.StreamHandler(printed)
    log.addHandler(handler)
    yield printed
    log.removeHandler(handler)


@pytest.mark.usefixtures("ray_cluster")
def test_shuffles_make_the_same_plan_as_one_process_and_are_quiet(tmp_path: Path, ray_data_log: StringIO) -> None:
    world = messy_world(2)
    alone = plan_world(world, tmp_path / "a", requests_per_shard=40)
    settings = {"requests_per_shard": 40, "single_node_bytes": 0, "num_partitions": 3}
    shuffled = plan_world(world.shuffled(1), tmp_path / "b", num_files=3, **settings)
    assert replace(shuffled, uri=alone.uri) == alone
    assert_as_reference(shuffled, world)
    for shard_id in shard_ids(alone):
        one, other = (Path(plan.uri, "shards", f"{shard_id}.parquet").read_bytes() for plan in (alone, shuffled))
        assert one == other
    assert not ray_data_log.getvalue()
    ray.data.range(1).materialize()
    assert "Execution plan" in ray_data_log.getvalue()  # a log that would hold it


@pytest.mark.usefixtures("ray_cluster")
def test_a_small_plan_on_a_ray_that_is_there_takes_relative_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its workers have another folder."""
    monkeypatch.chdir(tmp_path)
    world = messy_world(2)
    plan = plan_of(job(world.write(Path("in")), "out"))
    assert plan.counts == plan_of(job(world.write(tmp_path / "b"), tmp_path / "c")).counts
    shards = [read_shard(STORAGE, plan.uri, shard.shard_id) for shard in plan.shards]
    assert sum(len(group.requests) for groups in shards for group in groups) == plan.counts.num_requests > 0


@pytest.mark.usefixtures("ray_cluster")
def test_a_workers_error_is_the_typed_one(tmp_path: Path) -> None:
    config = job(messy_world(0).write(tmp_path / "in"), tmp_path / "out", single_node_bytes=0)
    with pytest.raises(IncompatibleError, match="'space-9'"):
        make_plan(config, STORAGE, embedding_space="space-9", embedding_dim=DIM)
    path = next((tmp_path / "in" / "users").iterdir())
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 4] = bytes(len(data) // 4 - 4)
    path.write_bytes(data)
    with pytest.raises(InputError, match=str(path)):
        plan_of(config)


def test_only_the_shards_of_a_changed_content_change(tmp_path: Path) -> None:
    contents = [content(f"c{number}") for number in range(40)]
    pairs = [candidate(f"u{number % 10}", f"c{number // 10}") for number in range(400)]
    world = World([user(f"u{number}") for number in range(10)], contents, pairs)
    before = plan_world(world, tmp_path / "a", requests_per_shard=32)
    changed = replace(world, contents=[*contents[1:], content("c0", body="another body")])
    after = plan_world(changed, tmp_path / "b", requests_per_shard=32)
    assert len(before.shards) > 10
    gone = set(shard_ids(before)) - set(shard_ids(after))
    assert len(gone) == 1
    assert any(group.content.content_id == "c0" for group in groups_of(before)[gone.pop()])


@pytest.mark.parametrize("change", [{"vector": (1.0, 2.0, 3.5)}, {"personalize": False}, {"vector": None}])
def test_a_users_row_changes_his_shards(change: dict[str, Any], tmp_path: Path) -> None:
    world = World([user("u1"), user("u2")], [content("c1")], [candidate("u1", "c1"), candidate("u2", "c1")])
    before = plan_world(world, tmp_path / "a")
    after = plan_world(replace(world, users=[user("u1"), user("u2", **change)]), tmp_path / "b")
    assert not set(shard_ids(before)) & set(shard_ids(after))


def test_groups_and_shards_keep_their_bounds(tmp_path: Path) -> None:
    """One hot content is split, many small ones are packed."""
    chance = random.Random(0)
    users = [f"u{number:04d}" for number in range(900)]
    hot = [candidate(user_id, "hot") for user_id in users]
    small = [candidate(chance.choice(users), f"c{number % 500}") for number in range(1000)]
    contents = [content("hot"), *(content(f"c{number}") for number in range(500))]
    plan = plan_world(
        World([user(user_id) for user_id in users], contents, hot + small), tmp_path,
        requests_per_shard=100, max_group_requests=64,
    )  # fmt: skip
    shards = groups_of(plan)
    sizes = {shard_id: sum(len(group.requests) for group in groups) for shard_id, groups in shards.items()}
    assert max(sizes.values()) <= 200
    assert np.mean(list(sizes.values())) > 40
    groups = [group for groups in shards.values() for group in groups]
    assert max(len(group.requests) for group in groups) == 64
    assert len([group for group in groups if group.content.content_id == "hot"]) == 2 * 15
    assert plan.counts.num_groups == len(groups)
    for entry in plan.shards:
        assert (sizes[entry.shard_id], len(shards[entry.shard_id])) == (entry.num_requests, entry.num_groups)
        assert Path(plan.uri, "shards", f"{entry.shard_id}.parquet").stat().st_size == entry.num_bytes
    for group in groups:
        assert [request.key for request in group.requests] == sorted(request.key for request in group.requests)


def test_long_texts_close_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard has its texts once a request: their bytes are bounded, and shards within the bound stay what they are."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # another process would not see the bound
    users = [user(f"u{number:02d}") for number in range(30)]
    pairs = [candidate(one["user_id"], f"c{number}") for one in users for number in range(6)]
    short = World(users, [content(f"c{number}", body="本" * 10) for number in range(6)], pairs)
    plan = plan_world(short, tmp_path / "a", requests_per_shard=400)
    monkeypatch.setattr("e2p_ray.plan.shards._MAX_TEXT_BYTES", 30 * 6 * 2 * len("title" + 3 * "b" * 10))
    assert shard_ids(plan_world(short, tmp_path / "b", requests_per_shard=400)) == shard_ids(plan), "just within it"
    assert len(plan.shards) == 1
    for max_bytes, num_requests in ((30 * 35, 30), (35 * 20, 20), (100, 2), (35, 1), (1, 1)):
        monkeypatch.setattr("e2p_ray.plan.shards._MAX_TEXT_BYTES", max_bytes)
        bounded = plan_world(short, tmp_path / str(max_bytes), requests_per_shard=400)
        assert_as_reference(bounded, short)
        sizes = [entry.num_requests for entry in bounded.shards]
        assert max(sizes) == num_requests
        assert bounded.counts.num_groups == 12 * -(-30 // num_requests)
    mixed = replace(short, contents=[*short.contents[1:], content("c0", body="long" * 500)])
    monkeypatch.setattr("e2p_ray.plan.shards._MAX_TEXT_BYTES", 30 * 35 * 4)
    groups = groups_of(plan_world(mixed, tmp_path / "mixed", requests_per_shard=400))
    assert {len(group.requests) for found in groups.values() for group in found} == {2, 30}
    assert all(
        sum(len(g.requests) * len((g.content.title + g.content.body).encode()) for g in found) <= 30 * 35 * 4
        for found in groups.values()
    )


def test_which_row_of_a_user_or_content_is_taken(tmp_path: Path) -> None:
    later = START + timedelta(seconds=1)
    world = World(
        users=[
            user("late", (1.0, 0.0, 0.0)), user("late", (2.0, 0.0, 0.0), updated_at=later),
            user("never", (1.0, 0.0, 0.0), updated_at=None), user("never", (2.0, 0.0, 0.0)),
            user("tie"), user("tie", personalize=None), user("tie"),
            user("back", personalize=False), user("back", (2.0, 0.0, 0.0), updated_at=later),
        ],
        contents=[content("c", "old"), content("c", "new", updated_at=later)],
        candidates=[candidate(name, "c") for name in ("late", "never", "tie", "back")],
    )  # fmt: skip
    outcomes = {key[0]: outcome for key, outcome in rows_of(plan_world(world, tmp_path))}
    newest = ("new", "body", "en", None, (2.0, 0.0, 0.0))
    assert outcomes == {
        "late": newest,
        "never": newest,
        "back": newest,
        "tie": ("new", "body", "en", "opted_out", None),
    }


def test_texts_that_are_missing(tmp_path: Path) -> None:
    contents = [
        content("title only", "t", None), content("body only", None, "b"), content("no language", language=None),
        content("blank", " ", "　\n"), content("nothing", None, None),
    ]  # fmt: skip
    world = World([user("u")], contents, [candidate("u", row["content_id"]) for row in contents])
    plan = plan_world(world, tmp_path, tasks=("headline",))
    texts = {key[1]: outcome[:3] for key, outcome in rows_of(plan)}
    assert texts == {
        "title only": ("t", "", "en"),
        "body only": ("", "b", "en"),
        "no language": ("title", "body", ""),
    }
    assert sorted(letters_of(plan)) == [(("u", name, "headline"), "empty_content") for name in ("blank", "nothing")]


def test_the_vector_of_an_opted_out_user_is_not_in_the_plan(tmp_path: Path) -> None:
    secret = (1234.5, 2345.5, 3456.5)
    world = World(
        [user("out", secret, personalize=False), user("in")], [content("c")], [candidate(u, "c") for u in ("in", "out")]
    )
    plan = plan_world(world, tmp_path)
    assert dict(rows_of(plan))[("out", "c", "headline")][3:] == ("opted_out", None)
    for info in STORAGE.list_objects(plan.uri):
        assert np.float32(secret[0]).tobytes() not in STORAGE.read_bytes(info.uri)
        if info.uri.endswith(".parquet"):
            assert secret[0] not in STORAGE.read_table(info.uri)["user_embedding"].combine_chunks().values.to_pylist()


@pytest.mark.parametrize("element", [pa.float16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize("kind", ["list", "large_list", "fixed_size_list"])
def test_kinds_of_vector_columns(kind: str, element: pa.DataType, tmp_path: Path) -> None:
    make = {"list": pa.list_, "large_list": pa.large_list, "fixed_size_list": lambda item: pa.list_(item, DIM)}[kind]
    world = World(
        [user("ok"), user("null", None), user("hole", (1.0, None, 2.0)), user("zero", (0.0, -0.0, 0.0))],
        [content("c")],
        [candidate(name, "c") for name in ("ok", "null", "hole", "zero")],
    )
    world.write(tmp_path / "in")
    table = world.tables()["users"]
    values = pa.array([row["embedding"] for row in world.users], make(element))
    path = next((tmp_path / "in" / "users").iterdir())
    pq.write_table(table.set_column(1, "embedding", values), path)
    rows = rows_of(plan_of(job(tmp_path / "in", tmp_path / "out", tasks=["headline"])))
    assert {key[0]: outcome[3:] for key, outcome in rows} == {
        "ok": (None, (1.0, 2.0, 3.0)),
        "null": ("embedding_null", None),
        "hole": ("embedding_non_finite", None),
        "zero": ("embedding_zero", None),
    }


@pytest.mark.parametrize(
    "moment",
    [pa.timestamp("ms"), *(pa.timestamp("us", zone) for zone in ("+05:30", "-03:30", "JST", "Asia/Tokyo"))],
    ids=str,
)
def test_files_of_one_table_may_differ_in_kind(moment: pa.DataType, tmp_path: Path) -> None:
    """Large and small strings, dictionaries, wide and narrow floats, zones: each file is read as what it is."""
    hour = timedelta(hours=1)
    copies = [user("u1", updated_at=START - hour, personalize=False), user("u2", updated_at=START + hour)]
    users = [*copies, user("u1"), user("u2", personalize=False)]
    world = World(users, [content("c")], [candidate("u1", "c"), candidate("u2", "c")])
    world.write(tmp_path / "in", num_files=2)
    path = sorted((tmp_path / "in" / "users").iterdir())[1]
    kinds = {
        "user_id": pa.large_string(), "embedding": pa.large_list(pa.float64()),
        "embedding_space": pa.dictionary(pa.int32(), pa.string()), "updated_at": moment,
    }  # fmt: skip
    table = world.tables()["users"].slice(2)
    assert table.num_rows == 2
    for name, kind in kinds.items():
        values = table[name].cast(kind) if name == "updated_at" else pa.array(table[name].to_pylist(), kind)
        table = table.set_column(table.schema.get_field_index(name), name, values)
    pq.write_table(table, path)
    plan = plan_of(job(tmp_path / "in", tmp_path / "out", requests_per_shard=5))
    assert_as_reference(plan, world)


def test_of_delta_tables_the_current_version_is_planned(tmp_path: Path) -> None:
    """What was overwritten or deleted still lies in their folders, until somebody vacuums."""
    old = World(
        [user(f"u{at}") for at in range(4)],
        [content("c", title="old"), content("d")],
        [candidate(f"u{at}", name) for at in range(4) for name in "cd"],
    )
    now = World(old.users[:3], [content("c", title="new"), content("d")], [candidate(f"u{at}", "c") for at in range(4)])
    folder = tmp_path / "in"
    for name in ("users", "contents", "candidates"):
        write_deltalake(folder / name, old.tables()[name])
    for name in ("contents", "candidates"):
        write_deltalake(folder / name, now.tables()[name], mode="overwrite")
    DeltaTable(folder / "users").delete("user_id = 'u3'")
    assert all(len([*(folder / name).glob("*.parquet")]) == 2 for name in now.tables()), "control: old files are there"
    plan = plan_of(job(folder, tmp_path / "out"))
    assert_as_reference(plan, now)
    with pytest.raises(AssertionError):
        assert_as_reference(plan, old)
    assert refusing(STORAGE, ["u2", "u3"], f"{folder}/users") == {"u3"}


def test_characters_of_many_requests_are_counted_in_full() -> None:
    num_requests, num_chars = 500_000, 10_000  # more than 2 ** 32 together
    contents = pl.DataFrame({"content": [0], "title": ["橋" * 4], "body": ["x" * (num_chars - 4)]})
    requests = pl.DataFrame({"content": [0] * num_requests, "reason": [None] * num_requests})
    counts = count_requests(ContentJoin(requests, contents, dead=contents.clear()), TASKS)
    assert counts["request_chars"] == num_requests * num_chars * len(TASKS) > 2**32
    assert counts["content_chars"] == num_chars


def test_a_file_with_another_schema_is_named(tmp_path: Path) -> None:
    world = messy_world(0)
    world.write(tmp_path / "in", num_files=3)
    path = sorted((tmp_path / "in" / "users").iterdir())[1]
    pq.write_table(pq.read_table(path).drop_columns("personalize"), path)
    with pytest.raises(InputError, match=rf"{path}, column 'personalize'"):
        plan_of(job(tmp_path / "in", tmp_path / "out"))


# -- bytes that are no text


@pytest.mark.parametrize(
    ("table", "column"),
    [
        ("users", "user_id"),
        ("users", "embedding_space"),
        ("contents", "content_id"),
        ("contents", "title"),
        ("contents", "body"),
        ("contents", "language"),
        ("candidates", "user_id"),
        ("candidates", "content_id"),
    ],
)
@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_bytes_that_are_no_text_are_named(table: str, column: str, kind: str, tmp_path: Path) -> None:
    """In the second of three row groups: the row is the file's."""
    contents = [content(f"c{number}") for number in range(9)]
    world = World([user(f"u{n}") for n in range(9)], contents, [candidate(f"u{n}", f"c{n}") for n in range(9)])
    config = job(world.write(tmp_path / "in"), tmp_path / "out")
    path = tmp_path / "in" / table / "part-00000.parquet"
    rows = pq.read_table(path)
    values = broken(rows[column], 4)
    if kind == "large_string":
        values = values.view(pa.binary()).cast(pa.large_binary()).view(pa.large_string())
    elif kind == "dictionary":
        values = pa.DictionaryArray.from_arrays(pa.array(range(9), pa.int32()), values)
    changed = rows.set_column(rows.schema.get_field_index(column), column, values)
    pq.write_table(changed, path, row_group_size=3)
    with pytest.raises(InputError, match=f"{path}, column '{column}', row 4 .counted from 0.: not UTF-8. W") as caught:
        plan_of(config)
    assert caught.value.exit_code == 3
    pq.write_table(rows, path, row_group_size=3)
    assert plan_of(config).counts.num_requests == 18, "the control"


def test_strings_of_one_row_group_may_pass_what_an_array_holds() -> None:
    """Arrays of `string` end at 2 GiB: what is put together is cast before, dictionaries and views too."""
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        chunks = pa.chunked_array([pa.array(["a", None], kind), pa.array(["日本", ""], kind)])
        plain = inputs._plain(chunks)
        assert (plain.type, plain.to_pylist()) == (pa.large_string(), ["a", None, "日本", ""])


def test_wrong_projector_is_not_a_matter_of_bad_rows(tmp_path: Path) -> None:
    out = [user("out", None, embedding_space=None, personalize=False)]
    pairs = [candidate("out", "c"), candidate("u1", "c"), candidate("u2", "c")]
    others = [user("u1", embedding_space="space-0"), user("u2", embedding_space=None)]
    with pytest.raises(IncompatibleError, match=r"'space-1'.*'space-0' \(1 users\)") as error:
        plan_world(World(out + others, [content("c")], pairs), tmp_path / "a")
    assert "2.0" not in str(error.value)
    one_right = World([*out, others[0], user("u2")], [content("c")], pairs)
    assert plan_world(one_right, tmp_path / "b").counts.reasons == {"embedding_other_space": 2, "opted_out": 2}
    only_out = World(out, [content("c")], pairs[:1])
    assert plan_world(only_out, tmp_path / "c").counts.reasons == {"opted_out": 2}


@pytest.mark.parametrize("world", [World(), World([user("u")], [content("c")], [])])
def test_no_candidates_make_an_empty_plan(world: World, tmp_path: Path) -> None:
    plan = plan_world(world, tmp_path, single_node_bytes=0)
    assert plan.shards == ()
    assert load_plan(STORAGE, plan.uri) == plan
    assert not plan.counts.num_requests


def test_a_finished_plan_is_used_again_and_half_a_plan_never(tmp_path: Path) -> None:
    world = messy_world(3)
    config = job(world.write(tmp_path / "in"), tmp_path / "out", requests_per_shard=40)
    plan = plan_of(config)
    manifest = Path(plan.uri, "manifest.json")
    objects = list(STORAGE.list_objects(plan.uri))
    assert plan_of(config) == load_plan(STORAGE, plan.uri) == plan
    assert list(STORAGE.list_objects(plan.uri)) == objects

    manifest.unlink()  # as if it had been killed, with other partitions, before the end
    Path(plan.uri, "shards", f"{plan.shards[0].shard_id}.parquet").unlink()
    stale = Path(plan.uri, "dead_letters", "part-00077.parquet")
    pq.write_table(DEAD_LETTERS.empty_table(), stale)
    assert plan_of(config) == plan
    assert not stale.exists()
    assert [info.uri for info in STORAGE.list_objects(plan.uri)] == [info.uri for info in objects]


def test_shards_grow_with_the_plan_where_workers_have_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = job(messy_world(0, 3000).write(tmp_path / "in"), tmp_path / "out")
    on_gpus = config.model_copy(update={"workers": config.workers.model_copy(update={"num_gpus": 1})})
    given = job(tmp_path / "in", tmp_path / "out", requests_per_shard=2048)
    given_on_gpus = given.model_copy(update={"workers": on_gpus.workers})
    sizes = {name: ShardSize.of(one) for name, one in (("cpu", config), ("gpu", on_gpus), ("given", given_on_gpus))}
    assert sizes == {"cpu": ShardSize(2048, 2048), "gpu": ShardSize(2048, 16384), "given": ShardSize(2048, 2048)}
    millions = [0, 1_048_575, 1_048_576, 2_097_152, 4_194_304, 100_000_000]
    assert [sizes["gpu"].among(number) for number in millions] == [2048, 2048, 4096, 8192, 16384, 16384]
    assert {sizes["cpu"].among(number) for number in millions} == {2048}
    assert ShardSize(10, 35).among(10**9) == 20, "never above the most"
    assert plan_of(given).uri == plan_of(config).uri
    small, large = plan_of(config), plan_of(on_gpus)
    assert small.uri != large.uri, "of which only large ones differ"
    assert small.shards == large.shards
    monkeypatch.setattr(ShardSize, "of", classmethod(lambda cls, one: cls(20, 80 if one.workers.num_gpus else 20, 4)))
    small, large = plan_of(config), plan_of(on_gpus)
    assert small.counts == replace(large.counts, num_groups=small.counts.num_groups)
    assert max(shard.num_requests for shard in small.shards) <= 2 * 20
    assert 2 * 20 < max(shard.num_requests for shard in large.shards) <= 2 * 80


@pytest.mark.parametrize("setting", [{"requests_per_shard": 7}, {"max_group_requests": 3}, {"tasks": ("headline",)}])
def test_other_settings_are_another_plan(setting: dict[str, Any], tmp_path: Path) -> None:
    inputs = messy_world(0).write(tmp_path / "in")
    plan = plan_of(job(inputs, tmp_path / "out"))
    assert plan_of(job(inputs, tmp_path / "out", **setting)).uri != plan.uri
    assert plan_of(job(inputs, tmp_path / "out", num_partitions=9)).uri == plan.uri
    other = make_plan(job(inputs, tmp_path / "out"), STORAGE, embedding_space="space-0", embedding_dim=DIM)
    assert other.uri != plan.uri


def test_a_changed_input_file_is_another_plan(tmp_path: Path) -> None:
    world = messy_world(0)
    plan = plan_world(world, tmp_path)
    write_files(tmp_path / "in" / "users" / "more", world.tables()["users"].slice(0, 1), 1)
    assert plan_of(job(tmp_path / "in", tmp_path / "out")).uri != plan.uri


def test_other_dead_letters_are_another_plan_though_no_shard_is_another(tmp_path: Path) -> None:
    world = World([user("u1")], [content("c1")], [candidate("u1", "c1"), candidate("u2", "c1")])
    plan = plan_world(world, tmp_path / "a")
    for name, more in (("b", candidate("u3", "c1")), ("c", candidate("u1", "c2"))):
        other = plan_world(replace(world, candidates=[*world.candidates[:1], more]), tmp_path / name)
        assert (shard_ids(other) == shard_ids(plan), other.plan_id == plan.plan_id) == (True, False)
    again = plan_world(world.shuffled(1), tmp_path / "d", num_files=2)
    assert again.plan_id == plan.plan_id


def test_ids_that_are_the_same_when_joined_are_other_shards(tmp_path: Path) -> None:
    ids = (("a", "bc"), ("ab", "c"))
    worlds = [World([*map(user, two)], [content("c1")], [candidate(one, "c1") for one in two]) for two in ids]
    plans = [plan_world(world, tmp_path / str(number)) for number, world in enumerate(worlds)]
    assert not set(shard_ids(plans[0])) & set(shard_ids(plans[1]))


def test_a_small_plan_starts_no_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    plan_world(messy_world(0, num_candidates=10_000), tmp_path)
    with pytest.raises(AssertionError, match="Ray was started"):
        plan_world(messy_world(0), tmp_path / "control", single_node_bytes=0)


def test_shard_files_are_as_the_schema_says(tmp_path: Path) -> None:
    plan = plan_world(messy_world(0), tmp_path, requests_per_shard=100)
    for shard in plan.shards:
        uri = f"{plan.uri}/shards/{shard.shard_id}.parquet"
        table = STORAGE.read_table(uri)
        assert table.schema == planned_schema(DIM)
        table.validate(full=True)
        assert pl.read_parquet(uri).height == shard.num_requests
        assert table["user_embedding"].null_count == table.num_rows - table["reason"].null_count


def test_a_file_that_is_no_shard_is_refused(tmp_path: Path) -> None:
    plan = plan_world(messy_world(0), tmp_path)
    uri = f"{plan.uri}/shards/{plan.shards[0].shard_id}.parquet"
    STORAGE.write_table(uri, STORAGE.read_table(uri).drop_columns("reason"))
    with pytest.raises(ShardError, match="not a shard"):
        read_shard(STORAGE, plan.uri, plan.shards[0].shard_id)


def test_on_s3(s3_server: S3Server) -> None:
    storage, bucket, world = Storage(s3_server.config), s3_server.new_bucket(), messy_world(4)
    upload(storage, f"{bucket}/in", world)
    config = job(f"{bucket}/in", f"{bucket}/out", requests_per_shard=100)
    plan = plan_of(config, storage)
    assert_as_reference(plan, world, storage)
    assert plan_of(config, storage) == plan


def _fnv(text: str) -> int:
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ (value >> shift)) * factor % 2**64
    return value ^ (value >> 31)


def test_the_hash_never_changes() -> None:
    texts = ["", "a", "content-7", "日本語", "x" * 1000, "content-8"]
    assert stable_hash(pl.Series(texts)).tolist() == [_fnv(text) for text in texts]
    assert stable_hash(pl.Series(texts)[2:4]).tolist() == [_fnv(text) for text in texts[2:4]]
    assert stable_hash(pl.Series(["content-7"])).tolist() == [1546388629327765273]
    assert not len(stable_hash(pl.Series([], dtype=pl.String)))

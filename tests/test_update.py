"""Updates: of every change exactly the requests that it concerns are written, and everything else stays as it is."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import write_deltalake

import e2p_ray.plan.shards
import e2p_ray.update.update
import jobs.whole_run
from e2p_ray.commit import PublishedTable, PublishedVersion, Run, load_run, publish, read_published
from e2p_ray.commit.audit import verify_log
from e2p_ray.commit.spool import HashSpool, hash_rows
from e2p_ray.config import JobConfig
from e2p_ray.downstream.report import Report, write_report
from e2p_ray.errors import (
    ConfigError,
    ConservationError,
    GateError,
    IncompatibleError,
    InputError,
    PublishConflictError,
    StorageError,
)
from e2p_ray.plan import ShardSize, read_shard
from e2p_ray.schema import ErrorCode, Group, RequestKey
from e2p_ray.storage import Storage, parquet_bytes
from e2p_ray.update import Changes, Limits, Priority, UpdateJob, priorities_digest, update_id_of
from e2p_ray.update.buckets import BucketSpool
from e2p_ray.update.survey import _order
from e2p_ray.update.write import ShardWriter, write_carried
from jobs import plan as plan_job
from jobs.cli import run_job
from jobs.steps import planned, set_up
from jobs.tables import duration_text
from jobs.whole_run import dead_letters_left
from tests.update_world import (
    TASKS,
    Key,
    User,
    World,
    content,
    edit_at_random,
    make_world,
    serial_batch,
    vector,
    with_task,
)


def no_engine(config: JobConfig, storage: Storage) -> NoReturn:
    raise AssertionError("an engine was made")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The world that every test begins with, published as version 0."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        made = make_world(tmp_path_factory.mktemp("first"), monkeypatch)
        report = made.run()
    assert set(made.rows()) == set(made.shown) != set()
    assert report.num_rows_generated == len(made.shown)
    return made


@pytest.fixture
def world(first: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A copy of it, to be changed."""
    made = make_world(tmp_path, monkeypatch)
    shutil.copytree(first.config.output.uri, made.config.output.uri)
    made.shown = dict(first.shown)
    return made


def assert_exact(world: World, run: Callable[[], Any]) -> None:
    """One run writes exactly what the model says, carries the rest over as it was, and publishes one version."""
    before, version = world.rows(), world.table().version()
    expected, causes, wanted = world.changed(), world.causes(), world.wanted()
    removed = set(before) - set(wanted)
    report = run()
    after = world.rows()
    assert set(after) == set(wanted)
    assert {key for key, row in after.items() if row["run_id"] == report.run_id} == expected
    assert {key: row for key, row in after.items() if key not in expected} == {
        key: row for key, row in before.items() if key in wanted and key not in expected
    }
    assert set(world.calls) == {
        key for key in expected if isinstance(wanted[key].user, tuple) and wanted[key].content.body
    }
    assert Counter(report.causes) == causes
    assert (report.num_carried, report.num_removed) == (len(wanted) - len(expected), len(removed))
    assert (report.num_rows_generated, report.num_deferred) == (len(expected), 0)
    assert world.table().version() == version + 1


def _change_vector(world: World) -> None:
    world.users["user-004"] = replace(world.users["user-004"], vector=vector(99))


def _change_space(world: World) -> None:
    world.users["user-004"] = replace(world.users["user-004"], space="space-0")


def _opt_out(world: World) -> None:
    world.users["user-004"] = replace(world.users["user-004"], personalize=False)


def _opt_in(world: World) -> None:
    world.users["user-000"] = replace(world.users["user-000"], personalize=True)


def _change_title(world: World) -> None:
    world.contents["content-02"] = replace(world.contents["content-02"], title="Another title")


def _change_body(world: World) -> None:
    world.contents["content-03"] = content(3, "そして雨。")


def _new_user(world: World) -> None:
    world.users["user-new"] = User(vector(77))
    world.candidates |= {("user-new", "content-00"): 1.0, ("user-new", "content-05"): 0.5}


def _new_content(world: World) -> None:
    world.contents["content-20"] = content(20)
    world.candidates |= {(user, "content-20"): 1.0 for user in ("user-000", "user-005")}


def _new_user_of_new_content(world: World) -> None:
    _new_user(world)
    world.contents["content-21"] = content(21)
    world.candidates["user-new", "content-21"] = 1.0


def _new_candidate(world: World) -> None:
    world.candidates["user-000", "content-05"] = 1.0


def _remove_candidate(world: World) -> None:
    del world.candidates["user-003", "content-03"]


def _remove_user(world: World) -> None:
    del world.users["user-005"]


def _remove_content(world: World) -> None:
    del world.contents["content-01"]


def _projector(world: World) -> None:
    world.projector = "projector-2"


def _base_model(world: World) -> None:
    world.base_model, world.projector = "base-2", "projector-2"


def _base_model_alone(world: World) -> None:
    world.base_model = "base-2"


def _prompt(world: World) -> None:
    world.config = with_task(world.config, "headline", "prompts", {"ja": {"cue_before": "\n題:"}})


def _content_room(world: World) -> None:
    data = world.config.model_dump(mode="json") | {"storage": {}}
    data["tasks"]["headline"]["max_content_tokens"] = 99
    world.config = JobConfig.model_validate(data)


def _sampling(world: World) -> None:
    world.config = with_task(world.config, "explanation", "sampling", {"seed": 5})


def _limits(world: World) -> None:
    world.config = with_task(world.config, "headline", "limits", {"max_chars": 180})


def _checks(world: World) -> None:
    world.config = world.config.model_copy(
        update={"checks": world.config.checks.model_copy(update={"deny": ("secret",)})}
    )


EDITS = [
    _change_vector, _change_space, _opt_out, _opt_in, _change_title, _change_body, _new_user, _new_content,
    _new_user_of_new_content, _new_candidate, _remove_candidate, _remove_user, _remove_content, _projector, _base_model,
    _base_model_alone, _prompt, _content_room, _sampling, _limits, _checks,
]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_each_change_writes_exactly_what_it_concerns(world: World, edit: Callable[[World], None]) -> None:
    edit(world)
    assert world.wanted() != world.shown
    assert_exact(world, world.run)
    assert_nothing_to_do(world)


def assert_nothing_to_do(world: World) -> None:
    version = world.table().version()
    report = world.run(engine=no_engine)
    assert report.version is not None
    assert (report.version.version, report.version.already_published) == (version, True)
    assert world.table().version() == version


@pytest.mark.parametrize("seed", range(8))
def test_random_edits_run_after_run(seed: int, world: World) -> None:
    chance = random.Random(seed)
    for _ in range(3):
        edit_at_random(world, chance)
        if world.changed() or set(world.rows()) != set(world.wanted()):
            assert_exact(world, world.run)
        else:
            assert_nothing_to_do(world)


def test_many_changes_at_once(world: World) -> None:
    for edit in (
        _change_vector,
        _opt_in,
        _change_title,
        _new_user,
        _new_content,
        _remove_candidate,
        _prompt,
        _sampling,
    ):
        edit(world)
    assert len(world.causes()) >= 6
    assert_exact(world, world.run)


def test_unchanged_inputs_need_no_engine_however_they_are_written(world: World) -> None:
    assert_nothing_to_do(world)
    world.users = dict(reversed(world.users.items()))
    world.candidates = dict(reversed(world.candidates.items()))
    assert_nothing_to_do(world)
    world.config = world.config.model_copy(
        update={"plan": world.config.plan.model_copy(update={"requests_per_shard": 500})}
    )
    assert_nothing_to_do(world)


@pytest.mark.parametrize("requests_per_shard", [3, 500])
def test_another_shard_size_carries_everything_else_over(world: World, requests_per_shard: int) -> None:
    plan = world.config.plan.model_copy(update={"requests_per_shard": requests_per_shard, "max_group_requests": 2})
    world.config = world.config.model_copy(update={"plan": plan})
    _change_vector(world)
    assert_exact(world, world.run)


@pytest.mark.parametrize("max_texts", [4, 1000])
def test_shards_of_an_update_are_as_full_as_their_bounds_let_them_be(
    max_texts: int, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of requests, of a group's requests, of bytes of texts, and of requests that wait in memory to be a shard."""
    held, add = list[int](), ShardWriter.add

    def watched(self: ShardWriter, *arguments: Any) -> None:
        add(self, *arguments)
        held.append(sum(rows.height for rows in self._requests))

    monkeypatch.setattr(ShardWriter, "add", watched)
    plan = world.config.plan.model_copy(update={"requests_per_shard": 10, "max_group_requests": 3})
    world.config = world.config.model_copy(update={"plan": plan})
    max_bytes = max_texts * max(_text_bytes(text.title + text.body, 1) for text in world.contents.values())
    monkeypatch.setattr(e2p_ray.plan.shards, "_MAX_TEXT_BYTES", max_bytes)
    _projector(world)
    run = load_run(world.storage, world.config.output.uri, world.run(publish_it=False).run_id)
    shards = [read_shard(world.storage, run.plan_uri, one) for one in run.shard_ids if not one.startswith("carried")]
    assert {tuple(r.key) for groups in shards for g in groups for r in g.requests} == set(world.wanted())
    assert len(shards) > 5
    assert max(held) <= 2 * 10
    assert max(len(group.requests) for groups in shards for group in groups) == 3

    def fits(groups: list[Group]) -> bool:
        num_bytes = sum(_text_bytes(g.content.title + g.content.body, len(g.requests)) for g in groups)
        return sum(len(group.requests) for group in groups) <= 10 and num_bytes <= max_bytes

    assert all(map(fits, shards))
    assert not any(fits([*one, other[0]]) for one, other in pairwise(shards))


def test_shards_of_an_update_are_as_large_as_what_it_writes_asks_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardSize, "of", classmethod(lambda cls, _: cls(5, 20, 1)))

    def sizes() -> list[int]:
        run = load_run(world.storage, world.config.output.uri, world.run(publish_it=False).run_id)
        ids = [one for one in run.shard_ids if not one.startswith("carried")]
        return [sum(len(g.requests) for g in read_shard(world.storage, run.plan_uri, one)) for one in ids]

    _change_vector(world)
    assert 0 < sum(few := sizes()) < 10
    assert max(few) <= 5
    _projector(world)
    assert sum(many := sizes()) == len(world.wanted()) >= 40
    assert 10 < max(many) <= 20


def test_an_update_whose_carried_rows_lost_their_markers_is_written_again(world: World) -> None:
    """As a killed vacuum left it, or somebody who removed the folder of its run."""
    _change_vector(world)
    report = world.run(publish_it=False)
    run = load_run(world.storage, world.config.output.uri, report.run_id)
    shutil.rmtree(run.uri)
    assert_exact(world, world.run)
    assert load_run(world.storage, world.config.output.uri, report.run_id) == run, "the same one"


def _text_bytes(text: str, num_requests: int) -> int:
    return num_requests * len(text.encode())


def test_buckets_follow_the_larger_of_plan_and_table_but_are_no_finer_than_shards() -> None:
    def num_buckets(size: int, bucket_rows: int, table: Any) -> int:
        plan: Any = SimpleNamespace(counts=SimpleNamespace(num_requests=1000, num_pairs=500), tasks=("a", "b"))
        settings: Any = None
        job = UpdateJob(Storage(), plan, table, settings, "p", "b", "c", ShardSize(size, size), 9, bucket_rows)
        return job.num_buckets()

    table = SimpleNamespace(num_rows=4000)
    assert [num_buckets(10, 100, one) for one in (None, table)] == [16, 64]
    assert [num_buckets(100, 100, one) for one in (None, table)] == [16, 16], "a bucket of the plan is not cut"
    assert num_buckets(1, 1, table) == 256, "each is an open file"


def test_an_update_is_named_by_all_that_decides_what_it_writes() -> None:
    table = PublishedTable("uri", "id", 3, (), 9, None)
    tables = [None, table, replace(table, uri="other"), replace(table, table_id="other"), replace(table, version=4)]
    limits = [
        Limits(), Limits(max_requests=1), Limits(max_requests=2), Limits(max_seconds=1.0), Limits(1, 1.0),
        *(Limits(1, priority=Priority(*column)) for column in (("a", True), ("a", False), ("b", True))),
    ]  # fmt: skip
    names = [update_id_of(source, one, limit) for source in ("s", "t") for one in tables for limit in limits]
    assert len(set(names)) == len(names) == 2 * 5 * 8
    assert update_id_of("s", table, Limits(max_seconds=1.0)) == update_id_of("s", table, Limits(max_seconds=2.0))
    assert update_id_of("s", table, limits[-1], "other scores") not in names


def test_a_report_is_read_back_as_it_was(world: World) -> None:
    _change_vector(world)
    first = world.run()
    again = world.run(engine=no_engine)
    assert first.version is not None
    assert again == replace(first, version=replace(first.version, already_published=True))
    for info in list(world.storage.list_objects(f"{world.config.output.uri}/runs")):
        world.storage.delete(info.uri)
    assert world.run(engine=no_engine).run_id == first.run_id


# -- drafts


def _drafts(world: World) -> dict[Key, str | None]:
    updates = {i.uri.split("/shards/")[0] for i in world.storage.list_objects(f"{world.config.output.uri}/updates")}
    (uri,) = {uri for uri in updates if not uri.endswith(".json") and "/dead_letters" not in uri}
    names = [i.uri.rpartition("/")[2].removesuffix(".parquet") for i in world.storage.list_objects(f"{uri}/shards")]
    groups = [g for name in names if not name.startswith("carried") for g in read_shard(world.storage, uri, name)]
    return {tuple(r.key): r.draft for group in groups for r in group.requests}  # type: ignore[misc]


def test_published_texts_are_drafts_where_the_engine_wrote_them_the_same_way(world: World) -> None:
    before = world.rows()
    world.contents["content-00"] = replace(world.contents["content-00"], body="")  # its texts become titles
    assert_exact(world, world.run)
    before = world.rows()
    assert {row["arm"] for row in before.values()} == {"soft_token", "no_soft_token", "title"}
    for info in list(world.storage.list_objects(f"{world.config.output.uri}/updates")):
        world.storage.delete(info.uri)
    _projector(world)
    _opt_out(world)
    _opt_in(world)
    _new_candidate(world)
    report = world.run()
    drafts = _drafts(world)
    assert set(drafts) == set(world.wanted())
    for key, draft in drafts.items():
        is_personal = isinstance(world.wanted()[key].user, tuple)
        arm = before[key]["arm"] if key in before else None
        same_way = arm == ("soft_token" if is_personal else "no_soft_token")
        assert draft == (before[key]["text"] if same_way else None)
    with_draft = {key for key, draft in drafts.items() if draft is not None}
    assert report.num_drafts == len(with_draft) > 0
    after = world.rows()
    assert report.num_texts_kept == sum(after[key]["text"] == drafts[key] for key in with_draft)
    assert 0 < report.num_accepted_tokens <= report.num_draft_tokens


def test_an_accepted_share_counts_texts_that_changed(world: World) -> None:
    for number, user in enumerate(world.users):
        if number % 2:
            world.users[user] = replace(world.users[user], vector=vector(500 + number))
    before = world.rows()
    report = world.run()
    written = {key: row for key, row in world.rows().items() if row["run_id"] == report.run_id}
    changed = sum(
        row["text"] != before[key]["text"] for key, row in written.items() if before[key]["arm"] == row["arm"]
    )
    assert report.num_drafts - report.num_texts_kept == changed > 0
    assert 0 < report.num_accepted_tokens < report.num_draft_tokens


# -- consent


def _without_switch(world: World, user: str) -> None:
    """The users table changes after the plan was made: only publishing sees it."""
    table = world.storage.read_table(world.config.inputs.users_uri)
    ids, switches = table["user_id"].to_pylist(), table["personalize"].to_pylist()
    switches[ids.index(user)] = False
    world.storage.write_table(
        world.config.inputs.users_uri,
        table.set_column(table.schema.get_field_index("personalize"), "personalize", [switches]),
    )


def _opting_out_during(world: World, user: str) -> Callable[[JobConfig, Storage], Any]:
    def engine(config: JobConfig, storage: Storage) -> Any:
        _without_switch(world, user)
        return world.engine(config, storage)

    return engine


def test_suppressed_at_publish_and_opted_in_again(world: World) -> None:
    _change_vector(world)
    world.users["user-006"] = replace(world.users["user-006"], vector=vector(66))
    world.run(engine=_opting_out_during(world, "user-004"))
    theirs = {key for key in world.shown if key[0] == "user-004"}
    rows = world.rows()
    assert {rows[key]["fingerprint"] for key in theirs} == {""}
    report = world.run()  # the same inputs as were planned, but not what is shown
    assert report.causes == {"suppressed_before": len(theirs)}
    after = world.rows()
    assert {key for key, row in after.items() if row["run_id"] == report.run_id} == theirs
    assert {after[key]["status"] for key in theirs} == {"ok"}
    assert all(after[key] == rows[key] for key in set(rows) - theirs)
    assert_nothing_to_do(world)


def test_without_titles_nothing_is_left_and_the_next_run_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(tmp_path, monkeypatch, num_users=3, num_contents=3)
    world.users = {user: User(vector(number)) for number, user in enumerate(world.users)}
    world.contents = {name: replace(text, title=" \n") for name, text in world.contents.items()}
    report = world.run(publish_it=False)
    world.users = {user: replace(one, personalize=False) for user, one in world.users.items()}
    world.write()
    published = _published(world, report.run_id)
    assert (published.num_rows, published.num_untitled, world.rows()) == (0, len(world.wanted()), {})
    folder = f"{world.config.output.uri}/runs/{report.run_id}/dead_letters"
    letters = pa.concat_tables(world.storage.read_table(info.uri) for info in world.storage.list_objects(folder))
    keys = zip(*(letters[name].to_pylist() for name in ("user_id", "content_id", "task")), strict=True)
    assert Counter(keys) == Counter(world.wanted().keys())
    world.run()
    assert set(world.rows()) == set(world.wanted())
    assert {(row["status"], row["arm"]) for row in world.rows().values()} == {("suppressed", "no_soft_token")}


@pytest.mark.parametrize("max_dead_letter_share", [0.05, 1.0])
def test_what_consent_left_out_is_written_by_limited_runs(
    max_dead_letter_share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its dead letter was nobody's try: a limit took it for one of a request that cannot be written, for good."""
    gates = {"max_fallback_share": 1.0, "max_dead_letter_share": max_dead_letter_share, "max_same_text_share": 1.0}
    world = make_world(tmp_path, monkeypatch, num_users=3, num_contents=3, gates=gates)
    world.users = {user: User(vector(number)) for number, user in enumerate(world.users)}
    world.contents = {name: replace(text, title=" \n") for name, text in world.contents.items()}
    world.run()
    world.users = {user: replace(one, personalize=False) for user, one in world.users.items()}
    reports = _runs(world, Limits(max_requests=4))
    assert [report.num_rows_generated for report in reports] == [4, 4, 4, 4, 2]
    assert set(world.rows()) == set(world.wanted())
    assert {(row["status"], row["arm"]) for row in world.rows().values()} == {("suppressed", "no_soft_token")}


def test_a_deferred_row_of_somebody_who_opted_out_is_not_shown(world: World) -> None:
    _opt_out(world)
    world.users["user-006"] = replace(world.users["user-006"], vector=vector(66))
    world.candidates |= {("user-006", name): 9.0 for name in ("content-00", "content-01", "content-02")}
    before, theirs = world.rows(), {key for key in world.wanted() if key[0] == "user-004"}
    report = world.run(Limits(max_requests=2, priority=Priority.parse("score")))
    rows = world.rows()
    assert {rows[key]["run_id"] for key in theirs} == {before[key]["run_id"] for key in theirs}
    assert {before[key]["status"] for key in theirs} == {"ok"}
    assert {(rows[key]["status"], rows[key]["personalized"]) for key in theirs} == {("suppressed", False)}
    assert {rows[key]["text"] for key in theirs} == {world.contents[key[1]].title for key in theirs}
    assert report.num_deferred == len(world.changed()) - 2
    causes = world.run().causes
    assert causes["suppressed_before"] == len(theirs)


# -- killed, and started again


class _KilledError(Exception):
    pass


def test_killed_between_update_and_publish(world: World) -> None:
    _change_vector(world)
    _new_content(world)
    assert_exact(world, lambda: (world.run(publish_it=False), world.run(engine=no_engine))[1] and _recount(world))


def _recount(world: World) -> Any:
    """The report of the run that was published; the engine was asked by the call before."""
    wanted = world.wanted()
    report = world.run(engine=no_engine)
    rows = world.rows()
    world.calls.update(
        k for k, row in rows.items() if row["run_id"] == report.run_id and isinstance(wanted[k].user, tuple)
    )
    return report


def _killed_while_an_update_is_written(world: World, num_carried: int, limits: Limits | None = None) -> None:
    """After the rows that stay of so many buckets."""
    calls = list[int]()

    def dying(*arguments: Any) -> list[str]:
        if len(calls) == num_carried:
            raise _KilledError
        calls.append(1)
        return write_carried(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(e2p_ray.update.update, "write_carried", dying)
        with pytest.raises(_KilledError):
            world.run(limits)


@pytest.mark.parametrize("num_carried", [0, 1, 2])
def test_killed_while_the_update_is_written(world: World, num_carried: int) -> None:
    _change_vector(world)
    _remove_candidate(world)
    _killed_while_an_update_is_written(world, num_carried)
    assert_exact(world, world.run)


def test_dead_letters_of_a_plan_that_was_cut_elsewhere_do_not_stay_in_an_update(world: World) -> None:
    """They are the same letters in files of other names: one plan id, two numbers of partitions."""
    world.candidates["somebody else", "content-00"] = 1.0
    _change_vector(world)
    _killed_while_an_update_is_written(world, 1)
    written = world.storage.list_objects(f"{world.config.output.uri}/updates")
    uri = next(info.uri for info in written if "dead_letters" in info.uri)
    world.storage.write_bytes(uri.replace("part-00", "part-77"), world.storage.read_bytes(uri))
    world.run()
    assert set(world.rows()) == set(world.wanted())


def _worst_come_first_now(world: World) -> None:
    world.candidates = {pair: -score for pair, score in world.candidates.items()}


@pytest.mark.parametrize("killed", ["while it is written", "before it is published"])
def test_other_scores_after_a_limited_run_was_killed(world: World, killed: str) -> None:
    """A plan holds no scores: they alone decide which requests are carried over, and which are written."""
    _projector(world)
    limits = Limits(max_requests=9, priority=Priority.parse("score"))
    if killed == "before it is published":
        world.run(limits, publish_it=False)
    else:
        _killed_while_an_update_is_written(world, 3, limits)
    _worst_come_first_now(world)
    best = sorted((world.candidates[key[:2]] for key in world.changed()), reverse=True)[:9]
    report = world.run(limits)
    written = [key for key, row in world.rows().items() if row["run_id"] == report.run_id]
    assert sorted((world.candidates[key[:2]] for key in written), reverse=True) == best


def test_the_digest_of_priorities_tells_who_comes_when_and_no_more(tmp_path: Path) -> None:
    rows = [("a", "x", 0.5), ("a", "y", 0.25), ("b", "x", None), ("ab", "x", float("nan"))]
    folders = iter(range(99))

    def digest(*files: list[tuple[str, str, float | None]], column: str = "score", **others: Any) -> str:
        folder = tmp_path / str(next(folders))
        for number, part in enumerate(files):
            columns = dict(zip(("user_id", "content_id", column), map(list, zip(*part, strict=True)), strict=True))
            Storage().write_table(f"{folder}/{number}.parquet", pa.table(columns | others))
        return priorities_digest(Storage(), str(folder), Priority.parse(column))

    first = digest(rows)
    swapped = [("a", "x", 0.25), ("a", "y", 0.5), *rows[2:]]
    moved = [("a", "x", 0.5), ("a", "y", 0.25), ("b", "x", None), ("a", "bx", None)]
    assert first == digest(rows[::-1]) == digest(rows[2:], rows[:2]) == digest([*rows[:3], ("ab", "x", None)])
    assert first == digest(rows, source=["of", "no", "account", "here"])
    found = [first, digest(rows[:3]), digest(swapped), digest(moved), digest([*rows[:3], ("ab", "x", 0.0)])]
    assert len({*found, digest(rows, column="rank")}) == len(found) + 1, "each is another"


def test_full_writes_everything_anew_and_resumes(world: World) -> None:
    before = world.rows()
    world.run(full=True, publish_it=False)
    assert world.table().version() == 0
    report = world.run(full=True, engine=no_engine)
    after = world.rows()
    assert set(after) == set(before)
    assert {row["run_id"] for row in after.values()} == {report.run_id} != {row["run_id"] for row in before.values()}
    assert all(after[key]["text"] == row["text"] for key, row in before.items())
    assert_nothing_to_do(world)
    again = world.run(full=True)
    assert (again.num_rows_generated, again.run_id == report.run_id) == (len(before), False)


@pytest.mark.parametrize("how", ["damaged", "missing"])
@pytest.mark.parametrize("kind", ["carried", "generated"])
def test_what_is_said_about_a_bad_data_file_helps(world: World, kind: str, how: str) -> None:
    _change_vector(world)
    report = world.run(publish_it=False)
    run = load_run(world.storage, world.config.output.uri, report.run_id)
    (shard_id, *_) = [name for name in run.shard_ids if name.startswith("carried") == (kind == "carried")]
    uri = run.data_uri(shard_id)
    data = world.storage.read_bytes(uri)
    world.storage.delete(uri)
    if how == "damaged":
        world.storage.write_bytes(uri, data[:100] + bytes([data[100] ^ 1]) + data[101:])
    with pytest.raises(ConservationError, match=f"1 shard.*: {shard_id}") as caught:
        world.run(engine=no_engine)
    remedy = f"Delete data file and marker of each in {uri.rpartition('/')[0]} and {run.markers_uri}"
    remedy += f", and {run.plan_uri}/manifest.json" if kind == "carried" else ""
    assert f"{remedy}, and generate again" in str(caught.value)
    world.storage.delete(uri)
    world.storage.delete(run.marker_uri(shard_id))
    if kind == "carried":
        world.storage.delete(f"{run.plan_uri}/manifest.json")
    again = world.run(engine=no_engine) if kind == "carried" else world.run()
    assert again.run_id == report.run_id
    assert set(world.rows()) == set(world.wanted())


def test_a_table_that_was_deleted_is_made_again(world: World) -> None:
    report = world.run()
    shutil.rmtree(world.config.output.table_uri)
    with pytest.raises(ConservationError, match=rf"{len(_shards(world, report.run_id))} shard.*is missing") as caught:
        world.run()
    run = load_run(world.storage, world.config.output.uri, report.run_id)
    assert f"and {run.markers_uri}" in str(caught.value)
    shutil.rmtree(run.markers_uri)
    assert world.run().run_id == report.run_id
    assert set(world.rows()) == set(world.wanted())


def _shards(world: World, run_id: str) -> tuple[str, ...]:
    return load_run(world.storage, world.config.output.uri, run_id).shard_ids


# -- somebody else at the table


def test_deleted_rows_are_written_again(world: World) -> None:
    world.table().delete("user_id = 'user-004' AND task = 'headline'")
    gone = {key for key in world.shown if key[0] == "user-004" and key[2] == "headline"}
    assert set(world.rows()) == set(world.shown) - gone
    for key in gone:
        del world.shown[key]
    assert world.changed() == gone
    assert_exact(world, world.run)
    assert_nothing_to_do(world)


def test_rows_of_a_file_that_a_repair_took_out_are_written_again(world: World) -> None:
    lost = Path(world.table().file_uris()[0])
    columns = world.storage.read_table(str(lost), list(RequestKey._fields)).to_pydict()
    gone = set(zip(*columns.values(), strict=True))
    lost.unlink()
    world.table().repair()
    assert set(world.rows()) == set(world.shown) - gone
    world.shown = {key: wanted for key, wanted in world.shown.items() if key not in gone}
    assert world.changed() == gone
    assert_exact(world, world.run)
    assert_nothing_to_do(world)


def test_rows_deleted_before_publishing_do_not_come_back(world: World) -> None:
    _change_vector(world)
    world.run(publish_it=False)
    world.table().delete("user_id = 'user-005'")
    after_delete = world.rows()

    def deleting(config: JobConfig, storage: Storage) -> Any:
        world.table().delete("user_id = 'user-006'")
        return world.engine(config, storage)

    with pytest.raises(PublishConflictError, match="was changed since version 1"):
        world.run(engine=deleting)
    assert set(world.rows()) == {key for key in after_delete if key[0] != "user-006"}
    report = world.run()
    assert {key[0] for key, row in world.rows().items() if row["run_id"] == report.run_id} == {
        "user-004",
        "user-005",
        "user-006",
    }


def _published(world: World, run_id: str) -> PublishedVersion:
    """What jobs.publish does."""
    run = load_run(world.storage, world.config.output.uri, run_id)
    return publish(world.storage, run, world.config.gates, world.config.inputs.users_uri)


def test_rows_deleted_since_a_full_run_began_do_not_come_back(world: World) -> None:
    report = world.run(full=True, publish_it=False)
    world.table().delete("user_id = 'user-005'")
    left = world.rows()
    with pytest.raises(PublishConflictError, match="was changed since version 0"):
        _published(world, report.run_id)
    assert world.rows() == left
    again = world.run(full=True)
    assert (again.run_id == report.run_id, set(world.rows())) == (False, set(world.shown))


def test_a_limited_first_run_does_not_take_the_place_of_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(tmp_path, monkeypatch)
    limited = world.run(Limits(max_requests=5), publish_it=False)
    world.run()
    rows = world.rows()
    with pytest.raises(PublishConflictError, match="was published first since run"):
        _published(world, limited.run_id)
    assert world.rows() == rows


def _upkeep(world: World) -> None:
    world.table().optimize.compact()
    world.table().alter.set_table_properties({"delta.logRetentionDuration": "interval 60 days"})
    assert world.table().version() == 2


def test_upkeep_before_publishing_throws_nothing_away(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    _change_vector(world)
    run_id = world.run(publish_it=False).run_id
    _upkeep(world)
    capsys.readouterr()
    assert run_job(plan_job.JOB, ["--config", str(world.folder / "job.yaml")]) == 0
    assert run_id in capsys.readouterr().out
    report = None

    def resumed() -> Any:
        nonlocal report
        report = world.run(engine=no_engine)
        return _recount(world)

    assert_exact(world, resumed)
    assert report is not None
    assert report.run_id == run_id


def test_upkeep_before_a_full_run_goes_on_throws_nothing_away(world: World) -> None:
    run_id = world.run(full=True, publish_it=False).run_id
    _upkeep(world)
    assert world.run(full=True, engine=no_engine).run_id == run_id
    assert world.table().version() == 3
    assert world.run(full=True).run_id != run_id, "the control: the table's rows are others now"


def test_control_a_delete_among_upkeep_is_another_update(world: World) -> None:
    _change_vector(world)
    run_id = world.run(publish_it=False).run_id
    world.table().delete("user_id = 'user-005'")
    world.table().optimize.compact()
    world.shown = {key: wanted for key, wanted in world.shown.items() if key[0] != "user-005"}
    assert_exact(world, world.run)
    assert run_id not in {row["run_id"] for row in world.rows().values()}


def test_a_restored_version_is_the_one_that_is_compared(world: World) -> None:
    shown, at_zero = dict(world.shown), world.rows()
    _change_vector(world)
    world.run()
    world.table().restore(0)
    assert world.rows() == at_zero
    world.shown = shown
    assert_exact(world, world.run)


def test_rows_deleted_behind_a_restore_are_written_again(world: World) -> None:
    shown, users = dict(world.shown), dict(world.users)
    _change_vector(world)
    world.run()
    world.table().restore(0)
    world.table().delete("user_id = 'user-003'")
    world.users = users
    world.shown = {key: wanted for key, wanted in shown.items() if key[0] != "user-003"}
    assert_exact(world, world.run)
    assert_nothing_to_do(world)


@pytest.mark.parametrize("limits", [Limits(max_requests=7), Limits(max_seconds=1e-9)])
def test_what_somebody_wrote_twice_stays_once_until_it_is_written_anew(world: World, limits: Limits) -> None:
    before = world.rows()
    write_deltalake(world.table(), world.table().to_pyarrow_table(), mode="append")
    report = world.run(limits)
    assert set(world.rows()) == set(before)
    assert report.causes == {"new_candidate": len(before)}
    assert report.num_deferred >= len(before) - 14
    _runs(world, limits)
    rows = world.rows()
    assert set(rows) == set(before)
    assert not {row["run_id"] for row in rows.values()} & {row["run_id"] for row in before.values()}


def test_a_row_that_somebody_wrote_twice_is_written_anew(world: World) -> None:
    first = min(world.shown)
    row = world.table().to_pyarrow_table().filter((pc.field("user_id") == first[0]) & (pc.field("task") == first[2]))
    row = row.filter(pc.field("content_id") == first[1])
    write_deltalake(world.table(), row, mode="append")
    del world.shown[first]
    report = world.run()
    assert report.causes == {"new_candidate": 1}
    assert {key for key, found in world.rows().items() if found["run_id"] == report.run_id} == {first}


def test_rows_that_somebody_else_wrote_are_carried_over_into_a_version_of_ours(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    before = world.rows()
    write_deltalake(world.table(), world.table().to_pyarrow_table(), mode="overwrite")
    world.write()
    assert run_job(plan_job.JOB, ["--config", str(world.folder / "job.yaml")]) == 0
    said = capsys.readouterr().out
    report = world.run(engine=no_engine)
    assert report.run_id in said
    assert (report.num_carried, report.causes) == (len(before), {})
    assert world.rows() == before
    assert world.table().version() == 2
    assert_nothing_to_do(world)


def test_control_a_row_with_a_flipped_fingerprint_is_written_anew(world: World) -> None:
    path = world.table().file_uris()[1]
    rows = world.storage.read_table(path)
    prints = rows["fingerprint"].to_pylist()
    flipped = ("1" if prints[0][0] == "0" else "0") + prints[0][1:]
    index = rows.schema.get_field_index("fingerprint")
    changed = rows.set_column(index, rows.schema.field(index), [pa.array([flipped, *prints[1:]])])
    world.storage.write_bytes(path, parquet_bytes(changed))
    (victim,) = zip(*(rows[name].to_pylist()[:1] for name in ("user_id", "content_id", "task")), strict=True)
    _new_candidate(world)
    expected = world.changed()
    assert victim not in expected
    report = world.run()
    assert {key for key, row in world.rows().items() if row["run_id"] == report.run_id} == expected | {victim}
    assert report.causes == {"new_candidate": len(expected), "content_changed": 1}


def test_deletion_vectors_are_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_vectors(storage: Storage, table_uri: str) -> Any:
        table = read_published(storage, table_uri)
        assert table is not None
        return replace(table, has_deletion_vectors=True)

    monkeypatch.setattr("jobs.whole_run.read_published", with_vectors)
    _change_vector(world)
    with pytest.raises(IncompatibleError, match="deletion vectors"):
        world.run()
    assert world.run(full=True).num_rows_generated == len(world.wanted())


def test_control_a_lost_request_stops_the_update(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    add = ShardWriter.add

    def losing(self: Any, bucket: Any, changed: Any) -> None:
        add(self, bucket, changed.head(max(changed.height - 1, 0)))

    _projector(world)
    monkeypatch.setattr(ShardWriter, "add", losing)
    with pytest.raises(ConservationError, match=r"key\(s\) of the plan are missing"):
        world.run()
    monkeypatch.setattr(ShardWriter, "add", add)
    assert_exact(world, world.run)


@pytest.mark.parametrize(
    ("wanted", "found"), [("abc", "ab"), ("abc", "abcd"), ("abc", "abcc"), ("abc", ""), ("aabc", "abc"), ("", "a")]
)
def test_control_each_planned_key_once_and_no_other(wanted: str, found: str) -> None:
    run: Any = SimpleNamespace(plan_uri="updates/1")
    with HashSpool() as planned_keys, HashSpool() as results:
        for spool, keys in ((planned_keys, wanted), (results, found)):
            spool.add(hash_rows(pa.array(list(keys), pa.string())))
        with pytest.raises(ConservationError, match=r"updates/1: 1 key|updates/1: 3 key"):
            e2p_ray.update.update._require_same(planned_keys, results, run)
    with HashSpool() as planned_keys, HashSpool() as results:
        for spool, keys in ((planned_keys, "abc"), (results, "cab")):
            spool.add(hash_rows(pa.array(list(keys), pa.string())))
        e2p_ray.update.update._require_same(planned_keys, results, run)


def test_a_spool_that_is_closed_holds_no_file_open() -> None:
    rows = pa.table({"content_id": [f"content-{n}" for n in range(200)]})
    with BucketSpool(rows.schema, 16) as spool:
        before = len(os.listdir("/proc/self/fd"))
        spool.add(rows)
        spool.close()
        assert len(os.listdir("/proc/self/fd")) == before
        found = pa.concat_tables(spool.rows(bucket) for bucket in range(16))
    assert found.sort_by("content_id") == rows.sort_by("content_id")


def test_no_room_to_spool_rows_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rows = pa.table({"content_id": ["content"]})
    said = rf"temporary files in {tmp_path}: .*No space left on device.* TMPDIR .*same command"
    spool = BucketSpool(rows.schema, 1)
    (folder,) = tmp_path.iterdir()
    (folder / "0.arrows").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=said), spool:
        spool.add(rows)
    assert not list(tmp_path.iterdir())


def test_a_publish_is_in_the_audit_log_whatever_becomes_of_its_report(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = verify_log(world.storage, world.config.output.uri).entries

    def failing(storage: Storage, run: Run, report: Report) -> None:
        if report.version is not None:
            raise StorageError("no room for it")
        write_report(storage, run, report)

    _projector(world)
    monkeypatch.setattr(jobs.whole_run, "write_report", failing)
    with pytest.raises(StorageError, match="no room"):
        world.run()
    assert world.table().version() == 1, "control: it is published"
    monkeypatch.setattr(jobs.whole_run, "write_report", write_report)
    assert_nothing_to_do(world)
    (entry,) = verify_log(world.storage, world.config.output.uri).entries[len(before) :]
    assert (entry.action, entry.ids["version"]) == ("generate", 1)


# -- limits


def _until_nothing_is_left(world: World, limits: Limits) -> list[set[Key]]:
    """The keys of each run of the same command."""
    written = []
    for _ in range(60):
        version = world.table().version()
        report = world.run(limits)
        if world.table().version() == version:
            break
        written.append({key for key, row in world.rows().items() if row["run_id"] == report.run_id})
        assert report.num_deferred == len(world.changed()) - sum(map(len, written))
        assert sum(report.causes.values()) == report.num_deferred + len(written[-1])
    assert_nothing_to_do(world)
    return written


def _texts(world: World) -> dict[Key, tuple[str, str, str]]:
    return {key: (row["text"], row["status"], row["fingerprint"]) for key, row in world.rows().items()}


def test_limited_runs_come_to_the_same_as_a_full_one(world: World) -> None:
    _projector(world)
    _new_content(world)
    _remove_candidate(world)
    changed, new = world.changed(), {key for key in world.wanted() if key not in world.shown}
    written = _until_nothing_is_left(world, Limits(max_requests=11))
    assert [len(keys) for keys in written] == [11] * (len(changed) // 11) + [len(changed) % 11]
    assert set().union(*written) == changed
    assert new <= written[0]  # what has no text at all comes first
    limited = _texts(world)
    world.run(full=True)
    assert _texts(world) == limited


@pytest.mark.parametrize(("priority", "sign"), [("score", 1), ("rank", 1), ("score:asc", -1), ("rank:desc", -1)])
def test_the_most_important_come_first(world: World, priority: str, sign: int) -> None:
    _projector(world)
    changed = world.changed()
    written = _until_nothing_is_left(world, Limits(max_requests=17, priority=Priority.parse(priority)))
    scores = [[sign * world.candidates[key[:2]] for key in keys] for keys in written]
    assert all(min(earlier) >= max(later) for earlier, later in pairwise(scores))
    assert sum(map(len, written)) == len(changed)


def test_the_order_under_a_limit() -> None:
    """Those that failed last, then by priority, then those without a text first, then the oldest, then as they lie."""
    in_order = [
        (-2.0, False, 7, 7, 0), (0.0, True, 0, 0, 0), (0.0, True, 0, 0, 0), (0.0, False, 5, 8, 0),
        (0.0, False, 5, 9, 0), (0.0, False, 6, 6, 0), (1.0, True, 0, 0, 0), (np.inf, True, 0, 0, 0),
        (-9.0, True, 0, 0, 1), (-9.0, False, 1, 1, 1), (-10.0, True, 0, 0, 2),
    ]  # fmt: skip
    lie = [10, 5, 4, 7, 1, 0, 9, 2, 6, 8, 3]  # of two alike the first lies first
    ages = {"content_since": pl.Int64, "since": pl.Int64}
    columns = {"priority": pl.Float64, "is_new": pl.Boolean} | ages | {"standing": pl.Int8}
    ranks = pl.DataFrame([in_order[at] for at in lie], schema=columns, orient="row")

    def tiers(limits: Limits, requests_per_shard: int = 100) -> list[int]:
        """Of the rows in their right order."""
        found = _order(ranks, limits, ShardSize(requests_per_shard, requests_per_shard))
        assert found.tiers is not None
        assert max(found.tiers) < found.num_tiers
        by_place = dict(zip(lie, found.tiers.tolist(), strict=True))
        return [by_place[at] for at in range(len(lie))]

    for number in range(1, 12):
        assert tiers(Limits(max_requests=number)) == [0] * number + [-1] * (11 - number)
    by_score = Priority("score", True)
    assert tiers(Limits(max_seconds=1.0, priority=by_score), 3) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert tiers(Limits(6, 1.0, by_score), 3) == [0, 0, 0, 1, 1, 1, -1, -1, -1, -1, -1]
    assert tiers(Limits(max_seconds=1.0, priority=by_score), 1) == [0, 0, 1, 2, 2, 3, 4, 5, 5, 6, 7], "eight at most"
    assert tiers(Limits(max_seconds=1.0)) == [1, 0, 0, 1, 1, 1, 0, 0, 2, 2, 2]
    assert Changes({"new_user": 9}, num_deferred=2, num_settled=3).num_to_write == 4


@pytest.mark.parametrize("limits", [Limits(max_requests=14), Limits(max_seconds=1e-9)])
def test_what_changes_before_every_limited_run_is_written_in_turns(world: World, limits: Limits) -> None:
    everything, written = set[Key](), set[Key]()
    for number in range(1, 16):
        for at, (user, found) in enumerate(world.users.items()):
            world.users[user] = replace(found, vector=vector(100 * number + at) if found.vector else None)
        everything |= world.changed()
        report = world.run(limits)
        now = {key for key, row in world.rows().items() if row["run_id"] == report.run_id}
        assert 0 < len(now) < len(everything) / 3, "the control: one run is far from all"
        written |= now
    assert written == everything


def test_of_repeated_candidates_the_best_counts_and_one_without_a_value_comes_last(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    best, unscored = ("user-003", "content-03"), {("user-003", "content-04"): None, ("user-004", "content-05"): np.nan}
    world.candidates = dict.fromkeys(world.candidates, -3.0)
    plain = world.write

    def write() -> None:
        plain()
        uri = world.config.inputs.candidates_uri
        rows = [row | {"score": unscored.get((row["user_id"], row["content_id"]), row["score"])}
                for row in world.storage.read_table(uri).to_pylist()]  # fmt: skip
        again = [row | {"score": score} for row in rows for score in (-1.0, -4.0)
                 if (row["user_id"], row["content_id"]) == best]  # fmt: skip
        schema = world.storage.read_table(uri).schema
        world.storage.write_table(uri, pa.Table.from_pylist([*again[:1], *rows, *again[1:]], schema))

    monkeypatch.setattr(world, "write", write)
    _projector(world)
    changed = world.changed()
    limits = [Limits(max_requests=most, priority=Priority.parse("score")) for most in (2, len(changed) - 6)]
    written = list[set[Key]]()
    for limit in limits:
        report = world.run(limit)
        written.append({key for key, row in world.rows().items() if row["run_id"] == report.run_id})
    assert written[0] == {(*best, task) for task in TASKS}
    assert written[1] == {key for key in changed if key[:2] not in {best, *unscored}}


def test_rows_that_stay_may_be_several_shards_of_one_bucket(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("e2p_ray.update.write._CARRIED_ROWS", 5)
    world.contents["content-20"] = content(20)
    world.candidates |= {(user, "content-20"): 1.0 for user in world.users}
    _projector(world)
    changed, num_new = world.changed(), 2 * len(world.users)
    report = world.run(Limits(max_requests=10))
    assert (report.num_carried, report.num_deferred) == (0, len(changed) - 10)
    assert report.run_dead_letters == {ErrorCode.DEFERRED: num_new - 10}
    rows = world.rows()
    assert rows.keys() >= world.shown.keys()
    written = {key: row for key, row in rows.items() if row["run_id"] == report.run_id}
    numbers = [one.rpartition("-")[2] for one in _shards(world, report.run_id) if one.startswith("carried")]
    assert max(numbers) > "001", "a bucket of more than two"
    report = world.run()
    assert (report.num_carried, report.num_rows_generated) == (10, len(changed) - 10)
    assert {key: row for key, row in world.rows().items() if row["run_id"] != report.run_id} == written
    assert_nothing_to_do(world)


def test_a_deferred_request_keeps_its_old_row_or_is_a_dead_letter(world: World) -> None:
    before = world.rows()
    _projector(world)
    _new_content(world)
    new = {key for key in world.wanted() if key not in world.shown}
    report = world.run(Limits(max_requests=1))
    (chosen,) = (key for key, row in world.rows().items() if row["run_id"] == report.run_id)
    assert chosen in new
    assert set(world.rows()) == set(world.shown) | {chosen}
    assert {key: row for key, row in world.rows().items() if key != chosen} == before
    assert report.run_dead_letters == {ErrorCode.DEFERRED: len(new) - 1}
    letters = [
        world.storage.read_table(info.uri)
        for info in world.storage.list_objects(f"{world.config.output.uri}/runs/{report.run_id}/dead_letters")
    ]
    columns = [pa.concat_tables(letters)[name].to_pylist() for name in ("user_id", "content_id", "task")]
    assert set(zip(*columns, strict=True)) == new - {chosen}


def test_a_first_run_may_be_limited_and_its_deferred_are_no_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gates = {"max_fallback_share": 1.0, "max_dead_letter_share": 0.0, "max_same_text_share": 1.0}
    world = make_world(tmp_path, monkeypatch, gates=gates)
    report = world.run(Limits(max_requests=10))
    assert (report.num_rows_generated, report.num_deferred) == (10, len(world.wanted()) - 10)
    assert len(world.rows()) == 10
    written = _until_nothing_is_left_after(world, 10)
    assert written == len(world.wanted()) - 10
    assert set(world.rows()) == set(world.wanted())


def _until_nothing_is_left_after(world: World, num_first: int) -> int:
    total = 0
    for _ in range(99):
        report = world.run(Limits(max_requests=25))
        if report.version is None or report.version.already_published:
            return total
        total += report.num_rows_generated
        assert report.num_deferred == len(world.wanted()) - num_first - total
    raise AssertionError("there is no end to it")


def test_no_shard_is_begun_after_the_time(world: World) -> None:
    _projector(world)
    changed, before = world.changed(), world.rows()
    limits = Limits(max_seconds=1e-9, priority=Priority.parse("score"))
    report = world.run(limits)
    rows = world.rows()
    written = {key for key, row in rows.items() if row["run_id"] == report.run_id}
    assert 0 < len(written) <= 7  # a worker's first shard is always done
    assert report.num_deferred == len(changed) - len(written)
    assert {key: row for key, row in rows.items() if key not in written} == {
        key: row for key, row in before.items() if key not in written
    }
    scores = sorted((world.candidates[key[:2]] for key in changed), reverse=True)
    tier = -(-len(changed) // 8)
    assert min(world.candidates[key[:2]] for key in written) >= scores[tier]
    rest = _until_nothing_is_left_in_time(world, limits)
    assert set().union(written, *rest) == changed
    limited = _texts(world)
    world.run(full=True)
    assert _texts(world) == limited


def _until_nothing_is_left_in_time(world: World, limits: Limits) -> list[set[Key]]:
    found: list[set[Key]] = []
    for _ in range(99):
        report = world.run(limits)
        if report.version is None or report.version.already_published:
            return found
        found.append({key for key, row in world.rows().items() if row["run_id"] == report.run_id})
        assert found[-1]
    raise AssertionError("there is no end to it")


def test_new_requests_wait_as_dead_letters_when_the_time_is_over(world: World) -> None:
    _projector(world)
    world.contents |= {f"content-{n}": content(n) for n in range(20, 26)}
    world.candidates |= {(user, f"content-{n}"): 1.0 for n in range(20, 26) for user in list(world.users)[:4]}
    new = world.wanted().keys() - world.shown.keys()
    report = world.run(Limits(max_seconds=1e-9))
    written = {key for key, row in world.rows().items() if row["run_id"] == report.run_id}
    assert written <= new
    assert report.run_dead_letters == {ErrorCode.DEFERRED: len(new - written)}
    before = world.rows()
    report = world.run()
    after = world.rows()
    assert set(after) == set(world.wanted())
    assert report.num_rows_generated == len(after) - len(written)
    assert {key: after[key] for key in written} == {key: before[key] for key in written}


def test_wrong_limits_are_refused(world: World) -> None:
    for make in (
        lambda: Limits(max_requests=0),
        lambda: Limits(max_seconds=0),
        lambda: Limits(max_seconds=float("nan")),
        lambda: Limits(priority=Priority("score", True)),
        lambda: Priority.parse("score:up"),
        lambda: Priority.parse(":asc"),
        lambda: world.run(Limits(max_requests=1), full=True),
    ):
        with pytest.raises(ConfigError):
            make()
    _projector(world)
    for column, said in (("clicks", "no such column"), ("source", "expected a number")):
        with pytest.raises(InputError, match=said):
            world.run(Limits(max_requests=1, priority=Priority.parse(column)))


# -- limits, and requests that can never be written


@pytest.fixture
def hopeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Not run yet: 36 requests, twelve of them about a content in a language that no prompt is for."""
    gates = {"max_fallback_share": 1.0, "max_dead_letter_share": 0.5, "max_same_text_share": 1.0}
    world = make_world(tmp_path, monkeypatch, num_users=6, num_contents=3, gates=gates)
    world.contents["content-00"] = replace(world.contents["content-00"], language="fr")
    for user, name in world.candidates:
        world.candidates[user, name] = 1.0 + (name == "content-00")  # the best and the last of both orders of a score
    return world


def _keys(world: World) -> set[Key]:
    return {(user, name, task) for user, name in world.candidates for task in TASKS}


def _dead(world: World) -> set[Key]:
    """Those that cannot be written; who has no soft token gets the title in place of a text that fails."""
    return {
        key
        for key in _keys(world)
        if world.contents[key[1]].language == "fr" and isinstance(world.users[key[0]].state(), tuple)
    }


def _letters(world: World, report: Report) -> dict[Key, dict[str, Any]]:
    """The dead letters of a run, each key once."""
    found: dict[Key, dict[str, Any]] = {}
    for info in world.storage.list_objects(f"{world.config.output.uri}/runs/{report.run_id}/dead_letters"):
        for row in world.storage.read_table(info.uri).to_pylist():
            key = (row["user_id"], row["content_id"], row["task"])
            assert key not in found
            found[key] = row
    return found


def _tried(world: World, report: Report) -> set[Key]:
    """What a run itself wrote or failed to write."""
    letters = _letters(world, report)
    written = {key for key, row in world.rows().items() if row["run_id"] == report.run_id}
    assert not written & set(letters)
    return written | {
        key
        for key, row in letters.items()
        if row["run_id"] == report.run_id and row["error_code"] != ErrorCode.DEFERRED
    }


def _runs(world: World, limits: Limits) -> list[Report]:
    """The same command until there is nothing to do."""
    reports = list[Report]()
    for _ in range(40):
        report = world.run(limits)
        assert report.version is not None
        if report.version.already_published:
            return reports
        reports.append(report)
    raise AssertionError("there is no end to it")


@pytest.mark.parametrize("priority", [None, "score", "score:asc"])
@pytest.mark.parametrize("max_requests", [7, 14, 35])
def test_requests_that_cannot_be_written_take_a_limit_once(
    hopeless: World, max_requests: int, priority: str | None
) -> None:
    limits = Limits(max_requests=max_requests, priority=Priority.parse(priority) if priority else None)
    if priority == "score":  # of which a first run would have nothing to show
        hopeless.candidates["user-003", "content-01"] = 3.0
    dead, everything, tried = _dead(hopeless), _keys(hopeless), set[Key]()
    assert (len(dead), len(everything)) == (8, 36)
    for _ in range(-(-len(everything) // max_requests)):
        report = hopeless.run(limits)
        now = _tried(hopeless, report)
        new = now - tried
        assert len(new) == min(max_requests, len(everything - tried)), "as many as the limit lets, none of them again"
        assert now - new <= dead
        tried |= now
        assert set(hopeless.rows()) == tried - dead
        assert set(_letters(hopeless, report)) == everything - (tried - dead)
        assert report.run_dead_letters.get("no_prompt", 0) == len(dead & tried), (
            "a letter stays until it is tried again"
        )
        assert report.num_deferred == len(everything - tried)
    assert tried == everything
    assert not _runs(hopeless, limits)


def test_what_failed_before_other_inputs_comes_last_but_is_tried(hopeless: World) -> None:
    limits, dead = Limits(max_requests=12), _dead(hopeless)
    first = _runs(hopeless, limits)[-1]
    assert set(_letters(hopeless, first)) == dead
    hopeless.contents["content-00"] = content(0)  # it can be written now, and nothing says so
    for user in hopeless.users:
        hopeless.candidates[user, "content-09"] = 1.0
    hopeless.contents["content-09"] = content(9)
    report = hopeless.run(limits)
    changed = {key for key in _keys(hopeless) if key[1] == "content-00"} - dead  # titles so far
    new = {key for key in _keys(hopeless) if key[1] == "content-09"}
    assert _tried(hopeless, report) == new
    assert {row["error_code"] for row in _letters(hopeless, report).values()} == {"no_prompt"}
    assert report.num_deferred == len(changed | dead), "their letters are of other inputs: they wait"
    report = hopeless.run(limits)
    assert _tried(hopeless, report) == changed | dead
    assert set(hopeless.rows()) == set(hopeless.wanted())
    assert_nothing_to_do(hopeless)


def test_time_runs_out_before_requests_that_failed(hopeless: World) -> None:
    limits, dead = Limits(max_seconds=1e-9), _dead(hopeless)
    reports = _runs(hopeless, limits)
    assert set(hopeless.rows()) == _keys(hopeless) - dead
    assert set(_letters(hopeless, reports[-1])) == dead
    tries = [row["run_id"] for row in _letters(hopeless, reports[-1]).values()]
    assert set(tries) <= {report.run_id for report in reports}
    assert len(reports) <= 2 + len(_keys(hopeless)) // 3, "a shard a run, and the last ones have few requests"


def test_control_a_dead_letter_of_a_purged_run_is_one_to_try(hopeless: World) -> None:
    limits, dead = Limits(max_requests=18), _dead(hopeless)
    report = hopeless.run(limits)
    for info in list(hopeless.storage.list_objects(f"{hopeless.config.output.uri}/runs/{report.run_id}")):
        hopeless.storage.delete(info.uri)
    _runs(hopeless, limits)
    assert set(hopeless.rows()) == _keys(hopeless) - dead


def _closed_then(world: World, limits: Limits) -> tuple[list[str], Report]:
    """What the same command is refused with again and again, and the first report that there is."""
    refusals, calls = list[str](), set[Key]()
    for _ in range(9):
        try:
            report = world.run(limits)
        except GateError as error:
            refusals.append(str(error))
        else:
            return refusals, report
        finally:
            assert not calls & set(world.calls), "nothing is written twice"
            calls |= set(world.calls)
    raise AssertionError("it never gets on")


@pytest.mark.parametrize("limits", [Limits(7, priority=Priority("score", True)), Limits(max_seconds=1e-9)])
def test_a_limited_run_that_no_gate_let_through_is_gone_on_from(hopeless: World, limits: Limits) -> None:
    hopeless.users = {user: User(vector(number)) for number, user in enumerate(hopeless.users)}
    hopeless.candidates = {pair: 1.0 + (pair[1] == "content-00") for pair in hopeless.candidates}
    if limits.max_requests is None:  # without a priority the first shard is of the content with the least hash
        hopeless.contents = {name: replace(text, language="fr") for name, text in hopeless.contents.items()}
        hopeless.contents["content-00"] = content(0)
    dead, everything = _dead(hopeless), _keys(hopeless)
    gates = hopeless.config.gates.model_copy(update={"max_dead_letter_share": len(dead) / len(everything)})
    hopeless.config = hopeless.config.model_copy(update={"gates": gates})
    refusals, report = _closed_then(hopeless, limits)
    assert refusals
    assert all("no text at all" in one and one.endswith("it goes on with what the limit left") for one in refusals)
    assert set(hopeless.rows()) | set(_letters(hopeless, report)) == everything
    _runs(hopeless, limits)
    assert set(hopeless.rows()) == everything - dead


def test_old_rows_hold_a_gate_closed_until_enough_of_them_are_written_anew(world: World) -> None:
    limits, users = Limits(max_requests=14), dict(world.users)
    world.users = {user: replace(found, vector=None) for user, found in users.items()}
    world.run()
    world.users = users
    version, changed = world.table().version(), world.changed()
    gates = world.config.gates.model_copy(update={"max_fallback_share": 0.5})
    world.config = world.config.model_copy(update={"gates": gates})
    refusals, report = _closed_then(world, limits)
    assert len(refusals) > 1
    assert world.table().version() == version + 1
    assert report.num_deferred == len(changed) - 14 * (len(refusals) + 1)
    _runs(world, limits)
    rows = world.rows()
    assert set(rows) == set(world.wanted())
    world.run(full=True)
    assert {key: row["text"] for key, row in rows.items()} == {key: row["text"] for key, row in world.rows().items()}


def test_dead_letters_that_other_inputs_may_have_made_good_close_no_gate_while_they_wait(hopeless: World) -> None:
    dead, limits = _dead(hopeless), Limits(max_requests=3)
    gates = hopeless.config.gates.model_copy(update={"max_dead_letter_share": len(dead) / len(_keys(hopeless))})
    hopeless.config = hopeless.config.model_copy(update={"gates": gates})
    hopeless.run(Limits(max_requests=99))
    hopeless.contents |= {"content-00": content(0), "content-01": content(1, " It is open.")}
    for user in ("user-002", "user-003"):
        del hopeless.candidates[user, "content-02"]  # a larger share of what is left
    report = hopeless.run(limits)
    assert set(_letters(hopeless, report)) == dead
    _runs(hopeless, limits)
    assert set(hopeless.rows()) == _keys(hopeless)


def test_control_a_gate_that_no_further_text_opens_costs_nothing_again(hopeless: World) -> None:
    """Dead letters are counted among all that is planned: their share only grows."""
    hopeless.users = {user: User(vector(number)) for number, user in enumerate(hopeless.users)}
    gates = hopeless.config.gates.model_copy(update={"max_dead_letter_share": 0.15})
    hopeless.config = hopeless.config.model_copy(update={"gates": gates})
    limits = Limits(max_requests=7, priority=Priority.parse("score"))
    with pytest.raises(GateError):
        hopeless.run(limits)
    for _ in range(2):
        with pytest.raises(GateError, match=r"report.html$"):
            hopeless.run(limits, engine=no_engine)


# -- what would change


def test_jobs_plan_says_beforehand_what_changes(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    for edit in (_change_vector, _change_title, _new_user, _remove_candidate):
        edit(world)
    world.write()
    causes, wanted = world.causes(), world.wanted()
    removed, carried = len(set(world.shown) - set(wanted)), len(wanted) - causes.total()
    path = world.folder / "job.yaml"
    capsys.readouterr()
    assert run_job(plan_job.JOB, ["--config", str(path), "--rows-per-s", "1"]) == 0
    shown = {" ".join(line.split()[:-1]): line.split()[-1] for line in capsys.readouterr().out.splitlines() if line}
    assert {name: int(number) for name, number in shown.items() if name.startswith("write: ")} == {
        f"write: {cause}": number for cause, number in causes.items()
    }
    assert (shown["carry over"], shown["remove"]) == (str(carried), str(removed))
    assert f"estimated time {duration_text(causes.total())} at 1.0 rows/s" in shown, "of what is written, not of all"
    assert world.table().version() == 0
    for nonsense in ("0", "-5", "nan", "inf"):
        assert run_job(plan_job.JOB, ["--config", str(path), "--rows-per-s", nonsense]) == 2
        assert f"--rows-per-s {nonsense}: give a number above 0" in capsys.readouterr().err
    assert_exact(world, world.run)


# -- a gate that is closed from the beginning


def _with_ghosts(world: World, num_ghosts: int, share: float) -> None:
    """Candidates of users whom nobody knows, two requests each, and a gate."""
    for number in range(num_ghosts):
        world.candidates[f"ghost-{number}", "content-00"] = 1.0
    gates = world.config.gates.model_copy(update={"max_dead_letter_share": share})
    world.config = world.config.model_copy(update={"gates": gates})


def _written(world: World) -> list[str]:
    """All that is below the output, but plans."""
    output = Path(world.config.output.uri)
    return sorted(str(path) for path in output.rglob("*") if path.is_file() and output / "plans" not in path.parents)


def test_a_gate_that_the_plan_closes_is_none_where_nothing_is_to_be_published(world: World) -> None:
    before = world.rows()
    _with_ghosts(world, 4, 0.0)
    world.run(engine=no_engine)
    assert world.rows() == before


@pytest.mark.parametrize("options", [{}, {"full": True}, {"publish_it": False}, {"limits": Limits(max_requests=5)}])
def test_dead_letters_of_the_plan_close_the_gate_before_anything_is_generated(
    options: dict[str, Any], world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    before, num_planned = world.rows(), len(world.wanted())
    _with_ghosts(world, 4, 7 / (num_planned + 8))
    _change_vector(world)
    said = rf"^8 of {num_planned + 8} requests cannot .* \(unknown_user 8\); .* more than 7, so .* raise the gate$"
    written = _written(world)
    with pytest.raises(GateError, match=said) as caught:
        world.run(engine=no_engine, **options)
    assert world.rows() == before
    assert _written(world) == written, "nor anything carried over"
    path, share = str(world.folder / "job.yaml"), ["--gates.max_dead_letter_share"]
    capsys.readouterr()
    assert run_job(plan_job.JOB, ["--config", path, *share, f"{7 / (num_planned + 8)}"]) == 0
    assert str(caught.value) in capsys.readouterr().out
    assert run_job(plan_job.JOB, ["--config", path, *share, f"{8 / (num_planned + 8)}"]) == 0
    assert "max_dead_letter_share" not in capsys.readouterr().out
    _with_ghosts(world, 4, 8 / (num_planned + 8))
    assert world.run(**options).plan_dead_letters == {"unknown_user": 8}, "the control: exactly what is allowed"


def test_what_the_gate_allows_is_what_the_gate_compares(world: World) -> None:
    """Every share in hundredths of plans of every size: as many as the gate's own comparison lets through."""
    world.write()
    made = planned(world.config, set_up(world.config))
    for num_requests in (0, 1, 3, 29, 100, 350, 10_000):
        counts = replace(made.counts, num_requests=num_requests, dead_letters={})
        for hundredths in range(101):
            _with_ghosts(world, 0, hundredths / 100)
            most = max(n for n in range(num_requests + 1) if n / max(1, num_requests) <= hundredths / 100)
            assert dead_letters_left(world.config, replace(made, counts=counts)) == most
    assert int(0.29 * 100) == 28, "the control: a product that is rounded down"


def test_only_a_full_run_is_stopped_by_the_dead_letters_that_the_gate_leaves(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update's share counts the rows that it carries over, too."""
    found = list[int | None]()

    def batch(*arguments: Any, **named: Any) -> Any:
        found.append(named["max_dead_letters"])
        return serial_batch(*arguments, **named)

    monkeypatch.setattr(jobs.whole_run, "run_batch", batch)
    _with_ghosts(world, 3, 0.25)
    _change_vector(world)
    world.run(publish_it=False)
    world.run(full=True)
    assert found == [None, (len(world.wanted()) + 6) // 4 - 6]


# -- in a larger world


NUM_MANY_USERS = 300


def _many_users(folder: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Each of 300 users with each of four contents and both tasks: 2,400 requests."""
    plan = {"requests_per_shard": 150, "max_group_requests": 64}
    world = make_world(folder, monkeypatch, num_users=NUM_MANY_USERS, num_contents=4, plan=plan)
    world.candidates = {(user, name): 1.0 for user in world.users for name in world.contents}
    return world


@pytest.fixture(scope="module")
def first_of_many(tmp_path_factory: pytest.TempPathFactory) -> World:
    with pytest.MonkeyPatch.context() as monkeypatch:
        made = _many_users(tmp_path_factory.mktemp("many"), monkeypatch)
        made.run()
    assert len(made.rows()) == 8 * NUM_MANY_USERS
    return made


def _one_percent(world: World) -> set[Key]:
    """Three of 300 users; who opted out is none of them, whose vector is not looked at."""
    users = ["user-017", "user-142", "user-299"]
    for number, user in enumerate(users):
        world.users[user] = replace(world.users[user], vector=vector(9000 + number))
    return {(user, f"content-0{number}", task) for user in users for number in range(4) for task in TASKS}


def _one_number_of_a_vector(world: World) -> set[Key]:
    """The least that float32 can tell, in one of 8 x 300 numbers."""
    values = np.array(world.users["user-142"].vector, dtype=np.float32)
    values[5] = np.nextafter(values[5], np.float32(9))
    world.users["user-142"] = replace(world.users["user-142"], vector=tuple(values.tolist()))
    return {("user-142", f"content-0{number}", task) for number in range(4) for task in TASKS}


def _one_content(world: World) -> set[Key]:
    world.contents["content-02"] = replace(world.contents["content-02"], body=world.contents["content-02"].body + ".")
    return {(user, "content-02", task) for user in world.users for task in TASKS}


def _one_prompt(world: World) -> set[Key]:
    """Of one task in one language; the odd contents are Japanese."""
    _prompt(world)
    return {(user, name, "headline") for user in world.users for name in ("content-01", "content-03")}


def _whole_projector(world: World) -> set[Key]:
    _projector(world)
    return {(user, f"content-0{number}", task) for user in world.users for number in range(4) for task in TASKS}


@pytest.mark.parametrize(
    ("edit", "num_changed"),
    [
        (_one_percent, 3 * 8),
        (_one_number_of_a_vector, 8),
        (_one_content, 600),
        (_one_prompt, 600),
        (_whole_projector, 2400),
    ],
)
def test_a_change_among_many_users_writes_these_keys_and_no_other(
    edit: Callable[[World], set[Key]],
    num_changed: int,
    first_of_many: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = _many_users(tmp_path, monkeypatch)
    shutil.copytree(first_of_many.config.output.uri, world.config.output.uri)
    world.shown = dict(first_of_many.shown)
    before, expected = world.rows(), edit(world)
    assert len(expected) == num_changed
    assert_exact(world, world.run)
    after = world.rows()
    assert {key for key, row in after.items() if row["run_id"] != before[key]["run_id"]} == expected
    assert {key for key, row in after.items() if row["fingerprint"] != before[key]["fingerprint"]} == expected

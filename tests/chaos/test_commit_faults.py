"""Commits of rollback and purge on an S3 that fails: made once, however often they were tried; told from others'."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

import e2p_ray.commit.rollback as rollback_module
from e2p_ray.commit.purge import find_users, purge_users
from e2p_ray.commit.rollback import RolledBack, rollback
from e2p_ray.commit.users_in import Users
from e2p_ray.errors import PublishConflictError, StorageError
from e2p_ray.storage import PassingError, Storage
from tests.faulty import Stormy, stormy_s3
from tests.s3 import IS_LONG, S3Server
from tests.test_commit import World, opened, users_table

LOG_WRITES = r"^PUT .*/_delta_log/"
# Delta's own client tries neither denials nor lost answers of a commit again.
SCRIPTS = [["denied", "reset", "denied", "lost_answer"]]
SCRIPTS += [["denied"], ["lost_answer"], ["slow_down"], ["reset"]] if IS_LONG else []
GONE = "u5"


@pytest.fixture(scope="module")
def stormy(s3_server: S3Server) -> Iterator[Stormy]:
    with stormy_s3(s3_server.endpoint_url) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def calm(s3_server: S3Server) -> World:
    """Two published versions, and a third run that is complete; reached without the proxy."""
    world = opened(Storage(s3_server.config), f"{s3_server.new_bucket()}/out")
    world.commit_pending("run1")
    world.publish()
    world.with_run("run2").publish()
    return world


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("e2p_ray.storage.s3._FIRST_WAIT_S", 0.001)


def through(calm: World, stormy: Stormy, **changes: Any) -> World:
    update = {"endpoint_url": stormy.endpoint_url, "read_timeout_s": 5.0, **changes}
    return replace(calm, storage=Storage(calm.storage.config.model_copy(update=update)))


def shown(world: World) -> set[str]:
    return set(world.published()["run_id"].to_pylist())


def back(world: World, version: int) -> RolledBack:
    return rollback(world.storage, world.output_uri, world.users_uri, version=version)


def other_version(calm: World) -> int:
    """0 or 1, whichever is not shown: each rollback goes to the other one."""
    return 1 if shown(calm) == {"run1"} else 0


@pytest.mark.parametrize("refusing", [set(), {GONE}], ids=["restore", "overwrite"])
def test_a_rollback_is_committed_once_through_any_fault(refusing: set[str], calm: World, stormy: Stormy) -> None:
    calm.write_users(users_table(refusing=refusing))
    for script in SCRIPTS:
        before, goal = calm.delta().version(), other_version(calm)
        stormy.plan(script, only=LOG_WRITES)
        done = back(through(calm, stormy), goal)
        counts = stormy.counts()
        assert {fault: counts[fault] for fault in script} == {fault: script.count(fault) for fault in script}, script
        assert (done.version, done.already) == (before + 1, False), script
        assert bool(done.num_files_suppressed) == bool(refusing)
        assert shown(calm) == {done.run_id} == {f"run{goal + 1}"}
        now = calm.delta()
        assert now.version() == before + 1, script
        assert now.history(1)[0]["action"] == "rollback"
        assert back(calm, goal).already
    stormy.plan(["denied"], only=LOG_WRITES)
    goal = other_version(calm)
    with pytest.raises(StorageError, match=r"could not roll back .* in 1 tries"):  # the control: with one try it fails
        back(through(calm, stormy, max_attempts=1), goal)
    assert calm.delta().version() == before + 1
    assert shown(calm) == {done.run_id}


def test_who_came_between_two_tries_is_not_rolled_back(
    calm: World, stormy: Stormy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first try is denied, it looks that nobody was first, then somebody is: the second try must not follow."""
    calm.write_users(users_table())
    goal, before, look = other_version(calm), calm.delta().version(), rollback_module._after_failure
    others = iter([calm.with_run("run3")])

    def then_another(*arguments: Any) -> RolledBack:
        try:
            return look(*arguments)
        except PassingError:
            for other in others:
                other.publish()
            raise

    monkeypatch.setattr(rollback_module, "_after_failure", then_another)
    stormy.plan(["denied"], only=LOG_WRITES)
    with pytest.raises(PublishConflictError, match="was changed while it was being rolled back"):
        back(through(calm, stormy), goal)
    assert stormy.counts()["denied"] == 1
    assert shown(calm) == {"run3"}
    assert calm.delta().version() == before + 1


def test_a_purge_is_committed_once_through_any_fault(calm: World, stormy: Stormy) -> None:
    """Its commit, which is an object of ours, and its checkpoint, which is Delta's."""
    calm.write_users(users_table(gone={GONE}))
    calm.delta().create_checkpoint()
    back(calm, other_version(calm))
    before, rows = calm.delta().version(), calm.published()
    assert GONE in rows["user_id"].to_pylist()
    users = Users([GONE])
    stormy.plan(["denied"], only=LOG_WRITES)
    storage = through(calm, stormy, max_attempts=1).storage
    with pytest.raises(StorageError, match="in 1 tries"):  # the control: with one try it fails, and all is as it was
        purge_users(storage, calm.output_uri, users, find_users(storage, calm.output_uri, users), print)
    assert calm.published().equals(rows)
    storage = through(calm, stormy).storage
    found = find_users(storage, calm.output_uri, users)
    # The commit is denied, made, and found again; then the checkpoint, and what says that it is the last one.
    stormy.plan(["denied", "lost_answer", "ok", "denied", "ok", "denied"], only=LOG_WRITES)
    done = purge_users(storage, calm.output_uri, users, found, print)
    assert (stormy.counts()["denied"], stormy.counts()["lost_answer"]) == (3, 1)
    assert done.version == before + 1 == calm.delta().version()
    assert GONE not in calm.published()["user_id"].to_pylist()
    assert calm.published().num_rows == sum(user != GONE for user in rows["user_id"].to_pylist())
    assert not find_users(calm.storage, calm.output_uri, users).hits

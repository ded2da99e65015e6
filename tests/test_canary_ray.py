"""Canaries in a run on a real Ray: what its logs, its tables of actors and its dashboard's arguments are given."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from pydantic import SecretStr
from ray._private import state, worker
from ray.data._internal.metadata_exporter import sanitize_for_struct
from ray.data._internal.stats import get_or_create_stats_actor

import jobs.whole_run
from e2p_ray.batch import pool, run_batch
from e2p_ray.config import JobConfig, StorageConfig
from e2p_ray.engine.fake import FakeEngine
from e2p_ray.errors import IncompleteRunError
from e2p_ray.schema import Completion, Group
from e2p_ray.storage import Storage
from jobs.whole_run import generate_run
from tests.small_job import fake_engine
from tests.test_canary import PROFILE, SECRETS, all_embedding_marks, canary_vector, hits, marks_of, write
from tests.update_world import make_world

LEAKY = "user-006"
PLANTED = "plantedcanary"
SIX_DIGITS = re.compile(rb"0\.\d{6}")
NEIGHBOURS = 400  # bytes, on which a printed user embedding has many values


def leaky_engine(config: JobConfig, storage: Storage, said: str) -> FakeEngine:
    """Fails at one user, with a user embedding in its message; `said` goes to the actor's log, as a print would."""
    engine = fake_engine(config, storage)
    generate = engine.generate
    print(said)

    def seen(groups: Iterable[Group | None]) -> Iterator[Any]:
        for group in groups:
            for request in group.requests if group is not None else ():
                if request.key.user_id == LEAKY and request.user_embedding is not None:
                    raise ValueError(f"no text for {[float(value) for value in request.user_embedding]}")
            yield group

    def leaking(groups: Any, **options: Any) -> Iterator[Completion]:
        return generate(seen(groups), **options)

    engine.generate = leaking  # type: ignore[method-assign]
    return engine


def logs() -> Iterator[Path]:
    """Every file that this Ray's processes wrote."""
    node: Any = worker._global_node
    folder = Path(node.get_session_dir_path(), "logs")
    return (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)


def leaks(data: bytes, marks: Iterable[bytes]) -> list[bytes]:
    """What of these is in the data, six digits only where another value's six digits are near; nine count alone.

    Ray logs some thousand figures of its own: one of them began like a canary in a run, as one in fifty will.
    """
    found = hits(data, marks)
    numbers = [mark for mark in found if SIX_DIGITS.fullmatch(mark)]
    places = sorted((place.start(), mark) for mark in numbers for place in re.finditer(re.escape(mark), data))
    pairs = [(one, other) for (at, one), (then, other) in pairwise(places) if one != other and then - at < NEIGHBOURS]
    near = {mark for pair in pairs for mark in pair}
    return [mark for mark in found if mark not in numbers or mark in near]


def found_in_logs(marks: Iterable[bytes]) -> dict[str, list[bytes]]:
    found = {str(path): leaks(path.read_bytes(), marks) for path in logs() if path.is_file()}
    return {path: seen for path, seen in found.items() if seen}


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All operators of the data sets that a batch makes, as Ray Data tells its dashboard of them."""
    made, dataset = list[Any](), pool._dataset

    def noted(*arguments: Any, **options: Any) -> Any:
        rows = dataset(*arguments, **options)
        made.extend(rows._logical_plan.dag.post_order_iter())
        return rows

    monkeypatch.setattr(pool, "_dataset", noted)
    return made


def test_nothing_of_a_run_on_ray_holds_a_canary(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ray_cluster: None,
    operators: list[Any],
    capfd: pytest.CaptureFixture[str],
) -> None:
    keys = StorageConfig(access_key_id=SecretStr(SECRETS[0]), secret_access_key=SecretStr(SECRETS[1]))
    workers = {"num_cpus": 1, "max_shard_attempts": 1, "max_poison_requests": 0, "max_stall_s": 120}
    world = make_world(tmp_path, monkeypatch, storage=keys, workers=workers)
    monkeypatch.setattr(jobs.whole_run, "run_batch", run_batch)
    for number, (name, user) in enumerate(world.users.items()):
        world.users[name] = replace(user, vector=user.vector and canary_vector(number))
    write(world)
    engine = partial(leaky_engine, said=f"{PLANTED} {canary_vector(99)}")
    with pytest.raises(IncompleteRunError, match="ValueError: no text for") as caught:
        generate_run(world.config, engine_factory=engine)
    said = capfd.readouterr()
    marks = [*all_embedding_marks(world), PROFILE.encode(), *(secret.encode() for secret in SECRETS)]
    assert hits((said.out + said.err + str(caught.value)).encode(), marks) == []
    assert found_in_logs(marks) == {}
    planted = found_in_logs([PLANTED.encode()])
    assert planted, "control: what an actor prints is found"
    assert found_in_logs(marks_of(canary_vector(99))).keys() == planted.keys(), "control: numbers, too"
    assert hits(_told_to_the_dashboard(operators), marks) == []


def test_a_figure_of_rays_own_is_no_canary_and_two_values_of_one_are() -> None:
    marks = marks_of(canary_vector(99))
    whole, other = (f"{abs(value):.16f}".encode() for value in canary_vector(99)[:2])
    mean, variance = (value[:8] + b"3440717192" for value in (whole, other))
    assert leaks(b"{'mean': 0.6866410305010504, 'variance': " + variance + b"}", marks) == []
    assert len(leaks(b"{'mean': 0.6866410305010504, 'variance': " + other + b"}", marks)) == 1, "a whole value alone"
    assert leaks(mean + b" " * NEIGHBOURS + variance, marks) == []
    assert len(leaks(b"{'mean': " + mean + b", 'variance': " + variance + b"}", marks)) == 2
    assert leaks(np.array(canary_vector(99), "<f4").tobytes().hex().encode(), marks), "bytes need no neighbour"


def _told_to_the_dashboard(operators: list[Any]) -> bytes:
    """The arguments of every operator, actors by their table, and what Ray Data keeps of its data sets."""
    plain: Any = sanitize_for_struct
    arguments = [plain(operator._get_args(), 100_000) for operator in operators]
    assert "ShardWorker" in str(arguments), "control: the workers' operator is among them"
    assert "endpoint_url" in str(arguments), "control: with its storage's settings"
    actors = state.actors()
    assert "ShardWorker" in str(actors), "control: the workers are among them"
    keeper: Any = get_or_create_stats_actor()
    data_sets: Any = ray.get(keeper.get_datasets.remote())
    assert data_sets
    return str((arguments, actors, data_sets)).encode()

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from ray.data._internal.execution import streaming_executor_state
from ray.data._internal.execution.metadata_fetcher import InlineMetadataFetcher

from e2p_ray.batch import BatchProgress, ShardOutcome, pool, run_batch, session
from e2p_ray.batch.limit import DeadLetterLimit
from e2p_ray.batch.pace import Pace
from e2p_ray.batch.session import check_resources
from e2p_ray.batch.tally import Tally
from e2p_ray.batch.worker import ShardWorker
from e2p_ray.batch.write import _said
from e2p_ray.commit import Run, open_run, pending_shards, publish, read_markers, verify
from e2p_ray.commit.failures import failures_uri, read_failures
from e2p_ray.config import JobConfig
from e2p_ray.engine.fake import FakeEngine
from e2p_ray.errors import ConfigError, GateError, IncompatibleError, IncompleteRunError, StorageError
from e2p_ray.plan import largest_first, make_plan, read_shard
from e2p_ray.schema import DEAD_LETTERS, DeadLetter, ErrorCode, Group, to_table
from e2p_ray.storage import Storage
from tests.bad_engines import Following, Hanging, Poisoned, Waiting, WithoutEnd, without_logits
from tests.chaos.conservation import assert_conserved, readers_see
from tests.s3 import IS_LONG
from tests.small_job import DIM, SPACE, fake_engine, write_small_job
from tests.test_jobs import expected_keys

pytestmark = pytest.mark.usefixtures("ray_cluster")


@dataclass(frozen=True)
class Opened:
    config: JobConfig
    storage: Storage
    run: Run


def opened(folder: Path, **changes: object) -> Opened:
    """A planned and recorded run of some ten shards."""
    workers = {"num_cpus": 1, "max_shard_attempts": 2, "max_stall_s": 120, **changes.pop("workers", {})}  # type: ignore[dict-item]
    config, _ = write_small_job(folder, workers=workers, **changes)  # type: ignore[arg-type]
    storage = Storage(config.storage)
    plan = make_plan(config, storage, embedding_space=SPACE, embedding_dim=DIM)
    engine = fake_engine(config, storage)
    shard_ids = tuple(shard.shard_id for shard in plan.shards)
    uri = f"{config.output.uri}/runs/run-1"
    run = Run(
        "run-1", uri, config.output.table_uri, plan.uri, SPACE, engine.projector_id, engine.base_model_id, shard_ids
    )
    open_run(storage, run, config.resolved())
    assert 4 <= len(shard_ids) <= 30
    return Opened(config, storage, run)


def test_a_whole_run_is_committed_and_told_and_then_only_what_is_pending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = opened(tmp_path, workers={"min_size": 1, "max_size": 2})
    told: list[BatchProgress] = []
    steps: list[Any] = []
    plain = Pace.on_execution_step

    def watched(self: Pace, executor: Any) -> None:
        steps.append(executor._metadata_fetcher)
        plain(self, executor)

    monkeypatch.setattr(Pace, "on_execution_step", watched)
    summary = run_batch(job.config, job.storage, job.run, engine_factory=fake_engine, on_progress=told.append)
    checked = verify(job.storage, job.run)
    markers = read_markers(job.storage, job.run)
    assert checked.statuses["ok"] > 0
    assert summary.num_done == len(job.run.shard_ids) == len(markers)
    assert (summary.num_attempts, summary.num_done_before, summary.failures) == (1, 0, ())
    assert summary.num_requests == sum(marker["num_requests"] for marker in markers)
    assert summary.num_output_tokens == sum(marker["stats"]["num_output_tokens"] for marker in markers) > 0
    assert summary.num_computed_tokens < summary.num_prompt_tokens
    assert [progress.num_done for progress in told] == list(range(len(job.run.shard_ids) + 1))
    assert told[-1].rows_per_s > 0
    assert steps, "Ray Data's loop comes by after every step"
    assert {type(step) for step in steps} == {InlineMetadataFetcher}, "no step for what a task says"
    assert streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S > 0, "as it was, for others"

    began = {marker["shard_id"]: marker["stats"]["started_at"] for marker in markers}
    largest = largest_first(job.storage, job.run.plan_uri, job.run.shard_ids)[0]
    assert sorted(began.values()).index(began[largest]) < 2, "one of the first two, for two workers"

    again = run_batch(job.config, job.storage, job.run, engine_factory=fake_engine)
    assert (again.num_done, again.num_done_before, again.num_attempts) == (0, len(markers), 0)

    before = {marker["shard_id"]: marker for marker in markers}
    job.storage.delete(job.run.marker_uri(job.run.shard_ids[2]))
    pending = run_batch(job.config, job.storage, job.run, engine_factory=fake_engine)
    assert (pending.num_done, pending.num_done_before) == (1, len(before) - 1)
    assert {marker["shard_id"]: marker for marker in read_markers(job.storage, job.run)} == before


def test_the_pool_grows_to_its_largest_size(tmp_path: Path, tries: Path) -> None:
    job = opened(tmp_path, workers={"min_size": 1, "max_size": 2})
    run_batch(job.config, job.storage, job.run, engine_factory=Waiting(tries))
    assert len({marker["stats"]["worker"] for marker in read_markers(job.storage, job.run)}) == 2


def test_shards_are_read_ahead_where_no_idle_worker_misses_them() -> None:
    many = 2 * pool.LEAST_SHARDS_TO_READ_AHEAD
    assert [pool.reads_ahead(*given) for given in ((2, 1), (many, 2), (many - 1, 2))] == [True, True, False]


@pytest.mark.parametrize("reads_ahead", [True, False])
def test_a_worker_reads_its_next_shard_while_it_writes(
    tmp_path: Path, tries: Path, monkeypatch: pytest.MonkeyPatch, reads_ahead: bool
) -> None:
    job = opened(tmp_path, workers={"min_size": 1, "max_size": 1}, plan={"requests_per_shard": 40})
    assert 3 < len(job.run.shard_ids) < pool.LEAST_SHARDS_TO_READ_AHEAD
    if not reads_ahead:  # control
        monkeypatch.setattr(pool, "reads_ahead", lambda *_: False)
    engines = Following(tries, max_wait_s=60 if reads_ahead else 0.5)
    summary = run_batch(job.config, job.storage, job.run, engine_factory=engines)
    assert (summary.num_attempts, summary.failures) == (1, ())
    assert (tries / "ahead").exists() == reads_ahead
    assert (tries / "alone").exists() != reads_ahead
    assert not (tries / "both").exists(), "one shard is written at a time"
    assert len(list(tries.glob("read-*"))) == summary.num_done == len(job.run.shard_ids)
    verify(job.storage, job.run)


@pytest.mark.parametrize("in_pieces", [True, False])
def test_the_search_for_poison_reads_nothing_ahead(tmp_path: Path, tries: Path, in_pieces: bool) -> None:
    """A worker's death takes what it has read: a search of a single attempt gave up its neighbours, too."""
    job = opened(tmp_path, workers={"max_shard_attempts": 1}, plan={"requests_per_shard": 40})
    engines = Following(tries, max_wait_s=0.5 if in_pieces else 60)
    tally = Tally(len(job.run.shard_ids), 0, None)
    tally.next_attempt()
    ends = (0, 1) if in_pieces else (None, None)  # whole shards are the control
    pieces = [{"shard_id": shard_id, "first": ends[0], "end": ends[1]} for shard_id in job.run.shard_ids]
    given = job.config, job.storage, job.run, engines, None
    outcomes = list(pool.pool_outcomes(job.config, given, tally, pieces, {}, is_alone=False))
    assert [outcome.is_piece for outcome in outcomes] == [in_pieces] * len(pieces)
    assert (tries / "alone").exists() == in_pieces
    assert (tries / "ahead").exists() != in_pieces


def test_a_death_beside_a_shard_that_is_read_ahead_loses_neither(tmp_path: Path, tries: Path) -> None:
    job = opened(tmp_path, workers={"min_size": 1, "max_size": 1}, plan={"requests_per_shard": 20})
    assert pool.reads_ahead(len(job.run.shard_ids), 1)
    engines = Poisoned(tries, killing=keys_of(job, 0, 5), times=1)
    summary = run_batch(job.config, job.storage, job.run, engine_factory=engines)
    assert (engines.num_tries(), summary.num_attempts, summary.num_done) == (2, 2, len(job.run.shard_ids))
    assert_published(job, num_users=60, num_dead_letters=0)


def shards_of(job: Opened) -> list[list[Group]]:
    return [read_shard(job.storage, job.run.plan_uri, shard_id) for shard_id in job.run.shard_ids]


def keys_of(job: Opened, *numbers: int) -> tuple[str, ...]:
    """A key with a user embedding from each of some shards of the run."""
    found = []
    for number in numbers:
        groups = shards_of(job)[number]
        requests = [request for group in groups for request in group.requests if request.user_embedding is not None]
        found.append("/".join(requests[0].key))
    return tuple(found)


def assert_published(job: Opened, *, num_users: int, num_dead_letters: int) -> None:
    """What is left of a run after its trouble can be published, with nothing lost and nothing twice."""
    gates = job.config.gates.model_copy(update={"max_dead_letter_share": 1.0})
    publish(job.storage, job.run, gates, job.config.inputs.users_uri)
    assert assert_conserved(job.config, expected_keys(num_users)).num_dead_letters == num_dead_letters


@pytest.fixture
def tries(tmp_path: Path) -> Path:
    folder = tmp_path / "tries"
    folder.mkdir()
    return folder


def test_a_failing_shard_fails_alone_and_is_named(tmp_path: Path, tries: Path) -> None:
    job = opened(tmp_path, workers={"max_poison_requests": 0})
    poisoned = Poisoned(tries, raising=keys_of(job, 1))
    with pytest.raises(IncompleteRunError) as caught:
        run_batch(job.config, job.storage, job.run, engine_factory=poisoned)
    message = str(caught.value)
    bad = job.run.shard_ids[1]
    assert pending_shards(job.storage, job.run) == [bad]
    assert bad in message
    assert "ValueError" in message
    assert "0.25" not in message
    assert "same command again" in message
    assert caught.value.exit_code == 5
    assert poisoned.num_tries() == 2
    (failure,) = read_failures(job.storage, job.run, job.run.shard_ids).values()
    assert (failure.shard_id, failure.attempt, failure.error_type) == (bad, 2, "ValueError")
    assert failure.message in message
    assert ":" in failure.worker
    assert run_batch(job.config, job.storage, job.run, engine_factory=fake_engine).num_done == 1
    assert not read_failures(job.storage, job.run, job.run.shard_ids), "a shard that is done did not fail"


def test_a_passing_trouble_is_tried_again(tmp_path: Path, tries: Path) -> None:
    job = opened(tmp_path)
    poisoned = Poisoned(tries, raising=keys_of(job, 0, 3), times=1)
    summary = run_batch(job.config, job.storage, job.run, engine_factory=poisoned)
    assert not pending_shards(job.storage, job.run)
    assert (summary.num_attempts, len(summary.failures)) == (2, 2)


def test_a_shard_that_kills_its_worker_takes_no_other_along(tmp_path: Path, tries: Path) -> None:
    job = opened(tmp_path, workers={"max_poison_requests": 0})
    poisoned = Poisoned(tries, killing=keys_of(job, 1))
    with pytest.raises(IncompleteRunError, match=r"1 of .*\n.*worker died"):
        run_batch(job.config, job.storage, job.run, engine_factory=poisoned)
    assert pending_shards(job.storage, job.run) == [job.run.shard_ids[1]]
    assert poisoned.num_tries() == 2  # one an attempt: Ray's own retries would go on for ever
    (failure,) = read_failures(job.storage, job.run, job.run.shard_ids).values()
    assert (failure.shard_id, failure.attempt, failure.error_type) == (job.run.shard_ids[1], 2, "WorkerDied")


def rows_by_key(job: Opened, shard_id: str) -> dict[tuple[str, ...], tuple[Any, ...]]:
    """Everything of a shard's rows but the run they are of."""
    table = job.storage.read_table(job.run.data_uri(shard_id)).drop_columns(["run_id", "generated_at"])
    names = table.column_names
    rows = table.to_pylist()
    return {(r["user_id"], r["content_id"], r["task"]): tuple(str(r[name]) for name in names) for r in rows}


def test_a_committed_shard_counts_though_its_worker_died_before_it_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = opened(tmp_path)
    real, lost = pool.pool_outcomes, list[str]()

    def losing(*arguments: Any, **options: Any) -> Iterator[ShardOutcome]:
        outcomes = real(*arguments, **options)
        lost.append(next(outcomes).shard_id)
        yield from outcomes

    monkeypatch.setattr("e2p_ray.batch.pool.pool_outcomes", losing)
    told: list[BatchProgress] = []
    summary = run_batch(job.config, job.storage, job.run, engine_factory=fake_engine, on_progress=told.append)
    assert len(lost) == 1
    assert (summary.num_attempts, summary.num_done, summary.left) == (1, len(job.run.shard_ids), ())
    assert [progress.num_done for progress in told] == list(range(len(job.run.shard_ids) + 1))
    said = [marker["num_requests"] for marker in read_markers(job.storage, job.run) if marker["shard_id"] not in lost]
    assert len(said) == len(job.run.shard_ids) - 1
    assert summary.num_requests == sum(said)


def test_a_poisonous_request_is_found_and_the_rest_of_its_shard_is_committed(tmp_path: Path, tries: Path) -> None:
    small = {"num_users": 6, "plan": {"requests_per_shard": 4}}
    clean = opened(tmp_path / "clean", **small)
    here = ShardWorker(clean.config, clean.storage, clean.run, fake_engine)
    assert not any(here(pa.table({"shard_id": [shard]}))["error_type"][0].as_py() for shard in clean.run.shard_ids)
    job = opened(tmp_path / "poisoned", workers={"max_shard_attempts": 1}, **small)
    assert job.run.shard_ids == clean.run.shard_ids
    killing, raising = keys_of(job, 1, 2)
    poisoned = Poisoned(tries, killing=(killing,), raising=(raising,))
    summary = run_batch(job.config, job.storage, job.run, engine_factory=poisoned)
    assert not pending_shards(job.storage, job.run)
    assert summary.num_done == len(job.run.shard_ids)
    letters = {
        "/".join(letter[:3]): letter[3]
        for shard_id in job.run.shard_ids[1:3]
        for letter in zip(*job.storage.read_table(job.run.dead_letter_uri(shard_id)).to_pydict().values(), strict=True)
        if letter[3] == "poison"
    }
    assert letters.keys() == {killing, raising}
    for shard_id in job.run.shard_ids:
        expected = rows_by_key(clean, shard_id)
        for key in (killing, raising):
            expected.pop(tuple(key.split("/")), None)
        assert rows_by_key(job, shard_id) == expected
    assert verify(job.storage, job.run).num_dead_letters == verify(clean.storage, clean.run).num_dead_letters + 2
    assert not list(job.storage.list_objects(f"{job.run.uri}/pieces"))
    assert not list(job.storage.list_objects(failures_uri(job.run)))
    assert_published(job, num_users=6, num_dead_letters=2)
    # One attempt, halves of a shard of some four requests, and two tries alone, of each of the two.
    assert 2 * 3 <= poisoned.num_tries() <= 2 * 6


def test_control_where_everything_dies_the_search_stops(tmp_path: Path, tries: Path) -> None:
    job = opened(tmp_path, workers={"max_shard_attempts": 1, "max_poison_requests": 1})
    groups = read_shard(job.storage, job.run.plan_uri, job.run.shard_ids[0])
    every = tuple("/".join(request.key) for group in groups for request in group.requests)
    poisoned = Poisoned(tries, raising=every)
    with pytest.raises(IncompleteRunError):
        run_batch(job.config, job.storage, job.run, engine_factory=poisoned)
    assert pending_shards(job.storage, job.run) == [job.run.shard_ids[0]]
    # The fix came: the same command again leaves nothing of the search.
    assert run_batch(job.config, job.storage, job.run, engine_factory=fake_engine).num_dead_letters == 0


@pytest.mark.parametrize("with_lock", [False, True] if IS_LONG else [True])
def test_a_worker_whose_engine_hangs_is_replaced(with_lock: bool, tmp_path: Path, tries: Path) -> None:
    job = opened(tmp_path, workers={"max_step_s": 2.0})
    hanging = Hanging(tries, keys_of(job, 1)[0], with_lock=with_lock)
    summary = run_batch(job.config, job.storage, job.run, engine_factory=hanging)
    assert (tries / "hung").exists()
    assert not pending_shards(job.storage, job.run)
    assert summary.num_attempts == 2, "the shard was tried again by another process"
    assert summary.num_dead_letters == 0
    if with_lock:
        assert_published(job, num_users=60, num_dead_letters=0)


def test_a_worker_that_does_not_come_back_is_replaced(tmp_path: Path, tries: Path) -> None:
    """It dies, and its successor's engine does not load, twice: Ray gives up on it."""
    job = opened(tmp_path, workers={"max_stall_s": 20})
    sizes = [sum(len(group.requests) for group in shard) for shard in shards_of(job)]
    poisoned = Poisoned(tries, killing=keys_of(job, sizes.index(max(sizes))), times=1)  # the largest is the first
    loads = tmp_path / "loads"

    def loaded(config: JobConfig, storage: Storage) -> FakeEngine:
        with loads.open("a", encoding="utf-8") as log:
            log.write(".")
        if loads.stat().st_size in (2, 3):
            raise StorageError("s3://models/base: could not be read after 8 tries")
        return poisoned(config, storage)

    summary = run_batch(job.config, job.storage, job.run, engine_factory=loaded)
    assert not pending_shards(job.storage, job.run)
    assert summary.num_attempts == 2, "the shard that was lost with it; no pass was given up"
    assert loads.stat().st_size == 5, "a new one of the pass, and the one of the next pass"


def test_after_a_stall_the_next_pass_has_workers(tmp_path: Path, tries: Path) -> None:
    workers = {"min_size": 2, "max_size": 2, "max_shard_attempts": 2, "max_stall_s": 12, "max_poison_requests": 0}
    job = opened(tmp_path, workers=workers)
    summary = run_batch(job.config, job.storage, job.run, engine_factory=WithoutEnd(tries, num_first=2))
    assert not pending_shards(job.storage, job.run)
    assert summary.num_attempts == 2
    assert len(list(tries.iterdir())) == 2, "both had begun"


def test_shards_that_take_longer_than_a_stall_may_name_what_helps(tmp_path: Path, tries: Path) -> None:
    job = opened(tmp_path, workers={"max_shard_attempts": 1, "max_stall_s": 2, "max_poison_requests": 0})
    with pytest.raises(IncompleteRunError) as caught:
        run_batch(job.config, job.storage, job.run, engine_factory=WithoutEnd(tries))
    lines = str(caught.value).splitlines()
    assert {line.split(": ", 1)[1] for line in lines[1:6]} == {
        "TimeoutError: no shard ended within workers.max_stall_s, 2 s. Where shards take longer, raise it, or lower "
        "plan.requests_per_shard"
    }
    assert "same command again" in lines[-1]


def test_too_many_dead_letters_stop_a_run_within_a_shard(tmp_path: Path) -> None:
    job = opened(tmp_path)
    with pytest.raises(GateError, match=r"non_finite_logits .*/dead_letters; nothing") as caught:
        run_batch(job.config, job.storage, job.run, engine_factory=without_logits, max_dead_letters=50)
    assert caught.value.exit_code == 4
    first = read_markers(job.storage, job.run)
    num_dead = [sum(marker["error_codes"].values()) for marker in first]
    assert sum(num_dead) > 50
    # One more shard may have been begun before the driver heard of the one that was too many.
    assert sum(sorted(num_dead)[: len(num_dead) - 2]) <= 50 < len(job.run.shard_ids) * 40
    with pytest.raises(GateError, match="is stopped"):
        run_batch(job.config, job.storage, job.run, engine_factory=without_logits, max_dead_letters=50)
    assert len(read_markers(job.storage, job.run)) <= len(first) + 1, "the next call stops before it begins"
    with pytest.raises(IncompleteRunError):
        publish(job.storage, job.run, job.config.gates, job.config.inputs.users_uri)
    assert readers_see(job.config) is None
    summary = run_batch(job.config, job.storage, job.run, engine_factory=fake_engine, max_dead_letters=400)
    assert summary.num_dead_letters == 0


def test_a_shard_whose_worker_was_killed_before_its_marker_counts_once(tmp_path: Path) -> None:
    """Its dead letters have their file by then; the worker that commits it tells of them again."""
    job = opened(tmp_path)
    shard_id = job.run.shard_ids[0]
    letters = [
        DeadLetter(f"u{at}", "c", "t", ErrorCode.NON_FINITE_LOGITS, "no number", shard_id, job.run.run_id)
        for at in range(3)
    ]
    job.storage.write_table(job.run.dead_letter_uri(shard_id), to_table(letters, DEAD_LETTERS))
    job.storage.write_table(job.run.untitled_uri(job.run.shard_ids[1]), to_table(letters, DEAD_LETTERS))
    tally = Tally(len(job.run.shard_ids), 0, None)
    tally.add(ShardOutcome(shard_id, num_dead_letters=3))
    DeadLetterLimit(job.storage, job.run, 5).check(tally)
    with pytest.raises(GateError, match="3 requests"):
        DeadLetterLimit(job.storage, job.run, 2).check(tally)


def test_a_refusal_stops_the_run_at_once(tmp_path: Path) -> None:
    job = opened(tmp_path)

    def refusing(config: JobConfig, storage: Storage) -> FakeEngine:
        raise IncompatibleError("projector p was trained for another model")

    told: list[BatchProgress] = []
    with pytest.raises(IncompatibleError, match="another model"):
        run_batch(job.config, job.storage, job.run, engine_factory=refusing, on_progress=told.append)
    assert told[-1].attempt == 1


def test_an_engine_that_does_not_load_is_tried_and_then_told(tmp_path: Path) -> None:
    job = opened(tmp_path, workers={"max_shard_attempts": 1})

    def failing(config: JobConfig, storage: Storage) -> FakeEngine:
        raise StorageError("s3://models/base: could not be read after 8 tries")

    with pytest.raises(IncompleteRunError, match="could not be read after 8 tries"):
        run_batch(job.config, job.storage, job.run, engine_factory=failing)


def test_a_worker_says_what_happened_in_one_row(tmp_path: Path) -> None:
    job = opened(tmp_path)
    worker = ShardWorker(job.config, job.storage, job.run, fake_engine)
    row = worker(pa.table({"shard_id": [job.run.shard_ids[0]]})).to_pylist()[0]
    assert row["error_type"] == ""
    assert row["num_requests"] > 0
    row = worker(pa.table({"shard_id": ["nowhere"]})).to_pylist()[0]
    assert row["error_type"]
    assert "nowhere" in row["message"]
    assert not row["fatal"]


def test_messages_of_strangers_lose_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("E2P_DEBUG", raising=False)
    try:
        raise ValueError("bad vector [0.125 -0.5\n 0.25] of somebody")
    except ValueError as error:
        said = _said(error)
    assert "0.125" not in said
    assert "test_batch.py" in said
    assert _said(StorageError("s3://b/k: 503 after 8 tries")) == "s3://b/k: 503 after 8 tries"


def test_a_worker_too_large_for_this_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config, _ = write_small_job(tmp_path, workers={"num_cpus": 64, "num_gpus": 1})
    with pytest.raises(ConfigError, match=r"num_gpus 1 .* workers.ray_address"):
        check_resources(config)


def test_what_a_cluster_lacks_is_told_until_a_worker_speaks() -> None:
    told: list[BatchProgress] = []
    tally = Tally(4, 0, told.append)
    tally.wait_for("")
    assert not told
    tally.wait_for("no node has 8 GPUs")
    assert told[-1].waits_for == "no node has 8 GPUs"
    tally.add(ShardOutcome("a"))
    assert told[-1].waits_for == ""


def test_where_no_worker_began_a_cluster_s_other_jobs_are_named(
    tmp_path: Path, tries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "only_machine", lambda address: None)
    job = opened(tmp_path, workers={"max_shard_attempts": 1, "max_stall_s": 2, "max_poison_requests": 0})
    said = r"requests_per_shard\. Where none began, other jobs may have the 1 CPUs"
    with pytest.raises(IncompleteRunError, match=said):
        run_batch(job.config, job.storage, job.run, engine_factory=WithoutEnd(tries))


def test_rates_count_from_the_first_shard() -> None:
    tally = Tally(4, 1, None)
    assert tally.progress().rows_per_s == 0.0
    tally.next_attempt()
    tally.add(ShardOutcome("a", num_requests=10, num_output_tokens=50, started_at_s=100.0, finished_at_s=102.0))
    tally.add(ShardOutcome("b", error_type="ValueError", message="no"))
    tally.add(ShardOutcome("b", num_requests=30, num_output_tokens=50, started_at_s=101.0, finished_at_s=104.0))
    progress = tally.progress()
    assert (progress.num_done, progress.num_failures, progress.rows_per_s, progress.tokens_per_s) == (3, 1, 10.0, 25.0)

"""A batch's shards through live replicas: the pool's own rows, online requests first, and nothing lost on the way."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from deltalake import DeltaTable

import e2p_ray.serve.shards
import jobs.generate
from e2p_ray.batch import BatchProgress, ShardOutcome, ShardWorker, run_batch
from e2p_ray.batch.write import Written, written_by
from e2p_ray.commit import Run, open_run, pending_shards, read_markers, verify
from e2p_ray.config import JobConfig
from e2p_ray.engine.engine import Engine
from e2p_ray.engine.manifest import ProjectorManifest, load_manifest, read_manifest
from e2p_ray.errors import ConfigError, IncompatibleError
from e2p_ray.loaded import LoadedGenerator
from e2p_ray.plan import make_plan, read_shard
from e2p_ray.schema import Completion, Group, RequestKey
from e2p_ray.serve.client import Client
from e2p_ray.serve.front import unused_ports
from e2p_ray.serve.messages import GenerationAnswer
from e2p_ray.serve.pauses import Pauses
from e2p_ray.serve.replica import APP_NAME
from e2p_ray.serve.shards import ShardDesk, parts
from e2p_ray.storage import Storage
from jobs.cli import run_job
from jobs.serve import serve_until
from tests import tiny_models
from tests.bad_engines import Poisoned
from tests.s3 import IS_LONG
from tests.serve_world import TOKENS, Site, serve_config, serving, slow
from tests.small_job import fake_engine, write_small_job
from tests.test_serve_engine import LLAMA, save_projector, tiny_job
from tests.test_serve_replica import until
from tests.tiny_models import engine_of, group, task

Row = dict[str, Any]
CHANGES_BY_CALL = {"run_id", "generated_at"}


def opened(config: JobConfig, run_id: str) -> Run:
    """A recorded run of the whole plan, under a name of its own."""
    storage = Storage(config.storage)
    manifest, base = load_manifest(config, storage)
    plan = make_plan(
        config, storage, embedding_space=manifest.embedding_space, embedding_dim=manifest.embedding_dim
    )  # fmt: skip
    uri, shard_ids = f"{config.output.uri}/runs/{run_id}", tuple(shard.shard_id for shard in plan.shards)
    run = Run(
        run_id, uri, config.output.table_uri, plan.uri, manifest.embedding_space, manifest.projector_id,
        base.base_model_id, shard_ids,
    )  # fmt: skip
    open_run(storage, run, config.resolved())
    return run


def rows_of(run: Run) -> dict[str, list[Row]]:
    """All that is committed, by shard, without what every call writes anew."""
    storage = Storage()
    done = set(run.shard_ids) - set(pending_shards(storage, run))
    return {
        shard_id: [
            {name: value for name, value in row.items() if name not in CHANGES_BY_CALL}
            for row in storage.read_table(run.data_uri(shard_id)).to_pylist()
        ]
        for shard_id in run.shard_ids
        if shard_id in done
    }


def pool_rows(config: JobConfig, run: Run, factory: Any) -> dict[str, list[Row]]:
    """What a worker of the pool commits, shard by shard."""
    worker = ShardWorker(config, Storage(config.storage), run, factory)
    for shard_id in run.shard_ids:
        (row,) = worker(pa.table({"shard_id": [shard_id], "first": [None], "end": [None]})).to_pylist()
        assert not ShardOutcome(**row).error_type, row
    return rows_of(run)


def piece(shard_id: str) -> Row:
    return {"shard_id": shard_id, "first": None, "end": None}


# -- one replica, in this process --------------------------------------------------------------------------------------


def test_a_shard_is_cut_into_calls_that_keep_every_request_in_its_order() -> None:
    groups = [group(content, range(5)) for content in tiny_models.contents(7)]
    keys = [request.key for one in groups for request in one.requests]
    for most in (1, 3, 5, 12, 35, 99):
        cut = list(parts(groups, most))
        assert [request.key for part in cut for one in part for request in one.requests] == keys
        sizes = [sum(len(one.requests) for one in part) for part in cut]
        assert sizes[:-1] == [most] * (len(sizes) - 1)
        assert 1 <= sizes[-1] <= most


def test_smaller_steps_prefill_content_by_content_and_write_the_same() -> None:
    engine = engine_of(LLAMA, tasks={"headline": task(max_new_tokens=10)}, max_rows=64)
    groups = [group(content, range(3)) for content in tiny_models.contents(9)]
    longest = max(len(engine.layout.segments(one.content, one.task).left) for one in groups)

    def largest_step(one: Engine) -> tuple[int, dict[RequestKey, Completion]]:
        """The prefix tokens computed between two pauses, at most, and what was written."""
        seen = list[int]()
        one.listener = Pauses(lambda: seen.append(one.stats.num_prefix_tokens))
        found = {completion.key: completion for completion in one.generate(groups)}
        return int(np.diff([*seen, one.stats.num_prefix_tokens]).max()), found

    small = engine.with_bounds(8, 1)
    in_small, found = largest_step(small)
    assert in_small <= longest
    assert engine.stats.num_steps == 0, "its counts are its own"
    at_once, wanted = largest_step(engine)
    assert at_once > 2 * longest, "the control"
    assert small.stats.num_waves + small.stats.num_steps > engine.stats.num_waves + engine.stats.num_steps
    assert {key: completion.text for key, completion in found.items()} == {
        key: completion.text for key, completion in wanted.items()
    }


def test_rows_are_the_pool_s_while_online_requests_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shard through a replica that answers people meanwhile: both get what they would have got alone."""
    tiny_models.write_letters_only(monkeypatch)
    torch.set_num_threads(1)
    config = tiny_job(tmp_path, *((170, 12, 3) if IS_LONG else (24, 6, 2)))
    config = config.model_copy(update={"plan": config.plan.model_copy(update={"requests_per_shard": 30})})
    pool = opened(config, "pool")
    wanted = pool_rows(config, pool, None)
    by_key = {(row["user_id"], row["content_id"], row["task"]): row for rows in wanted.values() for row in rows}
    assert len({row["status"] for row in by_key.values()}) == 3, "the control: every kind is there"
    with serving(serve_config(config), None) as site:
        for rows, prefill_tokens in ((3, 1), (16, 512)):
            steps = site.service.config.replica.model_copy(
                update={"shard_rows": rows, "shard_prefill_tokens": prefill_tokens}
            )
            site.service.config = site.service.config.model_copy(update={"replica": steps})
            run = opened(config, f"through-{rows}")
            with people_asking(site, sorted(by_key)) as answers:
                outcomes = written_through(site, config, run)
            assert {outcome.error_type for outcome in outcomes} == {""}
            assert same(rows_of(run), wanted)
            verify(Storage(), run)
            assert len(answers) > 5, "the control: people were answered meanwhile"
            for answer in answers:
                row = by_key[answer.user_id or "", answer.content_id, answer.task]
                got = (answer.text, answer.status, answer.fingerprint)
                assert got == (row["text"], row["status"], row["fingerprint"])
        counted = sum(outcome.num_output_tokens for outcome in outcomes)
        markers = read_markers(Storage(), pool)
        assert counted == sum(marker["stats"]["num_output_tokens"] for marker in markers), "without people's tokens"

        other_uri = str(tmp_path / "projector-2")
        save_projector(config, other_uri, seed=2)
        assert asyncio.run(site.service.swap(other_uri))
        again = config.model_copy(update={"projector": config.projector.model_copy(update={"uri": other_uri})})
        swapped = opened(again, "swapped")
        assert not written_through(site, again, swapped)[0].error_type
        assert not same(rows_of(swapped), wanted), "the control: another projector's rows differ"


def same(found: dict[str, list[Row]], wanted: dict[str, list[Row]]) -> bool:
    """Equal but for the last bits of mean log-probabilities, which depend on how many rows were computed together."""

    def plain(rows: list[Row]) -> list[Row]:
        return [{name: value for name, value in row.items() if name != "mean_logprob"} for row in rows]

    def logprobs(shards: dict[str, list[Row]]) -> list[float]:
        return [row["mean_logprob"] or 0.0 for shard_id in sorted(shards) for row in shards[shard_id]]

    if {shard: plain(rows) for shard, rows in found.items()} != {shard: plain(rows) for shard, rows in wanted.items()}:
        return False
    return bool(np.allclose(logprobs(found), logprobs(wanted), atol=1e-4))


def written_through(site: Site, config: JobConfig, run: Run) -> list[ShardOutcome]:
    """All shards of a run, as `run_batch` would send them to this replica."""
    desk = ShardDesk(site.service)
    futures = [desk.write(piece(shard_id), config, Storage(), run) for shard_id in run.shard_ids]
    return [future.result(120) for future in futures]


@contextmanager
def people_asking(site: Site, keys: list[tuple[str, str, str]]) -> Iterator[list[GenerationAnswer]]:
    """Two clients that ask again and again while this is entered; what they got."""
    over, answers, errors = threading.Event(), list[GenerationAnswer](), list[Exception]()

    def person(part: int) -> None:
        try:
            with site.client() as client:
                for user_id, content_id, name in itertools.cycle(keys[part::2]):
                    if over.is_set():
                        return
                    answers.append(client.generate(name, user_id=user_id, content_id=content_id, timeout_ms=60_000))
                    over.wait(0.1)  # without a rest of theirs the shards' turn would hardly come
        except Exception as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=person, args=(part,)) for part in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
    assert not errors, errors


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, list[str]]:
    """Set when a replica's model begins with a shard; "shard" is in the list once it is done with it."""
    event, ended = threading.Event(), list[str]()

    def watched(generator: LoadedGenerator, groups: Sequence[Group], shard_id: str) -> Written:
        event.set()
        try:
            return written_by(generator, groups, shard_id)
        finally:
            ended.append("shard")

    monkeypatch.setattr(e2p_ray.serve.shards, "written_by", watched)
    return event, ended


@pytest.mark.parametrize("pauses", [True, False])
def test_an_online_request_does_not_wait_for_the_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: tuple[threading.Event, list[str]], pauses: bool
) -> None:
    config, _ = write_small_job(tmp_path, num_users=20)
    run, (event, ended) = opened(config, "run"), begun
    if not pauses:
        monkeypatch.setattr(Pauses, "between_steps", lambda self: None)
    with serving(serve_config(config), slow(0.002)) as site, site.client() as client:
        future = ShardDesk(site.service).write(piece(run.shard_ids[0]), config, Storage(), run)
        assert event.wait(30)
        client.generate("headline", user_id="user-0003", content_id="content-001")
        ended.append("online")
        assert not future.result(60).error_type
    assert ended == (["online", "shard"] if pauses else ["shard", "online"]), "without pauses it would have waited"


def test_a_replica_that_ends_gives_its_shards_back(tmp_path: Path, begun: tuple[threading.Event, list[str]]) -> None:
    config, _ = write_small_job(tmp_path, num_users=20)
    run = opened(config, "run")
    with serving(serve_config(config), slow(0.01)) as site:
        desk = ShardDesk(site.service)
        futures = [desk.write(piece(shard_id), config, Storage(), run) for shard_id in run.shard_ids[:3]]
        assert begun[0].wait(30)
        site.service.close(30)
        outcomes = [future.result(30) for future in futures]
    assert {(outcome.error_type, outcome.fatal) for outcome in outcomes} == {("InterruptedError", False)}
    assert len(pending_shards(Storage(), run)) == len(run.shard_ids)
    assert "user-" not in str(outcomes)
    with serving(serve_config(config)) as site:
        assert not written_through(site, config, run)[0].error_type
    verify(Storage(), run)


def test_a_shard_keeps_the_projector_that_it_began_with(
    tmp_path: Path, begun: tuple[threading.Event, list[str]]
) -> None:
    config, other_uri = write_small_job(tmp_path, num_users=20)[0], str(tmp_path / "projector-2")
    run, other = opened(config, "run"), other_projector(config, other_uri)
    with serving(serve_config(config), slow(0.002)) as site:
        desk = ShardDesk(site.service)
        first = desk.write(piece(run.shard_ids[0]), config, Storage(), run)
        assert begun[0].wait(30)
        assert asyncio.run(site.service.swap(other_uri))
        assert not begun[1], "the control: the shard was under way"
        assert not first.result(60).error_type
        assert {row["projector_id"] for row in rows_of(run)[run.shard_ids[0]]} == {run.projector_id} != {other}
        refused = desk.write(piece(run.shard_ids[1]), config, Storage(), run).result(60)
        assert (refused.error_type, refused.fatal) == ("IncompatibleError", True)
        assert other in refused.message


def other_projector(config: JobConfig, uri: str) -> str:
    """Another one for the fake engine; returns its id."""
    old = read_manifest(Storage(), config.projector.uri)
    names = ("embedding_dim", "embedding_space", "d_model", "base_model_id", "tokenizer_hash")
    other = ProjectorManifest(**{name: getattr(old, name) for name in names}, output_rms=2.0).with_files({})
    Storage().write_bytes(f"{uri}/config.json", other.to_json().encode())
    return other.projector_id


@pytest.mark.parametrize("section", ["tasks", "checks", "dtype"])
def test_a_run_of_other_texts_is_refused(tmp_path: Path, section: str) -> None:
    config, _ = write_small_job(tmp_path, num_users=6)
    run, changed = opened(config, "run"), other_texts(config, section)
    with serving(serve_config(changed)) as site:
        refused = ShardDesk(site.service).write(piece(run.shard_ids[0]), config, Storage(), run).result(30)
        assert (refused.error_type, refused.fatal) == ("IncompatibleError", True)
        assert "--through-serve" in refused.message
    bounded = config.model_copy(update={"engine": config.engine.model_copy(update={"max_rows": 3})})
    with serving(serve_config(bounded)) as site:
        taken = ShardDesk(site.service).write(piece(run.shard_ids[0]), config, Storage(), run).result(30)
        assert not taken.error_type, "the control: bounds change no text"


def other_texts(config: JobConfig, section: str) -> JobConfig:
    if section == "dtype":
        return config.model_copy(update={"base_model": config.base_model.model_copy(update={"dtype": "bfloat16"})})
    if section == "checks":
        return config.model_copy(update={"checks": config.checks.model_copy(update={"deny": ("bridge",)})})
    headline = config.tasks["headline"]
    sampling = headline.sampling.model_copy(update={"seed": 7})
    return config.model_copy(
        update={"tasks": config.tasks | {"headline": headline.model_copy(update={"sampling": sampling})}}
    )


# -- a real Serve ------------------------------------------------------------------------------------------------------


@pytest.fixture
def app(tmp_path: Path, ray_cluster: None) -> Iterator[Callable[..., Client]]:
    """Starts the application of a job; it is stopped at the end."""
    stop, jobs_run = threading.Event(), list[threading.Thread]()
    clients = list[Client]()

    def start(config: JobConfig, factory: Any, **sections: Any) -> Client:
        (port,) = unused_ports(1)
        served = serve_config(config, api={"port": port}, **sections)
        jobs_run.append(threading.Thread(target=serve_until, args=(served, stop), kwargs={"engine_factory": factory}))
        jobs_run[0].start()
        clients.append(Client(f"http://127.0.0.1:{port}", TOKENS[0], timeout_s=60))
        until(clients[0], lambda models: True)
        return clients[0]

    yield start
    stop.set()
    for job in jobs_run:
        job.join(60)
        assert not job.is_alive()
    for client in clients:
        client.close()


def test_a_whole_run_goes_through_live_replicas_one_of_which_dies(
    tmp_path: Path, app: Callable[..., Client], capsys: pytest.CaptureFixture[str]
) -> None:
    config, path = write_small_job(tmp_path, num_users=30, workers={"num_cpus": 1, "max_stall_s": 120})
    wanted = pool_rows(config, opened(config, "pool"), fake_engine)
    run, ends = opened(config, "through"), tmp_path / "ends"
    ends.mkdir()
    groups = read_shard(Storage(), run.plan_uri, run.shard_ids[1])
    (victim, *_) = [one.key for found in groups for one in found.requests if one.user_embedding is not None]
    with pytest.raises(ConfigError, match="takes no shards"):
        run_batch(config, Storage(), run, through_serve="nobody")
    client = app(config, Poisoned(ends, killing=("/".join(victim),), times=1))
    before = client.models().replica
    told = list[BatchProgress]()
    summary = run_batch(config, Storage(), run, through_serve=APP_NAME, on_progress=told.append)
    assert len(list(ends.iterdir())) == 1, "the control: a replica died with its shard"
    assert until(client, lambda models: True).replica != before
    assert rows_of(run) == wanted
    assert summary.num_attempts == 2
    assert (summary.num_done, summary.left) == (len(run.shard_ids), ())
    assert told[-1].num_done == len(run.shard_ids)
    verify(Storage(), run)

    limited = opened(config, "limited")
    few = run_batch(config, Storage(), limited, through_serve=APP_NAME, max_seconds=0.0)
    assert 1 <= few.num_done < len(limited.shard_ids)
    assert len(few.left) == len(limited.shard_ids) - few.num_done

    changed = other_texts(config, "tasks")
    with pytest.raises(IncompatibleError, match="other tasks or checks"):
        run_batch(changed, Storage(), opened(changed, "changed"), through_serve=APP_NAME)
    moved = replace(opened(config, "moved"), projector_id="another")
    with pytest.raises(IncompatibleError, match="another"):
        run_batch(config, Storage(), moved, through_serve=APP_NAME)

    assert run_job(jobs.generate.JOB, ["--config", str(path), "--through-serve", "nobody"]) == 2
    assert "takes no shards" in capsys.readouterr().err
    assert run_job(jobs.generate.JOB, ["--config", str(path), "--through-serve", APP_NAME]) == 0
    published = DeltaTable(config.output.table_uri).to_pyarrow_table().to_pylist()
    texts = {(row["user_id"], row["content_id"], row["task"]): row["text"] for row in published}
    assert texts == {
        (row["user_id"], row["content_id"], row["task"]): row["text"] for rows in wanted.values() for row in rows
    }

"""Jobs killed while they generate, started again: only what was in flight is written anew; the rows are the same."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jobs.whole_run
from e2p_ray.commit import Run, load_run, pending_shards
from e2p_ray.commit.shard import planned_keys as keys_of_shard
from e2p_ray.config import JobConfig
from e2p_ray.engine.manifest import resolve_base_model
from e2p_ray.storage import Storage
from jobs import publish, whole_run
from jobs.cli import run_job
from tests.chaos.conservation import Key, Seen, assert_conserved, assert_old_or_new, readers_see
from tests.chaos.forks import ROOT, Forks, Job
from tests.chaos.steps import Death
from tests.chaos.worlds import planned_keys
from tests.fake_generate import calls_uri
from tests.s3 import IS_LONG, S3Server
from tests.small_job import DIM, SPACE, fake_engine, write_small_job
from tests.update_world import serial_batch

NUM_KILLS = 16 if IS_LONG else 2
NUM_KILLS_OWN_RAY = 3
PLANNED = planned_keys(60, 6, 3)
_NUM_SHARDS = 9


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[JobConfig, Seen]:
    """The same job, left alone."""
    config, _ = write_small_job(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs.whole_run, "run_batch", serial_batch)
        whole_run.generate_run(config, engine_factory=fake_engine)
    seen = readers_see(config)
    assert seen is not None
    return config, seen


def _start(path: Path, ray_address: str | None, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.fake_generate", "--config", str(path)]
    if ray_address:
        command += ["--workers.ray_address", ray_address]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with log.open("ab") as stream:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream)


@dataclass
class Watched:
    """A job that is started again and again, and what of it was durable before each start."""

    config: JobConfig
    path: Path
    log: Path
    ray_address: str | None
    committed: dict[str, tuple[str, str]] = field(default_factory=dict)  # by URI: hash and version when first seen
    num_kills: int = 0

    @property
    def storage(self) -> Storage:
        return Storage(self.config.storage)

    def go(self, stop: Callable[[], bool] | None = None) -> int | None:
        """Start it, kill it when `stop` says so; None if it was killed, else the exit code. What it did is checked."""
        before, calls = self._take_stock(), self.num_calls()
        process = _start(self.path, self.ray_address, self.log)
        code = _killed_when(process, stop)
        self.num_kills += code is None
        written = {key for keys in list(self._calls().values())[calls:] for key in keys}
        assert not before & written, "a shard that was committed was generated again"
        self._assert_unchanged()
        return code

    def num_calls(self) -> int:
        """Of the engine, so far."""
        return sum(1 for _ in self.storage.list_objects(calls_uri(self.config)))

    def num_done(self) -> int:
        """Shards that are committed."""
        return sum("/markers/" in info.uri for info in self.storage.list_objects(f"{self.config.output.uri}/runs"))

    def run(self) -> Run:
        uris = [info.uri for info in self.storage.list_objects(f"{self.config.output.uri}/runs")]
        (run_id,) = {uri.split("/runs/")[1].split("/")[0] for uri in uris}
        return load_run(self.storage, self.config.output.uri, run_id)

    def num_written_again(self) -> int:
        """Requests whose text was asked for more than once: what the kills cost."""
        asked = Counter(key for keys in self._calls().values() for key in keys)
        assert asked.keys() <= PLANNED.keys()
        return sum(count - 1 for count in asked.values())

    def _take_stock(self) -> set[Key]:
        """Note every durable object of committed shards; the keys of these shards."""
        if not self.num_done():
            return set()
        run = self.run()
        done = set(run.shard_ids) - set(pending_shards(self.storage, run))
        for shard_id in done:
            for uri in (run.data_uri(shard_id), run.marker_uri(shard_id)):
                self.committed.setdefault(uri, self._state(uri))
        return {key for shard_id in done for key in keys_of_shard(self.storage, run, shard_id)}

    def _assert_unchanged(self) -> None:
        changed = [uri for uri, state in self.committed.items() if self._state(uri) != state]
        assert not changed

    def _state(self, uri: str) -> tuple[str, str]:
        info = self.storage.info(uri)
        assert info is not None, uri
        return hashlib.sha256(self.storage.read_bytes(uri)).hexdigest(), info.version

    def _calls(self) -> dict[str, list[Key]]:
        """The keys of every call, first attempts only, by the object that says so; in the order of the calls."""
        found = {}
        for info in self.storage.list_objects(calls_uri(self.config)):
            call = json.loads(self.storage.read_bytes(info.uri))
            keys = call["keys"] if call["attempt"] == 0 else []
            found[info.uri] = [(user, content, task) for user, content, task in keys]
        return found


def _killed_when(process: subprocess.Popen[bytes], stop: Callable[[], bool] | None) -> int | None:
    while process.poll() is None:
        if stop is not None and stop():
            process.kill()
            process.wait()
            return None
        time.sleep(0.01)
    return process.returncode


@dataclass
class Moment:
    """Some milliseconds after so many shards were committed: anywhere within the next one."""

    job: Watched
    num_done: int
    delay_s: float
    at_s: float = math.inf

    def __call__(self) -> bool:
        if self.at_s == math.inf and self.job.num_done() >= self.num_done and self.job.num_calls():
            self.at_s = time.monotonic() + self.delay_s
        return time.monotonic() >= self.at_s


def _kill_and_resume(job: Watched, num_kills: int, seed: int) -> None:
    """Kill it at random points of its generation, each later than the last, then let it finish."""
    chance = random.Random(seed)
    for point in sorted(chance.choice(range(_NUM_SHARDS - 1)) for _ in range(num_kills)):
        code = job.go(Moment(job, point, chance.uniform(0.0, 0.15)))
        assert code in (None, 0), job.log.read_text(encoding="utf-8")[-4000:]
    assert job.go() == 0, job.log.read_text(encoding="utf-8")[-4000:]
    assert len(job.run().shard_ids) == _NUM_SHARDS


def _assert_the_same(job: Watched, whole: tuple[JobConfig, Seen], max_workers: int) -> None:
    """As the run that nothing happened to, row for row; and what the kills cost."""
    config, seen = whole
    conserved = assert_conserved(job.config, PLANNED)
    assert conserved.seen.texts == seen.texts
    assert assert_old_or_new(job.config, None, seen)
    run = job.run()
    assert run.run_id == seen.run_id
    for shard_id in run.shard_ids:
        assert _rows(job.storage, job.config, run, shard_id) == _rows(Storage(), config, run, shard_id)
    again = job.num_written_again()
    largest = max(len(keys_of_shard(job.storage, run, shard_id)) for shard_id in run.shard_ids)
    assert again <= job.num_kills * max_workers * largest
    share = again / PLANNED.total()
    print(f"\n{job.num_kills} kills while generating: {again} of {PLANNED.total()} requests twice ({share:.1%})")


def _rows(storage: Storage, config: JobConfig, run: Run, shard_id: str) -> tuple[pa.Table, object]:
    """A shard's data file without the times: its rows, and the dead letters in its footer."""
    data = storage.read_bytes(f"{config.output.table_uri}/{run.data_path(shard_id)}")
    table = pq.read_table(pa.BufferReader(data))
    footer = json.loads(table.schema.metadata[b"e2p_ray.shard"])
    return table.replace_schema_metadata(None).drop_columns("generated_at"), footer["dead_letters"]


@pytest.mark.timeout(1800)
def test_killed_while_generating_on_a_shared_cluster(
    tmp_path: Path, ray_cluster: None, uninterrupted: tuple[JobConfig, Seen]
) -> None:
    import ray

    config, path = write_small_job(tmp_path)
    job = Watched(config, path, tmp_path / "log", ray.get_runtime_context().gcs_address)
    _kill_and_resume(job, NUM_KILLS, seed=1)
    assert job.num_kills >= NUM_KILLS - 1
    _assert_the_same(job, uninterrupted, max_workers=1)


@pytest.mark.skipif(not IS_LONG, reason="a minute on two cores; the test above does the same on a shared cluster")
@pytest.mark.timeout(900)
def test_killed_with_its_own_ray_on_a_real_s3_server(
    tmp_path: Path, uninterrupted: tuple[JobConfig, Seen], s3_server: S3Server
) -> None:
    config, path = write_small_job(tmp_path, place=s3_server.new_bucket(), storage=s3_server.config)
    job = Watched(config, path, tmp_path / "log", None)
    _kill_and_resume(job, NUM_KILLS_OWN_RAY, seed=2)
    assert job.num_kills == NUM_KILLS_OWN_RAY
    _assert_the_same(job, uninterrupted, max_workers=1)


def test_a_committed_shard_that_is_written_again_is_found(
    tmp_path: Path, uninterrupted: tuple[JobConfig, Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the two above: a marker that is lost makes its shard be generated twice."""
    config, path = write_small_job(tmp_path)
    job = Watched(config, path, tmp_path / "log", None)
    monkeypatch.setattr(jobs.whole_run, "run_batch", serial_batch)
    from tests.fake_generate import slow_engine

    whole_run.generate_run(config, engine_factory=slow_engine, publish_it=False)
    assert job.num_written_again() == 0
    job._take_stock()
    victim = sorted(uri for uri in job.committed if uri.endswith(".json"))[0]
    Path(victim).unlink()
    whole_run.generate_run(config, engine_factory=slow_engine, publish_it=False)
    assert job.num_written_again() > 0
    with pytest.raises(AssertionError):
        job._assert_unchanged()


# -- the real engine


@pytest.fixture(scope="module")
def forks_with_torch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(tmp_path_factory.mktemp("forks"), "e2p_ray.engine.engine") as warm:
        yield warm


def _real_job(folder: Path) -> tuple[JobConfig, Path]:
    """Greedy, fp32, a model of random weights whose texts no check looks at."""
    from tests.tiny_models import configs, save_model_of_letters

    base = save_model_of_letters(configs()["llama"], folder / "llama")
    off = {"language": False, "repetition": False, "retry": False}
    off |= {f"foreign_{name}": False for name in ("contacts", "numbers", "names")}
    prompts = {"default": {"cue_before": "\n>"}}
    sampling = {"max_new_tokens": 6, "stop": []}
    task = {"prompts": prompts, "sampling": sampling, "limits": {"must_finish": False}, "max_content_tokens": 60}
    config, path = write_small_job(
        folder, num_users=12, num_contents=4, per_user=2, tasks={"headline": task, "explanation": task}, checks=off,
        base_model={"uri": str(base), "device": "cpu"}, plan={"requests_per_shard": 10}, engine={"num_threads": 1},
    )  # fmt: skip
    _write_projector(config)
    return config, path


def _write_projector(config: JobConfig) -> None:
    import torch

    from e2p_ray.engine.manifest import ProjectorManifest
    from e2p_ray.engine.projector import Projector, ReferenceStatistics

    base = resolve_base_model(config.base_model, Storage())
    torch.manual_seed(1)
    manifest = ProjectorManifest(
        embedding_dim=DIM, embedding_space=SPACE, d_model=48, base_model_id=base.base_model_id,
        tokenizer_hash=base.tokenizer_hash, output_rms=0.5,
    )  # fmt: skip
    projector = Projector(manifest, ReferenceStatistics.of(torch.randn(64, DIM)))
    for weight in projector.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    projector.save_pretrained(Storage(), config.projector.uri)


def test_the_real_engine_writes_the_same_after_a_kill(forks_with_torch: Forks, tmp_path: Path) -> None:
    """Killed before its third shard is durable, with its texts written: the rows are equal to the byte."""
    planned = planned_keys(12, 4, 2)
    config, path = _real_job(tmp_path)
    out = Path(config.output.uri)
    whole = forks_with_torch.run(Job("generate", str(path), real_engine=True))
    assert whole.code == 0, whole.said[-4000:]
    seen = assert_conserved(config, planned).seen
    assert sum(status == "ok" for _, status, _ in seen.texts.values()) > planned.total() / 2
    assert len({text for text, _, _ in seen.texts.values()}) > planned.total() / 4
    out.rename(tmp_path / "whole")
    killed = forks_with_torch.run(
        Job("generate", str(path), death=Death(2, "before", "data"), real_engine=True),
    )
    assert killed.was_killed, killed.said[-4000:]
    kept = {file: file.read_bytes() for file in out.glob("generations/data/*/*")}
    assert len(kept) == 2
    resumed = forks_with_torch.run(Job("generate", str(path), real_engine=True))
    assert resumed.code == 0, resumed.said[-4000:]
    assert {file: file.read_bytes() for file in kept} == kept
    assert_conserved(config, planned)
    run = load_run(Storage(), config.output.uri, seen.run_id)
    there = config.model_copy(update={"output": config.output.model_copy(update={"uri": str(tmp_path / "whole")})})
    for shard_id in run.shard_ids:
        assert _rows(Storage(), config, run, shard_id) == _rows(Storage(), there, run, shard_id)


# -- what is said


def test_a_lost_shard_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, path = write_small_job(tmp_path)
    monkeypatch.setattr(jobs.whole_run, "run_batch", serial_batch)
    report = whole_run.generate_run(config, engine_factory=fake_engine, publish_it=False)
    victim = sorted(Path(config.output.table_uri, "data", report.run_id).iterdir())[0]
    victim.unlink()
    assert run_job(publish.JOB, ["--config", str(path)]) == 4
    assert victim.stem in capsys.readouterr().err


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_stops_cleanly_and_says_how_to_resume(
    number: signal.Signals, code: int, tmp_path: Path, ray_cluster: None
) -> None:
    import ray

    config, path = write_small_job(tmp_path)
    storage, log = Storage(config.storage), tmp_path / "log"
    process = _start(path, ray.get_runtime_context().gcs_address, log)
    while process.poll() is None and not list(storage.list_objects(f"{config.output.uri}/runs")):
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(number)
    said = process.wait(timeout=120), log.read_text(encoding="utf-8")
    assert said[0] == code, said[1]
    assert "run the same command again" in said[1]
    assert "Traceback" not in said[1]

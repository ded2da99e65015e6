"""Runs on several nodes: unequal ones, ones that come, that go with and without notice, and that are killed again and
again. Real raylets and real processes; a killed node is the SIGKILL of its raylet and all its workers."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
import torch

from e2p_ray.batch import ShardWorker
from e2p_ray.commit import Run, load_run, read_markers
from e2p_ray.config import JobConfig, StorageConfig
from e2p_ray.engine.model import BaseModel, pick_device
from e2p_ray.storage import Storage
from tests.chaos.cluster import Driver, RayNodes, ray_nodes
from tests.chaos.conservation import Conserved, Key, assert_conserved
from tests.chaos.node_job import HOLD, Actor, actors, actors_folder
from tests.faulty import faulty_s3
from tests.s3 import IS_LONG, S3Server
from tests.small_job import TASKS, write_base_model, write_small_job

NUM_CONTENTS, PER_USER = 6, 3
SHARD_ROWS = 40
NUM_KILLS = 24 if IS_LONG else 3
KILL_EVERY_S = (1.0, 3.0) if IS_LONG else (0.5, 1.5)
_HEARD_S = 2.5  # Ray Data asks once a second which nodes are drained, in a step of its loop, of which one takes 0.5 s


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with ray_nodes() as found:
        yield found


@dataclass
class NodeJob:
    """A small job whose engines count what they write and can be held."""

    config: JobConfig
    path: Path
    num_users: int

    @property
    def planned(self) -> set[Key]:
        pairs = [(n, (n + step) % NUM_CONTENTS) for n in range(self.num_users) for step in range(PER_USER)]
        return {(f"user-{user:04d}", f"content-{content:03d}", task) for user, content in pairs for task in TASKS}

    @property
    def actors(self) -> list[Actor]:
        return actors(self.config)

    def hold(self) -> None:
        (actors_folder(self.config) / HOLD).touch()

    def release(self) -> None:
        (actors_folder(self.config) / HOLD).unlink()

    def num_recomputed(self) -> tuple[int, int]:
        """Texts that were written again, and all texts that had to be written."""
        written = Counter(key for actor in self.actors for key in actor.keys)
        return written.total() - len(written), len(written)

    def conserved(self) -> Conserved:
        """The published run, whole; every worker that it names had its engine."""
        found = assert_conserved(self.config, self.planned)
        storage = Storage(self.config.storage)
        markers = read_markers(storage, load_run(storage, self.config.output.uri, found.seen.run_id))
        workers = {int(marker["stats"]["worker"].rpartition(":")[2]) for marker in markers}
        assert workers <= {actor.pid for actor in self.actors}
        return found


def node_job(
    folder: Path,
    *,
    num_users: int = 60,
    place: str | None = None,
    storage: StorageConfig | None = None,
    base_model: dict[str, str] | None = None,
    **workers: float,
) -> NodeJob:
    """A job of some twenty shards, with 60 users."""
    config, path = write_small_job(
        folder,
        num_users=num_users,
        num_contents=NUM_CONTENTS,
        per_user=PER_USER,
        plan={"requests_per_shard": SHARD_ROWS // 2},
        workers={"num_cpus": 1, "min_size": 1, "max_size": 2, "max_stall_s": 60, **workers},
        place=place,
        storage=storage,
        base_model=base_model or local_model(folder),
    )
    actors_folder(config).mkdir()
    return NodeJob(config, path, num_users)


def local_model(folder: Path, device: str = "cpu") -> dict[str, str]:
    uri = str(write_base_model(folder / "base"))
    return {"uri": uri, "device": device, "cache_folder": str(folder / "models")}


@pytest.fixture
def drivers() -> Iterator[list[Driver]]:
    """Drivers of a test, ended with it."""
    found: list[Driver] = []
    yield found
    for driver in found:
        driver.close()


def started(nodes: RayNodes, job: NodeJob, drivers: list[Driver], *words: str) -> Driver:
    drivers.append(nodes.start("tests.chaos.node_job", "--config", str(job.path), *words))
    return drivers[-1]


def is_alive(actor: Actor, nodes: RayNodes) -> bool:
    """Whether its process is still one of its node's; its number alone may be somebody else's by now."""
    try:
        parent = psutil.Process(actor.pid).ppid()
    except psutil.NoSuchProcess:
        return False
    return parent in {node.raylet_pid for node in nodes.alive if node.node_id == actor.node_id}


def some(job: NodeJob, number: int) -> list[Actor] | None:
    """The actors, once there are so many."""
    return job.actors if len(job.actors) >= number else None


def s3_model(folder: Path, server: S3Server) -> dict[str, str]:
    """The local model, on S3."""
    uri = f"{server.new_bucket()}/base"
    for path in Path(local_model(folder)["uri"]).iterdir():
        Storage(server.config).write_bytes(f"{uri}/{path.name}", path.read_bytes())
    return local_model(folder) | {"uri": uri}


def test_a_pool_waits_for_a_node_that_fits_grows_there_and_fetches_the_base_model_once(
    nodes: RayNodes, drivers: list[Driver], tmp_path: Path, s3_server: S3Server
) -> None:
    nodes.only((1, 0))
    with faulty_s3(s3_server.endpoint_url) as proxy:
        # Nothing else of the job is on S3.
        through_proxy = s3_server.config.model_copy(update={"endpoint_url": proxy.endpoint_url})
        job = node_job(tmp_path, num_gpus=1, storage=through_proxy, base_model=s3_model(tmp_path, s3_server))
        num_files = len(list((tmp_path / "base").iterdir()))
        shutil.rmtree(tmp_path / "models")
        proxy.plan([])
        job.hold()
        driver = started(nodes, job, drivers)
        driver.until(lambda: "waiting: none of the cluster's 2 nodes has the 1 CPUs and 1 GPUs of one" in driver.said)
        assert not job.actors
        fitting = nodes.add(num_cpus=2, num_gpus=2)
        driver.until(lambda: some(job, 2))
        job.release()
        assert driver.exit_code() == 0, driver.said
    job.conserved()
    assert [actor.node_id for actor in job.actors] == [fitting.node_id] * 2
    assert all(actor.keys for actor in job.actors)
    # The driver and both actors look what there is; the driver, the first of this machine, downloads it.
    assert proxy.num_requests == 1 + 2 + num_files
    # Control of the count that the other tests read: without a fault nothing is written twice.
    assert job.num_recomputed()[0] == 0


def test_a_drained_node_finishes_its_shards_and_gets_no_more(
    nodes: RayNodes, drivers: list[Driver], tmp_path: Path
) -> None:
    going, staying = nodes.only((1, 0), (1, 0))
    job = node_job(tmp_path)
    job.hold()
    driver = started(nodes, job, drivers)
    driver.until(lambda: some(job, 2))
    nodes.drain(going, 60)
    time.sleep(_HEARD_S)
    job.release()
    at = {actor.node_id: n for n, actor in enumerate(job.actors)}
    gone = job.actors[at[going.node_id]]
    driver.until(lambda: not is_alive(gone, nodes))
    nodes.kill(going)
    assert driver.exit_code() == 0, driver.said
    job.conserved()
    assert 0 < len(job.actors[at[going.node_id]].keys) <= SHARD_ROWS // 2, "what it had begun"
    assert len(job.actors[at[staying.node_id]].keys) > SHARD_ROWS
    assert job.num_recomputed()[0] == 0


@pytest.mark.skipif(not IS_LONG, reason="the worker's part of it is tested below, without a cluster")
def test_a_gpu_that_torch_does_not_find_stops_the_run(nodes: RayNodes, drivers: list[Driver], tmp_path: Path) -> None:
    nodes.only((1, 1))
    job = node_job(tmp_path, num_gpus=1)
    drivers.append(nodes.start("jobs.generate", "--config", str(job.path), "--base_model.device", "auto"))
    assert drivers[-1].exit_code() == 2
    assert "finds no GPU in this process" in drivers[-1].said


@pytest.mark.skipif(not IS_LONG, reason="waits in vain")
def test_a_node_that_never_comes_ends_the_wait(nodes: RayNodes, drivers: list[Driver], tmp_path: Path) -> None:
    nodes.only((1, 0))
    job = node_job(tmp_path, num_gpus=1, max_stall_s=5)
    driver = started(nodes, job, drivers)
    assert driver.exit_code() == 2
    assert "none that has came within workers.max_stall_s, 5 s" in driver.said


@pytest.mark.parametrize(
    ("device", "num_gpus", "refused"),
    [("cuda", 1, "base_model.device is 'cuda'"), ("cuda:1", 0, "Set workers.num_gpus"), ("auto", 1, "finds no GPU")],
)
def test_a_worker_without_its_gpu_refuses_before_it_loads_anything(
    device: str, num_gpus: int, refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(BaseModel, "load", lambda *_: pytest.fail("loaded"))
    config, _ = write_small_job(tmp_path, base_model=local_model(tmp_path, device), workers={"num_gpus": num_gpus})
    storage = Storage()
    run = Run("run-1", f"{config.output.uri}/runs/run-1", config.output.table_uri, "", "", "", "", ())
    row = ShardWorker(config, storage, run, None)(pa.table({"shard_id": ["any"]})).to_pylist()[0]
    assert (row["fatal"], row["error_type"]) == (True, "ConfigError")
    assert refused in row["message"]
    assert socket.gethostname() in row["message"]


def test_control_without_a_gpu_asked_for_the_cpu_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto").type == pick_device("cpu", num_gpus=1).type == "cpu"


class Killer:
    """Kills actors and nodes, seeded; a killed node is replaced."""

    def __init__(self, nodes: RayNodes, job: NodeJob, seed: int) -> None:
        self._nodes, self._job, self._random = nodes, job, random.Random(seed)
        self.killed: Counter[str] = Counter()

    def wait_and_kill(self) -> None:
        """One actor, or the node of one, in turn; nothing while there is no actor."""
        time.sleep(self._random.uniform(*KILL_EVERY_S))
        alive = [actor for actor in self._job.actors if is_alive(actor, self._nodes)]
        if not alive:
            return
        victim, kind = self._random.choice(alive), ("actor", "node")[self.killed.total() % 2]
        if kind == "actor":
            os.kill(victim.pid, signal.SIGKILL)
        else:
            self._nodes.kill(next(node for node in self._nodes.alive if node.node_id == victim.node_id))
            self._nodes.add()
        self.killed[kind] += 1


def test_actors_and_nodes_that_are_killed_every_few_seconds_lose_nothing(
    nodes: RayNodes, drivers: list[Driver], tmp_path: Path, s3_server: S3Server
) -> None:
    nodes.only((1, 0), (1, 0))
    num_users = 2000 if IS_LONG else 100
    job = node_job(tmp_path, num_users=num_users, place=s3_server.new_bucket(), storage=s3_server.config)
    killer, num_starts = Killer(nodes, job, seed=7), 1
    driver = started(nodes, job, drivers)
    driver.until(lambda: some(job, 1))
    while killer.killed.total() < NUM_KILLS and driver.is_running:
        killer.wait_and_kill()
    code = driver.exit_code(600)
    while code == 5 and num_starts < 3:  # shards are left, as it says: the same command again
        num_starts += 1
        code = started(nodes, job, drivers).exit_code(600)
    said = "\n".join(driver.said for driver in drivers)
    assert code == 0, said
    found = job.conserved()
    num_again, num_texts = job.num_recomputed()
    print(
        f"killed {dict(killer.killed)}, {found.num_rows} rows and {found.num_dead_letters} dead letters, "
        f"{num_again} of {num_texts} texts written again, {len(job.actors)} actors, {num_starts} start(s)"
    )
    assert killer.killed.total() == NUM_KILLS, f"the run was over too soon: {killer.killed}"
    assert found.num_dead_letters == 0, "nothing was wrong with any request"
    assert num_starts == 1, said
    # A kill costs the shard in hand of one actor, and a start of its successor, which may be killed before it is ready.
    assert num_again <= NUM_KILLS * SHARD_ROWS
    assert len(job.actors) <= job.config.workers.max_shard_attempts * job.config.workers.max_size + 2 * NUM_KILLS

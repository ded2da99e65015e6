"""Base models from S3 on a node's disk: fetched once by many processes, never used when damaged."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from e2p_ray.config import BaseModelConfig, StorageConfig
from e2p_ray.engine.manifest import BaseModelFolder, resolve_base_model
from e2p_ray.engine.node_cache import cached_folder
from e2p_ray.errors import ConfigError, ObjectNotFoundError, StorageError
from e2p_ray.storage import ObjectInfo, Storage
from tests.faulty import Faulty, faulty_s3
from tests.s3 import S3Server
from tests.small_job import write_base_model

_RESOLVE = """
import sys
from e2p_ray.config import BaseModelConfig, StorageConfig
from e2p_ray.engine.manifest import resolve_base_model
from e2p_ray.storage import Storage
endpoint, uri, cache = sys.argv[1:]
storage = Storage(StorageConfig(endpoint_url=endpoint, access_key_id="AKTEST", secret_access_key="SKTEST"))
print("ready", flush=True)
sys.stdin.readline()
print(resolve_base_model(BaseModelConfig(uri=uri, cache_folder=cache), storage).base_model_id)
"""
WEIGHTS_BYTES = 3 << 20


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[Faulty]:
    with faulty_s3(s3_server.endpoint_url) as found:
        yield found


class Model:
    """A base model on S3, the same in a local folder, and a cache."""

    def __init__(self, proxy: Faulty, bucket: str, folder: Path) -> None:
        self.proxy, self.local, self.cache = proxy, write_base_model(folder / "base"), folder / "cache"
        (self.local / "model.safetensors").write_bytes(os.urandom(WEIGHTS_BYTES))
        self.uri = f"{bucket}/models/base"
        self.storage = Storage(
            StorageConfig(endpoint_url=proxy.endpoint_url, access_key_id="AKTEST", secret_access_key="SKTEST")
        )
        self.names = sorted(path.name for path in self.local.iterdir())
        self.upload()
        self.id = resolve_base_model(BaseModelConfig(uri=str(self.local)), self.storage).base_model_id

    def upload(self) -> None:
        for name in self.names:
            self.storage.write_bytes(f"{self.uri}/{name}", (self.local / name).read_bytes())

    def resolve(self, cache: Path | None = None) -> BaseModelFolder:
        config = BaseModelConfig(uri=self.uri, cache_folder=str(cache or self.cache))
        return resolve_base_model(config, self.storage)

    def num_requests(self, cache: Path | None = None) -> int:
        """Of one more look for the model, which must be found whole."""
        self.proxy.plan([])
        found = self.resolve(cache)
        assert found.base_model_id == self.id
        assert {name: (found.path / name).read_bytes() for name in self.names} == {
            name: (self.local / name).read_bytes() for name in self.names
        }
        return self.proxy.num_requests

    def start(self) -> subprocess.Popen[str]:
        """A process that looks for the model once it is told to."""
        command = [sys.executable, "-c", _RESOLVE, self.proxy.endpoint_url, self.uri, str(self.cache)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process


@pytest.fixture
def model(proxy: Faulty, s3_server: S3Server, tmp_path: Path) -> Model:
    return Model(proxy, s3_server.new_bucket(), tmp_path)


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def test_processes_of_a_node_download_a_base_model_once(model: Model) -> None:
    processes = [model.start() for _ in range(3)]
    model.proxy.plan([])
    for process in processes:
        go(process)
    said = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert said == [model.id] * 3
    # Each lists what there is, one of them fetches it.
    assert model.proxy.num_requests == 3 + len(model.names)
    assert model.num_requests() == 1
    # Control: what has a cache of its own fetches all of it again.
    assert model.num_requests(model.cache.with_name("other")) == 1 + len(model.names)


def test_who_waits_for_a_process_that_is_killed_takes_over(model: Model) -> None:
    model.proxy.plan(["ok", "ok"], after="hang_up")
    process = model.start()
    go(process)
    folder = until(lambda: [path for path in model.cache.glob("base-*") if path.is_dir() and any(path.iterdir())])[0]
    process.kill()
    process.wait()
    (folder / ".model.safetensors.0.tmp").write_bytes(b"what it left")
    assert model.num_requests() == 1 + len(model.names)
    assert sorted(path.name for path in folder.iterdir()) == model.names
    assert model.num_requests() == 1


def until(look: Callable[[], list[Path]], longest_s: float = 60) -> list[Path]:
    deadline_s = time.monotonic() + longest_s
    while time.monotonic() < deadline_s:
        if found := look():
            return found
        time.sleep(0.02)
    raise AssertionError("did not happen")


def test_a_damaged_copy_is_found_and_fetched_again(model: Model) -> None:
    folder = model.resolve().path
    weights, record = folder / "model.safetensors", folder.with_name(f"{folder.name}.json")
    whole = weights.read_bytes()

    def flip() -> None:
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))

    damages: dict[str, Callable[[], object]] = {
        "cut": lambda: weights.write_bytes(whole[: WEIGHTS_BYTES // 2]),
        "one bit": flip,
        "one file gone": lambda: (folder / "config.json").unlink(),
        "no record": lambda: record.unlink(),
        "half a record": lambda: record.write_bytes(record.read_bytes()[:20]),
    }
    for what, damage in damages.items():
        damage()
        assert model.num_requests() == 1 + len(model.names), what
        assert model.num_requests() == 1, what


def test_another_model_in_the_same_place_is_another_folder(model: Model) -> None:
    old = model.resolve()
    (model.local / "model.safetensors").write_bytes(os.urandom(WEIGHTS_BYTES))
    model.upload()
    new = model.resolve()
    assert new.base_model_id == resolve_base_model(BaseModelConfig(uri=str(model.local)), model.storage).base_model_id
    assert new.base_model_id != old.base_model_id
    assert new.path != old.path
    assert (old.path / "model.safetensors").stat().st_size == WEIGHTS_BYTES, "whoever has loaded half of it goes on"


def test_a_cache_that_others_may_write_is_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model.cache.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: model.cache.stat().st_uid + 1)
    with pytest.raises(ConfigError, match=r"another user.*base_model\.cache_folder"):
        model.resolve()


def test_a_link_that_another_user_left_in_the_usual_place_is_refused(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "mine").mkdir()
    link = tmp_path / f"e2p_ray-models-{os.getuid()}"
    link.symlink_to(tmp_path / "mine")
    config = BaseModelConfig(uri=model.uri)
    assert resolve_base_model(config, model.storage).path.parent == link, "control: one's own is followed"
    try:
        os.chown(link, os.getuid() + 1, -1, follow_symlinks=False)
    except PermissionError:
        pytest.skip("only root gives a link away")
    with pytest.raises(ConfigError, match=r"another user.*base_model\.cache_folder"):
        resolve_base_model(config, model.storage)


def test_a_link_of_ones_own_into_another_user_s_folder_is_refused(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"e2p_ray-models-{os.getuid()}").symlink_to(tmp_path / "theirs")
    try:
        os.chown(tmp_path / "theirs", os.getuid() + 1, -1)
    except PermissionError:
        pytest.skip("only root gives a folder away")
    with pytest.raises(ConfigError, match=r"another user.*base_model\.cache_folder"):
        resolve_base_model(BaseModelConfig(uri=model.uri), model.storage)


def test_the_folder_that_one_is_in_has_its_name(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    named = resolve_base_model(BaseModelConfig(uri=str(model.local)), model.storage)
    monkeypatch.chdir(model.local)
    assert resolve_base_model(BaseModelConfig(uri="."), model.storage).base_model_id == named.base_model_id


def test_a_disk_without_a_place_for_the_lock_is_said(model: Model, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    said = r"\.lock: No space left on device.*cache_folder"
    with small_disk(disk, WEIGHTS_BYTES, num_files=1), pytest.raises(StorageError, match=said):
        model.resolve(disk)
    with small_disk(disk, WEIGHTS_BYTES * 2):
        assert model.num_requests(disk) == 1 + len(model.names)


def test_nobody_else_may_look_into_a_cache_that_is_made(model: Model) -> None:
    model.resolve(model.cache / "deep")
    assert (model.cache / "deep").stat().st_mode & 0o777 == 0o700


def test_a_full_disk_is_said_and_nothing_is_left_on_it(model: Model, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk, WEIGHTS_BYTES // 2):
        with pytest.raises(StorageError, match=r"disk is full; the base model takes 3,\d+,\d+ bytes.*cache_folder"):
            model.resolve(disk)
        assert not [path for path in disk.rglob("*") if path.is_file() and path.stat().st_size]
    with small_disk(disk, WEIGHTS_BYTES * 2):
        assert model.num_requests(disk) == 1 + len(model.names)


@contextlib.contextmanager
def small_disk(folder: Path, num_bytes: int, num_files: int = 0) -> Iterator[None]:
    """At most so many files besides it: none is no bound."""
    options = f"size={num_bytes},nr_inodes={num_files},mode=700"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine lets us mount no small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_folder_is_downloaded_whole(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("e2p_ray.storage._PART_BYTES", 100_001)
    storage, root = Storage(s3_server.config), s3_server.new_bucket()
    big = os.urandom(300_000)
    storage.write_bytes(f"{root}/model/config.json", b"{}")
    storage.write_bytes(f"{root}/model/deep/model.safetensors", big)
    folder = cached_folder(storage, f"{root}/model", str(tmp_path / "into")).path
    assert (folder / "config.json").read_bytes() == b"{}"
    assert (folder / "deep" / "model.safetensors").read_bytes() == big
    assert folder.parent == tmp_path / "into"
    with pytest.raises(ObjectNotFoundError):
        cached_folder(storage, f"{root}/nothing", str(tmp_path / "nothing"))


def test_a_name_that_leads_out_of_its_folder_is_not_downloaded(tmp_path: Path) -> None:
    class Hostile(Storage):
        def list_objects(self, uri: str) -> Iterator[ObjectInfo]:
            yield ObjectInfo(f"{uri}/../../escaped", 1, "v")

    with pytest.raises(StorageError, match="leads out of its folder"):
        cached_folder(Hostile(), "s3://bucket/model", str(tmp_path / "into"))

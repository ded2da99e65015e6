"""Storage on local files and on a real S3 server, the latter also behind a proxy that fails on purpose."""

from __future__ import annotations

import errno
import os
import pickle
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from boto3.session import Session
from botocore.credentials import Credentials
from botocore.exceptions import CredentialRetrievalError
from deltalake import DeltaTable, write_deltalake
from pydantic import SecretStr

from e2p_ray.config import StorageConfig
from e2p_ray.errors import AccessDeniedError, ConfigError, InputError, ObjectNotFoundError, StorageError
from e2p_ray.serve.front import unused_ports
from e2p_ray.storage import ObjectInfo, PassingError, Storage, batches, parquet_bytes
from e2p_ray.storage.s3 import S3Place
from e2p_ray.storage.s3_errors import DenialError, typed_delta
from tests.faulty import FAULTS, Faulty, faulty_s3
from tests.s3 import S3Server, place_on

TABLE = pa.table({"user_id": [f"u{i}" for i in range(5000)], "title": ["見出し"] * 5000, "n": range(5000)})


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Storage, str]:
    """A storage and an empty root, on either kind of place."""
    return place_on(request.param, request, tmp_path, "root")


@pytest.fixture(scope="module")
def faulty(s3_server: S3Server) -> Iterator[Faulty]:
    with faulty_s3(s3_server.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def through(s3_server: S3Server, faulty: Faulty, monkeypatch: pytest.MonkeyPatch) -> tuple[Storage, str]:
    """A storage that reaches the server through the failing proxy, and a root with one object `old`."""
    monkeypatch.setattr("e2p_ray.storage.s3._FIRST_WAIT_S", 0.01)
    config = s3_server.config.model_copy(update={"endpoint_url": faulty.endpoint_url, "read_timeout_s": 1.0})
    storage, root = Storage(config), f"{s3_server.new_bucket()}/root"
    faulty.plan([])
    storage.write_bytes(f"{root}/old", b"old bytes, enough of them to be cut in half")
    return storage, root


def test_objects(place: tuple[Storage, str]) -> None:
    storage, root = place
    uri = f"{root}/a/b c.json"
    assert not storage.exists(uri)
    with pytest.raises(ObjectNotFoundError, match="there is no object"):
        storage.read_bytes(uri)
    storage.write_bytes(uri, b"one")
    first = storage.info(uri)
    storage.write_bytes(uri, b"two!")
    second = storage.info(uri)
    assert storage.read_bytes(uri) == b"two!"
    assert first is not None
    assert second is not None
    assert second.size_bytes == 4
    assert first.version != second.version
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri)


def test_listing_is_recursive_sorted_and_of_this_folder_only(place: tuple[Storage, str]) -> None:
    storage, root = place
    assert list(storage.list_objects(f"{root}/markers")) == []
    names = ["markers/b.json", "markers/a.json", "markers/deep/er/c.json", "markers-not/d.json", "markersnot"]
    for name in names:
        storage.write_bytes(f"{root}/{name}", name.encode())
    for folder in (f"{root}/markers", f"{root}/markers/"):
        found = [info.uri.removeprefix(f"{root}/") for info in storage.list_objects(folder)]
        assert found == ["markers/a.json", "markers/b.json", "markers/deep/er/c.json"]


def test_listing_goes_past_one_page(s3_server: S3Server) -> None:
    storage, root = Storage(s3_server.config), f"{s3_server.new_bucket()}/many"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: storage.write_bytes(f"{root}/{i:05}", b"x"), range(1005)))
    found = list(storage.list_objects(root))
    assert [info.uri.rpartition("/")[2] for info in found] == [f"{i:05}" for i in range(1005)]


def test_put_if_absent_has_one_winner(place: tuple[Storage, str]) -> None:
    storage, root = place
    num_writers = 12
    for name in range(5):
        barrier = threading.Barrier(num_writers)

        def write(writer: int, uri: str = f"{root}/{name}", barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return storage.put_if_absent(uri, f"writer {writer}".encode())

        with ThreadPoolExecutor(num_writers) as pool:
            won = list(pool.map(write, range(num_writers)))
        assert sum(won) == 1
        assert storage.read_bytes(f"{root}/{name}") == f"writer {won.index(True)}".encode()


def test_readers_never_see_a_part(tmp_path: Path) -> None:
    storage, uri = Storage(), str(tmp_path / "object")
    versions = [bytes([i]) * 300_000 for i in range(8)]
    storage.write_bytes(uri, versions[0])

    def write_all() -> None:
        for data in versions * 5:
            storage.write_bytes(uri, data)

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write_all)
        seen = 0
        while not writing.done() or not seen:
            assert storage.read_bytes(uri) in versions
            seen += 1
        writing.result()
    assert os.listdir(tmp_path) == ["object"]


def _killed_writer(uri: str) -> None:
    def die(*_: object) -> None:
        os.kill(os.getpid(), 9)

    os.replace = die  # type: ignore[assignment]
    Storage().write_bytes(uri, b"half done")


def test_a_killed_local_writer_leaves_nothing_that_is_listed(tmp_path: Path) -> None:
    uri = f"{tmp_path}/data/part.parquet"
    process = get_context("spawn").Process(target=_killed_writer, args=(uri,))
    process.start()
    process.join()
    assert process.exitcode == -9
    assert os.listdir(tmp_path / "data"), "the control: something was left behind"
    assert list(Storage().list_objects(f"{tmp_path}/data")) == []
    assert Storage().put_if_absent(uri, b"whole")


def test_tables(place: tuple[Storage, str]) -> None:
    storage, root = place
    storage.write_table(f"{root}/t/part.parquet", TABLE)
    assert storage.read_table(f"{root}/t/part.parquet").equals(TABLE)
    assert storage.read_table(f"{root}/t/part.parquet", ["n", "user_id"]).equals(TABLE.select(["n", "user_id"]))
    assert storage.read_schema(f"{root}/t/part.parquet") == TABLE.schema
    with pytest.raises(InputError, match="column 'embedding'"):
        storage.read_table(f"{root}/t/part.parquet", ["embedding"])
    assert parquet_bytes(TABLE) == parquet_bytes(TABLE)


def test_a_column_is_read_without_the_others(s3_server: S3Server) -> None:
    storage = Storage(s3_server.config)
    uri = f"{s3_server.new_bucket()}/wide.parquet"
    wide = pa.table({"user_id": [f"u{i}" for i in range(2000)], "noise": [os.urandom(500) for _ in range(2000)]})
    storage.write_table(uri, wide)
    fetched: list[int] = []

    class Counting(Storage):
        def read_range(self, info: ObjectInfo, start: int, num_bytes: int) -> bytes:
            data = super().read_range(info, start, num_bytes)
            fetched.append(len(data))
            return data

    assert Counting(s3_server.config).read_table(uri, ["user_id"]).equals(wide.select(["user_id"]))
    info = storage.info(uri)
    assert info is not None
    assert sum(fetched) < info.size_bytes / 4


def test_a_table_that_changes_while_it_is_read_is_refused(place: tuple[Storage, str]) -> None:
    storage, root = place
    uri = f"{root}/t.parquet"
    storage.write_table(uri, TABLE)
    info = storage.info(uri)
    assert info is not None
    storage.write_table(uri, TABLE.slice(1))
    with pytest.raises(StorageError, match="replaced while it was being read"):
        storage.read_range(info, 0, 4)


def test_parquet_files(place: tuple[Storage, str]) -> None:
    storage, root = place
    for name in ("a.parquet", "deep/b.parquet", "_SUCCESS", "_temporary/c.parquet", ".hidden.parquet", "d.txt"):
        storage.write_bytes(f"{root}/t/{name}", parquet_bytes(TABLE.slice(0, 1)))
    names = [info.uri.removeprefix(f"{root}/t/") for info in storage.parquet_files(f"{root}/t")]
    assert names == ["a.parquet", "deep/b.parquet"]
    assert [info.uri for info in storage.parquet_files(f"{root}/t/a.parquet")] == [f"{root}/t/a.parquet"]
    with pytest.raises(InputError, match="no Parquet file"):
        storage.parquet_files(f"{root}/nothing")
    storage.write_bytes(f"{root}/cut.parquet", parquet_bytes(TABLE)[:-100])
    with pytest.raises(InputError, match="not a whole Parquet file"):
        storage.read_schema(f"{root}/cut.parquet")


def test_inputs_are_read_through_links_and_each_folder_once(tmp_path: Path) -> None:
    def names() -> list[str]:
        return [info.uri.removeprefix(f"{tmp_path}/t/") for info in Storage().parquet_files(f"{tmp_path}/t")]

    for name in ("t/part=0/a.parquet", "elsewhere/b.parquet", "elsewhere/deep/c.parquet"):
        Storage().write_table(f"{tmp_path}/{name}", TABLE.slice(0, 1))
    assert names() == ["part=0/a.parquet"]
    (tmp_path / "t" / "part=1").symlink_to(tmp_path / "elsewhere")
    everything = ["part=0/a.parquet", "part=1/b.parquet", "part=1/deep/c.parquet"]
    assert names() == everything
    (tmp_path / "t" / "latest").symlink_to("part=0")  # comes first by name, and yet its files keep their own place
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "t")
    (tmp_path / "t" / "part=0" / "loop").symlink_to("..")
    assert names() == everything
    assert [info.name for info in Storage().list_objects(f"{tmp_path}/t")] == ["a.parquet"]
    linked = tmp_path / "linked"
    linked.symlink_to(tmp_path / "t")
    assert len(Storage().parquet_files(str(linked))) == 3


@pytest.mark.parametrize("name", ["part=1", "part-1.parquet"])
def test_an_input_link_that_leads_nowhere_is_no_empty_folder(name: str, tmp_path: Path) -> None:
    Storage().write_table(f"{tmp_path}/t/a.parquet", TABLE.slice(0, 1))
    (tmp_path / "t" / name).symlink_to(tmp_path / "unmounted" / name)
    with pytest.raises(StorageError, match=f"t/{name}: this link leads nowhere"):
        Storage().parquet_files(f"{tmp_path}/t")


@pytest.mark.parametrize(
    ("error", "kind"),
    [(PermissionError(errno.EACCES, "denied"), AccessDeniedError), (OSError(errno.EIO, "no answer"), StorageError)],
)
def test_a_folder_that_cannot_be_listed_is_no_empty_one(
    error: OSError, kind: type[StorageError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, root, scandir = Storage(), f"{tmp_path}/t", os.scandir
    for name in ("part=0/a.parquet", "part=1/b.parquet"):
        storage.write_table(f"{root}/{name}", TABLE.slice(0, 1))

    def failing(path: str) -> Any:
        if str(path).endswith("part=1"):
            error.filename = path
            raise error
        return scandir(path)

    assert len(storage.parquet_files(root)) == 2
    monkeypatch.setattr(os, "scandir", failing)
    listings: list[Callable[[str], object]] = [
        storage.parquet_files,
        lambda uri: list(storage.list_objects(uri)),
        storage.list_dated,
        storage.refuse_links_out,
    ]
    for listing in listings:
        with pytest.raises(kind, match="t/part=1: "):
            listing(root)
    monkeypatch.setattr(os, "scandir", lambda path: scandir(f"{path}/gone" if str(path).endswith("=1") else path))
    assert len(storage.parquet_files(root)) == 1, "what is removed meanwhile is no error"


@pytest.mark.parametrize("fault", FAULTS)
def test_passing_faults_are_survived(fault: str, through: tuple[Storage, str], faulty: Faulty) -> None:
    storage, root = through
    script = [fault] if fault == "hang_up" else [fault, "slow_down", fault]
    old = b"old bytes, enough of them to be cut in half"
    faulty.plan(script)
    assert storage.read_bytes(f"{root}/old") == old
    assert faulty.num_requests == len(script) + 1
    faulty.plan(script)
    assert [info.size_bytes for info in storage.list_objects(root)] == [len(old)]
    faulty.plan(script)
    storage.write_bytes(f"{root}/new", b"new")
    faulty.plan(script)
    assert storage.put_if_absent(f"{root}/absent", b"mine") is True
    faulty.plan(script)
    assert storage.put_if_absent(f"{root}/absent", b"another's") is False
    faulty.plan([])
    assert storage.read_bytes(f"{root}/new") == b"new"
    assert storage.read_bytes(f"{root}/absent") == b"mine"


def test_ranged_reads_survive_cut_bodies(through: tuple[Storage, str], faulty: Faulty) -> None:
    storage, root = through
    storage.write_table(f"{root}/t.parquet", TABLE)
    faulty.plan(["ok", "truncate", "reset", "ok", "truncate", "slow_down"])
    assert storage.read_table(f"{root}/t.parquet").equals(TABLE)
    assert faulty.num_requests > 6


def test_wrong_credentials_are_not_tried_again(through: tuple[Storage, str], faulty: Faulty) -> None:
    storage, root = through
    for call in (
        lambda: storage.read_bytes(f"{root}/old"),
        lambda: storage.write_bytes(f"{root}/new", b""),
        lambda: list(storage.list_objects(root)),
    ):
        faulty.plan([], after="wrong_key")
        with pytest.raises(AccessDeniedError, match="Check the credentials"):
            call()
        assert faulty.num_requests == 1


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (
            "Kernel error -> The operation lacked the necessary privileges to complete for path t/_delta_log/x",
            DenialError,
        ),
        ("Generic S3 error: Error performing list request: 403 Forbidden <Code>AccessDenied</Code>", DenialError),
        ("Generic S3 error: 403 Forbidden <Code>SignatureDoesNotMatch</Code>", OSError),
        ("Generic S3 error: Error performing list request: 404 <Code>NoSuchBucket</Code>", ObjectNotFoundError),
        ("request or response body error: error reading a body from connection", PassingError),
        ("Generic S3 error: in 2.4s, after 7 retries, max_retries 7: 503 Service Unavailable", OSError),
    ],
)
def test_what_deltalake_says_is_understood(said: str, kind: type[Exception]) -> None:
    """As it says it in deltalake 1.6, met in storms; it has tried the last one again itself."""

    def call() -> None:
        raise OSError(said)

    with pytest.raises(kind) as caught:
        typed_delta(call, "s3://bucket/table")
    assert type(caught.value) is kind


def test_tries_are_capped(through: tuple[Storage, str], faulty: Faulty) -> None:
    storage, root = through
    few = Storage(storage.config.model_copy(update={"max_attempts": 3}))
    faulty.plan([], after="slow_down")
    with pytest.raises(StorageError, match="in 3 tries: SlowDown"):
        few.read_bytes(f"{root}/old")
    assert faulty.num_requests == 3


def test_a_server_that_starts_again_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens at first: the connection is refused. A name that is not found is the same to boto3."""
    (port,) = unused_ports(1)
    keys = {"access_key_id": "k", "secret_access_key": "s", "region": "us-east-1"}
    config = StorageConfig(endpoint_url=f"http://127.0.0.1:{port}", max_attempts=7, **keys)
    monkeypatch.setattr("e2p_ray.storage.s3._FIRST_WAIT_S", 0.01)

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"here")

        def log_message(self, *_: object) -> None:
            return

    with ExitStack() as stack:
        waits: list[float] = []

        def sleep(wait_s: float) -> None:
            waits.append(wait_s)
            if len(waits) == num_away:
                server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", port), Answer))
                threading.Thread(target=server.serve_forever, daemon=True).start()
                stack.callback(server.shutdown)

        monkeypatch.setattr("e2p_ray.storage.s3.time", SimpleNamespace(sleep=sleep))
        num_away, storage = 3, Storage(config)
        assert storage.read_bytes("s3://bucket/x") == b"here"
        assert len(waits) == 3
    num_away = 0
    for known, num_tries in ((Storage(config), 5), (storage, 7)):  # control: who reached it before waits longer
        with pytest.raises(StorageError, match=f"in {num_tries} tries: .*connect to .*Check storage.endpoint_url"):
            known.read_bytes("s3://bucket/x")


def test_wrong_keys_are_denied(s3_server: S3Server) -> None:
    if s3_server.name == "moto":
        pytest.skip("moto checks no signatures")
    root = s3_server.new_bucket()
    config = s3_server.config.model_copy(update={"secret_access_key": SecretStr("wrong")})
    with pytest.raises(AccessDeniedError, match="SignatureDoesNotMatch"):
        Storage(config).write_bytes(f"{root}/x", b"")


def test_parts_of_delta_tables_are_no_tables(place: tuple[Storage, str]) -> None:
    """Their folders hold what was deleted, too; only the log of the whole knows."""
    storage, root = place
    table, inner = f"{root}/users", f"{root}/tables/jp"
    for uri in (table, inner):
        options = storage.delta_options(uri)
        rows = pa.table({"user_id": ["a", "b"], "p": ["x", "y"]})
        write_deltalake(uri, rows, partition_by=["p"], storage_options=options)
        DeltaTable(uri, storage_options=options).delete("p = 'x'")
    found = storage.table_files(table)
    assert (found.delta_version, len(found.files)) == (1, 1)
    with pytest.raises(InputError, match=f"{table}/p=x: is a partition of the Delta table {table}.*one Delta table"):
        storage.table_files(f"{table}/p=x")
    with pytest.raises(InputError, match=r"tables: holds the Delta table jp, and is none itself.*one Delta table"):
        storage.table_files(f"{root}/tables")
    for name in ("plain/dt=1/h=2/part.parquet", "plain/dt=1/_old/_delta_log/0.json"):
        storage.write_bytes(f"{root}/{name}", b"")
    assert len(storage.table_files(f"{root}/plain/dt=1/h=2").files) == 1, "control: not every partition is Delta's"
    assert len(storage.table_files(f"{root}/plain").files) == 1, "control: what is hidden is no table"
    DeltaTable(table, storage_options=storage.delta_options(table)).delete()
    with pytest.raises(InputError, match="version 2 of this Delta table is empty"):
        storage.table_files(table)


def test_credentials_come_from_the_usual_chain(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = s3_server.config
    assert keys.access_key_id is not None
    assert keys.secret_access_key is not None
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys.access_key_id.get_secret_value())
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys.secret_access_key.get_secret_value())
    storage, uri = Storage(StorageConfig(endpoint_url=s3_server.endpoint_url)), f"{s3_server.new_bucket()}/x.parquet"
    storage.write_table(uri, TABLE)
    options = storage.delta_options(uri)
    assert options["aws_secret_access_key"] == keys.secret_access_key.get_secret_value()
    assert pl.read_parquet(uri, storage_options=options).height == TABLE.num_rows


def test_pickled_and_printed(s3_server: S3Server) -> None:
    uri = f"{s3_server.new_bucket()}/x"
    storage = Storage(s3_server.config)
    storage.write_bytes(uri, b"x")
    again = pickle.loads(pickle.dumps(storage))  # noqa: S301 - our own bytes
    assert again.read_bytes(uri) == b"x"
    assert s3_server.endpoint_url in repr(again)
    assert "SKTEST" not in repr(again) + str(again) + repr(again.config)
    assert storage.delta_options("/a/local/path") == {}


def test_a_forked_child_makes_its_own_client(s3_server: S3Server) -> None:
    storage, uri = Storage(s3_server.config), f"{s3_server.new_bucket()}/x"
    storage.write_bytes(uri, b"x")
    process = get_context("fork").Process(target=storage.write_bytes, args=(f"{uri}2", b"child"))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert storage.read_bytes(f"{uri}2") == b"child"


@pytest.mark.parametrize("uri", ["gs://bucket/x", "http://host/x", "s3://", "s3://bucket", "s3:///key"])
def test_wrong_uris(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"expected s3://|unknown scheme"):
        Storage().read_bytes(uri)


def test_local_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(AccessDeniedError, match="permission denied"):
        Storage().read_bytes(str(tmp_path / "x"))


def test_file_uris(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "t.parquet")
    assert Storage().read_table(f"file://{tmp_path}/t.parquet").equals(TABLE)
    assert [info.uri for info in Storage().parquet_files(f"file://{tmp_path}")] == [f"file://{tmp_path}/t.parquet"]


def test_batches_of_a_large_file_hold_no_more_than_a_row_group(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(4 << 20)
    values = pa.array([noise[at : at + 64].hex() for at in range(0, len(noise), 64)])
    pq.write_table(pa.table({"a": values}), tmp_path / "many.parquet", row_group_size=len(values) // 32)

    def most_bytes(of: Callable[[pq.ParquetFile], Iterator[pa.RecordBatch]]) -> int:
        with Storage().open_parquet(str(tmp_path / "many.parquet")) as file:
            tracemalloc.start()
            found = [row for batch in of(file) for row in batch["a"].slice(0, 1).to_pylist()]
            peak_bytes = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert found[0] == values[0].as_py()
        return peak_bytes

    whole = most_bytes(lambda file: file.iter_batches(1 << 16, columns=["a"], use_threads=False))
    assert whole > 4 << 20, "the control"
    assert most_bytes(lambda file: batches(file, ["a"])) < whole / 4


def test_credentials_that_cannot_be_had_are_storage_s_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a pod's identity agent, say. Who has a session keeps it: it asks for them when they end."""
    sessions = set[int]()
    is_there = True

    def credentials(session: Session) -> Credentials:
        sessions.add(id(session))
        if not is_there:
            raise CredentialRetrievalError(provider="container-role", error_msg="timed out")
        return Credentials("id", "secret", "token")

    monkeypatch.setattr(Session, "get_credentials", credentials)
    place = S3Place(StorageConfig(endpoint_url="http://127.0.0.1:1", region="r"))
    for _ in range(3):
        assert place.delta_options(with_retries=False)["aws_session_token"] == "token"
    is_there = False
    with pytest.raises(StorageError, match=r"no credentials for S3: .*container-role.*timed out"):
        place.delta_options(with_retries=False)
    assert len(sessions) == 1

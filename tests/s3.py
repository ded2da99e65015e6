"""A real S3 server for the tests: Ceph's gateway where it is installed, moto's server elsewhere.

`E2P_TEST_S3=ceph` or `=moto` chooses one by force. `E2P_TEST_LONG=1` runs on it also what is the same everywhere.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3.session
import pytest
from botocore.config import Config

from e2p_ray.config import StorageConfig
from e2p_ray.serve.front import unused_ports
from e2p_ray.storage import Storage
from tests.waiting import wait_until

IS_LONG = bool(os.environ.get("E2P_TEST_LONG"))
PLACES = ("local", "s3") if IS_LONG else ("local",)  # of tests whose like runs on S3 anyway
_KEY_ID, _SECRET = "AKTEST", "SKTEST"
_PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin", "setpriv")
# With the default intervals of paxos it takes 16 s until the first bucket is there instead of 2 (measured).
_CEPH_CONF = """
[global]
fsid = {fsid}
mon host = [v1:127.0.0.1:{mon_port}]
mon initial members = a
public addr = 127.0.0.1
ms bind ipv6 = false
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
mon data = {home}/mon
mon data avail warn = 1
mon data avail crit = 1
paxos propose interval = 0.05
paxos min wait = 0.01
osd data = {home}/osd
osd objectstore = memstore
memstore device bytes = 4294967296
osd memory target = 1073741824
keyring = {home}/keyring
log file = {home}/$name.log
admin socket = {home}/$name.asok
run dir = {home}
rgw frontends = beast endpoint=127.0.0.1:{rgw_port}
rgw data = {home}/rgw
"""
_CAPABILITIES = {
    "mon.": {"mon": "allow *"},
    "client.admin": {"mon": "allow *", "osd": "allow *", "mgr": "allow *"},
    "osd.0": {"mon": "allow profile osd", "osd": "allow *", "mgr": "allow profile osd"},
    "client.rgw.a": {"mon": "allow rw", "osd": "allow rwx", "mgr": "allow rw"},
}


@dataclass(frozen=True)
class S3Server:
    """A running server: which one, and how to reach it."""

    name: str  # ceph | moto
    endpoint_url: str

    @property
    def config(self) -> StorageConfig:
        return StorageConfig(endpoint_url=self.endpoint_url, access_key_id=_KEY_ID, secret_access_key=_SECRET)

    def new_bucket(self) -> str:
        """A fresh, empty bucket as s3://name."""
        bucket = f"test-{uuid.uuid4().hex[:12]}"
        session = boto3.session.Session(_KEY_ID, _SECRET, region_name="us-east-1")
        config = Config(request_checksum_calculation="when_required", s3={"addressing_style": "path"})
        session.client("s3", endpoint_url=self.endpoint_url, config=config).create_bucket(Bucket=bucket)
        return f"s3://{bucket}"


def place_on(kind: str, request: pytest.FixtureRequest, tmp_path: Path, name: str = "out") -> tuple[Storage, str]:
    """A storage, "local" or "s3", and an empty place of this name on it."""
    if kind == "local":
        return Storage(), str(tmp_path / name)
    server: S3Server = request.getfixturevalue("s3_server")
    return Storage(server.config), f"{server.new_bucket()}/{name}"


def chosen_server() -> str:
    """Which server these tests use."""
    forced = os.environ.get("E2P_TEST_S3")
    if forced:
        return forced
    return "ceph" if all(shutil.which(program) for program in _PROGRAMS) else "moto"


@pytest.fixture(scope="session")
def s3_server(request: pytest.FixtureRequest) -> Iterator[S3Server]:
    """One S3 server for the whole session."""
    start = {"ceph": _ceph, "moto": _moto}[chosen_server()]
    with start() as server:
        reporter = request.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line(f"S3 server of these tests: {server.name} at {server.endpoint_url}")
        yield server


@contextmanager
def _moto() -> Iterator[S3Server]:
    # A process of its own: deltalake holds the interpreter's lock in some calls, and a server here would wait for it.
    (port,) = unused_ports(1)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: _answers(port), "moto's server is up")
        yield S3Server("moto", f"http://127.0.0.1:{port}")
    finally:
        server.kill()
        server.wait()


@contextmanager
def _ceph() -> Iterator[S3Server]:
    """A monitor, one storage daemon in memory and the S3 gateway, on loopback, in a folder of their own."""
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ceph-", ignore_cleanup_errors=True)))
        mon_port, rgw_port = unused_ports(2)
        ceph = _Ceph(home, mon_port=mon_port, rgw_port=rgw_port)
        stack.callback(ceph.stop)
        ceph.start()
        yield S3Server("ceph", f"http://127.0.0.1:{ceph.rgw_port}")


class _Ceph:
    def __init__(self, home: Path, *, mon_port: int, rgw_port: int) -> None:
        self.home, self.mon_port, self.rgw_port = home, mon_port, rgw_port
        self._conf = home / "ceph.conf"
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        fsid, osd_id = str(uuid.uuid4()), str(uuid.uuid4())
        self._conf.write_text(
            _CEPH_CONF.format(fsid=fsid, mon_port=self.mon_port, rgw_port=self.rgw_port, home=self.home)
        )
        for name in ("mon", "osd", "rgw"):
            (self.home / name).mkdir()
        keyring, monmap = str(self.home / "keyring"), str(self.home / "monmap")
        for entity, capabilities in _CAPABILITIES.items():
            create = [] if Path(keyring).exists() else ["--create-keyring"]
            caps = [word for kind, rule in capabilities.items() for word in ("--cap", kind, rule)]
            self._run("ceph-authtool", keyring, *create, "--gen-key", "-n", entity, *caps)
        address = f"[v1:127.0.0.1:{self.mon_port}]"
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, monmap)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
        self._daemon("ceph-mon", "-i", "a")
        self._ceph("auth", "import", "-i", keyring)
        self._ceph("osd", "new", osd_id)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_id, "--keyring", keyring)
        self._ceph("osd", "crush", "add", "osd.0", "1.0", "root=default", "host=localhost")
        self._daemon("ceph-osd", "-i", "0")
        self._daemon("radosgw", "-n", "client.rgw.a")
        wait_until(lambda: _answers(self.rgw_port), "the S3 gateway is up", longest_s=120)
        keys = (f"--access-key={_KEY_ID}", f"--secret={_SECRET}")
        self._run("radosgw-admin", "user", "create", "--uid=test", "--display-name=test", *keys)

    def stop(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()

    def _daemon(self, program: str, *words: str) -> None:
        # setpriv: the daemon dies with the test process, also when that is killed.
        command = ["setpriv", "--pdeathsig", "KILL", program, "-f", "-c", str(self._conf), *words]
        with (self.home / f"{program}.out").open("wb") as out:
            self._daemons.append(subprocess.Popen(command, stdout=out, stderr=out))

    def _ceph(self, *words: str) -> None:
        self._run("ceph", "--connect-timeout", "30", *words)

    def _run(self, program: str, *words: str) -> None:
        command = [program, "-c", str(self._conf), *words]
        if program in ("ceph-authtool", "monmaptool"):
            command = [program, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False

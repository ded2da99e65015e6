"""Objects on S3 and servers that speak like it: one client a process, errors made typed, retries of our own."""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError

from e2p_ray.config import StorageConfig
from e2p_ray.errors import AccessDeniedError, ConfigError, ObjectNotFoundError, StorageError
from e2p_ray.storage.objects import DatedObject, ObjectInfo, PassingError, changed_error
from e2p_ray.storage.s3_errors import (
    NO_CREDENTIALS,
    DenialError,
    PreconditionError,
    UnreachedError,
    typed,
    typed_delta,
)

_T = TypeVar("_T")

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 10.0
_MAX_DELTA_RETRY_S = 180.0
# A denial may be throttling in disguise. Where such a call was allowed before, it is tried as often as any other; where
# none was, a wrong policy is the likelier cause, and is told within three seconds (the waits between five tries). So is
# a wrong endpoint, where no call succeeded yet.
_MAX_FIRST_TRIES = 5
_SHA256 = "sha256"  # in the metadata of what is written here


class S3Place:
    """Objects as s3://bucket/key. Thread-safe; every process makes its own client."""

    def __init__(self, config: StorageConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._allowed: set[tuple[str, str]] = set()  # verbs and buckets of calls that succeeded
        # By process id: a forked child must not share its parent's sockets.
        self._connections: dict[int, tuple[boto3.session.Session, Any]] = {}

    def read(self, uri: str) -> bytes:
        bucket, key = split(uri)

        def get() -> bytes:
            answer = self._client().get_object(Bucket=bucket, Key=key)
            data = _whole(answer["Body"].read(), answer["ContentLength"])
            return _unchanged(data, answer.get("Metadata", {}).get(_SHA256))

        return self._try(get, "read", uri)

    def read_range(self, info: ObjectInfo, start: int, num_bytes: int) -> bytes:
        bucket, key = split(info.uri)
        span = f"bytes={start}-{start + num_bytes - 1}"

        def get() -> bytes:
            answer = self._client().get_object(Bucket=bucket, Key=key, Range=span, IfMatch=info.version)
            return _whole(answer["Body"].read(), num_bytes)

        try:
            return self._try(get, "read", info.uri)
        except PreconditionError as error:
            raise changed_error(info.uri) from error

    def put(self, uri: str, data: bytes) -> None:
        bucket, key = split(uri)
        put = {"Bucket": bucket, "Key": key, "Body": data, "Metadata": _metadata(data)}
        self._try(lambda: self._client().put_object(**put), "write", uri)

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        bucket, key = split(uri)
        metadata, num_tries = _metadata(data), 0

        def put() -> None:
            nonlocal num_tries
            num_tries += 1
            self._client().put_object(Bucket=bucket, Key=key, Body=data, Metadata=metadata, IfNoneMatch="*")

        try:
            self._try(put, "write", uri)
        except PreconditionError:
            # After a lost answer, the object in our way may be our own.
            return num_tries > 1 and self.read(uri) == data
        return True

    def info(self, uri: str) -> ObjectInfo | None:
        bucket, key = split(uri)
        try:
            answer = self._try(lambda: self._client().head_object(Bucket=bucket, Key=key), "look up", uri)
        except ObjectNotFoundError:
            return None
        return ObjectInfo(uri, answer["ContentLength"], answer["ETag"])

    def delete(self, uri: str) -> None:
        bucket, key = split(uri)
        self._try(lambda: self._client().delete_object(Bucket=bucket, Key=key), "delete", uri)

    def list_below(self, uri: str, *, through_links: bool = False) -> list[ObjectInfo]:
        return [found.info for found in self.list_dated(uri)]

    def list_dated(self, uri: str) -> list[DatedObject]:
        bucket, key = split(uri, folder=True)
        page = {"Bucket": bucket, "Prefix": f"{key}/" if key else ""}
        found: list[DatedObject] = []
        while True:
            answer = self._try(lambda: self._client().list_objects_v2(**page), "list", uri)
            for entry in answer.get("Contents", []):
                if not entry["Key"].endswith("/"):  # some tools write empty objects as folders
                    info = ObjectInfo(f"s3://{bucket}/{entry['Key']}", entry["Size"], entry["ETag"])
                    found.append(DatedObject(info, entry["LastModified"].timestamp()))
            if not answer.get("NextContinuationToken"):
                return sorted(found)
            page["ContinuationToken"] = answer["NextContinuationToken"]

    def delta_options(self, *, with_retries: bool) -> dict[str, str]:
        """Options with which deltalake, and without retries polars, reach the same place; they hold secrets."""
        session, client = self._connection()
        options = {
            "aws_region": client.meta.region_name or "us-east-1",
            "aws_conditional_put": "etag",
            "timeout": f"{self._config.read_timeout_s:g}s",
            "connect_timeout": f"{self._config.connect_timeout_s:g}s",
        }
        if with_retries:
            options |= {
                "max_retries": str(self._config.max_attempts - 1),
                "retry_timeout": f"{_MAX_DELTA_RETRY_S:g}s",
                "backoff_config.max_backoff": f"{_LONGEST_WAIT_S:g}s",
            }
        if not _is_aws(client.meta.endpoint_url):
            options["aws_endpoint_url"] = client.meta.endpoint_url
        if client.meta.endpoint_url.startswith("http://"):
            options["aws_allow_http"] = "true"
        # object_store knows fewer sources of credentials than boto3: it is given what boto3 found.
        try:
            found = session.get_credentials()  # asked for once by a session, and anew before they end
            keys = found and found.get_frozen_credentials()
        except BotoCoreError as error:
            raise StorageError(f"no credentials for S3: {error}") from error
        if keys is None:
            raise AccessDeniedError(NO_CREDENTIALS)
        options |= {"aws_access_key_id": keys.access_key, "aws_secret_access_key": keys.secret_key}
        if keys.token:
            options["aws_session_token"] = keys.token
        return options

    def patiently(self, call: Callable[[], _T], verb: str, uri: str) -> _T:
        """A call of deltalake's, tried as often as our own."""
        return self._again(lambda: typed_delta(call, uri), verb, uri)

    def _session(self) -> boto3.session.Session:
        key_id, secret = self._config.access_key_id, self._config.secret_access_key
        if (key_id is None) != (secret is None):
            raise ConfigError("storage: give both access_key_id and secret_access_key, or neither")
        return boto3.session.Session(
            aws_access_key_id=key_id.get_secret_value() if key_id else None,
            aws_secret_access_key=secret.get_secret_value() if secret else None,
            region_name=self._config.region,
        )

    def _client(self) -> Any:
        return self._connection()[1]

    def _connection(self) -> tuple[boto3.session.Session, Any]:
        """This process's session and client."""
        with self._lock:
            if os.getpid() not in self._connections:
                session = self._session()
                self._connections = {os.getpid(): (session, self._new_client(session))}
            return self._connections[os.getpid()]

    def _new_client(self, session: boto3.session.Session) -> Any:
        settings: dict[str, Any] = {
            "connect_timeout": self._config.connect_timeout_s,
            "read_timeout": self._config.read_timeout_s,
            "max_pool_connections": 32,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
        }
        region = session.region_name or "us-east-1"
        arguments: dict[str, Any] = {"endpoint_url": self._config.endpoint_url, "region_name": region}
        client = session.client("s3", config=Config(**settings), **arguments)
        if _is_aws(client.meta.endpoint_url):
            return client
        # Other servers often know neither the newer checksum trailers nor buckets as host names.
        settings |= {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
        return session.client("s3", config=Config(**settings, s3={"addressing_style": "path"}), **arguments)

    def _try(self, call: Callable[[], _T], verb: str, uri: str) -> _T:
        return self._again(lambda: typed(call, verb, uri), verb, uri)

    def _again(self, call: Callable[[], _T], verb: str, uri: str) -> _T:
        """Make a call again, with exponential waits and full jitter, while its trouble may pass."""
        kind, attempt = (verb, split(uri, folder=True)[0]), 1
        while True:
            try:
                result = call()
            except PassingError as error:
                if attempt >= self._max_tries(error, kind):
                    failure = AccessDeniedError if isinstance(error, DenialError) else StorageError
                    raise failure(f"could not {verb} {uri} in {attempt} tries: {error}") from error
                longest_s = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0**attempt)
                time.sleep(max(random.uniform(0, longest_s), min(error.wait_s, _LONGEST_WAIT_S)))
                attempt += 1
            else:
                self._allowed.add(kind)
                return result

    def _max_tries(self, error: PassingError, kind: tuple[str, str]) -> int:
        is_denied_anew = isinstance(error, DenialError) and kind not in self._allowed
        if is_denied_anew or (isinstance(error, UnreachedError) and not self._allowed):
            return min(self._config.max_attempts, _MAX_FIRST_TRIES)
        return self._config.max_attempts


def split(uri: str, *, folder: bool = False) -> tuple[str, str]:
    """Bucket and key of s3://bucket/key; only a folder may have an empty key."""
    bucket, _, key = uri.partition("://")[2].partition("/")
    if not bucket or not (key or folder):
        raise ConfigError(f"{uri}: expected s3://bucket/key")
    return bucket, key


def _is_aws(endpoint_url: str) -> bool:
    host = urlsplit(endpoint_url).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _whole(data: bytes, num_bytes: int) -> bytes:
    if len(data) != num_bytes:
        raise PassingError(f"{len(data)} of {num_bytes} bytes arrived")
    return data


def _metadata(data: bytes) -> dict[str, str]:
    return {_SHA256: hashlib.sha256(data).hexdigest()}


def _unchanged(data: bytes, sha256: str | None) -> bytes:
    """Data as it was written, where its writer said what that was."""
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise PassingError("other bytes arrived than were written")
    return data

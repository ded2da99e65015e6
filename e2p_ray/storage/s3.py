"""Objects on S3 and servers that speak like it: one client a process, errors made typed, retries of our own."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3.session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.parsers import ResponseParserError

from e2p_ray.config import StorageConfig
from e2p_ray.errors import AccessDeniedError, ConfigError, ObjectNotFoundError, StorageError
from e2p_ray.storage.objects import DatedObject, ObjectInfo, changed_error

_T = TypeVar("_T")

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 10.0
_DENIED = frozenset({"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"})
_MISSING = frozenset({"NoSuchKey", "NoSuchBucket"})
_PASSING = frozenset(
    {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "IncompleteBody", "BadDigest"}
    | {"InternalError", "ServiceUnavailable", "ConditionalRequestConflict", "OperationAborted"}
)
_NO_CREDENTIALS = "no S3 credentials found. Set them in the environment, a profile or a role, or in the storage section"


class _PassingError(Exception):
    """Worth another try; `wait_s` is what the server asked for."""

    def __init__(self, problem: str, wait_s: float = 0.0) -> None:
        super().__init__(problem)
        self.wait_s = wait_s


class _PreconditionError(Exception):
    """412: the object is there (put if absent), or is no longer the one that was listed (ranged read)."""


class S3Place:
    """Objects as s3://bucket/key. Thread-safe; every process makes its own client."""

    def __init__(self, config: StorageConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._clients: dict[int, Any] = {}  # by process id: a forked child must not share its parent's sockets

    def read(self, uri: str) -> bytes:
        bucket, key = split(uri)

        def get() -> bytes:
            answer = self._client().get_object(Bucket=bucket, Key=key)
            return _whole(answer["Body"].read(), answer["ContentLength"])

        return self._try(get, "read", uri)

    def read_range(self, info: ObjectInfo, start: int, num_bytes: int) -> bytes:
        bucket, key = split(info.uri)
        span = f"bytes={start}-{start + num_bytes - 1}"

        def get() -> bytes:
            answer = self._client().get_object(Bucket=bucket, Key=key, Range=span, IfMatch=info.version)
            return _whole(answer["Body"].read(), num_bytes)

        try:
            return self._try(get, "read", info.uri)
        except _PreconditionError as error:
            raise changed_error(info.uri) from error

    def put(self, uri: str, data: bytes) -> None:
        bucket, key = split(uri)
        self._try(lambda: self._client().put_object(Bucket=bucket, Key=key, Body=data), "write", uri)

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        bucket, key = split(uri)
        num_tries = 0

        def put() -> None:
            nonlocal num_tries
            num_tries += 1
            self._client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")

        try:
            self._try(put, "write", uri)
        except _PreconditionError:
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

    def list_below(self, uri: str) -> list[ObjectInfo]:
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

    def delta_options(self) -> dict[str, str]:
        """Options with which deltalake and polars reach the same place; they hold secrets."""
        session = self._session()
        client = self._client()
        options = {
            "aws_region": client.meta.region_name or "us-east-1",
            "aws_conditional_put": "etag",
            "timeout": f"{self._config.read_timeout_s:g}s",
            "connect_timeout": f"{self._config.connect_timeout_s:g}s",
        }
        if not _is_aws(client.meta.endpoint_url):
            options["aws_endpoint_url"] = client.meta.endpoint_url
        if client.meta.endpoint_url.startswith("http://"):
            options["aws_allow_http"] = "true"
        # object_store knows fewer sources of credentials than boto3: it is given what boto3 found.
        found = session.get_credentials()
        if found is None:
            raise AccessDeniedError(_NO_CREDENTIALS)
        keys = found.get_frozen_credentials()
        options |= {"aws_access_key_id": keys.access_key, "aws_secret_access_key": keys.secret_key}
        if keys.token:
            options["aws_session_token"] = keys.token
        return options

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
        with self._lock:
            if os.getpid() not in self._clients:
                self._clients = {os.getpid(): self._new_client()}
            return self._clients[os.getpid()]

    def _new_client(self) -> Any:
        settings: dict[str, Any] = {
            "connect_timeout": self._config.connect_timeout_s,
            "read_timeout": self._config.read_timeout_s,
            "max_pool_connections": 32,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
        }
        session = self._session()
        region = session.region_name or "us-east-1"
        arguments: dict[str, Any] = {"endpoint_url": self._config.endpoint_url, "region_name": region}
        client = session.client("s3", config=Config(**settings), **arguments)
        if _is_aws(client.meta.endpoint_url):
            return client
        # Other servers often know neither the newer checksum trailers nor buckets as host names.
        settings |= {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
        return session.client("s3", config=Config(**settings, s3={"addressing_style": "path"}), **arguments)

    def _try(self, call: Callable[[], _T], verb: str, uri: str) -> _T:
        """Make a call again, with exponential waits and full jitter, while its trouble may pass."""
        for attempt in range(1, self._config.max_attempts + 1):
            try:
                return _typed(call, verb, uri)
            except _PassingError as error:
                problem = error
            if attempt < self._config.max_attempts:
                longest_s = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0**attempt)
                time.sleep(max(random.uniform(0, longest_s), min(problem.wait_s, _LONGEST_WAIT_S)))
        raise StorageError(f"could not {verb} {uri} in {self._config.max_attempts} tries: {problem}") from problem


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
        raise _PassingError(f"{len(data)} of {num_bytes} bytes arrived")
    return data


def _typed(call: Callable[[], _T], verb: str, uri: str) -> _T:
    try:
        return call()
    except ClientError as error:
        raise _from_answer(error, verb, uri) from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise AccessDeniedError(f"could not {verb} {uri}: {_NO_CREDENTIALS}") from error
    except (
        HTTPClientError,
        IncompleteReadError,
        ResponseParserError,
        OSError,
    ) as error:  # time-outs, resets, cut bodies
        raise _PassingError(f"{type(error).__name__}: {error}") from error
    except BotoCoreError as error:
        raise StorageError(f"could not {verb} {uri}: {error}") from error


def _from_answer(error: ClientError, verb: str, uri: str) -> Exception:
    http = error.response.get("ResponseMetadata", {})
    status, code = http.get("HTTPStatusCode", 0), str(error.response.get("Error", {}).get("Code", ""))
    problem = f"could not {verb} {uri}: {code} (HTTP {status})"
    if status == 412:
        return _PreconditionError(problem)
    if code in _MISSING or (status == 404 and code in ("404", "NotFound", "")):
        return ObjectNotFoundError(
            f"there is no bucket for {uri}" if code == "NoSuchBucket" else f"there is no object {uri}"
        )
    if code in _PASSING or status in (429, 500, 502, 503, 504):
        return _PassingError(f"{code} (HTTP {status})", _asked_wait_s(http.get("HTTPHeaders", {})))
    if code in _DENIED or status in (401, 403):
        return AccessDeniedError(f"{problem}. Check the credentials and the bucket's policy")
    if status in (301, 307) or code == "AuthorizationHeaderMalformed":
        return StorageError(f"{problem}. Set storage.region to the bucket's region")
    return StorageError(problem)


def _asked_wait_s(headers: dict[str, str]) -> float:
    asked = headers.get("retry-after", "")
    return float(asked) if asked.isdigit() else 0.0

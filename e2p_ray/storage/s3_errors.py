"""What the answers of S3, and what deltalake says of them, mean: to be tried again, or one of our errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.parsers import ResponseParserError
from deltalake.exceptions import DeltaError

from e2p_ray.errors import AccessDeniedError, ObjectNotFoundError, StorageError
from e2p_ray.storage.objects import PassingError

_T = TypeVar("_T")

_MAYBE_THROTTLED = frozenset({"AccessDenied", "Forbidden", "403", ""})  # a HEAD has no body that could say more
_DELTA_DENIED = ("lacked the necessary privileges", "403 Forbidden")  # of object_store 0.13: objects, listings
_DELTA_CUT = "error reading a body"
_DENIED = frozenset({"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"})
_NO_BUCKET = "NoSuchBucket"
_MISSING = frozenset({"NoSuchKey", _NO_BUCKET})
_PASSING = frozenset(
    {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "IncompleteBody", "BadDigest"}
    | {"InternalError", "ServiceUnavailable", "ConditionalRequestConflict", "OperationAborted"}
)
NO_CREDENTIALS = "no S3 credentials found. Set them in the environment, a profile or a role, or in the storage section"


class DenialError(PassingError):
    """403 without a reason that could not pass."""


class UnreachedError(PassingError):
    """No connection was made: the server starts again, or the endpoint is wrong."""


class PreconditionError(Exception):
    """412: the object is there (put if absent), or is no longer the one that was listed (ranged read)."""


def typed(call: Callable[[], _T], verb: str, uri: str) -> _T:
    """Make a call of boto3's once; PassingError, PreconditionError or a StorageError when it fails."""
    try:
        return call()
    except ClientError as error:
        raise _from_answer(error, verb, uri) from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise AccessDeniedError(f"could not {verb} {uri}: {NO_CREDENTIALS}") from error
    except EndpointConnectionError as error:  # refused, or no such name
        remedy = "Check storage.endpoint_url, and that a server is there"
        raise UnreachedError(f"{type(error).__name__}: {error}. {remedy}") from error
    except (
        HTTPClientError,
        IncompleteReadError,
        ResponseParserError,
        OSError,
    ) as error:  # late answers, resets, cut bodies
        raise PassingError(f"{type(error).__name__}: {error}") from error
    except BotoCoreError as error:
        raise StorageError(f"could not {verb} {uri}: {error}") from error


def _from_answer(error: ClientError, verb: str, uri: str) -> Exception:
    http = error.response.get("ResponseMetadata", {})
    status, code = http.get("HTTPStatusCode", 0), str(error.response.get("Error", {}).get("Code", ""))
    problem = f"could not {verb} {uri}: {code} (HTTP {status})"
    if status == 412:
        return PreconditionError(problem)
    if code in _MISSING or (status == 404 and code in ("404", "NotFound", "")):
        return _no_bucket(uri) if code == _NO_BUCKET else ObjectNotFoundError(f"there is no object {uri}")
    if code in _PASSING or status in (429, 500, 502, 503, 504):
        return PassingError(f"{code} (HTTP {status})", _asked_wait_s(http.get("HTTPHeaders", {})))
    if status == 403 and code in _MAYBE_THROTTLED:
        return DenialError(f"{code or 'denied'} (HTTP 403). Check the credentials and the bucket's policy")
    if code in _DENIED or status in (401, 403):
        return AccessDeniedError(f"{problem}. Check the credentials and the bucket's policy")
    if status in (301, 307) or code == "AuthorizationHeaderMalformed":
        return StorageError(f"{problem}. Set storage.region to the bucket's region")
    return StorageError(problem)


def _no_bucket(uri: str) -> ObjectNotFoundError:
    return ObjectNotFoundError(f"there is no bucket for {uri}. Make it, or correct the name in the configuration")


def _asked_wait_s(headers: dict[str, str]) -> float:
    asked = headers.get("retry-after", "")
    return float(asked) if asked.isdigit() else 0.0


def typed_delta(call: Callable[[], _T], uri: str) -> _T:
    """Make a call of deltalake's once; PassingError for what it does not try again itself, else its own error.

    It does so after errors of the server and lost connections, but not after denials and bodies that were cut. A bucket
    that is not there is an error of ours.
    """
    try:
        return call()
    except (DeltaError, OSError) as error:
        said = str(error)
        if any(words in said for words in _DELTA_DENIED) and not any(code in said for code in _DENIED):
            raise DenialError("denied (HTTP 403). Check the credentials and the bucket's policy") from error
        if f"<Code>{_NO_BUCKET}</Code>" in said:
            raise _no_bucket(uri) from error
        if _DELTA_CUT in said:
            raise PassingError("a part of an answer arrived") from error
        raise

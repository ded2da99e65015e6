"""A client of the API: typed answers, and an error of its own kind for each way to fail. No Ray, no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from e2p_ray.errors import E2PError
from e2p_ray.serve.messages import BatchAnswer, GenerationAnswer, ModelsAnswer, ScoresAnswer

M = TypeVar("M", bound=BaseModel)


class ServiceError(E2PError):
    """An answer that is no text. `code` says why, `retry_after_s` when to come again."""

    def __init__(self, status: int, code: str, detail: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{status} {code}: {detail}")
        self.status, self.code, self.detail, self.retry_after_s = status, code, detail, retry_after_s


class UnauthorizedError(ServiceError):
    """The token is missing or unknown (401)."""


class InvalidRequestError(ServiceError):
    """The request cannot be answered as it is (404, 413, 422 ...)."""


class TooManyRequestsError(ServiceError):
    """Too much at once, or too often (429)."""


class DeadlineError(ServiceError):
    """No text within timeout_ms (504)."""


class UnavailableError(ServiceError):
    """The service cannot answer now (other 5xx), or is not there: status 0."""


@dataclass(frozen=True)
class Token:
    """What was added to a draft; with `restart`, everything before it is to be forgotten."""

    text: str
    restart: bool = False


class Client:
    """Blocking; one connection pool for all calls. Use it in a `with`, or close it."""

    def __init__(self, url: str, token: str | None = None, *, timeout_s: float = 70.0) -> None:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._http = httpx2.Client(base_url=url, headers=headers, timeout=timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def generate(self, task: str, **request: Any) -> GenerationAnswer:
        """One text; `request` has user_id or embedding and embedding_space, events of that space where there are some
        (each with embedding, weight, age_s), content_id or content (title, body, language), and sampling and timeout_ms
        where wanted. Raises a ServiceError."""
        return self._post("/v1/generations", {"task": task, **request}, GenerationAnswer)

    def generate_batch(self, task: str, pairs: Sequence[Mapping[str, Any]], **request: Any) -> BatchAnswer:
        """An answer or a problem for every pair of a user and a content."""
        return self._post("/v1/generations:batch", {"task": task, "pairs": list(pairs), **request}, BatchAnswer)

    def scores(self, task: str, candidates: Sequence[Mapping[str, Any]], **request: Any) -> ScoresAnswer:
        """The candidates, ranked for one user."""
        return self._post("/v1/scores", {"task": task, "candidates": list(candidates), **request}, ScoresAnswer)

    def models(self) -> ModelsAnswer:
        """What is served."""
        with _connection():
            return _read(self._http.get("/v1/models"), ModelsAnswer)

    def stream(self, task: str, **request: Any) -> Iterator[Token | GenerationAnswer]:
        """What is written, as it is: a draft, until the last item, the answer. Leaving early stops the decoding."""
        body = {"task": task, **request, "stream": True}
        with _connection(), self._http.stream("POST", "/v1/generations", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise _error(response.status_code, response.content)
            restart = False
            for name, data in _events(response.iter_lines()):
                match name:
                    case "token":
                        yield Token(json.loads(data)["text"], restart)
                        restart = False
                    case "restart":
                        restart = True
                    case "done":
                        yield _understood(data, GenerationAnswer)
                        return
                    case "error":
                        raise _error(int(json.loads(data)["status"]), data.encode())
        raise UnavailableError(0, "broken_stream", "the connection ended before the answer")

    def _post(self, path: str, body: dict[str, Any], kind: type[M]) -> M:
        with _connection():
            return _read(self._http.post(path, json=body), kind)


class _connection:  # noqa: N801 - reads as a word in a with
    """Turns a connection's trouble into UnavailableError; its message names no value of the request."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, httpx2.HTTPError):
            raise UnavailableError(0, "unreachable", f"the service did not answer ({type(error).__name__})") from None


def _events(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    """Name and data of server-sent events, each of one data line."""
    name = data = ""
    for line in lines:
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            data = value
        elif not line:
            yield name, data


def _read(response: httpx2.Response, kind: type[M]) -> M:
    if response.status_code != 200:
        raise _error(response.status_code, response.content)
    return _understood(response.content, kind)


def _understood(data: str | bytes, kind: type[M]) -> M:
    try:
        return kind.model_validate_json(data)
    except ValidationError:  # of whatever stands before the service; its own message would say values
        raise UnavailableError(200, "no_answer_body", "the answer is not one of this service's") from None


def _error(status: int, body: bytes) -> ServiceError:
    try:
        problem = json.loads(body)
        code, detail, retry_after_s = problem["code"], problem["detail"], problem.get("retry_after_s")
    except (ValueError, KeyError, TypeError):  # of whatever stands before the service
        code, detail, retry_after_s = "no_problem_body", "the answer is no problem+json", None
    kinds: dict[int, type[ServiceError]] = {401: UnauthorizedError, 429: TooManyRequestsError, 504: DeadlineError}
    kind = kinds.get(status, InvalidRequestError if status < 500 else UnavailableError)
    return kind(status, code, detail, retry_after_s)

"""The HTTP API over a `Service`: plain FastAPI, hosted by Ray Serve or by any ASGI server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from functools import cache
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from e2p_ray.batch.write import this_process
from e2p_ray.serve.answers import all_answered, published_answer, written_answer
from e2p_ray.serve.contents import MAX_LISTED, MAX_SEARCH_CHARS, ContentsAnswer, listed
from e2p_ray.serve.crowd import GENERATIONS_PATH, Crowd
from e2p_ray.serve.editors import add_page
from e2p_ray.serve.gate import App, Gate, TokenBucket
from e2p_ray.serve.messages import (
    BatchAnswer,
    BatchRequest,
    GenerationAnswer,
    GenerationRequest,
    ModelsAnswer,
    ScoresAnswer,
    ScoresRequest,
    StateAnswer,
    TableState,
    responses,
)
from e2p_ray.serve.problems import MEDIA_TYPE, ProblemError, deadline_passed, ended
from e2p_ray.serve.ranking import ranked
from e2p_ray.serve.service import Service
from e2p_ray.serve.streaming import begun_stream, until_gone

_CLIENT_LEFT = 499  # as nginx calls it; nobody is there to read it
_PROBLEMS = responses(401, 404, 408, 413, 422, 429, 500, 503, 504)


def make_api(service: Service) -> App:
    """The app of one replica, behind its gate."""
    app = FastAPI(title="e2p_ray", version="1", docs_url=None, redoc_url=None, redirect_slashes=False)
    _add_handlers(app)
    _add_writing(app, service)
    _add_state(app, service)
    add_page(app)
    return Gate(app, service.config.api, Crowd(service).refusal)


def _add_writing(app: FastAPI, service: Service) -> None:
    limits = service.config.api

    @app.post(GENERATIONS_PATH, response_model=GenerationAnswer, responses=_PROBLEMS, summary="Write one text")
    async def generations(request: Request, body: GenerationRequest) -> Any:
        began_s = time.perf_counter()
        asked = service.look_up(body, body, body.task, body.sampling)
        timeout_s = _timeout_s(body.timeout_ms, limits.timeout_ms, limits.max_timeout_ms)
        if body.stream:
            stream = begun_stream(service, asked, began_s, timeout_s, request.receive)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        published = published_answer(asked, began_s)
        if published is not None:  # nothing to wait for, so nobody has to watch whether the client stays
            return _json(published)
        return await _attended(request, written_answer(service, asked, began_s), timeout_s)

    @app.post("/v1/generations:batch", response_model=BatchAnswer, responses=_PROBLEMS, summary="Write many texts")
    async def batch(request: Request, body: BatchRequest) -> Any:
        began_s = time.perf_counter()
        _check_number(len(body.pairs), limits.max_pairs, request)
        timeout_s = _timeout_s(body.timeout_ms, limits.timeout_ms, limits.max_timeout_ms)
        return await _attended(request, all_answered(service, body, began_s), timeout_s)

    @app.post("/v1/scores", response_model=ScoresAnswer, responses=_PROBLEMS, summary="Rank candidates for a user")
    async def scores(request: Request, body: ScoresRequest) -> Any:
        began_s = time.perf_counter()
        _check_number(len(body.candidates), limits.max_pairs, request)
        timeout_s = _timeout_s(body.timeout_ms, limits.timeout_ms, limits.max_timeout_ms)
        return await _attended(request, ranked(service, body, began_s), timeout_s)


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", response_model=ModelsAnswer, responses=responses(401, 429), summary="What is served")
    async def models() -> ModelsAnswer:
        loaded = service.loaded
        return ModelsAnswer(
            projector_id=loaded.projector_id,
            base_model_id=loaded.base_model_id,
            embedding_space=loaded.embedding_space,
            replica=this_process(),
            embedding_dim=loaded.embedding_dim,
            projector_uri=loaded.config.projector.uri,
            tasks=sorted(loaded.config.tasks),
            tables={name: TableState(age_s=round(age_s, 3)) for name, age_s in service.tables.ages_s().items()},
            published_version=service.tables.version,
            swap=service.swap_state,
        )

    @app.get("/v1/contents", response_model=ContentsAnswer, responses=responses(401, 422, 429), summary="Find contents")
    async def contents(
        search: Annotated[str, Query(max_length=MAX_SEARCH_CHARS, examples=["bridge"])] = "",
        limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 20,
    ) -> ContentsAnswer:
        return await asyncio.to_thread(listed, service.tables, search, limit)

    @app.get("/healthz", response_model=StateAnswer, responses=responses(503), summary="Whether this process lives")
    async def healthz() -> StateAnswer:
        if not service.loop.is_alive:
            raise ended()
        return StateAnswer(status="ok")

    @app.get("/readyz", response_model=StateAnswer, responses=responses(503), summary="Whether requests may come")
    async def readyz() -> StateAnswer:
        if not service.tables.are_fresh:
            raise ProblemError(503, "stale_tables", "users or contents could not be refreshed for too long")
        return StateAnswer(status="ready")


def _json(answer: BaseModel) -> Response:
    """An answer as it is: what FastAPI is given as a model it would validate once more."""
    return Response(answer.model_dump_json(), media_type="application/json")


async def _attended(request: Request, work: Coroutine[Any, Any, BaseModel], timeout_s: float) -> Response:
    """The result of some work, as long as its client is there and its time is not over; else it is cancelled."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(until_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return _json(task.result())
        if gone.done():
            return Response(status_code=_CLIENT_LEFT)
        raise deadline_passed()
    finally:
        task.cancel()
        gone.cancel()


def _timeout_s(asked_ms: int | None, default_ms: int, max_ms: int) -> float:
    return min(asked_ms or default_ms, max_ms) / 1000


def _check_number(number: int, limit: int, request: Request) -> None:
    """So many texts in one request: within the limit, and counted for the token's rate."""
    if number > limit:
        raise ProblemError(422, "too_many", f"one request has {limit} at most")
    bucket: TokenBucket = request.state.bucket
    bucket.charge(max(number - 1, 0))


def _add_handlers(app: FastAPI) -> None:
    @app.exception_handler(ProblemError)
    async def problem(request: Request, error: ProblemError) -> Response:
        return _response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        errors = [{"at": _place(found["loc"]), "message": str(found["msg"])} for found in error.errors()]
        detail = "the request does not fit its schema"
        if request.method == "POST" and not _is_json(request):
            detail += "; a body needs the header Content-Type: application/json"
        return _response(ProblemError(422, "invalid_request", detail, errors=errors[:20]))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        known = {404: ("not_found", "no such path"), 405: ("method_not_allowed", "not with this method")}
        code, detail = known.get(error.status_code, ("bad_request", "the request could not be read"))
        return _response(ProblemError(error.status_code, code, detail))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return _response(
            ProblemError(500, "internal", "this is a defect of the service; its log has the kind of error")
        )


def _is_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _response(problem: ProblemError) -> Response:
    return JSONResponse(problem.body(), problem.status, headers=problem.headers(), media_type=MEDIA_TYPE)


def _place(loc: tuple[int | str, ...] | list[int | str]) -> str:
    """Where in a request the trouble is. Names that a client made up are not repeated: they may be anything."""
    return ".".join(str(part) if isinstance(part, int) or part in _fields() else "?" for part in loc)


@cache
def _fields() -> frozenset[str]:
    """Every name that a request may have."""
    names = {"body", "query", "search", "limit"}
    for model in (GenerationRequest, BatchRequest, ScoresRequest):
        schema = model.model_json_schema()
        for part in (schema, *schema.get("$defs", {}).values()):
            names |= part.get("properties", {}).keys()
    return frozenset(names)

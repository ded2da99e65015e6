"""From requests to answers: the published text where it is the current one, else a new one."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from e2p_ray.schema import Generation
from e2p_ray.serve.messages import BatchAnswer, BatchRequest, GenerationAnswer, ProblemBody
from e2p_ray.serve.problems import ProblemError
from e2p_ray.serve.service import Asked, Service, elapsed_ms


def published_answer(asked: Asked, began_s: float) -> GenerationAnswer | None:
    """The published text, None where it is not what would be written now."""
    known = asked.known_text
    return None if known is None else _answer_of(asked, known, "published", began_s)


async def written_answer(service: Service, asked: Asked, began_s: float) -> GenerationAnswer:
    """A text that is written now; a ProblemError is raised."""
    (outcome,) = await service.write([asked.job()])
    if isinstance(outcome, ProblemError):
        raise outcome
    return generated_answer(asked, outcome, began_s)


async def all_answered(service: Service, body: BatchRequest, began_s: float) -> BatchAnswer:
    """A text or a problem for every pair; all of them with one version of the projector."""
    loaded = service.loaded

    def look_up() -> list[Asked | ProblemError]:
        found: list[Asked | ProblemError] = []
        for pair in body.pairs:
            try:
                found.append(service.look_up(pair, pair, body.task, body.sampling, loaded=loaded))
            except ProblemError as problem:
                found.append(problem)
        return found

    all_asked = await asyncio.to_thread(look_up)
    open_ones = [asked for asked in all_asked if isinstance(asked, Asked) and asked.known_text is None]
    written = await service.write([asked.job() for asked in open_ones]) if open_ones else []
    outcomes = dict(zip(open_ones, written, strict=True))
    return BatchAnswer(
        results=[_result(asked, outcomes, began_s) for asked in all_asked],
        projector_id=loaded.projector_id,
        base_model_id=loaded.base_model_id,
        embedding_space=loaded.embedding_space,
        took_ms=elapsed_ms(began_s),
    )


def _result(
    asked: Asked | ProblemError, outcomes: Mapping[Asked, Generation | ProblemError], began_s: float
) -> GenerationAnswer | ProblemBody:
    if isinstance(asked, ProblemError):
        return ProblemBody(**asked.body())
    published = published_answer(asked, began_s)
    if published is not None:
        return published
    outcome = outcomes[asked]
    if isinstance(outcome, ProblemError):
        return ProblemBody(**outcome.body())
    return generated_answer(asked, outcome, began_s)


def generated_answer(asked: Asked, row: Generation, began_s: float) -> GenerationAnswer:
    """A text that was written for this request."""
    return _answer_of(asked, {name: getattr(row, name) for name in row.__slots__}, "generated", began_s)


def _answer_of(asked: Asked, row: Mapping[str, Any], source: str, began_s: float) -> GenerationAnswer:
    """A row of the output table as an answer."""
    wanted = GenerationAnswer.model_fields.keys() & row.keys() - {"user_id"}
    return GenerationAnswer.model_validate(
        {name: row[name] for name in wanted}
        | {"user_id": asked.user_id, "source": source, "consent": asked.consent, "took_ms": elapsed_ms(began_s)}
    )

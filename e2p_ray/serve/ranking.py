"""Candidates ranked for a user by how likely their texts are under the user's soft token."""

from __future__ import annotations

import asyncio
import math

from e2p_ray.schema import ErrorCode, Group, Request, RequestKey, TextScore
from e2p_ray.serve.lookup import User
from e2p_ray.serve.messages import CandidateScore, ScoresAnswer, ScoresRequest
from e2p_ray.serve.problems import ContentProblemError, ProblemError
from e2p_ray.serve.service import Asked, Service, elapsed_ms


async def ranked(service: Service, body: ScoresRequest, began_s: float) -> ScoresAnswer:
    """Scores of every candidate, the best first; `gain` takes away what the text has without a soft token."""
    loaded = service.loaded
    service.loop.require_room_to_score(len(body.candidates))  # before anything is looked up

    def look_up(place: int, person: User) -> Asked:
        try:
            return service.look_up(body, body.candidates[place], body.task, loaded=loaded, person=person)
        except ContentProblemError as error:
            raise ProblemError(error.status, error.code, f"candidate {place}: {error.detail}") from error

    def look_all_up() -> list[Asked]:
        person = service.person_of(body, loaded)  # once: all are compared for one state of the user
        return [look_up(place, person) for place in range(len(body.candidates))]

    all_asked = await asyncio.to_thread(look_all_up)
    groups, texts = list[Group](), dict[RequestKey, str]()
    for place, (asked, candidate) in enumerate(zip(all_asked, body.candidates, strict=True)):
        text = candidate.text or asked.content.title
        if not text.strip():
            raise ProblemError(422, "empty_text", f"candidate {place} has neither a text nor a title")
        requests = [Request(_key(asked, place, "nobody"), None)]
        if asked.request.user_embedding is not None:
            requests.append(Request(_key(asked, place, "user"), asked.request.user_embedding))
        groups.append(Group(asked.content, body.task, tuple(requests)))
        texts |= dict.fromkeys((request.key for request in requests), loaded.as_trained(text, asked.content.language))
    found = await service.score(groups, texts, loaded, all_asked[0].request.key)
    scores = [_scored(asked, place, found) for place, asked in enumerate(all_asked)]
    scores.sort(key=lambda score: (-_merit(score), score.place))
    return ScoresAnswer(
        user_id=body.user_id,
        consent=all_asked[0].consent,
        personalized=all_asked[0].request.user_embedding is not None,
        scores=scores,
        projector_id=loaded.projector_id,
        base_model_id=loaded.base_model_id,
        embedding_space=loaded.embedding_space,
        took_ms=elapsed_ms(began_s),
    )


def _key(asked: Asked, place: int, who: str) -> RequestKey:
    """A key within one call: a content may be there twice, with two texts."""
    return RequestKey(f"{who}-{place}", asked.content.content_id, asked.request.key.task)


def _scored(asked: Asked, place: int, found: dict[RequestKey, TextScore]) -> CandidateScore:
    nobody = found[_key(asked, place, "nobody")]
    own = found.get(_key(asked, place, "user"))
    shown = own or nobody
    failed = shown.error_code or nobody.error_code
    if failed is None and not math.isfinite(shown.logprob + nobody.logprob):
        failed = ErrorCode.NON_FINITE_LOGITS
    gain = own.mean_logprob - nobody.mean_logprob if own is not None and failed is None else None
    return CandidateScore(
        content_id=asked.content.content_id,
        place=place,
        mean_logprob=None if failed else shown.mean_logprob,
        gain=gain,
        num_tokens=shown.num_tokens,
        error_code=None if failed is None else failed.value,
    )


def _merit(score: CandidateScore) -> float:
    if score.gain is not None:
        return score.gain
    return -float("inf") if score.mean_logprob is None else score.mean_logprob

"""Requests and answers of the API, as pydantic models: unknown fields are errors, and no error repeats a value."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from e2p_ray.config import SamplingConfig
from e2p_ray.config.serve import MAX_EVENTS
from e2p_ray.schema import Arm, FinishReason, Reason, Status

MAX_ID_CHARS = 512
_MAX_DIM = 16_384
_MAX_WEIGHT = 1e6


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half a character (a lone surrogate) is no text") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]  # JSON can say what no encoding can
Id = Annotated[Text, Field(min_length=1, max_length=MAX_ID_CHARS)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Consent(StrEnum):
    """What the users table says of personalisation, now."""

    GIVEN = "given"
    REFUSED = "refused"
    UNKNOWN = "unknown"  # no such user, or the table could not be read for too long


class Message(BaseModel):
    """A part of a request."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class InlineContent(Message):
    """A content that need not be in the contents table."""

    title: Text = Field("", max_length=2000)
    body: Text
    language: str = Field(pattern=r"^[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8}){0,3}$", examples=["en", "ja"])


class SamplingOverride(Message):
    """What may differ from the task's sampling; absent: as configured."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1_000_000)
    seed: int | None = Field(None, ge=0, lt=1 << 31)
    max_new_tokens: int | None = Field(None, ge=1, description="at most the task's")

    def on(self, sampling: SamplingConfig) -> SamplingConfig:
        """The task's sampling with these in place; never more tokens than it has."""
        given = self.model_dump(exclude_none=True)
        if "max_new_tokens" in given:
            given["max_new_tokens"] = min(given["max_new_tokens"], sampling.max_new_tokens)
        return sampling.model_copy(update=given)


class Event(Message):
    """Something that a user did lately, as the vector of what it was done to."""

    embedding: tuple[Finite, ...] = Field(
        min_length=1, max_length=_MAX_DIM, repr=False, description="its direction counts; never logged or repeated"
    )
    weight: float = Field(1.0, gt=0, le=_MAX_WEIGHT, allow_inf_nan=False, description="a click is 1, a purchase more")
    age_s: float = Field(0.0, ge=0, allow_inf_nan=False, description="how long ago")


class UserPart(Message):
    """Who it is for: a user of the users table, or a user embedding, or both (then this embedding is used)."""

    user_id: Id | None = None
    embedding: tuple[Finite, ...] | None = Field(
        None, min_length=1, max_length=_MAX_DIM, repr=False, description="a user embedding; never logged or repeated"
    )
    embedding_space: Id | None = Field(None, description="the space of `embedding` and `events`")
    events: tuple[Event, ...] | None = Field(
        None, max_length=MAX_EVENTS, repr=False, description="folded into the user embedding, for this request alone"
    )

    @model_validator(mode="after")
    def _says_who(self) -> Self:
        if self.user_id is None and self.embedding is None:
            raise ValueError("give user_id, or embedding and embedding_space")
        if (self.embedding is None and self.events is None) != (self.embedding_space is None):
            raise ValueError("embedding_space goes with embedding and events, and they with it")
        return self


class ContentPart(Message):
    """What it is about: a content of the contents table, or one given here."""

    content_id: Id | None = None
    content: InlineContent | None = None

    @model_validator(mode="after")
    def _says_what(self) -> Self:
        if self.content_id is None and self.content is None:
            raise ValueError("give content_id, or content")
        return self


class Pair(UserPart, ContentPart):
    """One user and one content."""


class GenerationRequest(Pair):
    """One text."""

    task: Id
    sampling: SamplingOverride | None = None
    stream: bool = Field(False, description="server-sent events: `token`, `restart`, then `done` or `error`")
    timeout_ms: int | None = Field(None, ge=1)

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"user_id": "user-7", "content_id": "bridge", "task": "headline"},
                {
                    "embedding": [0.12, -0.5, 0.33, 0.9],
                    "embedding_space": "mf-2026-11",
                    "content": {"title": "Harbour bridge opens", "body": "It cost 40 million.", "language": "en"},
                    "task": "headline",
                    "stream": True,
                },
                {
                    "user_id": "user-7",
                    "embedding_space": "mf-2026-11",
                    "events": [
                        {"embedding": [0.4, -0.1, 0.7, 0.2], "age_s": 30},
                        {"embedding": [0.3, 0.1, 0.9, 0.0], "age_s": 3600, "weight": 3},
                    ],
                    "content_id": "bridge",
                    "task": "headline",
                },
            ]
        }
    )


class BatchRequest(Message):
    """Many texts of one task, each as if asked for alone; those of one content share its prefix."""

    pairs: tuple[Pair, ...] = Field(min_length=1)
    task: Id
    sampling: SamplingOverride | None = None
    timeout_ms: int | None = Field(None, ge=1)

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "task": "headline",
                    "pairs": [
                        {"user_id": "user-7", "content_id": "bridge"},
                        {"user_id": "user-8", "content_id": "bridge"},
                    ],
                }
            ]
        }
    )


class Candidate(ContentPart):
    """A content to be ranked."""

    text: Text | None = Field(
        None,
        min_length=1,
        max_length=2000,
        description="what is scored, behind the training.target_prefix that the projector learned; absent: the title",
    )


class ScoresRequest(UserPart):
    """Candidates to be ranked for one user."""

    candidates: tuple[Candidate, ...] = Field(min_length=1)
    task: Id
    timeout_ms: int | None = Field(None, ge=1)

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "user_id": "user-7",
                    "task": "headline",
                    "candidates": [{"content_id": "bridge"}, {"content_id": "budget", "text": "Taxes fall in May"}],
                }
            ]
        }
    )


class Ids(BaseModel):
    """What an answer was made with."""

    projector_id: str
    base_model_id: str
    embedding_space: str


class GenerationAnswer(Ids):
    """One text that may be shown. `source` says whether it was published before or written now."""

    user_id: str | None
    content_id: str
    task: str
    text: str
    status: Status
    reason: Reason | None
    personalized: bool
    arm: Arm
    source: Literal["published", "generated"]
    consent: Consent | None = Field(description="null where no user_id was given")
    fingerprint: str
    prompt_id: str
    num_prompt_tokens: int
    num_output_tokens: int
    mean_logprob: float | None
    finish_reason: FinishReason | None
    generated_at: datetime
    took_ms: float


class ProblemBody(BaseModel):
    """application/problem+json: what went wrong, by `code`."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    retry_after_s: int | None = None
    errors: list[dict[str, str]] | None = None


class BatchAnswer(Ids):
    """An answer or a problem for every pair, in their order."""

    results: list[GenerationAnswer | ProblemBody]
    took_ms: float


class CandidateScore(BaseModel):
    """How likely the candidate's text is for the user, in nats a token, and by how much more than for nobody."""

    content_id: str
    place: int = Field(description="in the request, from 0")
    mean_logprob: float | None
    gain: float | None = Field(description="over the same text without a soft token; null for an unpersonalised user")
    num_tokens: int
    error_code: str | None


class ScoresAnswer(Ids):
    """The candidates, the best first: by gain where there is one, else by mean_logprob."""

    user_id: str | None
    consent: Consent | None
    personalized: bool
    scores: list[CandidateScore]
    took_ms: float


class TableState(BaseModel):
    """How old what is known of a table can be."""

    age_s: float


class SwapState(BaseModel):
    """The last attempt to take over another projector."""

    projector_uri: str
    done: bool
    error: str | None


class ModelsAnswer(Ids):
    """What is served."""

    replica: str = Field(description="host and process that answered")
    embedding_dim: int
    projector_uri: str
    tasks: list[str]
    tables: dict[str, TableState]
    published_version: int | None
    swap: SwapState | None


class StateAnswer(BaseModel):
    """A probe's answer."""

    status: str


def responses(*codes: int) -> dict[int | str, dict[str, Any]]:
    """These problems, for OpenAPI."""
    return {code: {"model": ProblemBody, "content": {"application/problem+json": {}}} for code in codes}

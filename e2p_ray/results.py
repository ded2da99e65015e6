"""What becomes of a request: its row of the output, or its dead letter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache, partial

from e2p_ray.config import JobConfig
from e2p_ray.engine.contract import TextEngine
from e2p_ray.fingerprint import TextSettings, content_part, fingerprint, text_settings
from e2p_ray.schema import (
    Arm,
    Completion,
    Content,
    DeadLetter,
    ErrorCode,
    Generation,
    Reason,
    Request,
    Status,
    Verdict,
    one_line,
)

Result = Generation | DeadLetter

UNPERSONALIZED_USER_ID = ""  # stands for all users in the key of a content's unpersonalised text
_MAX_KEPT_PARTS = 256  # hashes of contents, whose requests come one after the other
_MAX_KEPT_SETTINGS = 256  # of tasks and languages, which an inline content may make up

_MESSAGES = {
    ErrorCode.NULL_KEY: "the user id is empty",
    ErrorCode.EMPTY_CONTENT: (
        "no text was accepted, or the content leaves the prompt empty; and it has no title to publish instead"
    ),
    ErrorCode.NO_PROMPT: "the task has no prompt for the content's language; add tasks.<task>.prompts.<language>",
    ErrorCode.PROMPT_TOO_LONG: (
        "the template's own words leave the content no room in the model's window; shorten them or lower "
        "tasks.<task>.sampling.max_new_tokens"
    ),
    ErrorCode.NON_FINITE_LOGITS: "the model gave NaN or Inf; try dtype float32, and check the projector",
    ErrorCode.CANCELLED: "nobody waited for it any more",
    ErrorCode.OUT_OF_MEMORY: (
        "one request alone did not fit beside the model; lower tasks.<task>.max_content_tokens or engine.max_bytes, or "
        "give its worker more memory"
    ),
}


@dataclass(frozen=True, slots=True)
class Written:
    """One text out of the engine and what the checks say of it."""

    completion: Completion
    text: str  # in one line, as it would be published
    verdict: Verdict
    first_reason: Reason | None = None  # why the text before this one was rejected

    @property
    def accepted(self) -> bool:
        """Whether it may be published."""
        return self.completion.error_code is None and self.verdict.accepted

    @property
    def rejected(self) -> bool:
        """Whether the checks refuse it; an error of the engine is neither."""
        return self.completion.error_code is None and not self.verdict.accepted


class Results:
    """Turns what was written for a request into its row of the output, or into its dead letter."""

    def __init__(self, engine: TextEngine, config: JobConfig, run_id: str) -> None:
        self._engine = engine
        self._run_id = run_id
        self._settings_of = lru_cache(_MAX_KEPT_SETTINGS)(partial(_settings, engine, config))
        self._content_part = lru_cache(_MAX_KEPT_PARTS)(content_part)

    def result(
        self, request: Request, content: Content, own: Written | None, shared: Written | None, shard_id: str
    ) -> Result:
        """The row of one request of a shard; a dead letter where there is no text to publish.

        own: the last personalised text, None where none was asked for; shared: the unpersonalised one, likewise.
        """
        if request.key.user_id == UNPERSONALIZED_USER_ID:
            return self._dead_letter(request, ErrorCode.NULL_KEY, shard_id)
        if own is not None and own.completion.error_code is not None:
            return self._dead_letter(request, own.completion.error_code, shard_id)
        if own is not None and own.accepted:
            return self._row(request, content, Status.OK, own.first_reason, Arm.SOFT_TOKEN, own)
        status, reason = _why_not_personalized(request, content, own)
        if shared is not None and shared.accepted:
            return self._row(request, content, status, reason, Arm.NO_SOFT_TOKEN, shared)
        if not content.title.strip():
            return self._dead_letter(request, ErrorCode.EMPTY_CONTENT, shard_id)
        return self._row(request, content, status, reason, Arm.TITLE, None)

    def fingerprint(self, request: Request, content: Content) -> str:
        """What the fingerprint of this request's row is."""
        settings = self._settings_of(request.key.task, content.language)
        return fingerprint(request, self._content_part(content), settings.part)

    def _row(
        self,
        request: Request,
        content: Content,
        status: Status,
        reason: Reason | None,
        arm: Arm,
        source: Written | None,
    ) -> Generation:
        completion = None if source is None else source.completion
        settings = self._settings_of(request.key.task, content.language)
        return Generation(
            *request.key,
            text=one_line(content.title) if source is None else source.text,
            status=status,
            reason=reason,
            personalized=arm is Arm.SOFT_TOKEN,
            arm=arm,
            num_prompt_tokens=0 if completion is None else completion.num_prompt_tokens,
            num_output_tokens=0 if completion is None else completion.num_output_tokens,
            mean_logprob=None if completion is None else _finite(completion.mean_logprob),
            finish_reason=None if completion is None else completion.finish_reason,
            fingerprint=self.fingerprint(request, content),
            projector_id=self._engine.projector_id,
            base_model_id=self._engine.base_model_id,
            prompt_id=settings.prompt_id,
            embedding_space=self._engine.embedding_space,
            run_id=self._run_id,
            generated_at=datetime.now(UTC),
        )

    def _dead_letter(self, request: Request, code: ErrorCode, shard_id: str) -> DeadLetter:
        message = _MESSAGES.get(code, code.value)
        return DeadLetter(*request.key, code, message, shard_id, self._run_id)


def _settings(engine: TextEngine, config: JobConfig, task: str, language: str) -> TextSettings:
    return text_settings(
        config,
        task,
        prompt_id=engine.prompt_id(task, language),
        projector_id=engine.projector_id,
        base_model_id=engine.base_model_id,
    )


def _why_not_personalized(request: Request, content: Content, own: Written | None) -> tuple[Status, Reason | None]:
    if request.reason is Reason.OPTED_OUT:
        return Status.SUPPRESSED, Reason.OPTED_OUT
    if is_blank(content):
        return Status.FALLBACK, Reason.EMPTY_BODY
    if own is not None:
        return Status.FALLBACK, own.verdict.reason
    return Status.FALLBACK, request.reason or Reason.EMBEDDING_NULL


def is_blank(content: Content) -> bool:
    """Whether there is nothing to write about: such a content's title is published as it is."""
    return not content.body.strip()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

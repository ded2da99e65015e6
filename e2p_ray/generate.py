"""From groups of requests to rows that may be published: engine, checks, fallbacks. The one path of batch and serve.

What becomes of a request:

- With a user embedding: the personalised text, if the checks accept it (ok); else one more, sampled, if the checks'
  `retry` is on and accepts that (ok as well, with the first verdict's reason); else a fallback with that reason.
- Without one: the reason says why. Opted out is `suppressed`, anything else `fallback`.
- A fallback is the unpersonalised text of the same engine, one for all users of a content, if the checks accept it;
  else the content's title, which is published as it is. A blank body goes straight to the title.
- An error of the engine in a personalised text is a dead letter; in the unpersonalised one it leads to the title. Where
  the title is needed and blank, a dead letter as well: no text is ever made up here.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Protocol

from e2p_ray.check import check
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
    Group,
    Reason,
    Request,
    RequestKey,
    Status,
    Verdict,
)

UNPERSONALIZED_USER_ID = ""  # stands for all users in the key of a content's unpersonalised text

_MESSAGES = {
    ErrorCode.NULL_KEY: "the user id is empty",
    ErrorCode.EMPTY_CONTENT: "no text was accepted and the content has no title to publish instead",
    ErrorCode.NO_PROMPT: "the task has no prompt for the content's language; add tasks.<task>.prompts.<language>",
    ErrorCode.PROMPT_TOO_LONG: (
        "the prompt leaves no room in the model's window; shorten the template or lower max_content_tokens"
    ),
    ErrorCode.NON_FINITE_LOGITS: "the model gave NaN or Inf; try dtype float32, and check the projector",
    ErrorCode.CANCELLED: "nobody waited for it any more",
    ErrorCode.OUT_OF_MEMORY: "one request alone did not fit; lower max_content_tokens or raise engine.max_bytes",
}
_BLANKS = re.compile("[ \t\r\n\u2028\u2029]+")


def one_line(text: str) -> str:
    """The text as it is published: stripped, and every run of blanks with a line break or tab in it one blank.

    Other blanks stay, so an ideographic space between two parts of a Japanese headline does too.
    """
    return _BLANKS.sub(lambda match: " " if match.group().strip(" ") else match.group(), text).strip()


@dataclass(frozen=True, slots=True)
class _Written:
    """One text out of the engine and what the checks say of it."""

    completion: Completion
    text: str  # in one line, as it would be published
    verdict: Verdict
    first_reason: Reason | None = None  # why the text before this one was rejected

    @property
    def accepted(self) -> bool:
        return self.completion.error_code is None and self.verdict.accepted


class Generator:
    """Writes, checks and labels the texts of groups; keeps nothing between calls but the engine."""

    def __init__(self, engine: TextEngine, config: JobConfig, run_id: str) -> None:
        self._engine = engine
        self._config = config
        self._run_id = run_id

    def generate(self, groups: Sequence[Group], *, shard_id: str = "") -> tuple[list[Generation], list[DeadLetter]]:
        """Exactly one row or dead letter a request, in the order of the requests.

        Within a call a request key occurs once and a content id stands for one content. AssertionError where that does
        not hold, and where the engine drops, repeats or invents a completion.
        """
        _require_sound(groups)
        written = self._write(groups)
        label = _Labels(self._engine, self._config, self._run_id, shard_id, datetime.now(UTC))
        results = [label.result(request, group.content, written) for group in groups for request in group.requests]
        rows = [result for result in results if isinstance(result, Generation)]
        dead_letters = [result for result in results if isinstance(result, DeadLetter)]
        _require_same_keys((request.key for group in groups for request in group.requests), results)
        return rows, dead_letters

    def fingerprint_of(self, request: Request, content: Content) -> str:
        """What the fingerprint of this request's row would be."""
        return _Labels(self._engine, self._config, self._run_id, "", datetime.now(UTC)).fingerprint(request, content)

    def _write(self, groups: Sequence[Group]) -> dict[RequestKey, _Written]:
        """All texts that the groups' requests need, by request key and by the keys of unpersonalised texts."""
        written = self._run(_first_call(groups), attempt=0)
        rejected = {key for key, text in written.items() if key.user_id and _is_rejected(text)}
        if self._config.checks.retry and rejected:
            for key, text in self._run(_only(groups, rejected), attempt=1).items():
                if text.accepted:
                    written[key] = replace(text, first_reason=written[key].verdict.reason)
                    rejected.discard(key)
        missing = {_unpersonalized_key(key) for key in rejected} - written.keys()
        return written | self._run(_unpersonalized_groups(groups, missing), attempt=0)

    def _run(self, groups: list[Group], *, attempt: int) -> dict[RequestKey, _Written]:
        """One call of the engine, checked content by content."""
        if not groups:
            return {}
        completions: dict[RequestKey, Completion] = {}
        for completion in self._engine.generate(groups, attempt=attempt):
            if completion.key in completions:
                raise AssertionError(f"the engine completed {completion.key} twice")
            completions[completion.key] = completion
        _require_same_keys((request.key for group in groups for request in group.requests), completions.values())
        written = {}
        for group in groups:
            limits = self._config.tasks[group.task].limits
            for request in group.requests:
                completion = completions[request.key]
                text = one_line(completion.text)
                verdict = Verdict()
                if completion.error_code is None:
                    verdict = check(text, group.content, completion, limits, self._config.checks)
                written[request.key] = _Written(completion, text, verdict)
        return written


class _Labels:
    """Turns what was written for a request into its row of the output, or into its dead letter."""

    def __init__(self, engine: TextEngine, config: JobConfig, run_id: str, shard_id: str, now: datetime) -> None:
        self._engine = engine
        self._config = config
        self._run_id = run_id
        self._shard_id = shard_id
        self._now = now
        self._settings: dict[tuple[str, str], TextSettings] = {}
        self._content_parts: dict[str, str] = {}

    def result(
        self, request: Request, content: Content, written: Mapping[RequestKey, _Written]
    ) -> Generation | DeadLetter:
        """The row of one request; a dead letter where there is no text to publish."""
        if request.key.user_id == UNPERSONALIZED_USER_ID:
            return self._dead_letter(request, ErrorCode.NULL_KEY)
        own = written.get(request.key)
        if own is not None and own.completion.error_code is not None:
            return self._dead_letter(request, own.completion.error_code)
        if own is not None and own.accepted:
            return self._row(request, content, Status.OK, own.first_reason, Arm.SOFT_TOKEN, own)
        status, reason = _why_not_personalized(request, content, own)
        shared = written.get(_unpersonalized_key(request.key))
        if shared is not None and shared.accepted:
            return self._row(request, content, status, reason, Arm.NO_SOFT_TOKEN, shared)
        if not content.title.strip():
            return self._dead_letter(request, ErrorCode.EMPTY_CONTENT)
        return self._row(request, content, status, reason, Arm.TITLE, None)

    def _row(
        self,
        request: Request,
        content: Content,
        status: Status,
        reason: Reason | None,
        arm: Arm,
        source: _Written | None,
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
            generated_at=self._now,
        )

    def fingerprint(self, request: Request, content: Content) -> str:
        settings = self._settings_of(request.key.task, content.language)
        return fingerprint(request, self._content_part(content), settings.part)

    def _dead_letter(self, request: Request, code: ErrorCode) -> DeadLetter:
        message = _MESSAGES.get(code, code.value)
        return DeadLetter(*request.key, code, message, self._shard_id, self._run_id)

    def _settings_of(self, task: str, language: str) -> TextSettings:
        """Once per task and language."""
        if (task, language) not in self._settings:
            self._settings[task, language] = text_settings(
                self._config,
                task,
                prompt_id=self._engine.prompt_id(task, language),
                projector_id=self._engine.projector_id,
                base_model_id=self._engine.base_model_id,
            )
        return self._settings[task, language]

    def _content_part(self, content: Content) -> str:
        """Once per content."""
        if content.content_id not in self._content_parts:
            self._content_parts[content.content_id] = content_part(content)
        return self._content_parts[content.content_id]


def _why_not_personalized(request: Request, content: Content, own: _Written | None) -> tuple[Status, Reason | None]:
    if request.reason is Reason.OPTED_OUT:
        return Status.SUPPRESSED, Reason.OPTED_OUT
    if _is_blank(content):
        return Status.FALLBACK, Reason.EMPTY_BODY
    if own is not None:
        return Status.FALLBACK, own.verdict.reason
    return Status.FALLBACK, request.reason or Reason.EMBEDDING_NULL


def _is_rejected(text: _Written) -> bool:
    return text.completion.error_code is None and not text.verdict.accepted


def _is_blank(content: Content) -> bool:
    return not content.body.strip()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _unpersonalized_key(key: RequestKey) -> RequestKey:
    return key._replace(user_id=UNPERSONALIZED_USER_ID)


def _first_call(groups: Sequence[Group]) -> list[Group]:
    """What is known to be needed from the start; the unpersonalised text shares the prefix of its content's users."""
    drafts: dict[RequestKey, str | None] = {}  # by the keys that are needed; all users of a content have one draft
    for group in groups:
        for request in group.requests:
            if request.user_embedding is None and request.key.user_id and not _is_blank(group.content):
                key = _unpersonalized_key(request.key)
                drafts[key] = drafts.get(key) or request.draft
    result = []
    for group in groups:
        if _is_blank(group.content):
            continue
        requests = [r for r in group.requests if r.user_embedding is not None and r.key.user_id]
        key = RequestKey(UNPERSONALIZED_USER_ID, group.content.content_id, group.task)
        if key in drafts:
            requests.insert(0, Request(key, None, draft=drafts.pop(key)))
        if requests:
            result.append(replace(group, requests=tuple(requests)))
    return result


def _only(groups: Sequence[Group], keys: Set[RequestKey]) -> list[Group]:
    kept = [replace(group, requests=tuple(r for r in group.requests if r.key in keys)) for group in groups]
    return [group for group in kept if group.requests]


def _unpersonalized_groups(groups: Sequence[Group], keys: Set[RequestKey]) -> list[Group]:
    contents = {RequestKey(UNPERSONALIZED_USER_ID, group.content.content_id, group.task): group for group in groups}
    return [replace(group, requests=(Request(key, None),)) for key, group in contents.items() if key in keys]


def _require_sound(groups: Sequence[Group]) -> None:
    """One content a content id, and requests that belong to their group."""
    contents: dict[str, Content] = {}
    for group in groups:
        content_id = group.content.content_id
        if contents.setdefault(content_id, group.content) != group.content:
            raise AssertionError(f"content {content_id!r} has two versions in one call")
        for request in group.requests:
            if request.key[1:] != (content_id, group.task):
                raise AssertionError(f"{request.key} is in the group of {content_id!r}, {group.task!r}")


class _Keyed(Protocol):
    @property
    def key(self) -> RequestKey: ...


def _require_same_keys(planned: Iterable[RequestKey], results: Iterable[_Keyed]) -> None:
    """Row conservation: key sets, never counts, and no key twice on either side."""
    wanted = Counter(planned)
    found = Counter(result.key for result in results)
    if wanted == found and all(count == 1 for count in wanted.values()):
        return
    repeated = [key for key, count in (wanted + found).items() if wanted[key] > 1 or found[key] > 1]
    problems = {"missing": [*(wanted - found)], "unplanned": [*(found - wanted)], "repeated": repeated}
    raise AssertionError("; ".join(f"{len(keys)} {name}: {keys[:3]}" for name, keys in problems.items() if keys))

"""An engine without a model, for tests of pipelines: its texts are sentences of the content."""

from __future__ import annotations

import copy
import hashlib
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Self

import numpy as np

from e2p_ray.config import TaskConfig
from e2p_ray.engine.contract import EngineStats, Listener
from e2p_ray.schema import Completion, Content, ErrorCode, FinishReason, Group, Request, RequestKey, TextScore

# An English stop needs a blank behind it (3.5, U.S.), a Japanese one does not; a closing bracket stays with it.
_SENTENCE_END = re.compile(
    r"(?<=[。！？])(?![。！？」』）])|(?<=[。！？][」』）])|(?<=[.!?])[ \t]+(?=[A-Z\"“'(\d])|\n+"
)


def split_sentences(body: str) -> list[str]:
    """The sentences of an English or Japanese text, stripped, without empty ones."""
    return [sentence for part in _SENTENCE_END.split(body) if (sentence := part.strip())]


class FakeEngine:
    """The contract of `TextEngine` in numpy: deterministic, no model, no torch.

    The largest component of the user embedding, modulo the number of sentences, chooses a sentence of the body; without
    a user embedding it is the first one. A further attempt takes the next sentence. A token is four bytes of UTF-8.

    For tests of what follows an engine, `texts` overrides the text of a request (one for all attempts, or one an
    attempt) and `errors` makes it fail. A draft is accepted whole or not at all. Where somebody listens, a
    request is written token by token, each in `step_s` seconds.
    """

    def __init__(
        self,
        *,
        tasks: Mapping[str, TaskConfig] | None = None,
        projector_id: str = "fake-projector",
        base_model_id: str = "fake-model",
        embedding_space: str = "fake-space",
        embedding_dim: int = 4,
        texts: Mapping[RequestKey, str | Sequence[str]] | None = None,
        errors: Mapping[RequestKey, ErrorCode] | None = None,
        step_s: float = 0.0,
    ) -> None:
        self.listener: Listener | None = None
        self._step_s = step_s
        self._tasks = dict(tasks or {})
        self._ids = (projector_id, base_model_id, embedding_space)
        self._embedding_dim = embedding_dim
        self._texts = dict(texts or {})
        self._errors = dict(errors or {})
        self._stats = EngineStats()

    @property
    def projector_id(self) -> str:
        return self._ids[0]

    @property
    def base_model_id(self) -> str:
        return self._ids[1]

    @property
    def embedding_space(self) -> str:
        return self._ids[2]

    @property
    def embedding_dim(self) -> int:
        return self._embedding_dim

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def target_prefixes(self) -> Mapping[str, str]:
        """None: nothing was trained."""
        return {}

    def prompt_id(self, task: str, language: str) -> str:
        """As the real engine's, of a projector with the soft token last."""
        if task in self._tasks:
            return self._tasks[task].prompt_id(language, "content_first", 1)
        return hashlib.sha256(f"fake {task}".encode()).hexdigest()[:16]

    def generate(self, groups: Iterable[Group | None]) -> Iterator[Completion]:
        """One completion a request, group by group: nothing is under way when the next group is read."""
        for group in groups:
            if group is None:
                return
            num_prefix = num_tokens(group.content.title + group.content.body)
            completions = [
                self._heard(self._complete(group.content, request, num_prefix, group.attempt))
                for request in group.requests
            ]
            self._count(completions, num_prefix, group.requests)
            yield from completions

    def with_bounds(self, max_rows: int, max_prefill_tokens: int) -> Self:
        """See `ServingEngine.with_bounds`."""
        other = copy.copy(self)
        other.listener = None
        return other

    def with_tasks(self, tasks: Mapping[str, TaskConfig]) -> Self:
        """See `ServingEngine.with_tasks`."""
        other = copy.copy(self)
        other._tasks = dict(tasks)
        return other

    def score(self, groups: Iterable[Group], texts: Mapping[RequestKey, str]) -> Iterator[TextScore]:
        """A nat for every token, and a quarter of one for the tokens of what it would have written itself."""
        for group in groups:
            for request in group.requests:
                text = texts[request.key]
                own = text.strip() == self._write(group.content, request, 0)
                yield TextScore(request.key, -num_tokens(text) * (0.25 if own else 1.0), num_tokens(text))

    def _complete(self, content: Content, request: Request, num_prefix: int, attempt: int) -> Completion:
        num_prompt = num_prefix + (request.user_embedding is not None)
        failed = Completion(request.key, "", FinishReason.ERROR, num_prompt, 0, 0.0)
        if request.key in self._errors:
            return replace(failed, error_code=self._errors[request.key])
        if request.key.task in self._tasks and self._tasks[request.key.task].prompt_for(content.language) is None:
            return replace(failed, error_code=ErrorCode.NO_PROMPT)
        if request.user_embedding is not None:
            assert request.user_embedding.shape == (self._embedding_dim,), "the plan lets no other size pass"
            if not np.isfinite(request.user_embedding).all():
                return replace(failed, error_code=ErrorCode.NON_FINITE_LOGITS)
        text = self._write(content, request, attempt)
        task = self._tasks.get(request.key.task)
        max_chars = None if task is None else task.sampling.max_chars
        cut = max_chars is not None and len(text) > max_chars
        text = text[:max_chars] if cut else text
        finish_reason = FinishReason.MAX_CHARS if cut else FinishReason.END_TOKEN
        return Completion(request.key, text, finish_reason, num_prompt, num_tokens(text), -0.5)

    def _heard(self, completion: Completion) -> Completion:
        """The completion, told to the listener as it grows, or cancelled by it."""
        if self.listener is None or completion.error_code is not None:
            return completion
        for end in range(4, len(completion.text) + 4, 4):
            self.listener.between_steps()
            if completion.key in self.listener.cancelled():
                return replace(completion, text="", finish_reason=FinishReason.ERROR, error_code=ErrorCode.CANCELLED)
            time.sleep(self._step_s)
            if completion.key in self.listener.streamed():
                self.listener.on_text(completion.key, completion.text[:end])
        return completion

    def _write(self, content: Content, request: Request, attempt: int) -> str:
        override = self._texts.get(request.key)
        if isinstance(override, str):
            return override
        if override is not None:
            return override[min(attempt, len(override) - 1)]
        sentences = split_sentences(content.body)
        if not sentences:
            return ""
        chosen = 0 if request.user_embedding is None else int(np.argmax(request.user_embedding))
        return sentences[(chosen + attempt) % len(sentences)]

    def _count(self, completions: list[Completion], num_prefix: int, requests: Sequence[Request]) -> None:
        stats = self._stats
        drafted = [
            (num_tokens(request.draft), completion.text == request.draft)
            for request, completion in zip(requests, completions, strict=True)
            if request.draft is not None and completion.error_code is None
        ]
        num_prompt = sum(completion.num_prompt_tokens for completion in completions)
        num_output = [completion.num_output_tokens for completion in completions]
        self._stats = EngineStats(
            num_prompt_tokens=stats.num_prompt_tokens + num_prompt,
            num_computed_tokens=stats.num_computed_tokens + num_prompt - num_prefix * max(0, len(completions) - 1),
            num_output_tokens=stats.num_output_tokens + sum(num_output),
            num_steps=stats.num_steps + max(num_output, default=0),
            num_prefix_tokens=stats.num_prefix_tokens + (num_prefix if completions else 0),
            num_waves=stats.num_waves + 1,
            num_draft_tokens=stats.num_draft_tokens + sum(number for number, _ in drafted),
            num_accepted_tokens=stats.num_accepted_tokens + sum(number for number, same in drafted if same),
        )


def num_tokens(text: str) -> int:
    """What the fake counts as tokens: UTF-8 bytes by four, rounded up."""
    return -(-len(text.encode("utf-8", "replace")) // 4)

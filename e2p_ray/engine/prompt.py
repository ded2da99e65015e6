"""The prompt layout: texts of a content and a task -> token ids left and right of the soft token."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from e2p_ray.config import PromptTemplate, TaskConfig
from e2p_ray.config.braces import filled
from e2p_ray.engine.manifest import Layout
from e2p_ray.errors import ConfigError, RowError
from e2p_ray.schema import Content, ErrorCode

_MAX_KEPT = 256  # contents' segments: second tries and the texts that users share ask for them again
# Of a text longer than the room only a head is made into tokens. Its end is not that of the whole text, so tokens there
# may differ; how far back is bounded where a tokenizer splits words first, and elsewhere not known to be more than a
# few. So many more are made than are kept.
_MARGIN_TOKENS = 64
_CHARS_PER_TOKEN = 6  # more than most texts have: the head is made once


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a transformers folder; no remote code."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    return tokenizer


class LeftPart(tuple[int, ...]):
    """Token ids whose hash is reckoned once.

    All rows of a content are looked up by one such object, some ten times each: 2.1 us a time for 512 plain ids, 10 ms
    of a run of 512 rows (2026-11-23).
    """

    _hash: int

    def __hash__(self) -> int:
        try:
            return self._hash
        except AttributeError:
            self._hash = super().__hash__()
            return self._hash


@dataclass(frozen=True, slots=True)
class Segments:
    """Token ids around the soft token: [left] SOFT [right]. The left part is the shared prefix."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    truncated: bool  # the content lost its tail
    num_stem: int = 0  # of the left part, what other tasks of the content begin with as well: all but the cue

    @property
    def num_tokens(self) -> int:
        return len(self.left) + len(self.right)


class PromptLayout:
    """Builds the segments of a prompt: head, content, cue before, SOFT, cue after.

    content_first: [head content cue_before] SOFT [cue_after]; soft_first: SOFT [head content cue_before cue_after].
    Segments are tokenised apart, so that a content's ids do not depend on the task or the user.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        layout: Layout,
        tasks: Mapping[str, TaskConfig],
        *,
        num_soft_tokens: int,
        max_positions: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._layout = layout
        self._tasks = tasks
        self._num_soft_tokens = num_soft_tokens
        self._max_positions = max_positions
        self._start = tuple(_start_tokens(tokenizer))
        self._kept = lru_cache(_MAX_KEPT)(self._made)
        for name, task in tasks.items():
            max_new_tokens = task.sampling.max_new_tokens
            if max_new_tokens + num_soft_tokens >= max_positions:
                raise ConfigError(
                    f"tasks.{name}.sampling.max_new_tokens is {max_new_tokens}: with {num_soft_tokens} soft tokens it "
                    f"leaves no room for a prompt in the base model's window of {max_positions} tokens. Lower it"
                )

    def with_tasks(self, tasks: Mapping[str, TaskConfig]) -> PromptLayout:
        """The same layout for other tasks."""
        other = copy.copy(self)
        other._tasks = tasks
        return other

    def template(self, task: str, language: str) -> PromptTemplate:
        """The task's template for a language. Raises ConfigError for an unknown task, RowError without a template."""
        if task not in self._tasks:
            raise ConfigError(f"task {task!r} is not in the configuration; it has {sorted(self._tasks)}")
        config = self._tasks[task]
        found = config.prompt_for(language)
        if found is None:
            raise RowError(
                ErrorCode.NO_PROMPT,
                f"tasks.{task}.prompts has no template for language {language!r} and no 'default'; it has "
                f"{sorted(config.prompts)}. Add one",
            )
        return found

    def prompt_id(self, task: str, language: str) -> str:
        """Stable hash of everything about a prompt but the content and the user, also of there being none."""
        return self._tasks[task].prompt_id(language, self._layout, self._num_soft_tokens)

    def segments(self, content: Content, task: str) -> Segments:
        """The token ids for one content and task; those of the last few contents are kept.

        Raises RowError without a template, without room for it, or where there is nothing to be put into it.
        """
        template = self.template(task, content.language)
        config = self._tasks[task]
        return self._kept(content, template, config.max_content_tokens, config.sampling.max_new_tokens)

    def _made(
        self, content: Content, template: PromptTemplate, max_content_tokens: int, max_new_tokens: int
    ) -> Segments:
        head, before, after = _template_ids(self._tokenizer, template)
        head = [*self._start, *head]
        used = len(head) + len(before) + len(after) + self._num_soft_tokens + max_new_tokens
        room = min(max_content_tokens, self._max_positions - used)
        if room < 1:
            raise RowError(
                ErrorCode.PROMPT_TOO_LONG,
                f"cues and {max_new_tokens} new tokens leave no room for the content in a window of "
                f"{self._max_positions} tokens",
            )
        text = filled(template.content, {"title": content.title, "body": content.body})
        body, truncated = self._fitting(text, room)
        if not (head or body or before or after):
            raise RowError(ErrorCode.EMPTY_CONTENT, f"the prompt of content {content.content_id!r} is empty")
        if self._layout == "soft_first":
            return Segments((), (*head, *body, *before, *after), truncated)
        return Segments(LeftPart((*head, *body, *before)), tuple(after), truncated, len(head) + len(body))

    def _fitting(self, text: str, room: int) -> tuple[list[int], bool]:
        """A text's first tokens, at most `room`, and whether that is not all of them."""
        num_chars = (room + _MARGIN_TOKENS) * _CHARS_PER_TOKEN
        while True:
            ids = text_ids(self._tokenizer, text[:num_chars])
            if num_chars >= len(text) or len(ids) >= room + _MARGIN_TOKENS:
                break
            num_chars *= 2
        return (self._cut(ids, room), True) if len(ids) > room else (ids, False)

    def _cut(self, ids: list[int], room: int) -> list[int]:
        """Keep the head, and do not end within a character of several byte tokens."""
        # All are looked at: a tokenizer may show a whole run of bytes as unknown whose first or last ones are missing.
        for num_tokens in range(room, max(room - 4, 0), -1):
            if not str(self._tokenizer.decode(ids[:num_tokens])).endswith("\ufffd"):
                return ids[:num_tokens]
        return ids[:room]


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Of a text that is data, such as a content or a target: a special token spelled out in it stays plain text."""
    return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))


def num_template_tokens(tokenizer: PreTrainedTokenizerBase, template: PromptTemplate) -> int:
    """Of a prompt, without its content and soft tokens."""
    return len(_start_tokens(tokenizer)) + sum(map(len, _template_ids(tokenizer, template)))


def _template_ids(tokenizer: PreTrainedTokenizerBase, template: PromptTemplate) -> tuple[list[int], ...]:
    """Of head, cue before and cue after. It is our own text: special tokens written in it are meant."""
    texts = map(filled, (template.head, template.cue_before, template.cue_after))
    return tuple(list(tokenizer.encode(text, add_special_tokens=False)) if text else [] for text in texts)


def _start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text, or its begin token when it has one of its own."""
    start = list(tokenizer.encode(""))
    if start and start[-1] == tokenizer.eos_token_id:
        start = start[:-1]
    if start or tokenizer.bos_token_id is None or tokenizer.bos_token_id == tokenizer.eos_token_id:
        return start
    return [tokenizer.bos_token_id]

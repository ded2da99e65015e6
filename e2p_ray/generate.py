"""From groups of requests to rows that may be published: engine, checks, fallbacks. Batch and serve both go through here.

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

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import numpy as np

from e2p_ray.check import check
from e2p_ray.config import JobConfig
from e2p_ray.engine.contract import TextEngine
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
    ErrorCode.PROMPT_TOO_LONG: (
        "the prompt leaves no room in the model's window; shorten the template or lower max_content_tokens"
    ),
    ErrorCode.NON_FINITE_LOGITS: "the model gave NaN or Inf; try dtype float32, and check the projector",
    ErrorCode.OUT_OF_MEMORY: "one request alone did not fit; lower max_content_tokens or raise engine.max_bytes",
}
_BLANKS = re.compile("[ \t\r\n\u2028\u2029]+")


def one_line(text: str) -> str:
    """The text as it is published: stripped, and every run of blanks with a line break or tab in it one blank.

    Other blanks stay, so an ideographic space between two parts of a Japanese headline does too.
    """
    return _BLANKS.sub(lambda match: " " if match.group().strip(" ") else match.group(), text).strip()


def shared_fingerprint(
    config: JobConfig, task: str, *, prompt_id: str, projector_id: str, base_model_id: str
) -> str:
    """Hash of what determines the texts of a task besides request and content; `prompt_id` names the template."""
    parts = [
        config.tasks[task].model_dump(mode="json", exclude={"prompts"}),
        config.checks.model_dump(mode="json"),
        config.base_model.dtype,
        prompt_id,
        projector_id,
        base_model_id,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def fingerprint(request: Request, content: Content, shared: str) -> str:
    """Hash, 32 hex digits, of all that determines one request's text; equal fingerprints need no new text.

    `shared` is `shared_fingerprint` of the request's task and the content's language. The user embedding goes into the
    hash only.
    """
    digest = hashlib.sha256()
    texts = (*request.key, content.title, content.body, content.language, request.reason or "", shared)
    for part in texts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    if request.user_embedding is not None:
        digest.update(np.ascontiguousarray(request.user_embedding, dtype="<f4").tobytes())
    return digest.hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class _Item:
    """One request beside its content."""

    request: Request
    content: Content

    @property
    def key(self) -> RequestKey:
        return self.request.key


@dataclass(slots=True)
class _Outcome:
    """What is known of one request so far."""

    completion: Completion | None = None
    verdict: Verdict = field(default_factory=Verdict)
    retry: Completion | None = None  # set when the retry was accepted


class Generator:
    """Writes, checks and labels the texts of groups; keeps nothing between calls but the engine."""

    def __init__(self, engine: TextEngine, config: JobConfig, run_id: str) -> None:
        self._engine = engine
        self._config = config
        self._run_id = run_id

    def generate(
        self, groups: Sequence[Group], *, shard_id: str = ""
    ) -> tuple[list[Generation], list[DeadLetter]]:
        """One row or one dead letter a request; whatever else comes out of the engine is an AssertionError.

        A content id stands for one content within a call.
        """
        items = [_Item(request, group.content) for group in groups for request in group.requests]
        _require_unique(items)
        call = _Call(self._engine, self._config, self._run_id, shard_id)
        writable = [item for item in items if item.key.user_id != UNPERSONALIZED_USER_ID]
        call.write(writable)
        rows: list[Generation] = []
        dead_letters: list[DeadLetter] = []
        for item in items:
            row = call.row(item)
            if isinstance(row, Generation):
                rows.append(row)
            else:
                dead_letters.append(row)
        _require_conserved(items, rows, dead_letters)
        return rows, dead_letters

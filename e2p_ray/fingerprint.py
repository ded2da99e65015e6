"""What determines a text, as a short hash in three parts, so that a change also says what it was.

A fingerprint is 48 hex digits: the content's part, the user's part, the settings' part, 16 each. Ids and task are in
none of them: only rows of one key are compared. "" is no fingerprint: consent leaves it in rows it suppressed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np

from e2p_ray.config import JobConfig
from e2p_ray.schema import Content, Request

PART_CHARS = 16
FINGERPRINT_CHARS = 3 * PART_CHARS
_PART_BYTES = PART_CHARS // 2


@dataclass(frozen=True, slots=True)
class TextSettings:
    """What determines the texts of one task and language besides content and user."""

    prompt_id: str
    projector_id: str
    base_model_id: str
    part: str  # of the fingerprint, over these and over sampling, limits, checks, dtype and engine


def text_settings(
    config: JobConfig, task: str, *, prompt_id: str, projector_id: str, base_model_id: str
) -> TextSettings:
    """The settings of a task; `prompt_id` names its template in the content's language."""
    parts = [
        config.tasks[task].model_dump(mode="json", exclude={"prompts"}),
        config.checks.model_dump(mode="json"),
        config.base_model.dtype,
        config.engine.kind,
        prompt_id,
        projector_id,
        base_model_id,
    ]
    part = _part(b"settings", json.dumps(parts, sort_keys=True).encode())
    return TextSettings(prompt_id, projector_id, base_model_id, part)


def content_part(content: Content) -> str:
    """Of title, body and language."""
    texts = [text.encode("utf-8", "surrogatepass") for text in (content.title, content.body, content.language)]
    return _part(b"content", b"".join(len(text).to_bytes(8, "little") + text for text in texts))


def embedding_part(user_embedding: bytes | memoryview) -> str:
    """Of a user embedding, (d,) little-endian float32, contiguous. It goes into the hash only."""
    return _part(b"embedding", user_embedding)


def reason_part(reason: str) -> str:
    """Of a user without a user embedding, by the reason; "" when none is known."""
    return _part(b"reason", reason.encode())


def fingerprint(request: Request, content: str, settings: str) -> str:
    """The fingerprint of one request, given the parts of its content and of its settings."""
    if request.user_embedding is None:
        return content + reason_part(request.reason or "") + settings
    return content + embedding_part(np.ascontiguousarray(request.user_embedding, dtype="<f4").data) + settings


def _part(kind: bytes, data: bytes | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=_PART_BYTES, person=kind).hexdigest()

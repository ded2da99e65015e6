"""Who is refused when too many ask, found for as little as can be: what a crowd costs, those pay who were let in."""

from __future__ import annotations

import json

from e2p_ray.serve.messages import MAX_ID_CHARS
from e2p_ray.serve.problems import ProblemError
from e2p_ray.serve.service import Service

GENERATIONS_PATH = "/v1/generations"
_KEY = ("user_id", "content_id", "task")


class Crowd:
    """Before a request for one text is understood: whether it would only be told, later, that too many wait.

    Understanding it takes FastAPI, the user's row and a fingerprint: a third of the 2.1 ms of CPU that a refusal cost.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    def refusal(self, path: str, body: bytes) -> ProblemError | None:
        """429 for a text that would have to be written and may not wait; None for all that has to be looked at."""
        if path != GENERATIONS_PATH:
            return None
        loop = self._service.loop
        return None if loop.may_wait() or self._may_be_published(body) else loop.refuse()

    def _may_be_published(self, body: bytes) -> bool:
        try:
            asked = json.loads(body)
            key = [asked[name] for name in _KEY if isinstance(asked.get(name), str)] if isinstance(asked, dict) else []
            "".join(key).encode()
        except (ValueError, RecursionError):
            return True  # no text either way; what is wrong with it is said elsewhere
        if any(len(part) > MAX_ID_CHARS for part in key):
            return True  # refused elsewhere; here it would be kept
        return len(key) == len(_KEY) and self._service.tables.published(*key) is not None

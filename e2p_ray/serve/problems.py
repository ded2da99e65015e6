"""What can go wrong with a request, as application/problem+json (RFC 9457) with a code.

No problem repeats what was sent: a user embedding could be in it.
"""

from __future__ import annotations

from typing import Any

from e2p_ray.errors import E2PError

MEDIA_TYPE = "application/problem+json"


class ProblemError(E2PError):
    """An answer that is no text: HTTP status, code, what to do about it, and where in the request the trouble is."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        retry_after_s: int | None = None,
        errors: list[dict[str, str]] | None = None,
    ) -> None:
        super().__init__(f"{code}: {detail}")
        self.status, self.code, self.detail = status, code, detail
        self.retry_after_s, self.errors = retry_after_s, errors

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        body: dict[str, Any] = {
            "type": f"urn:e2p_ray:{self.code}",
            "title": self.code.replace("_", " "),
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
        }
        if self.retry_after_s is not None:
            body["retry_after_s"] = self.retry_after_s
        if self.errors is not None:
            body["errors"] = self.errors
        return body

    def headers(self) -> dict[str, str]:
        """What HTTP wants to be said besides."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


class ContentProblemError(ProblemError):
    """The trouble is with a content that was asked for."""


def queue_full(retry_after_s: int) -> ProblemError:
    """More texts wait than may."""
    return ProblemError(
        429, "queue_full", "too many texts wait for the model; try again later", retry_after_s=retry_after_s
    )


def ended() -> ProblemError:
    """The replica ends, or its model's thread has."""
    return ProblemError(503, "shutting_down", "this replica is about to end; ask again", retry_after_s=1)


def deadline_passed() -> ProblemError:
    """The request's time is over; its decoding has been stopped."""
    return ProblemError(504, "deadline_passed", "no text within timeout_ms; its decoding was stopped")

"""The configuration of jobs.serve: that of the batch job, and how it is served."""

from __future__ import annotations

from typing import Self

from pydantic import Field, SecretStr, model_validator

from e2p_ray.config.job import JobConfig
from e2p_ray.config.sections import Section

_MIN_TOKEN_CHARS = 16
MAX_EVENTS = 256  # in one request, whatever is configured


class ApiConfig(Section):
    """What clients may ask for. Rates count per token and replica."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    tokens: tuple[SecretStr, ...] = Field((), description="bearer tokens; best by E2P_API__TOKENS, a JSON list")
    allow_anonymous: bool = Field(False, description="serve without any token: only behind something that checks")
    rate_per_s: float = Field(100.0, gt=0, description="texts of one token a second, over time")
    burst: int = Field(500, ge=1, description="texts of one token at once")
    timeout_ms: int = Field(10_000, ge=1, description="of a request that gives none")
    max_timeout_ms: int = Field(60_000, ge=1)
    max_body_bytes: int = Field(1 << 20, ge=1024)
    max_content_chars: int = Field(100_000, ge=1, description="of an inline content's body")
    max_pairs: int = Field(256, ge=1, description="of one batch or ranking")

    @model_validator(mode="after")
    def _tokens_are_given(self) -> Self:
        if not self.tokens and not self.allow_anonymous:
            raise ValueError("no tokens: set E2P_API__TOKENS, or allow_anonymous where something else checks")
        if any(len(token.get_secret_value()) < _MIN_TOKEN_CHARS for token in self.tokens):
            raise ValueError(f"tokens have {_MIN_TOKEN_CHARS} characters or more")
        if any(not _can_be_sent(token.get_secret_value()) for token in self.tokens):
            raise ValueError("tokens are printable ASCII without blanks at their ends: no header has others")
        return self


def _can_be_sent(token: str) -> bool:
    return token.isascii() and token.isprintable() and token == token.strip()


class ReplicaConfig(Section):
    """The copies of the model; `workers.num_cpus` and `num_gpus` are what each takes, `engine` its bounds."""

    min_replicas: int = Field(1, ge=0, description="0: none while nobody asks; the first request then waits for one")
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: float = Field(16.0, gt=0, description="of one replica; more of them, and another comes")
    look_back_s: float = Field(30.0, gt=0, description="what counts is their mean over this time")
    upscale_delay_s: float = Field(10.0, ge=0)
    downscale_delay_s: float = Field(300.0, ge=0)
    max_waiting: int = Field(
        128,
        ge=1,
        description="texts that wait for one of engine.max_rows places; further ones get 429. A quarter as many as "
        "places: with half as many, ten times too many requests tripled the time of those that were accepted. After a "
        "refusal, for a while, only who may expect a place very soon waits. As many candidates may wait to be scored, "
        "or one ranking; a batch of more pairs waits while nobody else does",
    )
    shard_rows: int = Field(
        32,
        ge=1,
        description="rows of a batch's shard decoded together (jobs.generate --through-serve); an online "
        "request waits for one step of theirs",
    )
    shard_prefill_tokens: int = Field(
        256, ge=1, description="of a batch's contents between two steps; one content always is"
    )
    drain_s: float = Field(30.0, ge=0, description="a replica that is to end finishes its requests for this long")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError("min_replicas is above max_replicas")
        return self


class TablesConfig(Section):
    """The local copies of users, contents and published rows that a replica looks things up in."""

    refresh_s: float = Field(15.0, gt=0, description="pause between two looks for changes")
    max_staleness_s: float = Field(60.0, gt=0, description="older consent counts as unknown: unpersonalised")
    max_bytes: int = Field(
        8 << 30,
        ge=1 << 20,
        description="on the local disk, of one replica; more is refused. A file that is written anew is there twice "
        "while it is copied: twice the largest table has to fit",
    )
    folder: str | None = Field(None, description="where they lie; null: the system's folder for temporary files")

    @model_validator(mode="after")
    def _looks_in_time(self) -> Self:
        if self.refresh_s >= self.max_staleness_s:
            raise ValueError("refresh_s has to be below max_staleness_s: consent would be too old between two looks")
        return self


class ProfileConfig(Section):
    """How recent events that come with a request are folded into a user embedding; serve/profile.py has the formula."""

    half_life_s: float = Field(86_400.0, gt=0, description="an event this old counts half")
    stored_events: float = Field(8.0, gt=0, description="the user embedding counts as much as so many fresh events")
    max_share: float = Field(0.4, ge=0, lt=0.5, description="of all events together, however many; 0: none counts")
    max_events: int = Field(64, ge=1, le=MAX_EVENTS, description="of one user in a request")


class ServeConfig(JobConfig):
    """The job whose texts are served, and how."""

    api: ApiConfig
    replica: ReplicaConfig = ReplicaConfig()
    tables: TablesConfig = TablesConfig()
    profile: ProfileConfig = ProfileConfig()

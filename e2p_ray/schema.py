"""The records that flow through a run and the Arrow schemas of every table that is read or written."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from e2p_ray.errors import ConfigError, InputError

UserEmbedding = npt.NDArray[np.float32]

_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{0,127}")  # no separators, no dots: an id never leaves its folder
_BREAK = re.compile("[\t\r\n\u2028\u2029]")
_BLANKS = re.compile("[ \t\r\n\u2028\u2029]+")


def checked_id(text: str) -> str:
    """The id of a run, plan or shard itself; ConfigError when it could name anything outside its own folder."""
    if not _ID.fullmatch(text):
        raise ConfigError(f"{text!r} is not an id: letters, digits, - and _ only, at most 128")
    return text


class Status(StrEnum):
    """What became of a request that has a text."""

    OK = "ok"  # the personalised text
    FALLBACK = "fallback"  # another text than the personalised one, `reason` says why
    SUPPRESSED = "suppressed"  # personalisation is off for this user: the unpersonalised text


class Arm(StrEnum):
    """Where a published text comes from."""

    SOFT_TOKEN = "soft_token"
    NO_SOFT_TOKEN = "no_soft_token"
    TITLE = "title"


class Reason(StrEnum):
    """Why the published text is not the first personalised one. The same words serve as verdicts of the checks."""

    OPTED_OUT = "opted_out"
    EMBEDDING_NULL = "embedding_null"
    EMBEDDING_WRONG_SIZE = "embedding_wrong_size"
    EMBEDDING_NON_FINITE = "embedding_non_finite"
    EMBEDDING_ZERO = "embedding_zero"
    EMBEDDING_OTHER_SPACE = "embedding_other_space"
    EMPTY_BODY = "empty_body"
    EMPTY_TEXT = "empty_text"
    BROKEN_CHARACTERS = "broken_characters"  # control characters, or bytes that are no text
    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"
    UNFINISHED = "unfinished"
    WRONG_LANGUAGE = "wrong_language"
    REPETITION = "repetition"
    FOREIGN_URL = "foreign_url"
    FOREIGN_EMAIL = "foreign_email"
    FOREIGN_PHONE = "foreign_phone"
    FOREIGN_ADDRESS = "foreign_address"
    FOREIGN_NUMBER = "foreign_number"
    FOREIGN_NAME = "foreign_name"
    DENIED_PHRASE = "denied_phrase"


class ErrorCode(StrEnum):
    """Why a request has no text at all: the code of its dead letter."""

    NULL_KEY = "null_key"
    UNKNOWN_USER = "unknown_user"
    MISSING_CONTENT = "missing_content"
    EMPTY_CONTENT = "empty_content"
    NO_PROMPT = "no_prompt"
    PROMPT_TOO_LONG = "prompt_too_long"
    NON_FINITE_LOGITS = "non_finite_logits"
    OUT_OF_MEMORY = "out_of_memory"
    POISON = "poison"  # every process that wrote it ended or failed
    DEFERRED = "deferred"  # nothing is wrong with it: a limit left it for a later run
    CANCELLED = "cancelled"  # nobody waits for it any more: online only


class FinishReason(StrEnum):
    """Why the token loop stopped for a request."""

    END_TOKEN = "end_token"
    STOP_STRING = "stop_string"
    MAX_TOKENS = "max_tokens"
    MAX_CHARS = "max_chars"
    ERROR = "error"


class RequestKey(NamedTuple):
    """The identity of a request: row conservation compares sets of these."""

    user_id: str
    content_id: str
    task: str


@dataclass(frozen=True, slots=True)
class Content:
    """One item to be written about."""

    content_id: str
    title: str
    body: str
    language: str


def one_line(text: str) -> str:
    """The text as it is published: stripped, and every run of blanks with a line break or tab in it one blank.

    Other blanks stay, so an ideographic space between two parts of a Japanese headline does too.
    """
    if _BREAK.search(text):
        text = _BLANKS.sub(lambda match: " " if match.group().strip(" ") else match.group(), text)
    return text.strip()


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One (user, content, task) to be written; without a user embedding it is written without a soft token."""

    key: RequestKey
    user_embedding: UserEmbedding | None  # (d,)
    reason: Reason | None = None  # why there is no user embedding, or why generation is skipped
    draft: str | None = None  # a guess of the text, to be verified: it saves time and changes nothing

    def __post_init__(self) -> None:
        assert (self.user_embedding is None) or (self.reason is None), "a reason replaces the user embedding"


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The requests of one content and task, capped: they share one prefix."""

    content: Content
    task: str
    requests: tuple[Request, ...]
    attempt: int = 0  # a further one is sampled, with the checks' retry temperature


@dataclass(frozen=True, slots=True)
class Completion:
    """Raw text from the engine for one request."""

    key: RequestKey
    text: str
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_output_tokens: int
    mean_logprob: float  # natural log, of the tokens chosen, under the model before temperature
    error_code: ErrorCode | None = None  # set with FinishReason.ERROR
    truncated: bool = False  # the content was longer than its room and lost its tail


@dataclass(frozen=True, slots=True)
class TextScore:
    """How likely a given text is for one request."""

    key: RequestKey
    logprob: float  # natural log, summed over its tokens and the end token, under the model before temperature
    num_tokens: int
    error_code: ErrorCode | None = None

    @property
    def mean_logprob(self) -> float:
        """Per token, as a completion's."""
        return self.logprob / max(self.num_tokens, 1)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the checks say of one text."""

    reason: Reason | None = None
    detail: str = ""  # what was found, for people; never from the user

    @property
    def accepted(self) -> bool:
        return self.reason is None


@dataclass(frozen=True, slots=True)
class Generation:
    """One row of the output table."""

    user_id: str
    content_id: str
    task: str
    text: str
    status: Status
    reason: Reason | None
    personalized: bool
    arm: Arm
    num_prompt_tokens: int
    num_output_tokens: int
    mean_logprob: float | None
    finish_reason: FinishReason | None
    fingerprint: str
    projector_id: str
    base_model_id: str
    prompt_id: str
    embedding_space: str
    run_id: str
    generated_at: datetime

    @property
    def key(self) -> RequestKey:
        return RequestKey(self.user_id, self.content_id, self.task)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A request that has no text, and why."""

    user_id: str
    content_id: str
    task: str
    error_code: ErrorCode
    message: str
    shard_id: str
    run_id: str

    @property
    def key(self) -> RequestKey:
        return RequestKey(self.user_id, self.content_id, self.task)


_TIMESTAMP = pa.timestamp("us", tz="UTC")

GENERATIONS = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("content_id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("personalized", pa.bool_(), nullable=False),
        pa.field("arm", pa.string(), nullable=False),
        pa.field("num_prompt_tokens", pa.int32(), nullable=False),
        pa.field("num_output_tokens", pa.int32(), nullable=False),
        pa.field("mean_logprob", pa.float32()),
        pa.field("finish_reason", pa.string()),
        pa.field("fingerprint", pa.string(), nullable=False),
        pa.field("projector_id", pa.string(), nullable=False),
        pa.field("base_model_id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("embedding_space", pa.string(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("generated_at", _TIMESTAMP, nullable=False),
    ]
)

DEAD_LETTERS = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("content_id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("error_code", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("shard_id", pa.string(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
    ]
)


def planned_schema(embedding_dim: int) -> pa.Schema:
    """The rows of a shard file: one row a request, sorted by content, task and user.

    `user_embedding` is null where `reason` says why; `reason` is a `Reason` or null; `draft` is a text that an earlier
    run wrote, or null.
    """
    return pa.schema(
        [
            pa.field("user_id", pa.string(), nullable=False),
            pa.field("content_id", pa.string(), nullable=False),
            pa.field("task", pa.string(), nullable=False),
            pa.field("group", pa.int32(), nullable=False),  # numbers the groups within the shard
            pa.field("title", pa.string(), nullable=False),
            pa.field("body", pa.string(), nullable=False),
            pa.field("language", pa.string(), nullable=False),
            pa.field("user_embedding", pa.list_(pa.float32(), embedding_dim)),
            pa.field("reason", pa.string()),
            pa.field("draft", pa.string()),
        ]
    )


class _Column(NamedTuple):
    name: str
    kind: str  # string | bool | int | float | timestamp | embedding
    required: bool = True


INPUT_TABLES: dict[str, tuple[_Column, ...]] = {
    "users": (
        _Column("user_id", "string"),
        _Column("embedding", "embedding"),
        _Column("embedding_space", "string"),
        _Column("personalize", "bool"),
        _Column("updated_at", "timestamp"),
        _Column("locale", "string", required=False),
        _Column("profile_text", "string", required=False),
    ),
    "contents": (
        _Column("content_id", "string"),
        _Column("title", "string"),
        _Column("body", "string"),
        _Column("language", "string"),
        _Column("updated_at", "timestamp"),
        _Column("embedding", "embedding", required=False),
    ),
    "candidates": (
        _Column("user_id", "string"),
        _Column("content_id", "string"),
        _Column("rank", "int"),
        _Column("score", "float"),
        _Column("source", "string"),
    ),
    "targets": (
        _Column("user_id", "string"),
        _Column("content_id", "string"),
        _Column("text", "string"),
        _Column("weight", "float"),
        _Column("task", "string", required=False),
    ),
}


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_fixed_size_list(kind) or types.is_list(kind) or types.is_large_list(kind))


def _fits(kind: str, actual: pa.DataType) -> bool:
    if pa.types.is_dictionary(actual):
        return _fits(kind, actual.value_type)
    types = pa.types
    fits = {
        "string": types.is_string(actual) or types.is_large_string(actual) or types.is_string_view(actual),
        "bool": types.is_boolean(actual),
        "int": types.is_integer(actual),
        "float": types.is_floating(actual) or types.is_integer(actual),
        "timestamp": types.is_timestamp(actual) or types.is_date(actual),
        "embedding": _is_list(actual) and types.is_floating(actual.value_type),
    }
    return bool(fits[kind])


_REMEDY = {
    "string": "Write it as Arrow/Parquet string",
    "bool": "Write it as boolean (null means no)",
    "int": "Write it as an integer",
    "float": "Write it as a number",
    "timestamp": "Write it as a timestamp in UTC",
    "embedding": "Write it as a list or fixed-size list of float16 or float32",
}


def validate_schema(table: str, schema: pa.Schema, uri: str) -> None:
    """Raise InputError where a file's Arrow schema is not that of the named input table."""
    for column in INPUT_TABLES[table]:
        if column.name not in schema.names:
            if column.required:
                raise InputError(
                    f"the {table} table needs this column; the file has {schema.names}",
                    uri=uri,
                    column=column.name,
                    remedy=f"Add it. {_REMEDY[column.kind]}.",
                )
            continue
        actual = schema.field(column.name).type
        if not _fits(column.kind, actual):
            raise InputError(
                f"expected {column.kind}, found {actual}",
                uri=uri,
                column=column.name,
                remedy=_REMEDY[column.kind] + ".",
            )


def to_table(rows: Iterable[Generation] | Iterable[DeadLetter], schema: pa.Schema) -> pa.Table:
    """Rows as a table of exactly this schema; an empty list gives an empty table, never null-typed columns."""
    listed = list(rows)
    columns = {}
    for field in schema:
        values = [getattr(row, field.name) for row in listed]
        if pa.types.is_string(field.type):
            values = [None if value is None else str(value) for value in values]
        columns[field.name] = pa.array(values, type=field.type)
    return pa.table(columns, schema=schema)

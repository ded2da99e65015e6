"""The exception tree.

E2PError
├── RowError                 one request cannot be written: it becomes a dead letter with the error's code
├── ShardError               one shard cannot be read, generated or committed: retried, capped
├── StorageError             a place could not be read or written after the retries
│   ├── ObjectNotFoundError
│   ├── ObjectExistsError    put-if-absent found the object there
│   └── AccessDeniedError
└── RunError                 the run has to stop; every one says what to do about it
    ├── ConfigError          the configuration is wrong (exit code 2)
    ├── InputError           a table breaks its schema: file, column, row (or line), remedy (exit code 3)
    ├── IncompatibleError    projector, base model, layout or embedding space do not belong together (exit code 3)
    ├── UnsupportedModelError  the engine does not fit this architecture (exit code 3)
    ├── GateError            a run is complete but must not be published (exit code 4)
    ├── ConservationError    planned request keys and results differ (exit code 4)
    ├── PublishConflictError another publisher was first (exit code 4)
    └── IncompleteRunError   shards are left after the capped attempts; run again to resume (exit code 5)

Messages never hold user embeddings, secrets or texts of users.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar


class E2PError(Exception):
    """Root of all errors that this package raises on purpose."""

    exit_code: ClassVar[int] = 1


class RowError(E2PError):
    """One request cannot be written; `code` is what its dead letter says."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str]]:
        return type(self), (self.code, str(self))


class ShardError(E2PError):
    """One shard failed as a whole."""


class StorageError(E2PError):
    """A place could not be read or written after the retries."""

    exit_code = 5


class ObjectNotFoundError(StorageError):
    """There is no object at this URI."""


class ObjectExistsError(StorageError):
    """Put-if-absent found the object there already."""


class AccessDeniedError(StorageError):
    """The credentials do not allow this call."""


class RunError(E2PError):
    """The run has to stop."""


class ConfigError(RunError):
    """The configuration is wrong."""

    exit_code = 2


class InputError(RunError):
    """A table breaks its schema. Its rows count from 0, as in every reader of Parquet; a text's lines from 1."""

    exit_code = 3

    def __init__(
        self,
        problem: str,
        *,
        uri: str,
        remedy: str,
        column: str | None = None,
        row: int | None = None,
        line: int | None = None,
    ) -> None:
        place = uri
        if column is not None:
            place += f", column {column!r}"
        if row is not None:
            place += f", row {row} (counted from 0)"
        if line is not None:
            place += f", line {line}"
        super().__init__(f"{place}: {problem}. {remedy}")
        self.problem, self.uri, self.remedy = problem, uri, remedy
        self.column, self.row, self.line = column, row, line

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross processes, and the default would call the constructor with the finished message alone.
        rebuild = partial(
            type(self),
            self.problem,
            uri=self.uri,
            remedy=self.remedy,
            column=self.column,
            row=self.row,
            line=self.line,
        )
        return rebuild, ()


class IncompatibleError(RunError):
    """Artifacts or tables that do not belong together."""

    exit_code = 3


class UnsupportedModelError(RunError):
    """The engine does not fit this base model's architecture."""

    exit_code = 3


class GateError(RunError):
    """The run is complete but must not be published."""

    exit_code = 4


class ConservationError(RunError):
    """The planned request keys and the results differ."""

    exit_code = 4


class PublishConflictError(RunError):
    """Another publisher committed to the table first."""

    exit_code = 4


class IncompleteRunError(RunError):
    """Shards are left after the capped attempts."""

    exit_code = 5

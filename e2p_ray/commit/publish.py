"""The one step that makes a run visible: a single Delta Lake commit of files that are already there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from deltalake import CommitProperties, DeltaTable, Schema
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, create_table_with_add_actions

from e2p_ray.commit.consent import suppress, without_consent
from e2p_ray.commit.data_files import add_actions
from e2p_ray.commit.published import open_table, same_rows_since, shown_by
from e2p_ray.commit.run import Run
from e2p_ray.commit.spool import HashSpool
from e2p_ray.commit.verify import DataFile, RunSummary, check_gates, verify
from e2p_ray.config import GatesConfig
from e2p_ray.errors import PublishConflictError
from e2p_ray.schema import GENERATIONS
from e2p_ray.storage import PassingError, Storage
from e2p_ray.storage.delta import said


@dataclass(frozen=True)
class PublishedVersion:
    """A run as readers see it."""

    version: int
    num_rows: int
    num_files: int
    already_published: bool
    num_files_suppressed: int = field(default=0, compare=False)  # files that consent changed
    num_untitled: int = field(default=0, compare=False)  # rows left out: their users opted out, there is no title


def publish(storage: Storage, run: Run, gates: GatesConfig, users_uri: str) -> PublishedVersion:
    """Verify a run, check its gates and its users' consent as it is now, and make it what readers see.

    The old version stays as it was until the commit, and readable by number after it. Publishing again what is there
    changes nothing. Raises IncompleteRunError, ConservationError, GateError, or PublishConflictError when the table
    changed since this call began or, other than by upkeep, since the run did.
    """
    base = open_table(storage, run.table_uri)
    _refuse_other_base(base, run)
    with HashSpool() as users:
        summary = verify(storage, run, users=users)
        check_gates(summary, gates)
        refused = without_consent(storage, users, users_uri)
    suppressed = suppress(storage, run, summary.files, refused)
    num_suppressed = sum(now != before for now, before in zip(suppressed, summary.files, strict=True))
    files = [file for file in suppressed if file.num_rows]
    digest = digest_of(files)
    published = _published(base, run, files, digest)
    published = published or _commit(storage, run, base, files, _metadata(run, summary, files, num_suppressed))
    return replace(published, num_untitled=summary.num_rows - published.num_rows)


def _refuse_other_base(table: DeltaTable | None, run: Run) -> None:
    """What was published since a run began is not undone, and rows that were deleted since do not come back."""
    if run.base_version is None and not run.is_first:
        return
    shown = shown_by(table) if table else None
    if shown is not None and shown.run_id == run.run_id:
        return
    if run.base_version is None:
        if table is None:
            return
        problem = f"{run.table_uri} was published first since run {run.run_id} began"
    else:
        if table is not None and same_rows_since(table, run.base_version):
            return
        problem = f"{run.table_uri} was changed since version {run.base_version}, from which run {run.run_id} began"
    remedy = "Run jobs.generate again: it starts from the table as it is"
    raise PublishConflictError(f"{problem}. {remedy}. A run that was published before comes back with jobs.rollback")


def _metadata(run: Run, summary: RunSummary, files: list[DataFile], num_suppressed: int) -> dict[str, str]:
    """What a version says of itself in the table's history."""
    metadata = {
        "run_id": run.run_id,
        "source_id": run.source_id,
        "projector_id": run.projector_id,
        "base_model_id": run.base_model_id,
        "embedding_space": run.embedding_space,
        "num_rows": sum(file.num_rows for file in files),
        "num_deferred": summary.num_deferred,
        "num_files_suppressed": num_suppressed,
        "files_digest": digest_of(files),
    }
    return {name: str(value) for name, value in metadata.items()}


def _published(table: DeltaTable | None, run: Run, files: list[DataFile], digest: str) -> PublishedVersion | None:
    """The version that shows exactly these files already, if it does."""
    current = shown_by(table) if table else None
    if table is None or current is None or current.run_id != run.run_id:
        return None
    if current.files_digest == digest:
        num_rows = sum(file.num_rows for file in files)
        return PublishedVersion(table.version(), num_rows, len(files), True, current.num_files_suppressed)
    if current.rows_deleted:
        problem = f"rows were deleted from {run.table_uri} since run {run.run_id} was published, and would come back"
        raise PublishConflictError(f"{problem}. Plan and generate a new run")
    return None


def _commit(
    storage: Storage, run: Run, base: DeltaTable | None, files: list[DataFile], metadata: dict[str, str]
) -> PublishedVersion:
    actions = add_actions(storage, run.table_uri, base, files)
    once = partial(_try_commit, storage, run, base, files, actions, metadata)
    return storage.patiently(once, "publish to", run.table_uri)


def _try_commit(
    storage: Storage,
    run: Run,
    base: DeltaTable | None,
    files: list[DataFile],
    actions: list[AddAction],
    metadata: dict[str, str],
) -> PublishedVersion:
    # Without retries the library cannot put our files beside those of a publisher that came first.
    properties = CommitProperties(custom_metadata=metadata, max_commit_retries=0)
    schema = Schema.from_arrow(GENERATIONS)
    try:
        if base is None:
            options = storage.delta_options(run.table_uri, with_retries=True)
            create_table_with_add_actions(
                run.table_uri, schema, actions, storage_options=options, commit_properties=properties
            )
        else:
            base.create_write_transaction([*actions], "overwrite", schema, commit_properties=properties)
    except (DeltaError, OSError) as error:
        return _after_failure(storage, run, base, files, error)
    num_rows = sum(file.num_rows for file in files)
    version, num_suppressed = base.version() + 1 if base else 0, int(metadata["num_files_suppressed"])
    return PublishedVersion(version, num_rows, len(files), False, num_suppressed)


def _after_failure(
    storage: Storage,
    run: Run,
    base: DeltaTable | None,
    files: list[DataFile],
    error: Exception,
) -> PublishedVersion:
    """Find out who was first: another publisher of this run, of another run, or ourselves before an answer was lost."""
    now = open_table(storage, run.table_uri)
    if published := _published(now, run, files, digest_of(files)):
        return published
    changed = now is not None and (base is None or now.version() > base.version())
    if changed or isinstance(error, CommitFailedError):
        _refuse_other_base(now, run)
        problem = f"{run.table_uri} was changed while run {run.run_id} was being published"
        raise PublishConflictError(f"{problem}. Look at its history, then publish again if it should follow") from error
    raise PassingError(said(error)) from error


def digest_of(files: Iterable[DataFile]) -> str:
    """Names a set of data files; a version says by it what it was made of."""
    lines = sorted(f"{file.path} {file.size_bytes}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:32]

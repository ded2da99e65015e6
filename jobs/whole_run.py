"""One go from tables to a published version: what the main job and a backfill do."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from e2p_ray.batch import BatchSummary, EngineFactory, run_batch
from e2p_ray.commit import (
    PublishedTable,
    PublishedVersion,
    Run,
    as_of_last_change,
    load_run,
    pending_shards,
    publish,
    read_published,
    verify,
)
from e2p_ray.commit.audit import published_ids, record
from e2p_ray.commit.published import as_if_published
from e2p_ray.commit.verify import check_gates
from e2p_ray.config import JobConfig
from e2p_ray.downstream.report import Report, build_report, read_report, with_consent, write_report
from e2p_ray.errors import ConfigError, GateError
from e2p_ray.fork_server import NO_FORKS
from e2p_ray.plan import Plan
from e2p_ray.update import Changes, Limits, Priority, defer_shards, make_update
from jobs.progress import ProgressLine
from jobs.steps import Setup, full_run, opened_run, planned, say, set_up, source_id_of, update_job, update_runs


@dataclass(frozen=True)
class Work:
    """A run to be done: of a whole plan, or of an update with its changes."""

    run: Run
    plan: Plan
    changes: Changes | None = None


def generate_run(
    config: JobConfig,
    *,
    publish_it: bool = True,
    engine_factory: EngineFactory | None = None,
    full: bool = False,
    limits: Limits | None = None,
    action: str = "generate",
    through_serve: str | None = None,
    forks: Mapping[str, str] = NO_FORKS,
) -> Report:
    """Plan, generate what the published table lacks, report and publish; with `full`, everything.

    The report is written before the gates, so that it can say why one closed. Where the table shows all of it already,
    nothing is done and the report is that of the run it shows. `action` is what the audit log calls it; `through_serve`
    and `forks` are as in `run_batch`.
    """
    limits = limits or Limits()
    if full and limits:
        raise ConfigError("--full generates everything: it takes no --max-requests and no --max-seconds")
    setup = set_up(config)
    plan = planned(config, setup)
    table = read_published(setup.storage, config.output.table_uri)
    if not full and table and table.shows_all_of(source_id_of(config, setup, plan)):
        return _nothing_to_do(config, setup, plan, table)
    work = _work(config, setup, plan, table, full, limits)
    if work is None:
        assert table is not None, "without a table there is something to do"
        return _nothing_to_do(config, setup, plan, table)
    max_dead_letters = dead_letters_left(config, plan)
    batch = run_batch if through_serve is None else partial(run_batch, through_serve=through_serve)
    batch = partial(batch, forks=forks) if forks else batch
    # An update's share counts the rows that it carries over, too.
    batch = partial(
        batch, engine_factory=engine_factory, max_dead_letters=max_dead_letters if work.changes is None else None
    )
    return _done(config, setup, work, action if publish_it else None, batch, limits)


def _work(
    config: JobConfig, setup: Setup, plan: Plan, table: PublishedTable | None, full: bool, limits: Limits
) -> Work | None:
    """What is to be done; None when the published table needs no change. GateError before an update is written."""
    table = table and as_of_last_change(setup.storage, table)
    if full or (table is None and not limits):
        return Work(full_run(config, setup, plan, again=table), plan)
    run, base = _run_and_base(config, setup, plan, table, limits)
    # The update's requests are those of the plan, so that the plan's dead letters weigh in it as much.
    update = make_update(
        update_job(config, setup, plan, base), run, limits, say, before_writing=lambda: dead_letters_left(config, plan)
    )
    if update is None:
        return None
    return Work(replace(run, shard_ids=update.shard_ids), update.plan, update.changes)


def _run_and_base(
    config: JobConfig, setup: Setup, plan: Plan, table: PublishedTable | None, limits: Limits
) -> tuple[Run, PublishedTable | None]:
    """The run of an update, and what it is an update of: the table, or a limited run that a gate keeps out of it.

    The table is as it was when that run began, so a run from there would be the same one and be refused again.
    """
    storage, runs = setup.storage, update_runs(config, setup, plan, table, limits)
    run, refused = next(runs), None
    while limits and storage.exists(run.record_uri):
        following = next(runs)
        if not (storage.exists(following.record_uri) or _can_go_on(config, setup, run)):
            break
        run, refused = following, run
    if refused is None:
        return run, table
    say(f"run {refused.run_id} is complete, but a gate keeps it out of the table: run {run.run_id} goes on from it")
    return run, as_if_published(storage, load_run(storage, config.output.uri, refused.run_id), table)


def _can_go_on(config: JobConfig, setup: Setup, run: Run) -> bool:
    """Whether a recorded run is complete and refused by a gate that what its limit left could open."""
    run = load_run(setup.storage, config.output.uri, run.run_id)
    if pending_shards(setup.storage, run):
        return False
    summary = verify(setup.storage, run)
    # Further texts make no dead letter less: their share is of all that is planned, now as in the end.
    if not summary.num_deferred or summary.dead_letter_share > config.gates.max_dead_letter_share:
        return False
    try:
        check_gates(summary, config.gates)
    except GateError:
        return True
    return False


def _done(
    config: JobConfig,
    setup: Setup,
    work: Work,
    action: str | None,
    batch: Callable[..., BatchSummary],
    limits: Limits,
) -> Report:
    """Generate, report and, with the name of the action for the audit log, publish."""
    run, storage = opened_run(config, setup, work.run), setup.storage
    num_requests = work.changes.num_to_write if work.changes else work.plan.counts.num_requests
    say(f"run {run.run_id}: {num_requests:,} requests in {len(work.plan.shards):,} shards")
    with ProgressLine() as progress:
        summary = batch(config, storage, run, on_progress=progress, max_seconds=limits.max_seconds)
    _defer(setup, run, summary)
    changes = work.changes or Changes()
    report = build_report(
        storage, run, work.plan, config.resolved(), causes=changes.causes, num_removed=changes.num_removed
    )
    report = with_consent(storage, report, config.inputs.users_uri)
    write_report(storage, run, report)
    if action is not None:
        version = _published(config, setup, run, limits)
        # First of all: should what follows fail, the same command finds nothing to do, or (`--full`) begins anew.
        record(storage, config.output.uri, action, published_ids(run, version))
        report = report.with_version(version)
        if version.num_files_suppressed:  # some of these users may have opted out since the report was built
            report = with_consent(storage, report, config.inputs.users_uri)
        write_report(storage, run, report)
    return report


def dead_letters_left(config: JobConfig, plan: Plan) -> int:
    """How many more dead letters than its plan's a run may have for the gate; GateError when those are too many."""
    planned = plan.counts.dead_letters
    num_planned, limit = sum(planned.values()), config.gates.max_dead_letter_share
    num_requests = plan.counts.num_requests + num_planned
    allowed = round(limit * num_requests)
    if allowed / max(1, num_requests) > limit:  # as the gate compares: a product rounded down can be one too few
        allowed -= 1
    if num_planned > allowed:
        codes = ", ".join(f"{code} {number:,}" for code, number in sorted(planned.items(), key=lambda item: -item[1]))
        raise GateError(
            f"{num_planned:,} of {num_requests:,} requests cannot be written, whatever is generated ({codes}); "
            f"gates.max_dead_letter_share {limit:g} forbids to publish with more than {allowed:,}, so nothing is "
            f"generated. Look at {plan.uri}/dead_letters; mend the input tables, or raise the gate"
        )
    return allowed - num_planned


def _defer(setup: Setup, run: Run, summary: BatchSummary) -> None:
    """The shards that the time did not suffice for keep their old rows."""
    if not summary.left:
        return
    for failure in summary.failures:
        if failure.shard_id in summary.left:
            say(f"shard {failure.shard_id} failed and is left as well: {failure.error_type}: {failure.message}")
    num_requests = defer_shards(setup.storage, run, summary.left)
    say(f"the time is over: {num_requests:,} requests in {len(summary.left):,} shards are left for a later run")


def _published(config: JobConfig, setup: Setup, run: Run, limits: Limits) -> PublishedVersion:
    try:
        return publish(setup.storage, run, config.gates, config.inputs.users_uri)
    except GateError as error:
        said = f"{error}. The report: {run.uri}/report.html"
        if limits and _can_go_on(config, setup, run):
            said += ". Run the same command again: it goes on with what the limit left"
        raise GateError(said) from error


def _nothing_to_do(config: JobConfig, setup: Setup, plan: Plan, table: PublishedTable) -> Report:
    """The report of the run that the table shows; an empty one where that run's folder is gone."""
    say(f"nothing to do: version {table.version} of {table.uri} shows this already")
    assert table.shown is not None, "a table that needs no change was published by us"
    try:
        run = load_run(setup.storage, config.output.uri, table.shown.run_id)
    except ConfigError:
        run_id, gone = table.shown.run_id, full_run(config, setup, plan)
        run = replace(gone, run_id=run_id, uri=f"{config.output.uri}/runs/{run_id}", shard_ids=())
    report = read_report(setup.storage, run)
    if report is None:
        report = build_report(setup.storage, run, plan, config.resolved())
    version = PublishedVersion(table.version, table.num_rows, len(table.file_uris), already_published=True)
    report = report.with_version(version)
    write_report(setup.storage, run, report)
    return report


def limits_of(options: argparse.Namespace) -> Limits:
    """The limits that people can give to a job, see `jobs.limits`."""
    priority = Priority.parse(options.priority) if options.priority is not None else None
    return Limits(options.max_requests, options.max_seconds, priority)

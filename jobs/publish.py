"""Publish a complete run."""

from __future__ import annotations

import argparse
import json

from e2p_ray.commit import Run, load_run, pending_shards, publish
from e2p_ray.commit.audit import published_ids, record
from e2p_ray.config import JobConfig
from e2p_ray.downstream.report import read_report, with_consent, write_report
from e2p_ray.errors import ConfigError, IncompleteRunError
from e2p_ray.storage import Storage
from jobs.cli import Job, main
from jobs.tables import print_pairs


def publish_run(config: JobConfig, options: argparse.Namespace) -> None:
    """Verify, check gates and consent, and make the run what readers see."""
    storage = Storage(config.storage)
    is_named = options.run is not None  # by an empty word, too: a variable that is not set names no run
    run = load_run(storage, config.output.uri, options.run) if is_named else latest_complete(storage, config)
    version = publish(storage, run, config.gates, config.inputs.users_uri)
    record(storage, config.output.uri, "publish", published_ids(run, version))
    if (report := read_report(storage, run)) is not None:
        write_report(storage, run, with_consent(storage, report.with_version(version), config.inputs.users_uri))
    pairs = {
        "run": run.run_id,
        "table": run.table_uri,
        "version": f"{version.version}" + (" (it was published already)" if version.already_published else ""),
        "rows": f"{version.num_rows:,} in {version.num_files:,} files",
    }
    if version.num_untitled:
        pairs["left out"] = f"{version.num_untitled:,} rows of users who opted out, without a title to show instead"
    print_pairs(pairs)


def latest_complete(storage: Storage, config: JobConfig) -> Run:
    """The run whose last shard was finished last, among those that have all their markers."""
    runs_uri = f"{config.output.uri}/runs"
    run_ids = [info.uri.split("/")[-2] for info in storage.list_objects(runs_uri) if info.uri.endswith("/run.json")]
    if not run_ids:
        raise ConfigError(f"{runs_uri}: there is no run. Generate one first")
    runs = [load_run(storage, config.output.uri, run_id) for run_id in run_ids]
    complete = [run for run in runs if not pending_shards(storage, run)]
    if not complete:
        raise IncompleteRunError(f"{runs_uri}: none of {len(runs)} run(s) is complete. Run jobs.generate to resume")
    return complete[0] if len(complete) == 1 else max(complete, key=lambda run: _finished_at(storage, run))


def _finished_at(storage: Storage, run: Run) -> str:
    if not run.shard_ids:
        return ""
    return max(
        str(json.loads(storage.read_bytes(run.marker_uri(shard_id)))["stats"]["finished_at"])
        for shard_id in run.shard_ids
    )


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", metavar="RUN_ID", help="default: the complete run that was finished last")


JOB = Job(
    prog="jobs.publish",
    description="Publish a complete run in one Delta Lake commit: row conservation, the gates and the users' consent\n"
    "as it is now are checked first. Publishing what is there already changes nothing. A run is refused when the\n"
    "table's rows were changed since it began: it would undo that. Exit code 4: refused.",
    config=JobConfig,
    call=publish_run,
    add_options=_options,
)


if __name__ == "__main__":
    main(JOB)

"""List the versions of the published table."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from e2p_ray.commit.history import TableVersion, read_history
from e2p_ray.config import JobConfig
from e2p_ray.errors import ConfigError
from e2p_ray.storage import Storage
from jobs.cli import Job, main
from jobs.tables import print_table

_DEFAULT_VERSIONS = 50


def history(config: JobConfig, options: argparse.Namespace) -> None:
    """Print the newest versions, newest first."""
    if options.limit < 1:
        raise ConfigError(f"jobs.history: --limit {options.limit} shows nothing: give 1 or more")
    versions = read_history(Storage(config.storage), config.output.table_uri, options.limit)
    if options.json:
        print(json.dumps([_as_json(version) for version in versions], ensure_ascii=False, indent=1))
    elif not versions:
        print(f"{config.output.table_uri}: nothing is published here")
    else:
        head = (
            "version",
            "time (UTC)",
            "made by",
            "run",
            "rows",
            "deferred",
            "files",
            "readable",
            "projector",
            "source",
        )
        print_table(head, [_row(version) for version in versions])


def _row(version: TableVersion) -> tuple[str, ...]:
    return (
        f"{version.version}" + (" (now)" if version.is_current else ""),
        version.committed_at.strftime("%Y-%m-%d %H:%M:%S"),
        version.made_by,
        version.run_id or "-",
        "?" if version.num_rows is None else f"{version.num_rows:,}",
        f"{version.num_deferred:,}",
        "?" if version.num_files is None else f"{version.num_files:,}",
        _readable(version),
        version.projector_id or "-",
        version.source_id or "-",
    )


def _readable(version: TableVersion) -> str:
    if version.num_files is None:
        return "no: not in the log"
    return f"no: {len(version.missing_files):,} files gone" if version.missing_files else "yes"


def _as_json(version: TableVersion) -> dict[str, object]:
    found = asdict(version)
    found["committed_at"] = version.committed_at.isoformat()
    return found | {"is_published": version.is_published, "is_readable": version.is_readable}


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, with base models and names of missing files")
    parser.add_argument(
        "--limit", type=int, default=_DEFAULT_VERSIONS, metavar="N", help=f"the newest N (default {_DEFAULT_VERSIONS})"
    )


JOB = Job(
    prog="jobs.history",
    description="List the versions of the published table, newest first: when, what made each (generate, backfill,\n"
    "rollback, or another writer's operation), its run, its rows, and whether its files are still there. A version\n"
    "with a run is one that jobs.rollback can go back to. Reads storage only.",
    config=JobConfig,
    call=history,
    add_options=_options,
)


if __name__ == "__main__":
    main(JOB)

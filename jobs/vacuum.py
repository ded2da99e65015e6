"""Remove what nobody can need any more."""

from __future__ import annotations

import argparse

from e2p_ray.commit.audit import record
from e2p_ray.commit.vacuum import Orphan, OrphanKind, vacuum
from e2p_ray.config import JobConfig
from e2p_ray.errors import ConfigError
from e2p_ray.storage import Storage
from jobs.cli import Job, main
from jobs.tables import bytes_text, print_table

_DEFAULT_HOURS = 168.0  # a week, as Delta's own vacuum


def clean(config: JobConfig, options: argparse.Namespace) -> None:
    """Find the orphans, remove them unless it is a dry run, and print them."""
    if not options.older_than >= 0:
        raise ConfigError(f"--older-than {options.older_than:g}: give hours, 0 or more")
    storage = Storage(config.storage)
    orphans = vacuum(storage, config.output.uri, max_age_s=options.older_than * 3600, dry_run=options.dry_run)
    if orphans and not options.dry_run:
        ids: dict[str, str | int] = {"num_objects": len(orphans), "older_than_h": f"{options.older_than:g}"}
        record(storage, config.output.uri, "vacuum", ids)
    for orphan in orphans:
        print(f"{orphan.kind}  {orphan.uri}  {bytes_text(orphan.size_bytes)}")
    if orphans:
        print()
    print_table(("orphans", "objects", "bytes"), [_row(kind, orphans) for kind in (*OrphanKind, None)])
    print("dry run: nothing was removed" if options.dry_run else "removed")


def _row(kind: OrphanKind | None, orphans: tuple[Orphan, ...]) -> tuple[str, str, str]:
    """Of one kind, or of all."""
    mine = [orphan for orphan in orphans if kind is None or orphan.kind == kind]
    return kind or "all", f"{len(mine):,}", bytes_text(sum(orphan.size_bytes for orphan in mine))


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--older-than",
        type=float,
        default=_DEFAULT_HOURS,
        metavar="HOURS",
        help=f"keep what is younger, longer than any job takes (default {_DEFAULT_HOURS:g}, a week)",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be removed, remove nothing")


JOB = Job(
    prog="jobs.vacuum",
    description="Remove what no reader and no job can need: data files of no version that was current within the\n"
    "limit, runs that no such version shows and that nobody went on with, plans and updates that no kept run reads,\n"
    "and what killed writers left. Only under generations, runs, plans, updates and audit of output.uri. Run it while\n"
    "nothing publishes. Reads storage only. Exit code 4: the table was changed meanwhile, nothing was removed.",
    config=JobConfig,
    call=clean,
    add_options=_options,
)


if __name__ == "__main__":
    main(JOB)

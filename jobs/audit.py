"""Print the audit log and check that nobody changed it."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict

from e2p_ray.commit.audit import AuditLog, verify_log
from e2p_ray.config import JobConfig
from e2p_ray.errors import ConfigError, RunError
from e2p_ray.storage import Storage
from jobs.cli import Job, main
from jobs.tables import print_pairs, print_table

_HASH = re.compile("[0-9a-f]{64}")


class BrokenLogError(RunError):
    """The audit log is not what was written."""

    exit_code = 1


def audit(config: JobConfig, options: argparse.Namespace) -> None:
    """Raises BrokenLogError after the log has been printed."""
    known = None if options.known is None else options.known.strip().lower()
    if known is not None and not _HASH.fullmatch(known):
        raise ConfigError(
            f"--known {options.known!r} is no hash: give all 64 digits of a last hash that was printed here"
        )
    log = verify_log(Storage(config.storage), config.output.uri, known)
    if options.json:
        for entry in log.entries:
            print(json.dumps(asdict(entry), ensure_ascii=False, sort_keys=True))
    else:
        _print_log(log)
    if log.problems:
        said = "\n".join(f"  {problem}" for problem in log.problems)
        raise BrokenLogError(f"{config.output.uri}/audit is not what was written:\n{said}")


def _print_log(log: AuditLog) -> None:
    rows = [
        (str(entry.number), entry.at, entry.who, entry.action, " ".join(f"{k}={v}" for k, v in entry.ids.items()))
        for entry in log.entries
    ]
    if rows:
        print_table(("entry", "at", "who", "action", "ids"), rows)
    print_pairs({"entries": f"{len(rows):,}", "last hash": log.head})


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--known", metavar="HASH", help="a last hash that was noted down before: it has to be there")
    parser.add_argument("--json", action="store_true", help="one JSON object an entry instead of a table")


JOB = Job(
    prog="jobs.audit",
    description="Print who published, rolled back or purged what and when, and check the chain of hashes. Exit code\n"
    "1: an entry was changed, removed or put in between; which one is said.",
    config=JobConfig,
    call=audit,
    add_options=_options,
)


if __name__ == "__main__":
    main(JOB)

"""Remove users from everything that was written."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping

from e2p_ray.commit import load_run
from e2p_ray.commit.audit import record
from e2p_ray.commit.purge import Purge, find_users, purge_users, read_user_ids
from e2p_ray.commit.users_in import Users
from e2p_ray.config import JobConfig
from e2p_ray.downstream.report import read_report, write_report
from e2p_ray.errors import ConfigError, E2PError
from e2p_ray.storage import Storage
from jobs.cli import Job, main
from jobs.steps import say
from jobs.tables import print_pairs, print_table


def purge(config: JobConfig, options: argparse.Namespace) -> None:
    """Look, remove, look again; with --dry-run only the first."""
    if options.users is None:
        raise ConfigError("jobs.purge: --users FILE is missing: one user id a line, or Parquet with user_id")
    storage, output_uri = Storage(config.storage), config.output.uri
    users = read_user_ids(storage, options.users)
    if options.dry_run:
        survey = find_users(storage, output_uri, users)
        _print_places(survey.by_place(), "would be removed")
        _print_rest(len(survey.objects), survey.unread)
    else:
        done = purge_run(config, storage, users)
        _print_places(done.removed, "removed")
        _print_rest(done.num_read, done.unread)
        if done.version is not None:
            say(f"version {done.version} of {config.output.table_uri} is without them")
        elif not done.num_objects:
            say("nothing to do")
    _warn_of_inputs(storage, config, users)
    if num_nowhere := len(users) - len(users.found):
        say(
            f"{num_nowhere:,} of these {len(users):,} ids are nowhere, in the users table neither: removed earlier, or "
            "not written as there"
        )


def purge_run(config: JobConfig, storage: Storage, users: Users) -> Purge:
    """Purge, write the reports' pages again, and record both ends of it; nothing is recorded where nothing is done."""
    ids: dict[str, str | int] = {"num_users": len(users), "users_digest": users_digest(users)}
    output_uri = config.output.uri
    found = find_users(storage, output_uri, users)
    say(f"read {len(found.objects):,} objects: {len(found.hits):,} hold something of these {len(users):,} users")
    if found.hits:
        record(storage, output_uri, "purge_begun", ids)
    done = purge_users(storage, output_uri, users, found, say)
    for info in list(storage.list_objects(f"{output_uri}/runs")):
        folder, _, name = info.uri.rpartition("/")
        if name == "report.json" and not storage.exists(f"{folder}/report.html"):
            run = load_run(storage, output_uri, folder.rpartition("/")[2])
            if (report := read_report(storage, run)) is not None:
                write_report(storage, run, report)
    if done.num_objects:
        version = {} if done.version is None else {"version": done.version}
        record(storage, output_uri, "purge", ids | version | {"num_removed": sum(done.removed.values())})
    return done


def users_digest(users: Users) -> str:
    """Names a list of users for those who have the list."""
    return hashlib.sha256("\n".join(sorted(users.ids)).encode()).hexdigest()


def _print_places(places: Mapping[str, int], what: str) -> None:
    if places:
        print_table(("place", what), [(place, f"{number:,}") for place, number in places.items()])


def _print_rest(num_objects: int, unread: tuple[str, ...]) -> None:
    pairs = {"objects read": f"{num_objects - len(unread):,}"}
    if unread:
        pairs["not read"] = f"{len(unread):,} of kinds that nothing here writes, the first: {unread[0]}"
    print_pairs(pairs)


def _warn_of_inputs(storage: Storage, config: JobConfig, users: Users) -> None:
    """Whoever is still in the inputs comes back with the next plan."""
    try:
        files = storage.parquet_files(config.inputs.users_uri)
        num_found = sum(users.in_parquet(storage, info) for info in files)
    except E2PError as error:
        say(f"could not look into the users table: {error}")
        return
    if num_found:
        say(f"{num_found:,} of their rows are still in {config.inputs.users_uri}: the next plan brings them back")


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--users",
        metavar="FILE",
        help="whom to remove: a line is a user id, or Parquet with user_id",
    )
    parser.add_argument("--dry-run", action="store_true", help="only count what would be removed, by place")


JOB = Job(
    prog="jobs.purge",
    description="Remove users' rows physically from the published table and all its versions, from runs, plans,\n"
    "updates, drafts, dead letters, reports and the table's log, then read everything again to prove it. Other rows\n"
    "stay as they are. Remove the users from the inputs first. Run it while no job writes; killed, run it again.",
    config=JobConfig,
    call=purge,
    add_options=_options,
)


if __name__ == "__main__":
    main(JOB)

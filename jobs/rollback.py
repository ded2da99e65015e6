"""Go back to a version that was published before."""

from __future__ import annotations

import argparse

from e2p_ray.commit.audit import record
from e2p_ray.commit.rollback import rollback
from e2p_ray.config import JobConfig
from e2p_ray.errors import ConfigError
from e2p_ray.storage import Storage
from jobs.cli import Job, main
from jobs.tables import print_pairs


def roll_back(config: JobConfig, options: argparse.Namespace) -> None:
    """One commit, or none when the table shows that version already."""
    if (options.version is None) == (options.run is None):
        raise ConfigError("jobs.rollback: give either --version N or --run RUN_ID; jobs.history lists them")
    storage = Storage(config.storage)
    done = rollback(
        storage,
        config.output.uri,
        config.inputs.users_uri,
        version=options.version,
        run_id=options.run,
        restore_deleted=options.restore_deleted,
    )
    if not done.already:
        ids: dict[str, str | int] = {"version": done.version, "rolled_back_to": done.goal, "run_id": done.run_id}
        record(storage, config.output.uri, "rollback", ids)
    print_pairs(
        {
            "table": config.output.table_uri,
            "version": f"{done.version}" + (" (it shows this already, nothing was changed)" if done.already else ""),
            "shows": f"version {done.goal}, run {done.run_id}",
            "rows": f"{done.num_rows:,} in {done.num_files:,} files",
            "consent": f"{done.num_files_suppressed:,} files changed for users who opted out since",
        }
    )


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", type=int, metavar="N", help="a published version, as jobs.history lists it")
    parser.add_argument("--run", metavar="RUN_ID", help="the newest version that a publish of this run made")
    parser.add_argument(
        "--restore-deleted", action="store_true", help="go back even if rows come back that were deleted since"
    )


JOB = Job(
    prog="jobs.rollback",
    description="Make a version that was published before what readers see again, in one Delta Lake commit that says\n"
    "so. Users who opted out since are shown the original titles. Doing it again changes nothing. The next\n"
    "jobs.generate starts from the table as it is and writes what differs from the inputs. Reads storage only.\n"
    "Exit codes: 2 no such published version, 3 its files are gone, 4 deleted rows would come back, or somebody\n"
    "else committed meanwhile.",
    config=JobConfig,
    call=roll_back,
    add_options=_options,
)


if __name__ == "__main__":
    main(JOB)

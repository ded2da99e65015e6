"""The main job: plan, generate what is pending, publish, report."""

from __future__ import annotations

import argparse
from contextlib import nullcontext

from e2p_ray.config import JobConfig
from e2p_ray.engine_process import engine_forks
from e2p_ray.fork_server import NO_FORKS
from jobs.cli import Job, main
from jobs.limits import add_limits


def generate(config: JobConfig, options: argparse.Namespace) -> None:
    """One go; what an earlier, interrupted go committed is kept."""
    with engine_forks(config) if options.through_serve is None else nullcontext(NO_FORKS) as forks:
        # What they need is imported beside what this process does.
        from e2p_ray.downstream.report import render_terminal
        from jobs.whole_run import generate_run, limits_of

        report = generate_run(
            config,
            publish_it=not options.no_publish,
            full=options.full,
            limits=limits_of(options),
            through_serve=options.through_serve,
            forks=forks,
        )
    print(render_terminal(report))


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", action="store_true", help="write every request anew, whatever is published")
    parser.add_argument(
        "--through-serve",
        metavar="APP",
        help="let the live replicas of this Serve application write the shards (jobs.serve names its own e2p_ray): one "
        "copy of the model serves both, online requests go first; workers.ray_address or RAY_ADDRESS says where it is",
    )
    add_limits(parser)


JOB = Job(
    prog="jobs.generate",
    description="Plan, generate, publish and report in one go. Where a table is published, only requests are written\n"
    "whose fingerprint changed; the other rows are carried over, rows that are wanted no more are removed, and one\n"
    "new version is published. `jobs.plan` says beforehand what would change. What a limit leaves keeps its old row\n"
    "(or is a dead letter `deferred` until it has one); the same command goes on with it, also after a closed gate\n"
    "that further texts could open.\n"
    "Interrupted before its version is published, the same command resumes: only shards that are not committed yet\n"
    "are generated. Behind that it begins anew with --full, and with a limit goes on with what is left.\n"
    "Exit code 4: complete but not published (a gate, or the table was changed meanwhile), or not begun (the\n"
    "plan has more dead letters than gates.max_dead_letter_share allows, also for --no-publish); 5: shards are left.",
    config=JobConfig,
    call=generate,
    add_options=_options,
)


if __name__ == "__main__":
    main(JOB)

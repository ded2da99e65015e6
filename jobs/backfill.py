"""The main job with another projector: what changed is written anew, with the published texts as drafts."""

from __future__ import annotations

import argparse

from pydantic import ValidationError

from e2p_ray.config import JobConfig, ProjectorConfig
from e2p_ray.config.options import explain
from e2p_ray.engine_process import engine_forks
from e2p_ray.errors import ConfigError
from jobs.cli import Job, main
from jobs.limits import add_limits


def backfill(config: JobConfig, options: argparse.Namespace) -> None:
    """One go; what an earlier, interrupted go committed is kept."""
    before, config = config, config if options.projector is None else with_projector(config, options.projector)
    with engine_forks(config) as forks:
        # What they need is imported beside what this process does.
        from e2p_ray.downstream.report import render_terminal
        from jobs.steps import say
        from jobs.whole_run import generate_run, limits_of

        report = generate_run(
            config, publish_it=not options.no_publish, limits=limits_of(options), action="backfill", forks=forks
        )
    print(render_terminal(report))
    if config.projector.uri != before.projector.uri:
        say(f"set projector.uri to {options.projector}: the next jobs.generate would go back to {before.projector.uri}")


def with_projector(config: JobConfig, uri: str) -> JobConfig:
    """The configuration with this projector; ConfigError where that is no URI of one."""
    if not uri.strip():
        raise ConfigError("--projector: give the URI of a projector, or leave it out and set projector.uri")
    try:
        projector = ProjectorConfig(uri=uri)
    except ValidationError as error:
        raise ConfigError(explain(error, ProjectorConfig, f"--projector {uri!r}", {})) from error
    return config.model_copy(update={"projector": projector})


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--projector", metavar="URI", help="the new projector, in place of projector.uri")
    add_limits(parser)


JOB = Job(
    prog="jobs.backfill",
    description="Write anew what another projector changes, with the published texts as drafts: a draft is verified\n"
    "in one pass instead of being decoded, and the texts are the same as without drafts. Otherwise the same as\n"
    "jobs.generate: rows that still hold are carried over, one new version is published, limits leave the rest for\n"
    "the next run of the same command, and an interrupted run resumes. The report says how many texts changed,\n"
    "what share of the drafts was accepted, and estimates the time that drafts and carried rows saved.",
    config=JobConfig,
    call=backfill,
    add_options=_options,
)


if __name__ == "__main__":
    main(JOB)

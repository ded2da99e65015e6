"""The main job with another projector: what changed is written anew, with the published texts as drafts."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from pydantic import ValidationError

from e2p_ray.batch import EngineFactory
from e2p_ray.config import JobConfig, ProjectorConfig
from e2p_ray.config.options import explain
from e2p_ray.downstream.report import Report, render_terminal
from e2p_ray.engine_process import engine_forks
from e2p_ray.errors import ConfigError
from e2p_ray.fork_server import NO_FORKS
from e2p_ray.update import Limits
from jobs.cli import Job, main
from jobs.limits import add_limits
from jobs.steps import say
from jobs.whole_run import generate_run, limits_of


def backfill(config: JobConfig, options: argparse.Namespace) -> None:
    """One go; what an earlier, interrupted go committed is kept."""
    limits = limits_of(options)
    with engine_forks(config) as forks:
        report = backfill_run(config, options.projector, publish_it=not options.no_publish, limits=limits, forks=forks)
    print(render_terminal(report))
    if options.projector is not None and options.projector.rstrip("/") != config.projector.uri:
        say(f"set projector.uri to {options.projector}: the next jobs.generate would go back to {config.projector.uri}")


def backfill_run(
    config: JobConfig,
    projector_uri: str | None,
    *,
    publish_it: bool = True,
    engine_factory: EngineFactory | None = None,
    limits: Limits | None = None,
    forks: Mapping[str, str] = NO_FORKS,
) -> Report:
    """`generate_run` with this projector in place of the configured one."""
    if projector_uri is not None:
        if not projector_uri.strip():
            raise ConfigError("--projector: give the URI of a projector, or leave it out and set projector.uri")
        try:
            projector = ProjectorConfig(uri=projector_uri)
        except ValidationError as error:
            raise ConfigError(explain(error, ProjectorConfig, f"--projector {projector_uri!r}", {})) from error
        config = config.model_copy(update={"projector": projector})
    return generate_run(
        config, publish_it=publish_it, engine_factory=engine_factory, limits=limits, action="backfill", forks=forks
    )


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

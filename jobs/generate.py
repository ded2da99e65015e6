"""The main job: plan, generate what is pending, publish, report."""

from __future__ import annotations

import argparse
import sys

from e2p_ray.batch import EngineFactory, run_batch
from e2p_ray.commit import PublishedVersion, Run, publish
from e2p_ray.config import JobConfig
from e2p_ray.downstream.report import Report, build_report, render_terminal, write_report
from e2p_ray.errors import GateError
from jobs.cli import Job, run_job
from jobs.progress import ProgressLine
from jobs.steps import Setup, opened_run, planned, say, set_up


def generate(config: JobConfig, options: argparse.Namespace) -> None:
    """One go; what an earlier, interrupted go committed is kept."""
    report = generate_run(config, publish_it=not options.no_publish)
    print(render_terminal(report))


def generate_run(config: JobConfig, *, publish_it: bool = True, engine_factory: EngineFactory | None = None) -> Report:
    """Plan, generate, report and publish. The report is written before the gates, so that it can say why one closed."""
    setup = set_up(config)
    plan = planned(config, setup)
    run = opened_run(config, setup, plan)
    say(f"run {run.run_id}: {plan.counts.num_requests:,} requests in {len(run.shard_ids):,} shards")
    with ProgressLine() as progress:
        run_batch(config, setup.storage, run, engine_factory=engine_factory, on_progress=progress)
    report = build_report(setup.storage, run, plan, config.resolved())
    write_report(setup.storage, run, report)
    if publish_it:
        report = report.with_version(_published(config, setup, run))
        write_report(setup.storage, run, report)
    return report


def _published(config: JobConfig, setup: Setup, run: Run) -> PublishedVersion:
    try:
        return publish(setup.storage, run, config.gates, config.inputs.users_uri)
    except GateError as error:
        raise GateError(f"{error}. The report: {run.uri}/report.html") from error


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-publish", action="store_true", help="stop before publishing; `jobs.publish` does it later"
    )


JOB = Job(
    prog="jobs.generate",
    description="Plan, generate, publish and report in one go. Interrupted at any point, the same command resumes:\n"
    "only shards that are not committed yet are generated. Exit code 4: complete but not published (a gate);\n"
    "5: shards are left.",
    config=JobConfig,
    call=generate,
    add_options=_options,
)


if __name__ == "__main__":
    sys.exit(run_job(JOB))

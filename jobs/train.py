"""Train a projector on the texts that were right for their users."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from e2p_ray.config import TrainConfig
from e2p_ray.downstream.pages.training_page import TrainingReport, build_report, render_html, render_terminal
from jobs.cli import Job, main
from jobs.steps import say

if TYPE_CHECKING:
    from e2p_ray.train.job.training import TrainOutcome


def train(config: TrainConfig, options: argparse.Namespace) -> None:
    """Nothing when the artifact of this training is there already, unless --again."""
    report = train_projector(config, again=options.again)
    if report is not None:
        print(render_terminal(report))


def train_projector(config: TrainConfig, *, again: bool = False) -> TrainingReport | None:
    """Train, write artifact, report and record; None when all of them are there already."""
    from e2p_ray.train.job.prepared import finished_manifest, forget, prepare
    from e2p_ray.train.job.training import run_training  # torch: not for --help
    from jobs.train_progress import TrainLine

    prepared = prepare(config)
    output = prepared.config.output
    record_uri = f"{output.uri}/training.json"
    manifest = finished_manifest(prepared, record_uri)
    if manifest is not None and not again:
        say(f"training {prepared.train_id} is finished: projector {manifest.projector_id} in {output.projector_uri}")
        say("--again trains it once more")
        return None

    def begin() -> None:
        if manifest is not None:
            # Without its record it is not finished: interrupted from here on, the same command resumes.
            forget(prepared)
            prepared.storage.delete(record_uri)

    say(f"training {prepared.train_id}")
    with TrainLine() as line:
        outcome = run_training(prepared, say=line.say, on_progress=line, begin=begin)
    report = _report(outcome, output.projector_uri)
    prepared.storage.write_bytes(f"{output.uri}/report.html", render_html(report).encode())
    # Last, because with it the training counts as finished.
    prepared.storage.write_bytes(record_uri, report.to_json().encode())
    forget(prepared)
    return report


def _report(outcome: TrainOutcome, projector_uri: str) -> TrainingReport:
    scores = outcome.scores
    return build_report(
        projector_id=outcome.manifest.projector_id,
        projector_uri=projector_uri,
        provenance=outcome.provenance,
        records=outcome.records,
        nll=None if scores is None else scores.nll,
        num_tokens=None if scores is None else scores.num_tokens,
        user=None if scores is None else scores.user,
    )


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--again", action="store_true", help="train once more where the artifact is there already")


JOB = Job(
    prog="jobs.train",
    description="Train a projector: read users, contents and targets, train with Ray Train on the frozen base model,\n"
    "write the artifact, training.json and report.html. Interrupted at any point, the same command resumes from the\n"
    "last checkpoint. Exit code 2: configuration; 3: inputs; 5: workers were lost too often, run again.",
    config=TrainConfig,
    call=train,
    add_options=_options,
)


if __name__ == "__main__":
    main(JOB)

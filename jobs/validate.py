"""Check a job's inputs, artifacts and configuration without planning or generating anything."""

from __future__ import annotations

import argparse
import sys

from e2p_ray.config import JobConfig
from e2p_ray.plan.inputs import scan_inputs
from jobs.cli import Job, run_job
from jobs.steps import set_up
from jobs.tables import bytes_text, print_pairs, print_table


def validate(config: JobConfig, options: argparse.Namespace) -> None:
    """Raises the error of whatever is wrong first; prints what was found when nothing is."""
    setup = set_up(config)
    inputs = scan_inputs(config.inputs, setup.storage)
    print_table(
        ("table", "files", "rows", "size"),
        [
            (name, f"{len(table.files):,}", f"{table.num_rows:,}", bytes_text(sum(f.size_bytes for f in table.files)))
            for name, table in inputs.items()
        ],
    )
    manifest = setup.manifest
    print_pairs(
        {
            "projector": f"{manifest.projector_id} ({manifest.kind}, {manifest.layout}, "
            f"{manifest.num_soft_tokens} soft token(s))",
            "base model": setup.base.base_model_id,
            "embedding space": f"{manifest.embedding_space} ({manifest.embedding_dim} dimensions)",
            "tasks": ", ".join(f"{name} ({', '.join(sorted(task.prompts))})" for name, task in config.tasks.items()),
            "output": config.output.uri,
        }
    )
    print("everything fits together; `python -m jobs.plan` says what a run would do")


JOB = Job(
    prog="jobs.validate",
    description=(
        "Check the schemas of the input tables, the projector, that it belongs to the base model, and the "
        "configuration.\nNothing is written. Exit code 0: a run can start; 2: configuration; 3: inputs or artifacts."
    ),
    config=JobConfig,
    call=validate,
)


if __name__ == "__main__":
    sys.exit(run_job(JOB))

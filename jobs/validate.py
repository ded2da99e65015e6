"""Check a job's inputs, artifacts and configuration without planning or generating anything."""

from __future__ import annotations

import argparse
import hashlib
import json
import os

from e2p_ray.config import JobConfig
from e2p_ray.engine.manifest import CONFIG_FILE, REFERENCE_FILE, WEIGHTS_FILE
from e2p_ray.errors import ConfigError, IncompatibleError, ObjectNotFoundError
from e2p_ray.plan.inputs import scan_inputs
from e2p_ray.storage import is_s3
from e2p_ray.storage.local import local_path
from jobs.cli import Job, main
from jobs.steps import Setup, set_up
from jobs.tables import bytes_text, print_pairs, print_table


def validate(config: JobConfig, options: argparse.Namespace) -> None:
    """Raises the error of whatever is wrong first; prints what was found when nothing is."""
    setup = set_up(config)
    _check_projector(config, setup)
    inputs = scan_inputs(config.inputs, setup.storage)
    _check_output(config, setup)
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


def _check_projector(config: JobConfig, setup: Setup) -> None:
    """IncompatibleError unless its files are those that its manifest names, and as wide as the base model.

    The engine looks again, and into the weights; here torch is not even imported.
    """
    for name in (WEIGHTS_FILE, REFERENCE_FILE):
        place = f"{config.projector.uri}/{name}"
        try:
            data = setup.storage.read_bytes(place)
        except ObjectNotFoundError as error:
            raise IncompatibleError(f"{place}: is not there. Copy the artifact again") from error
        if hashlib.sha256(data).hexdigest() != setup.manifest.files.get(name):
            raise IncompatibleError(f"{place}: not the file that config.json names. Copy the artifact again")
    base = json.loads((setup.base.path / CONFIG_FILE).read_bytes())
    width = base.get("hidden_size") or base.get("n_embd") or setup.manifest.d_model  # else the engine will say
    if width != setup.manifest.d_model:
        raise IncompatibleError(
            f"projector {setup.manifest.projector_id} makes soft tokens of width {setup.manifest.d_model}, the base "
            f"model's tokens have {width}. Use the base model it was trained for: {setup.manifest.base_model_id}"
        )


def _check_output(config: JobConfig, setup: Setup) -> None:
    """The error of a bucket that cannot be listed, or of a place that can hold no folder; nothing is written."""
    uri = config.output.uri
    next(setup.storage.list_objects(f"{uri}/runs/-"), None)  # of no run: those of all runs would be listed first
    if not is_s3(uri):
        folder = local_path(uri)
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
            raise ConfigError(f"output.uri {uri}: {nearest} is no folder that this user may write to")


JOB = Job(
    prog="jobs.validate",
    description=(
        "Check the schemas of the input tables, the projector and its files, that it belongs to the base model, the\n"
        "configuration, and that the output's place can be listed. Nothing is written: a bucket may still refuse it.\n"
        "Exit code 0: a run can start; 2: configuration; 3: inputs or artifacts; 5: storage."
    ),
    config=JobConfig,
    call=validate,
)


if __name__ == "__main__":
    main(JOB)

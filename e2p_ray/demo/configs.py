"""The demo's job files: what jobs.train, jobs.evaluate and jobs.generate read, with its places filled in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import yaml

from e2p_ray.config import TaskConfig

BASE_MODEL = Path(__file__).parent / "base_model"


@dataclass(frozen=True, slots=True)
class JobFiles:
    """The configurations of one demo; all have the same tasks."""

    train: Path
    evaluate: Path
    generate: Path


def demo_tasks() -> dict[str, TaskConfig]:
    """The tasks of the demo, as its main job's configuration says them."""
    tasks = yaml.safe_load(_text("job"))["tasks"]
    return {name: TaskConfig.model_validate(task) for name, task in tasks.items()}


def write_configs(folder: Path, *, world: Path, base_model: Path = BASE_MODEL) -> JobFiles:
    """Write train.yaml, evaluate.yaml and job.yaml into a folder; job.yaml comes last."""
    places = {"world": world, "output": folder, "base_model": base_model}
    # The templates have them in double quotes, between which YAML reads what JSON writes.
    filled = {name: json.dumps(str(place), ensure_ascii=False)[1:-1] for name, place in places.items()}
    job = Template(_text("job")).substitute(filled)
    tasks = yaml.safe_dump({"tasks": yaml.safe_load(job)["tasks"]}, allow_unicode=True, sort_keys=False)
    found = JobFiles(folder / "train.yaml", folder / "evaluate.yaml", folder / "job.yaml")
    for path in (found.train, found.evaluate):
        path.write_text(f"{Template(_text(path.stem)).substitute(filled)}{tasks}", "utf-8")
    found.generate.write_text(job, "utf-8")
    return found


def _text(name: str) -> Any:
    return files("e2p_ray.demo").joinpath(f"{name}.yaml").read_text(encoding="utf-8")

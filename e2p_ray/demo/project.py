"""The demo's projector, trained on the world's targets, and the demo's job file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import polars as pl
import torch
import yaml

from e2p_ray.config import BaseModelConfig, TaskConfig
from e2p_ray.demo.newsroom import TEXT_PREFIX
from e2p_ray.engine.manifest import resolve_base_model
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.prompt import load_tokenizer
from e2p_ray.schema import Content
from e2p_ray.storage import Storage
from e2p_ray.train import Target, TrainResult, TrainSettings, UserTable, train_projector

BASE_MODEL = Path(__file__).parent / "base_model"
# 64 rows a step. After 90 steps 0.37 of the English headlines show the true angle, after 180 0.77 (measured while the
# base model was in the making).
SETTINGS = TrainSettings(num_steps=180, contents_per_step=4, users_per_content=16, target_prefix=TEXT_PREFIX)


def _job_text() -> str:
    return files("e2p_ray.demo").joinpath("job.yaml").read_text(encoding="utf-8")


def demo_tasks() -> dict[str, TaskConfig]:
    """The tasks of the demo's job, as its configuration says them."""
    job: dict[str, Any] = yaml.safe_load(_job_text())
    return {name: TaskConfig.model_validate(task) for name, task in job["tasks"].items()}


def write_job(path: Path, *, world: Path, output: Path, projector: Path, base_model: Path = BASE_MODEL) -> Path:
    """Write the demo's job file with these places in it."""
    places = {"world": world, "output": output, "projector": projector, "base_model": base_model}
    path.write_text(Template(_job_text()).substitute({name: str(place) for name, place in places.items()}), "utf-8")
    return path


def read_users(world: Path) -> UserTable:
    """The user embeddings of a world's users table."""
    users = pl.read_parquet(world / "users.parquet")
    vectors = np.array(users["embedding"].to_numpy(), np.float32)  # a copy that torch may own
    return UserTable(users["user_id"].to_list(), vectors, users["embedding_space"][0])


def train_demo_projector(
    world: Path,
    projector_uri: str,
    *,
    settings: TrainSettings = SETTINGS,
    base_model: Path = BASE_MODEL,
    on_progress: Callable[[int, float], None] | None = None,
    **changes: Any,
) -> TrainResult:
    """Train on the world's targets and save the artifact; `changes` replace fields of `settings`."""
    settings = replace(settings, **changes)
    storage = Storage()
    folder = resolve_base_model(BaseModelConfig(uri=str(base_model)), storage)
    base = BaseModel.load(folder.path, "float32", torch.device("cpu"))
    contents = pl.read_parquet(world / "contents.parquet").select("content_id", "title", "body", "language")
    targets = pl.read_parquet(world / "targets.parquet").select("user_id", "content_id", "task", "text", "weight")
    result = train_projector(
        base,
        folder,
        load_tokenizer(folder.path),
        demo_tasks(),
        read_users(world),
        [Content(*row) for row in contents.iter_rows()],
        [Target(*row) for row in targets.iter_rows()],
        settings,
        on_progress,
    )
    result.projector.save_pretrained(storage, projector_uri)
    return result

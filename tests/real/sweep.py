"""The sweep that the defaults of TrainSettings come from: learning rate, kind and size on one real task.

    python -m tests.real.sweep pens --steps 60

Each setting trains a projector on the same draws and is judged on validation targets: loss of the right user, and what
it gains over a shuffled one. The figures belong into tests/bench/LOG.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import torch

from e2p_ray.config import BaseModelConfig, TaskConfig
from e2p_ray.downstream.measures.bootstrap import ratio_interval, user_sums
from e2p_ray.engine.manifest import BaseModelFolder, resolve_base_model
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.prefixes import PrefixStore
from e2p_ray.engine.prompt import load_tokenizer
from e2p_ray.schema import Content
from e2p_ray.storage import Storage
from e2p_ray.train.controls import derangement
from e2p_ray.train.lessons import LessonTable, Target, UserTable, make_lessons
from e2p_ray.train.projector import fit_projector, new_projector, start_calmly
from e2p_ray.train.score import score
from e2p_ray.train.settings import TrainSettings
from tests.real.data import FOLDER
from tests.real.task import WRITERS, RealTask

_MAX_VALIDATED = 800


def variants(settings: TrainSettings) -> Iterator[tuple[str, TrainSettings]]:
    """One change at a time from the settings given."""
    yield "as it is", settings
    for rate in (1e-3, 3e-3, 3e-2):
        yield f"learning rate {rate:g}", replace(settings, learning_rate=rate)
    yield "hidden 64", replace(settings, hidden_dim=64)
    yield "linear", replace(settings, kind="linear")
    yield "mlp", replace(settings, kind="mlp")
    yield "dropout 0.2", replace(settings, dropout=0.2)
    yield "output scale 2", replace(settings, output_scale=2.0)


def read_users(task: RealTask) -> UserTable:
    """The users of a real task."""
    users = pl.read_parquet(task.uri("users"))
    return UserTable(users["user_id"].to_list(), np.array(users["embedding"].to_numpy()), task.embedding_space)


def lessons(
    task: RealTask, split: str, users: UserTable, base: BaseModel, folder: BaseModelFolder, settings: TrainSettings
) -> LessonTable:
    """The targets of one split; of validation the first ones."""
    config = {task.task: TaskConfig.model_validate({"prompts": {task.language: dict(task.template)}})}
    columns = ("content_id", "title", "body", "language")
    contents = [Content(*row) for row in pl.read_parquet(task.uri("contents")).select(columns).iter_rows()]
    targets = pl.read_parquet(task.uri(f"targets_{split}"))
    rows = targets if split == "train" else targets.head(_MAX_VALIDATED)
    chosen = [Target(*row) for row in rows.select("user_id", "content_id", "task", "text", "weight").iter_rows()]
    table, _ = make_lessons(load_tokenizer(folder.path), config, users, contents, chosen, settings, base.max_positions)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(WRITERS))
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = resolve_base_model(BaseModelConfig(uri=str(FOLDER / "models" / "news-lm-6m")), Storage())
    base = BaseModel.load(folder.path, "float32", torch.device("cpu"))
    results = []
    with tempfile.TemporaryDirectory() as place:
        task = WRITERS[options.task](FOLDER / "data", Path(place))
        users = read_users(task)
        settings = TrainSettings(
            num_steps=options.steps,
            contents_per_step=16,
            warmup_steps=10,
            target_prefix={task.language: task.target_prefix},
        )
        training = lessons(task, "train", users, base, folder, settings)
        validation = lessons(task, "validation", users, base, folder, settings)
        store = PrefixStore(base, settings.max_prefix_bytes)
        others = replace(validation, user=derangement(len(users.user_ids), seed=0)[validation.user].astype(np.int32))
        for name, changed in variants(settings):
            projector = new_projector(base, folder, users, changed)
            start_calmly(projector, base, training)
            projector = fit_projector(base, projector, training, changed).finish()
            right, shuffled = score(base, projector, validation, store), score(base, projector, others, store)
            by_user = [f"{user}" for user in validation.user]
            sums, _ = user_sums(by_user, np.column_stack([shuffled.nll - right.nll, right.num_tokens]))
            gain = ratio_interval(sums[:, 0], sums[:, 1], seed=0)
            print(f"{name:22} {right.mean_nll:.4f}  +{gain.value:.4f} [{gain.low:.4f}, {gain.high:.4f}]", flush=True)
            results.append({"case": name, "nll_per_token": right.mean_nll, "gain": gain.value})
    print(json.dumps({"bench": "sweep", "task": options.task, "steps": options.steps, "results": results}))


if __name__ == "__main__":
    main()

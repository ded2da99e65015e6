"""A small training world: a tiny random base model, users whose sign on one axis decides what was right for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from e2p_ray.config import StorageConfig, TrainConfig
from e2p_ray.storage import Storage
from tests.tiny_models import configs, contents, save_model_folder

DIM, NUM_USERS, NUM_CONTENTS = 6, 30, 10
SPACE = "space-1"
TEXTS = {True: "a bridge for money", False: "the river, in peace"}
TASKS = {
    "headline": {"prompts": {"default": {"cue_before": "\n>"}}, "sampling": {"max_new_tokens": 8}},
    "reason": {"prompts": {"default": {"cue_before": "\nwhy>"}}, "sampling": {"max_new_tokens": 8}},
}


def vectors() -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(3).normal(size=(NUM_USERS, DIM)).astype(np.float32)


def updated(count: int) -> pa.Array:
    return pa.array([1_700_000_000_000_000] * count, pa.timestamp("us", "UTC"))


def users_table(**columns: Any) -> pa.Table:
    """The last user opted out."""
    values: dict[str, Any] = {
        "user_id": [f"user-{n:03d}" for n in range(NUM_USERS)],
        "embedding": pa.array(list(vectors()), pa.list_(pa.float32(), DIM)),
        "embedding_space": [SPACE] * NUM_USERS,
        "personalize": [n != NUM_USERS - 1 for n in range(NUM_USERS)],
        "updated_at": updated(NUM_USERS),
    }
    return pa.table(values | columns)


def contents_table() -> pa.Table:
    made = contents(NUM_CONTENTS)
    values = {name: [getattr(c, name) for c in made] for name in ("content_id", "title", "body", "language")}
    return pa.table({**values, "updated_at": updated(NUM_CONTENTS)})


def target_rows() -> list[tuple[str, str, str, str, float]]:
    return [
        (f"user-{n:03d}", f"c{(n + step) % NUM_CONTENTS}", name, TEXTS[bool(vector[0] > 0)], 1.0)
        for n, vector in enumerate(vectors())
        for step in (0, 3)
        for name in TASKS
    ]


def targets_table(rows: list[tuple[Any, ...]] | None = None, *, task: bool = True) -> pa.Table:
    columns = list(zip(*(target_rows() if rows is None else rows), strict=True)) or [()] * 5
    kinds = (pa.string(), pa.string(), pa.string(), pa.string(), pa.float32())
    names = ("user_id", "content_id", "task", "text", "weight")
    table = pa.table({n: pa.array(c, k) for n, c, k in zip(names, columns, kinds, strict=True)})
    return table if task else table.drop_columns("task")


def write_train_world(
    folder: Path,
    *,
    place: str | None = None,
    storage: StorageConfig | None = None,
    tables: dict[str, pa.Table] | None = None,
    **changes: Any,
) -> tuple[TrainConfig, Path]:
    """The configuration and its file. `place` is where tables and results go, `tables` replace the usual ones."""
    place, storage_config = place or str(folder), storage or StorageConfig()
    base = folder / "base"
    if not base.exists():
        save_model_folder(configs()["llama"], base)
    values: dict[str, Any] = {
        "inputs": {f"{name}_uri": f"{place}/in/{name}.parquet" for name in ("users", "contents", "targets")},
        "output": {"uri": f"{place}/out"},
        "base_model": {"uri": str(base), "device": "cpu"},
        "tasks": TASKS,
        "projector": {"hidden_dim": 16},
        "training": {
            "num_steps": 12,
            "contents_per_step": 4,
            "users_per_content": 4,
            "learning_rate": 0.02,
            "warmup_steps": 2,
            "validate_every": 4,
            "checkpoint_every": 4,
            "validation_share": 0.2,
        },
        "workers": {"num_workers": 1, "num_cpus": 0.5},
        "storage": json.loads(storage_config.model_dump_json(exclude_none=True)),
    }
    for name, section in changes.items():
        values[name] = values[name] | section if name != "tasks" else section
    for name in ("access_key_id", "secret_access_key"):
        secret = getattr(storage_config, name)
        if secret is not None:
            values["storage"][name] = secret.get_secret_value()
    written = {"users": users_table(), "contents": contents_table(), "targets": targets_table()} | (tables or {})
    for name, table in written.items():
        Storage(storage_config).write_table(f"{place}/in/{name}.parquet", table)
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return TrainConfig.model_validate(values), path

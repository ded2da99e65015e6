"""What a training was made from: its id, and what the artifact tells of its origin."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from e2p_ray.config import TrainConfig
from e2p_ray.train.data.tables import SourceTable

_FORMAT = 2  # counts up when the same inputs give another projector
_NO_INFLUENCE = {"training": {"checkpoint_every", "max_prefix_bytes"}}
_MAX_FILES = 100  # that a manifest lists; the digest is of all
_GIT_S = 10.0


def train_id_of(config: TrainConfig, sources: Mapping[str, SourceTable], base_model_id: str) -> str:
    """The id of the training of these: 16 hex digits. Restarts, places of outputs and checkpoints do not count."""
    parts = {
        "format": _FORMAT,
        "inputs": {name: [table.files, table.delta_version] for name, table in sorted(sources.items())},
        "tasks": {name: task.model_dump(mode="json") for name, task in config.tasks.items()},
        "projector": config.projector.model_dump(mode="json"),
        "training": config.training.model_dump(mode="json", exclude=_NO_INFLUENCE["training"]),
        "dtype": config.base_model.dtype,
        "base_model_id": base_model_id,
        "num_workers": config.workers.num_workers,
    }
    return _hash(parts)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def inputs_of(sources: Mapping[str, SourceTable]) -> dict[str, dict[str, Any]]:
    """Places, sizes and versions of the input tables; their files by name where they are not too many."""
    said = {}
    for name, table in sources.items():
        said[name] = {
            "uri": table.uri,
            "num_files": len(table.files),
            "num_rows": table.num_rows,
            "size_bytes": sum(info.size_bytes for info in table.files),
            "digest": _hash(table.files),
            "delta_version": table.delta_version,
            "files": [info._asdict() for info in table.files[:_MAX_FILES]],
        }
    return said


def code_of() -> dict[str, str | None]:
    """The package's version, and the commit of the checkout it runs from where it does."""
    try:
        found = version("e2p_ray")
    except PackageNotFoundError:
        found = "unknown"
    return {"version": found, "commit": _commit(Path(__file__).resolve().parents[3])}


def _commit(root: Path) -> str | None:
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def settings_said(config: TrainConfig) -> dict[str, Any]:
    """The parts of the configuration that shape a projector, as JSON."""
    return {
        "projector": config.projector.model_dump(mode="json"),
        "training": config.training.model_dump(mode="json"),
        "workers": config.workers.model_dump(mode="json", include={"num_workers", "num_cpus", "num_gpus"}),
        "base_model": config.base_model.model_dump(mode="json"),
        "tasks": {name: task.model_dump(mode="json", exclude={"limits"}) for name, task in config.tasks.items()},
    }


def curves_said(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Last and best values of the curves."""
    validated = [record for record in records if record["validation_loss"] is not None]
    best = min(validated, key=lambda record: record["validation_loss"], default=None)
    return {
        "num_steps": records[-1]["step"],
        "last_loss": records[-1]["loss"],
        "last_validation_loss": validated[-1]["validation_loss"] if validated else None,
        "best_validation_loss": best["validation_loss"] if best else None,
        "best_step": best["step"] if best else None,
        "num_tokens": sum(record["num_tokens"] for record in records),
    }

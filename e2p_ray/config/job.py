"""The configuration of a run: what jobs.validate, plan, generate and publish read."""

from __future__ import annotations

import hashlib
import json
from typing import Self

from pydantic import Field

from e2p_ray.config.sections import (
    BaseModelConfig,
    ChecksConfig,
    Config,
    EngineConfig,
    GatesConfig,
    InputsConfig,
    OutputConfig,
    PlanConfig,
    ProjectorConfig,
    StorageConfig,
    TaskConfig,
    WorkersConfig,
)
from e2p_ray.config.uris import absolute


class JobConfig(Config):
    """Everything that determines a run."""

    inputs: InputsConfig
    output: OutputConfig
    base_model: BaseModelConfig
    projector: ProjectorConfig
    tasks: dict[str, TaskConfig] = Field(min_length=1)
    storage: StorageConfig = StorageConfig()
    plan: PlanConfig = PlanConfig()
    engine: EngineConfig = EngineConfig()
    workers: WorkersConfig = WorkersConfig()
    checks: ChecksConfig = ChecksConfig()
    gates: GatesConfig = GatesConfig()

    def text_hash(self) -> str:
        """Hash of the parts that determine the texts of given requests: tasks, checks, dtype, the kind of engine."""
        parts: dict[str, object] = {
            "tasks": {name: task.model_dump(mode="json") for name, task in self.tasks.items()},
            "checks": self.checks.model_dump(mode="json"),
            "dtype": self.base_model.dtype,
        }
        if self.engine.kind != "native":
            parts["engine"] = self.engine.kind  # it samples from other random streams
        return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]

    def with_absolute_places(self) -> Self:
        """For workers of a Ray that was found: their working folder is the one in which that was started.

        Not for this process: plans and updates are named after their places as they are written.
        """
        inputs = {name: absolute(uri) for name, uri in self.inputs.model_dump().items()}
        changes = {
            "inputs": self.inputs.model_copy(update=inputs),
            "output": self.output.model_copy(update={"uri": absolute(self.output.uri)}),
            "base_model": self.base_model.with_absolute_place(),
            "projector": self.projector.model_copy(update={"uri": absolute(self.projector.uri)}),
        }
        return self.model_copy(update=changes)

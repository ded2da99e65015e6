"""The configuration of jobs.train."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from e2p_ray.config.sections import BaseModelConfig, Config, Section, StorageConfig, TaskConfig
from e2p_ray.config.uris import Uri


class TrainInputsConfig(Section):
    """Where the training tables are: a Parquet file or a folder of Parquet files each."""

    users_uri: Uri
    contents_uri: Uri
    targets_uri: Uri
    validation_uri: Uri | None = Field(None, description="what to validate on; null: some contents held out")


class TrainOutputConfig(Section):
    """Where the projector, the checkpoint and the training report are written."""

    uri: Uri

    @property
    def projector_uri(self) -> str:
        """The artifact that jobs read."""
        return f"{self.uri}/projector"


class ShapeConfig(Section):
    """What the projector looks like and where its soft tokens stand."""

    kind: Literal["residual", "mlp", "linear", "constant"] = Field(
        "residual", description="residual: an MLP beside a linear layer; constant: one soft token for everybody"
    )
    layout: Literal["content_first", "soft_first"] = "content_first"
    hidden_dim: int = Field(256, ge=1)
    num_soft_tokens: int = Field(1, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    output_scale: float = Field(1.0, gt=0, description="size of a soft token, in sizes of an average token embedding")
    embedding_space: str | None = Field(None, description="null: the one that all users of the table have")


class TrainingConfig(Section):
    """How it is trained; contents and users are counted per worker."""

    num_steps: int = Field(300, ge=1)
    contents_per_step: int = Field(8, ge=1)
    users_per_content: int = Field(16, ge=1, description="at most so many targets of a content in one step")
    learning_rate: float = Field(1e-2, gt=0)
    warmup_steps: int = Field(20, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    seed: int = Field(0, ge=0, lt=1 << 64)  # as many as torch tells apart
    max_target_tokens: int = Field(64, ge=2)
    max_prefix_bytes: int = Field(1 << 30, ge=1 << 20, description="kept keys and values of contents, per worker")
    validation_share: float = Field(0.1, ge=0, lt=1, description="of the contents, when no validation_uri is given")
    validate_every: int = Field(50, ge=1, description="steps")
    patience: int | None = Field(None, ge=1, description="validations without a better loss; null: never stop early")
    checkpoint_every: int = Field(50, ge=1, description="steps")
    target_prefix: dict[str, str] = Field(
        {}, description="by language as prompts are, what stands before every target: often ' '"
    )


class TrainWorkersConfig(Section):
    """The workers that train together."""

    num_workers: int = Field(1, ge=1)
    num_cpus: float = Field(1.0, gt=0)
    num_gpus: float = Field(0.0, ge=0)
    max_failures: int = Field(3, ge=0, description="restarts from the last checkpoint after a worker was lost")
    ray_address: str | None = Field(None, description="null: the cluster of this process, else a local one")


class TrainConfig(Config):
    """Everything that determines a projector."""

    inputs: TrainInputsConfig
    output: TrainOutputConfig
    base_model: BaseModelConfig
    tasks: dict[str, TaskConfig] = Field(min_length=1)
    projector: ShapeConfig = ShapeConfig()
    training: TrainingConfig = TrainingConfig()
    workers: TrainWorkersConfig = TrainWorkersConfig()
    storage: StorageConfig = StorageConfig()

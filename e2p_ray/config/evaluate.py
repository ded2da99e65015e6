"""The configuration of jobs.evaluate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from e2p_ray.config.sections import (
    BaseModelConfig,
    ChecksConfig,
    Config,
    EngineConfig,
    ProjectorConfig,
    Section,
    StorageConfig,
    TaskConfig,
)
from e2p_ray.config.train import TrainingConfig
from e2p_ray.config.uris import Uri

ExtraMethod = Literal["profile_text", "profile_text_constant", "prefix_tuning", "lora", "lora_profile_text"]


class EvaluateInputsConfig(Section):
    """Where the tables are: a Parquet file or a folder of Parquet files each."""

    users_uri: Uri
    contents_uri: Uri
    targets_uri: Uri = Field(description="held-out targets: the projector must not have been trained on them")
    training_targets_uri: Uri = Field(description="what the trained controls learn from: the projector's own targets")
    impressions_uri: Uri | None = Field(
        None, description="what was shown: impression_id, user_id, content_id, text, clicked; for ranking"
    )
    later_users_uri: Uri | None = Field(None, description="the same users later, in the same embedding space")
    refit_users_uri: Uri | None = Field(None, description="the same users in a refit space: must be refused")


class EvaluateOutputConfig(Section):
    """Where evaluation.json and report.html are written."""

    uri: Uri


class EvaluationConfig(Section):
    """What is measured. Right, shuffled, mean, no soft token and constant token always are."""

    methods: tuple[ExtraMethod, ...] = Field(
        (), description="more baselines; lora and lora_profile_text need peft ([evaluate])"
    )
    max_targets: int = Field(2000, ge=1, description="a fixed sample of so many held-out targets is scored")
    num_retrieval_texts: int = Field(200, ge=0, description="texts of which the right user is looked for; 0: none")
    num_retrieval_users: int = Field(50, ge=2, description="users that each of these texts could be for")
    num_written: int = Field(200, ge=0, description="held-out pairs for which texts are written and compared; 0: none")
    max_impressions: int = Field(300, ge=1)
    noise: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = Field(
        (0.25, 0.5, 1.0, 2.0), description="drift: Gaussian noise in standard deviations of the reference statistics"
    )
    seed: int = Field(0, ge=0, lt=1 << 64)


class EvaluateConfig(Config):
    """Everything that determines an evaluation."""

    inputs: EvaluateInputsConfig
    output: EvaluateOutputConfig
    base_model: BaseModelConfig
    projector: ProjectorConfig
    tasks: dict[str, TaskConfig] = Field(min_length=1)
    evaluation: EvaluationConfig = EvaluationConfig()
    training: TrainingConfig = Field(TrainingConfig(), description="of the trained controls")
    compare: dict[str, Uri] = Field({}, description="by name, outputs of other evaluations to be shown beside this one")
    checks: ChecksConfig = Field(ChecksConfig(), description="`allow` counts, for what is a foreign name; the rest not")
    engine: EngineConfig = EngineConfig()
    storage: StorageConfig = StorageConfig()

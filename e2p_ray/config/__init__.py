"""The configuration of every job: YAML, then environment (E2P_...), then command line; unknown keys are errors."""

from e2p_ray.config.evaluate import EvaluateConfig, EvaluateInputsConfig, EvaluationConfig, ExtraMethod
from e2p_ray.config.job import JobConfig
from e2p_ray.config.load import load_config
from e2p_ray.config.sections import (
    BaseModelConfig,
    ChecksConfig,
    Config,
    EngineConfig,
    GatesConfig,
    InputsConfig,
    LimitsConfig,
    OutputConfig,
    PlanConfig,
    ProjectorConfig,
    PromptTemplate,
    SamplingConfig,
    StorageConfig,
    TaskConfig,
    WorkersConfig,
    for_language,
)
from e2p_ray.config.serve import ApiConfig, ProfileConfig, ReplicaConfig, ServeConfig, TablesConfig
from e2p_ray.config.train import ShapeConfig, TrainConfig, TrainingConfig, TrainInputsConfig, TrainWorkersConfig

__all__ = [
    "ApiConfig",
    "BaseModelConfig",
    "ChecksConfig",
    "Config",
    "EngineConfig",
    "EvaluateConfig",
    "EvaluateInputsConfig",
    "EvaluationConfig",
    "ExtraMethod",
    "GatesConfig",
    "InputsConfig",
    "JobConfig",
    "LimitsConfig",
    "OutputConfig",
    "PlanConfig",
    "ProfileConfig",
    "ProjectorConfig",
    "PromptTemplate",
    "ReplicaConfig",
    "SamplingConfig",
    "ServeConfig",
    "ShapeConfig",
    "StorageConfig",
    "TablesConfig",
    "TaskConfig",
    "TrainConfig",
    "TrainInputsConfig",
    "TrainWorkersConfig",
    "TrainingConfig",
    "WorkersConfig",
    "for_language",
    "load_config",
]

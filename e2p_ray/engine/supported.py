"""Which architectures the engine fits, told from a model's configuration alone: drivers ask it, and load no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from e2p_ray.errors import ConfigError, UnsupportedModelError

# Each is proven equal to transformers' own forward in tests/test_engine_architectures.py.
SUPPORTED_MODEL_TYPES = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "gpt2"}
)
# Rotary embeddings whose angles depend on the length of the sequence: a shared prefix has none of its own.
_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


def read_model_config(folder: Path) -> PreTrainedConfig:
    """The configuration in a transformers folder; no remote code.

    Raises UnsupportedModelError for a model type that transformers does not know, ConfigError for a damaged file.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ValueError as error:  # of several lines, the others of which advise what we do not do
        raise _refusal(str(folder), str(error).partition("\n")[0].rstrip(". ")) from error
    except (OSError, LookupError, TypeError, ArithmeticError, AttributeError, StrictDataclassError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{folder}: its config.json makes no sense ({said}). Copy the model again") from error
    return config


def refuse_unsupported(config: PreTrainedConfig, where: str) -> None:
    """Raise UnsupportedModelError naming what in this architecture the engine does not fit."""

    def refuse(why: str) -> None:
        raise _refusal(where, why)

    if config.model_type not in SUPPORTED_MODEL_TYPES:
        refuse(f"model type {config.model_type!r} is not supported")
    for rope in _rope_types(getattr(config, "rope_parameters", None)):
        if rope in _LENGTH_DEPENDENT_ROPE:
            refuse(f"rotary embedding {rope!r} depends on the sequence length")
    if getattr(config, "use_bidirectional_attention", False):
        refuse("its attention is not causal")
    if getattr(config, "add_cross_attention", False):
        refuse("it has cross-attention")


def _refusal(where: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{where}: {why}. Supported model types: {', '.join(sorted(SUPPORTED_MODEL_TYPES))}")


def _rope_types(parameters: Any) -> list[str]:
    if not isinstance(parameters, dict):
        return []
    if "rope_type" in parameters:
        return [parameters["rope_type"]]
    return [nested.get("rope_type", "default") for nested in parameters.values() if isinstance(nested, dict)]

"""Which architectures the engine fits, told from a model's configuration alone: drivers ask it, and load no model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from e2p_ray.errors import UnsupportedModelError

# Each is proven equal to transformers' own forward in tests/test_engine_architectures.py.
SUPPORTED_MODEL_TYPES = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "gpt2"}
)
# Rotary embeddings whose angles depend on the length of the sequence: a shared prefix has none of its own.
_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


def refuse_unsupported(config: PreTrainedConfig, where: str) -> None:
    """Raise UnsupportedModelError naming what in this architecture the engine does not fit."""

    def refuse(why: str) -> None:
        raise UnsupportedModelError(
            f"{where}: {why}. Supported model types: {', '.join(sorted(SUPPORTED_MODEL_TYPES))}"
        )

    if config.model_type not in SUPPORTED_MODEL_TYPES:
        refuse(f"model type {config.model_type!r} is not supported")
    for rope in _rope_types(getattr(config, "rope_parameters", None)):
        if rope in _LENGTH_DEPENDENT_ROPE:
            refuse(f"rotary embedding {rope!r} depends on the sequence length")
    if getattr(config, "use_bidirectional_attention", False):
        refuse("its attention is not causal")
    if getattr(config, "add_cross_attention", False):
        refuse("it has cross-attention")


def _rope_types(parameters: Any) -> list[str]:
    if not isinstance(parameters, dict):
        return []
    if "rope_type" in parameters:
        return [parameters["rope_type"]]
    return [nested.get("rope_type", "default") for nested in parameters.values() if isinstance(nested, dict)]

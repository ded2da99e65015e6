"""The frozen base model: loaded through transformers, refused when the engine does not fit it, proven unchanged."""

from __future__ import annotations

import hashlib
import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from e2p_ray.engine.attention import ATTENTION_NAME, Step, step_attention
from e2p_ray.engine.compiled import prepare
from e2p_ray.engine.fused import FusedDecoder, fits
from e2p_ray.engine.gpu.available import has_kernels
from e2p_ray.engine.greedy import GreedyHead
from e2p_ray.engine.packed import can_pack, pack
from e2p_ray.engine.shared_prefix import SuffixSlots
from e2p_ray.engine.supported import read_model_config, refuse_unsupported
from e2p_ray.errors import ConfigError

if TYPE_CHECKING:
    from e2p_ray.engine.gpu.layers import GpuDecoder
    from e2p_ray.engine.pass_cost import PassCost


def pick_device(device: str, *, num_gpus: float = 0) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU; not that where Ray reserved `num_gpus`.

    Raises ConfigError where this process has no such device: before anything is loaded, not by torch afterwards.
    """
    num_found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        if num_gpus and not num_found:
            raise ConfigError(
                f"{socket.gethostname()}: workers.num_gpus is {num_gpus:g}, and torch {torch.__version__} finds no GPU "
                "in this process. Install torch for this GPU and its driver, or set base_model.device to cpu"
            )
        return torch.device("cuda" if num_found else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"base_model.device {device!r}: use auto, cpu or cuda") from error
    if found.type == "cuda" and (found.index or 0) >= num_found:
        raise ConfigError(
            f"{socket.gethostname()}: base_model.device is {device!r}, and torch {torch.__version__} finds {num_found} "
            "GPUs in this process. Set workers.num_gpus, so that workers are on nodes with GPUs only, or another device"
        )
    if found.index:  # kernels are launched, and passes timed, on a process's first GPU
        raise ConfigError(
            f"base_model.device {device!r}: a process uses the first GPU that it sees. Set "
            f"CUDA_VISIBLE_DEVICES={found.index} in its environment, and base_model.device to cuda"
        )
    return found


def _refuse_unsafe(folder: Path) -> None:
    """ConfigError unless the weights are whole safetensors files of this folder; reads their headers only."""
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise ConfigError(f"{folder}: no .safetensors weights. Convert the model; pickle files are never loaded")
    for path in found:
        try:
            with safe_open(path, "pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path}: not a whole safetensors file ({error}). Copy the model again") from error
    for path in folder.glob("*.safetensors.index.json"):
        named = set(read_weight_map(path).values())
        if outside := sorted(named - {weights.name for weights in found}):
            raise ConfigError(f"{path}: names {outside[0]!r}, which is no weights file of this folder")


def read_weight_map(index: Path) -> dict[str, str]:
    """The file of every weight, as the index of several says. Raises ConfigError where it does not."""
    try:
        found = json.loads(index.read_bytes())["weight_map"]
        return {str(name): str(file) for name, file in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index}: not an index of weights ({error!r}). Copy the model again") from error


class BaseModel:
    """A frozen causal language model whose attention goes through a `Step`.

    `hidden` and `logits` are split so that the vocabulary product runs only for the positions that need it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        refuse_unsupported(model.config, model.config.name_or_path or type(model).__name__)
        AttentionInterface.register(ATTENTION_NAME, step_attention)
        model.set_attn_implementation(ATTENTION_NAME)
        model.eval().requires_grad_(False)
        self.model = model
        self.device: torch.device = model.device  # kept: the model looks for them among its modules, 0.1 ms each time
        self.dtype: torch.dtype = model.dtype
        config = model.config
        self.num_layers: int = config.num_hidden_layers
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = getattr(config, "num_key_value_heads", None) or self.num_heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // self.num_heads
        self.d_model: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.max_positions: int = config.max_position_embeddings
        self._decoder = model.base_model
        self.fused: FusedDecoder | GpuDecoder | None = None  # once packed, in place of the model's own layers
        head = model.get_output_embeddings()
        assert isinstance(head, nn.Module), "a causal language model has output embeddings"
        self._head = head
        self.greedy: GreedyHead | None = None  # once packed, for rows that take the likeliest token
        self._logit_cap: float | None = getattr(config, "final_logit_softcapping", None)
        self.pass_cost: PassCost | None = None  # once somebody has measured it

    @classmethod
    def load(cls, folder: Path, dtype: str, device: torch.device) -> BaseModel:
        """Load from a transformers folder; safetensors only, no remote code.

        Raises ConfigError for a damaged folder or one without safetensors, UnsupportedModelError before any weight is
        read.
        """
        _refuse_unsafe(folder)
        refuse_unsupported(read_model_config(folder), str(folder))
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
        return cls(model.to(device))

    def pack(self, *, keep_plain: bool = False) -> None:
        """Speed up a model that is only run, never trained through or hashed again; nothing where that cannot be.

        keep_plain: a second copy of weights in fp32, with which a pass over few rows is faster.
        """
        if has_kernels(self.device):
            self._pack_for_gpu()
        if self.device.type == "cpu":
            prepare()
        if can_pack(self.dtype, self.device):
            if fits(self.model):
                self.fused = FusedDecoder(self.model, keep_plain=keep_plain)
            pack(self.model, keep_plain=keep_plain)
            head = self.model.get_output_embeddings()
            assert isinstance(head, nn.Module)
            self._head = head
            self.greedy = GreedyHead.of(head) if self._logit_cap is None else None

    def _pack_for_gpu(self) -> None:
        from e2p_ray.engine.gpu.layers import GpuDecoder, fits_gpu

        if fits_gpu(self.model):
            self.fused = GpuDecoder(self.model)
            # What rows may take is measured next: there the weights that were packed count until torch gives them back.
            torch.cuda.empty_cache()

    @property
    def own_dtype(self) -> torch.dtype:
        """That of the rows' own keys and values, the model's own but on a CPU without loops for all of a layer.

        Torch's many small products are twice as fast in float32 (256 rows of 2 queries and 17 keys: 0.8 and 1.9 ms).
        """
        if self.device.type == "cpu" and not (isinstance(self.fused, FusedDecoder) and self.fused.is_compiled):
            return torch.float32
        return self.dtype

    def packs_contents(self, num_tokens: int) -> bool:
        """Whether contents of so many tokens go through the model as rows do, none of them padded.

        Python between a layer's loops is 4 ms of a content's 21 (128 tokens, two Zen 4 cores, bf16, 2026-11-29).
        """
        return isinstance(self.fused, FusedDecoder) and self.fused.takes_packed(num_tokens)

    def slots(self, max_rows: int, max_tokens: int) -> SuffixSlots:
        """Room for the own keys and values of so many rows."""
        return SuffixSlots(
            self.num_layers,
            max_rows,
            self.num_kv_heads,
            max_tokens,
            self.head_dim,
            dtype=self.own_dtype,
            device=self.device,
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one position over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def activation_bytes_per_token(self) -> int:
        """Bytes of a pass beside keys and values, a token of it; logits not counted."""
        return 64 * self.d_model

    @property
    def token_embedding_rms(self) -> float:
        """Root mean square of the token embeddings: the size that a soft token should have."""
        return float(self.token_embeddings().square().mean().sqrt())

    @torch.no_grad()
    def token_embeddings(self) -> Tensor:
        """All of them in float32, as the layers read them: Gemma's weights are made larger by the root of d_model."""
        num_tokens = len(self.model.get_input_embeddings().weight)
        return self.embed(torch.arange(num_tokens, device=self.device)).float()

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids (...) to embeddings (..., d_model)."""
        embedded: Tensor = self.model.get_input_embeddings()(token_ids)
        return embedded

    def hidden(self, inputs_embeds: Tensor, position_ids: Tensor, step: Step) -> Tensor:
        """Run the decoder on (n, q, d_model) at position_ids (n, q); keys and values go to and come from `step`."""
        if self.fused is not None:
            fused: Tensor = self.fused(inputs_embeds, position_ids, step)
            return fused
        output = self._decoder(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,  # never left to the cache's length, which is the suffix's alone
            past_key_values=step,
            use_cache=True,
            e2p_step=step,
        )
        states: Tensor = output.last_hidden_state
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits (n, V) of hidden states (n, d_model), in the model's dtype; in float32 where capped."""
        logits: Tensor = self._head(hidden)
        if self._logit_cap is not None:
            logits = torch.tanh(logits.float() / self._logit_cap) * self._logit_cap
        return logits

    def weights_hash(self) -> str:
        """sha256 over every parameter and buffer: equal before and after proves the model stayed frozen."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

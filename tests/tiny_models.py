"""Tiny random base models of every supported architecture, and a tokenizer without any download."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from e2p_ray.config import EngineConfig, PromptTemplate, SamplingConfig, TaskConfig
from e2p_ray.engine.decode import Decoder
from e2p_ray.engine.engine import Engine
from e2p_ray.engine.manifest import Layout, ProjectorManifest
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.pass_cost import PassCost
from e2p_ray.engine.projector import Projector, ReferenceStatistics
from e2p_ray.schema import Content, Group, Request, RequestKey, UserEmbedding

BOS, EOS, PAD = 256, 257, 258
VOCAB_SIZE = 300
EMBEDDING_DIM = 12


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: any text in any language, nothing to train."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: at for at, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|bos|>", "<|eos|>", "<|pad|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
    )


def byte_fallback_tokenizer(chars: str) -> PreTrainedTokenizerFast:
    """A token for each of these characters, and bytes for others, as Llama 2, Mistral, Gemma and Phi 3 spell them."""
    special = ["<unk>", "<s>", "</s>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *chars]
    vocab = {piece: at for at, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def common(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "initializer_range": 0.3,  # large, so that attention and greedy choices are far from uniform
    }
    return values | changes


def configs() -> dict[str, PreTrainedConfig]:
    """One configuration an architecture; windows shorter than the prompts where the architecture has them."""
    gpt2 = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=48,
        n_layer=3,
        n_head=4,
        n_positions=512,
        bos_token_id=EOS,
        eos_token_id=EOS,
        initializer_range=0.3,
    )
    neox_values = common()
    del neox_values["num_key_value_heads"]
    return {
        "llama": LlamaConfig(**common()),
        "mistral": MistralConfig(**common(sliding_window=24)),
        "qwen2": Qwen2Config(
            **common(use_sliding_window=True, sliding_window=24, max_window_layers=1, tie_word_embeddings=True)
        ),
        "qwen3": Qwen3Config(**common(head_dim=16)),
        "gemma2": Gemma2Config(
            **common(
                head_dim=16,
                sliding_window=24,
                query_pre_attn_scalar=16,
                attn_logit_softcapping=5.0,
                final_logit_softcapping=10.0,
            )
        ),
        "gemma3_text": Gemma3TextConfig(
            **common(head_dim=16, sliding_window=24, query_pre_attn_scalar=16, layer_types=_gemma3_layers())
        ),
        "phi3": Phi3Config(**common()),
        "gpt_neox": GPTNeoXConfig(**neox_values),
        "gpt2": gpt2,
    }


def _gemma3_layers() -> list[str]:
    return ["sliding_attention", "full_attention", "sliding_attention"]


def random_model(config: PreTrainedConfig, *, attention: str = "eager", seed: int = 0) -> PreTrainedModel:
    """A model with random weights, the same for the same seed whatever the attention."""
    torch.manual_seed(seed)
    config = copy.deepcopy(config)  # a model writes its attention's name into its configuration
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    model.generation_config.eos_token_id = EOS
    return model.eval()


@torch.no_grad()
def shake(model: Any) -> None:
    """Give norms and biases, which begin as ones and zeros, numbers that matter."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
        assert parameter.ndim in (1, 2), name


def random_projector(
    d_model: int, *, layout: Layout = "content_first", num_soft_tokens: int = 1, output_rms: float = 0.5, seed: int = 1
) -> Projector:
    """A projector with random weights that tells users apart."""
    torch.manual_seed(seed)
    manifest = ProjectorManifest(
        embedding_dim=EMBEDDING_DIM,
        embedding_space="space-1",
        d_model=d_model,
        base_model_id="tiny@0",
        tokenizer_hash="bytes",
        output_rms=output_rms,
        layout=layout,
        hidden_dim=16,
        num_soft_tokens=num_soft_tokens,
    ).with_files({})
    projector = Projector(manifest, ReferenceStatistics.of(torch.randn(64, EMBEDDING_DIM)))
    weights = dict(projector.named_parameters())
    for name in ("linear.weight", "bias", "hidden.weight", "hidden.bias", "output.weight"):
        torch.nn.init.normal_(weights.pop(name), std=0.5)
    assert not weights, "every one is drawn, in an order that the tests' numbers hang on"
    return projector.eval().requires_grad_(False)


def task(cue_before: str = "\n>", cue_after: str = "", **sampling: Any) -> TaskConfig:
    """A task in one template for every language."""
    prompt = PromptTemplate(head="News. ", cue_before=cue_before, cue_after=cue_after)
    values: dict[str, Any] = {"max_new_tokens": 8, "stop": ()} | sampling
    return TaskConfig(prompts={"default": prompt}, sampling=SamplingConfig(**values))


def engine_of(
    config: PreTrainedConfig,
    *,
    layout: Layout = "content_first",
    num_soft_tokens: int = 1,
    tasks: dict[str, TaskConfig] | None = None,
    max_rows: int = 64,
    max_bytes: int = 1 << 30,
    drafts: bool = True,
    model: PreTrainedModel | None = None,
) -> Engine:
    """An engine over a tiny random model, or over the given one."""
    projector = random_projector(config.hidden_size, layout=layout, num_soft_tokens=num_soft_tokens)
    return Engine(
        BaseModel(model or random_model(config)),
        projector,
        byte_tokenizer(),
        tasks or {"headline": task()},
        EngineConfig(max_rows=max_rows, max_bytes=max_bytes, drafts=drafts),
    )


def choose_by_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token is chosen from logits that a test can see or change; else greedy rows' stay within compiled loops."""
    monkeypatch.setattr(Decoder, "_likeliest", lambda *_: None)


def write_letters_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model writes bytes; one that writes letters only has texts that can be read back as its tokens."""
    choose_by_logits(monkeypatch)
    plain = BaseModel.logits
    letters = torch.full((VOCAB_SIZE,), -1e4)
    letters[[*byte_tokenizer().encode(" abcdefghijklmnopqrstuvwxyz", add_special_tokens=False), EOS]] = 0.0
    monkeypatch.setattr(BaseModel, "logits", lambda self, hidden: plain(self, hidden) + letters)


def user_embedding(seed: int) -> UserEmbedding:
    return np.random.default_rng(seed).standard_normal(EMBEDDING_DIM).astype(np.float32)


def group(content: Content, users: Sequence[int], *, task_name: str = "headline", without: Sequence[int] = ()) -> Group:
    """One content for these users; those in `without` have no user embedding."""
    requests = tuple(
        Request(
            RequestKey(f"u{user}", content.content_id, task_name), None if user in without else user_embedding(user)
        )
        for user in users
    )
    return Group(content, task_name, requests)


def pass_cost(overhead_tokens: int) -> PassCost:
    """A machine on which a pass costs as much as so many tokens, besides those in it."""
    return PassCost((1, 2), (1.0, 1.0 + 1 / (overhead_tokens + 1)))


def contents(num: int, *, seed: int = 0) -> list[Content]:
    """Contents of unequal lengths (20 to 90 bytes), in English and Japanese."""
    rng = np.random.default_rng(seed)
    found = []
    for at in range(num):
        if at % 3 == 2:
            body = "".join(
                rng.choice(list("東京都は新しい橋を三つ建てる計画を発表した。")) for _ in range(rng.integers(5, 25))
            )
            found.append(Content(f"c{at}", "橋の計画", body, "ja"))
        else:
            body = " ".join(rng.choice(["bridge", "river", "cost", "plan", "new"]) for _ in range(rng.integers(2, 15)))
            found.append(Content(f"c{at}", "Bridge plan", body, "en"))
    return found


def save_model_folder(config: PreTrainedConfig, folder: Path) -> Path:
    """A loadable transformers folder of a tiny random model."""
    return _saved(random_model(config), folder)


def save_model_of_letters(config: PreTrainedConfig, folder: Path) -> Path:
    """The same with one that writes letters and spaces only, so that its texts are texts."""
    model = random_model(config)
    keep_letters_only(model, byte_tokenizer(), " abcdefghijklmnopqrstuvwxyz")
    return _saved(model, folder)


@torch.no_grad()
def keep_letters_only(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, letters: str) -> None:
    """Let a random model write these alone: all other tokens' logits are zero, and one letter's is above that.

    With tied weights all other tokens' embeddings are zero as well.
    """
    weight = model.get_output_embeddings().weight
    silent = torch.ones(len(weight), dtype=torch.bool)
    silent[tokenizer.encode(letters, add_special_tokens=False)] = False
    weight[silent] = 0.0


def _saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder, safe_serialization=True)
    byte_tokenizer().save_pretrained(folder)
    return folder

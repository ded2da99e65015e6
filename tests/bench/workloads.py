"""The pairs that the engine's benches run on: contents x users, a random Llama of 30 M, and the floor."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from e2p_ray.config import EngineConfig, PromptTemplate, SamplingConfig, TaskConfig
from e2p_ray.engine.engine import Engine
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.prefixes import PrefixStore
from e2p_ray.engine.projector import Projector
from e2p_ray.schema import Content, Group, Request, RequestKey
from tests.tiny_models import BOS, EMBEDDING_DIM, EOS, PAD, random_projector

VOCAB_SIZE = 8192
MAX_CONTENT_TOKENS = 1536
CUE = ">"
# Standard deviation of random weights with which every user's text differs (64 of 64; with 0.02 25 of 64).
LIVELY = 0.04
LATIN = tuple("abcdefghijklmnopqrstuvwxyz ")
JAPANESE = tuple("東京都は新しい橋を三つ建てる計画発表川費用ニュースデタのがとで、。0123456789")


@dataclass(frozen=True)
class Case:
    """num_contents x num_users pairs with content_tokens each (begin token and cue included).

    `unequal`: content lengths are log-normal about content_tokens, and rows end after a quarter, half, three quarters
    or all of new_tokens. Japanese contents mix characters of three bytes with digits, so that their lengths differ a
    little; a token is a byte.
    """

    num_contents: int
    num_users: int
    content_tokens: int = 256
    new_tokens: int = 16
    unequal: bool = False
    language: Literal["en", "ja"] = "en"

    @property
    def shape(self) -> str:
        return f"{self.num_contents}x{self.num_users}"

    @property
    def name(self) -> str:
        """The shape, and whatever is not the default of it."""
        found = [self.shape]
        if self.content_tokens != default_content_tokens(self.shape):
            found.append(f"c{self.content_tokens}")
        if self.new_tokens != 16:
            found.append(f"n{self.new_tokens}")
        found += ["unequal"] * self.unequal + [self.language] * (self.language != "en")
        return " ".join(found)

    @property
    def ends(self) -> tuple[int, ...]:
        """The numbers of new tokens that rows have, in turn."""
        if not self.unequal:
            return (self.new_tokens,)
        return tuple(max(self.new_tokens * quarter // 4, 1) for quarter in (1, 2, 3, 4))


SHAPES = ((8, 64), (1, 512), (256, 2), (2048, 1))


def default_content_tokens(shape: str) -> int:
    return 512 if shape == "1x512" else 256


@dataclass(frozen=True, eq=False)
class Pair:
    """One row of a workload: its request, its content, its place in the content's users, its number of new tokens."""

    request: Request
    content: Content
    new_tokens: int


@dataclass(frozen=True)
class ModelSize:
    """Widths of a Llama; its vocabulary is VOCAB_SIZE, whatever the size, but where a bench says otherwise."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int


# The larger ones are Llama 3.2's and 3.1's.
MODEL_SIZES = {
    "30m": ModelSize(512, 1536, 8, 8, 4),
    "1b": ModelSize(2048, 8192, 16, 32, 8),
    "8b": ModelSize(4096, 14336, 32, 32, 8),
}


def llama(size: ModelSize, initializer_range: float = 0.02, vocab_size: int = VOCAB_SIZE) -> LlamaConfig:
    return LlamaConfig(
        **asdict(size),
        vocab_size=vocab_size,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=initializer_range,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def llama_30m(initializer_range: float = 0.02) -> LlamaConfig:
    return llama(MODEL_SIZES["30m"], initializer_range)


@functools.cache
def wide_tokenizer(vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """One token a byte, and a word of its own for every other id of the model: equal texts mean equal tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: at for at, char in enumerate(alphabet)}
    specials = {"<|bos|>": BOS, "<|eos|>": EOS, "<|pad|>": PAD}
    words = {f"[{at}]": at for at in range(len(vocab) + len(specials), vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab | specials | words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    assert tokenizer.get_vocab_size() == vocab_size
    assert tokenizer.token_to_id("<|eos|>") == EOS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
    )


def groups_of(case: Case, seed: int = 0) -> list[Group]:
    """Contents of content_tokens bytes (begin token and cue included) and random users."""
    rng = np.random.default_rng(seed)
    found = []
    for at in range(case.num_contents):
        content = Content(f"c{at}", "", _body(case, rng), case.language)
        requests: dict[str, list[Request]] = {task_name(end): [] for end in case.ends}
        for user in range(case.num_users):
            task = task_name(case.ends[(at + user) % len(case.ends)])
            vector = rng.standard_normal(EMBEDDING_DIM).astype(np.float32)
            requests[task].append(Request(RequestKey(f"u{at}-{user}", content.content_id, task), vector))
        found += [Group(content, task, tuple(rows)) for task, rows in requests.items() if rows]
    return found


def _body(case: Case, rng: np.random.Generator) -> str:
    num_tokens = case.content_tokens
    if case.unequal:
        num_tokens = int(np.clip(rng.lognormal(np.log(num_tokens), 0.6), 16, MAX_CONTENT_TOKENS))
    if case.language == "en":
        return "".join(rng.choice(LATIN, num_tokens - 2))
    mean_bytes = float(np.mean([len(char.encode()) for char in JAPANESE]))
    return "".join(rng.choice(JAPANESE, max(round((num_tokens - 2) / mean_bytes), 1)))


def task_name(new_tokens: int) -> str:
    return f"headline{new_tokens}"


def pairs_of(groups: Sequence[Group]) -> list[Pair]:
    """All rows, content by content."""
    return [
        Pair(request, group.content, int(group.task.removeprefix("headline")))
        for group in groups
        for request in group.requests
    ]


def tasks_of(case: Case) -> dict[str, TaskConfig]:
    """One task for each number of new tokens."""
    prompt = PromptTemplate(content="{body}", cue_before=CUE)
    return {
        task_name(end): TaskConfig(
            prompts={"default": prompt}, sampling=SamplingConfig(max_new_tokens=end, stop=()), max_content_tokens=2048
        )
        for end in case.ends
    }


def make_engine(
    base: BaseModel,
    case: Case,
    max_rows: int,
    projector: Projector | None = None,
    store: PrefixStore | None = None,
    max_bytes: int | None = None,
) -> Engine:
    """An engine for the case's tasks; without a projector, one with random weights."""
    projector = projector or random_projector(base.d_model, output_rms=base.token_embedding_rms)
    config = EngineConfig(max_rows=max_rows, max_bytes=max_bytes)
    return Engine(base, projector, wide_tokenizer(base.vocab_size), tasks_of(case), config, store=store)


def left_ids(pair: Pair, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """What stands before the soft token: begin token, content, cue. The engine's own layout, written out again."""
    return [BOS, *tokenizer.encode(pair.content.body + CUE, add_special_tokens=False)]


@dataclass(frozen=True)
class Floor:
    """The least work of the shared computation, summed over rows: arithmetic, and bytes of weights, keys and values."""

    flops: float
    num_bytes: float

    def rows_per_s(self, num_rows: int, flops_per_s: float, bytes_per_s: float) -> tuple[float, float]:
        """What the machine could do if one of the two were all."""
        return num_rows * flops_per_s / self.flops, num_rows * bytes_per_s / self.num_bytes


def floor_of(pairs: Sequence[Pair], lengths: Sequence[int], config: LlamaConfig, max_rows: int, itemsize: int) -> Floor:
    """No padding, every content once; `lengths` are the pairs' left parts, waves of at most max_rows rows.

    Attention is counted causally for a prefix (half the square). Bytes: all weights once per step and once per prefill
    of 1,024 tokens, keys and values of a prefix once per step and content, a row's own once per step.
    """
    head = config.vocab_size * config.hidden_size
    body = _num_body_parameters(config)
    width = config.hidden_size * config.num_hidden_layers
    kv_bytes = kv_bytes_per_token(config, itemsize)
    prefixes = {pair.content.content_id: length for pair, length in zip(pairs, lengths, strict=True)}
    flops = sum(length * (2 * body + 2 * width * length) for length in prefixes.values())
    num_bytes = itemsize * body * (sum(prefixes.values()) / 1024)
    for pair, length in zip(pairs, lengths, strict=True):
        flops += pair.new_tokens * (2 * body + 2 * head + 4 * width * length)
        num_bytes += kv_bytes * pair.new_tokens * (pair.new_tokens + 1) / 2
    for at in range(0, len(pairs), max_rows):
        wave = pairs[at : at + max_rows]
        num_steps = max(pair.new_tokens for pair in wave)
        shared = {pair.content.content_id for pair in wave}
        num_bytes += num_steps * (itemsize * (body + head) + kv_bytes * sum(prefixes[name] for name in shared))
    return Floor(float(flops), float(num_bytes))


def kv_bytes_per_token(config: LlamaConfig, itemsize: int) -> int:
    """Keys and values of one position over all layers."""
    head_dim = config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * itemsize)


def _num_body_parameters(config: LlamaConfig) -> int:
    d, head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
    attention = 2 * d * d + 2 * d * config.num_key_value_heads * head_dim
    return int(config.num_hidden_layers * (attention + 3 * d * config.intermediate_size))


@torch.inference_mode()
def soft_tokens(pairs: Sequence[Pair], projector: Projector) -> torch.Tensor:
    """(n, d_model) in fp32."""
    vectors = [pair.request.user_embedding for pair in pairs]
    soft: torch.Tensor = projector(torch.from_numpy(np.stack([vector for vector in vectors if vector is not None])))
    return soft[:, 0]


def texts_of(tokens: Sequence[Sequence[int]]) -> list[str]:
    """Tokens as text, as the engine gives it."""
    decoded = wide_tokenizer().batch_decode(tokens, skip_special_tokens=True)
    return [str(text).lstrip().rstrip("\ufffd") for text in decoded]

"""Trains the demo's base model from scratch: `python -m e2p_ray.demo.base_model --out DIR`.

It learns to write a headline or an explanation behind a cue; a word between cue and text names the angle. A soft token
stands exactly where that word would, so a projector has only to find the words' directions.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from e2p_ray.demo.newsroom import ANGLES, LANGUAGES, make_article, make_articles
from e2p_ray.demo.packing import NO_TARGET, Batch, Packed, Packer
from e2p_ray.demo.tokenizer import train_tokenizer


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that determines the weights, but for the machine's arithmetic."""

    seed: int = 20511
    num_steps: int = 4500
    batch_tokens: int = 1200
    easy_share: float = 0.35  # of the steps, on articles of two or three angles: copying is learned sooner there
    vocab_size: int = 4096
    d_model: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    d_ff: int = 640
    muon_lr: float = 0.02
    adam_lr: float = 1e-2
    warmup_steps: int = 50
    noise: float = 0.3  # on the angle word, in units of the token embeddings' root mean square
    num_tokenizer_articles: int = 3000


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A random model of this recipe's shape."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_ff,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def batches(recipe: Recipe, packer: Packer) -> Iterator[Batch]:
    """One batch a step, of fresh articles: none is seen twice, so what a text needs has to be read from its content."""
    number = 0
    for step in range(recipe.num_steps):
        sizes = (2, 3) if step < recipe.easy_share * recipe.num_steps else (2, 3, 5, 5, 6, 6)
        packed: list[Packed] = []
        while sum(len(item.ids) for item in packed) < recipe.batch_tokens:
            random = Random(f"{recipe.seed}/corpus/{number}")
            angles = random.sample(ANGLES, random.choice(sizes))
            article = make_article(str(number), LANGUAGES[number % len(LANGUAGES)], random, angles)
            packed.append(packer.pack(article, random))
            number += 1
        yield packer.batch(packed)


def mixed_embeddings(model: LlamaForCausalLM, batch: Batch, noise: float, generator: torch.Generator) -> Tensor:
    """Token embeddings (n, t, d) in which the angle words are mixed and blurred."""
    table = model.get_input_embeddings()
    embedded: Tensor = table(batch.ids)
    share = batch.mix_share[:, None]
    own = embedded[batch.mix_row, batch.mix_place]
    rms = table.weight.detach().square().mean().sqrt()
    blur = noise * rms * torch.randn(own.shape, generator=generator)
    mixed = share * own + (1 - share) * table(batch.mix_other) + blur
    return embedded.index_put((batch.mix_row, batch.mix_place), mixed)


def text_loss(model: LlamaForCausalLM, batch: Batch, embedded: Tensor) -> Tensor:
    """Mean cross-entropy (nats per token) over the texts; the vocabulary product runs only where there is a target."""
    mask = torch.zeros(batch.visible.shape, dtype=torch.bfloat16).masked_fill(~batch.visible, -torch.inf)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(
            inputs_embeds=embedded, position_ids=batch.positions, attention_mask=mask, use_cache=False
        ).last_hidden_state
        keep = batch.targets != NO_TARGET
        logits = model.lm_head(hidden[keep])
    return nn.functional.cross_entropy(logits.float(), batch.targets[keep])


class Optimizers:
    """Muon for the matrices, AdamW for embeddings and norms, one schedule: warm-up, then cosine to a tenth."""

    def __init__(self, model: LlamaForCausalLM, recipe: Recipe) -> None:
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
        self._recipe = recipe
        self._all: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=0.0), recipe.muon_lr),
            (torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0), recipe.adam_lr),
        ]

    def step(self, step: int) -> None:
        recipe = self._recipe
        warm = min(1.0, (step + 1) / recipe.warmup_steps)
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / recipe.num_steps))
        for optimizer, lr in self._all:
            for group in optimizer.param_groups:
                group["lr"] = lr * warm * cosine
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def train(
    model: LlamaForCausalLM,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    log_every: int = 50,
    save_every: int = 500,
) -> float:
    """Train in place and return the mean loss of the last steps; what the model is like so far is saved on the way."""
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizers = Optimizers(model, recipe)
    recent: list[float] = []
    started = time.monotonic()
    for step, batch in enumerate(batches(recipe, Packer(tokenizer))):
        loss = text_loss(model, batch, mixed_embeddings(model, batch, recipe.noise, generator))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizers.step(step)
        recent = [*recent[-(log_every - 1) :], loss.item()]
        if (step + 1) % log_every == 0:
            mean = sum(recent) / len(recent)
            print(f"step {step + 1}/{recipe.num_steps} loss {mean:.4f} {time.monotonic() - started:.0f} s", flush=True)
        if (step + 1) % save_every == 0:
            save(copy.deepcopy(model), tokenizer, folder)
    return sum(recent) / len(recent)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a transformers folder with half-precision weights."""
    generation = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    generation.pad_token_id = tokenizer.pad_token_id
    model.generation_config = generation
    model.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's base model and tokenizer.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="go on from this folder's weights and tokenizer")
    parser.add_argument("--threads", type=int, default=1)
    for item in fields(Recipe):
        kind = type(item.default)
        parser.add_argument(f"--{item.name.replace('_', '-')}", type=kind, default=item.default, metavar=kind.__name__)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = Recipe(**{item.name: getattr(options, item.name) for item in fields(Recipe)})
    started = time.monotonic()
    if options.start is None:
        articles = make_articles("tokenizer", recipe.num_tokenizer_articles, recipe.seed)
        tokenizer = train_tokenizer(articles, recipe.vocab_size)
        model = make_model(recipe, tokenizer)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.start)
        model = LlamaForCausalLM.from_pretrained(options.start, dtype=torch.float32, attn_implementation="sdpa")
    loss = train(model, recipe, tokenizer, options.out)
    save(model, tokenizer, options.out)
    print(f"{asdict(recipe)}\nloss {loss:.4f}, {time.monotonic() - started:.0f} s, {options.threads} thread(s)")


if __name__ == "__main__":
    main()

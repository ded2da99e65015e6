"""Engine against batched HF `generate(inputs_embeds=...)` on the same pairs: python -m tests.bench.decode.

A Llama of about 30 M parameters with random weights, fp32, one thread; soft token last. HF has nothing to share, so its
rows/s do not depend on how many rows there are: it runs a part of the rows, in the batch size that was its best.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, PreTrainedModel

from e2p_ray.config import EngineConfig, PromptTemplate, SamplingConfig, TaskConfig
from e2p_ray.engine.engine import Engine
from e2p_ray.engine.model import BaseModel
from e2p_ray.schema import Content, Group, Request, RequestKey
from tests.bench.harness import interleaved, matmul_peak_flops, print_results
from tests.tiny_models import BOS, EMBEDDING_DIM, EOS, PAD, byte_tokenizer, random_model, random_projector

HF_BATCHES = (8, 16, 32)
HF_MAX_ROWS = 32


@dataclass(frozen=True)
class Case:
    """num_contents x num_users pairs with content_tokens each."""

    num_contents: int
    num_users: int
    content_tokens: int
    new_tokens: int = 16

    @property
    def name(self) -> str:
        return f"{self.num_contents}x{self.num_users}"


CASES = (Case(8, 64, 256), Case(1, 512, 512), Case(256, 2, 256))


def llama_30m() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def groups_of(case: Case, seed: int = 0) -> list[Group]:
    """Contents of exactly content_tokens bytes (begin token and cue included) and random users."""
    rng = np.random.default_rng(seed)
    found = []
    for at in range(case.num_contents):
        body = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz "), case.content_tokens - 2))
        content = Content(f"c{at}", "", body, "en")
        requests = tuple(
            Request(
                RequestKey(f"u{at}-{user}", f"c{at}", "headline"),
                rng.standard_normal(EMBEDDING_DIM).astype(np.float32),
            )
            for user in range(case.num_users)
        )
        found.append(Group(content, "headline", requests))
    return found


def make_engine(model: PreTrainedModel, case: Case, max_rows: int) -> Engine:
    prompt = PromptTemplate(content="{body}", cue_before=">")
    sampling = SamplingConfig(max_new_tokens=case.new_tokens, stop=())
    tasks = {"headline": TaskConfig(prompts={"default": prompt}, sampling=sampling, max_content_tokens=2048)}
    base = BaseModel(model)
    projector = random_projector(base.d_model, output_rms=base.token_embedding_rms)
    return Engine(base, projector, byte_tokenizer(), tasks, EngineConfig(max_rows=max_rows))


def run_engine(engine: Engine, groups: list[Group]) -> tuple[float, dict[RequestKey, str]]:
    start = time.perf_counter()
    texts = {completion.key: completion.text for completion in engine.generate(groups)}
    return len(texts) / (time.perf_counter() - start), texts


@torch.inference_mode()
def run_hf(
    model: Any, engine: Engine, groups: list[Group], case: Case, batch: int, num_rows: int
) -> tuple[float, dict[RequestKey, str]]:
    """Batched generate over the first num_rows pairs, spread over contents as they come (all of one length)."""
    pairs = [(group.content, request) for group in groups for request in group.requests][:num_rows]
    tokenizer, embed = byte_tokenizer(), model.get_input_embeddings()
    projector = engine._decoder._projector
    texts: dict[RequestKey, str] = {}
    start = time.perf_counter()
    for at in range(0, len(pairs), batch):
        part = pairs[at : at + batch]
        ids = torch.tensor([engine.layout.segments(content, "headline").left for content, _ in part])
        soft = projector(
            torch.from_numpy(
                np.stack([request.user_embedding for _, request in part if request.user_embedding is not None])
            )
        )
        embeds = torch.cat([embed(ids), soft], dim=1)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        output = model.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=case.new_tokens, do_sample=False
        )
        decoded = tokenizer.batch_decode(output, skip_special_tokens=True)
        texts.update({request.key: text.lstrip() for (_, request), text in zip(part, decoded, strict=True)})
    return len(pairs) / (time.perf_counter() - start), texts


def floor_flops(case: Case, config: LlamaConfig, num_parameters: int) -> float:
    """Arithmetic per pair of the shared computation: weights over computed tokens, attention, no padding."""
    head = int(config.vocab_size * config.hidden_size)
    body = num_parameters - head
    width = int(config.hidden_size * config.num_hidden_layers)
    prefix = case.content_tokens * (2 * body + 2 * width * case.content_tokens) / case.num_users
    decode = case.new_tokens * (2 * body + 2 * head + 4 * width * case.content_tokens)
    return prefix + decode


def measure(case: Case, *, max_rows: int, num_repeats: int, hf_rows: int) -> list[dict[str, Any]]:
    config = llama_30m()
    plain = random_model(config, attention="sdpa")
    shared = random_model(config)
    engine = make_engine(shared, case, max_rows)
    groups = groups_of(case)
    run_engine(engine, groups[:1])
    best = max(HF_BATCHES, key=lambda size: run_hf(plain, engine, groups, case, size, size)[0])
    texts: dict[str, dict[RequestKey, str]] = {}

    def ours() -> float:
        # A new engine each time: one that has run keeps its prefixes, and would be timed without their prefill.
        rate, texts["e2p_ray"] = run_engine(make_engine(shared, case, max_rows), groups)
        return rate

    def theirs() -> float:
        rate, texts["hf"] = run_hf(plain, engine, groups, case, best, hf_rows)
        return rate

    rates = interleaved({"e2p_ray": ours, "hf_generate": theirs}, num_repeats)
    equal = np.mean([texts["e2p_ray"][key] == text for key, text in texts["hf"].items()])
    num_parameters = sum(parameter.numel() for parameter in plain.parameters())
    peak = matmul_peak_flops(256, config.hidden_size)
    share = rates["e2p_ray"] * floor_flops(case, config, num_parameters) / peak
    common = {"case": case.name, "content_tokens": case.content_tokens, "new_tokens": case.new_tokens}
    return [
        common | {"system": f"hf_generate(batch {best})", "rows_per_s": rates["hf_generate"], "ratio": 1.0},
        common
        | {
            "system": "e2p_ray",
            "rows_per_s": rates["e2p_ray"],
            "ratio": rates["e2p_ray"] / rates["hf_generate"],
            "equal_texts": float(equal),
            "share_of_matmul_peak": share,
        },
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-rows", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help="one case by name, for example 8x64")
    parser.add_argument("--quick", action="store_true", help="one repeat, fewer HF rows")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for case in CASES:
        if options.only in (None, case.name):
            num_repeats, hf_rows = (1, 16) if options.quick else (options.repeats, HF_MAX_ROWS)
            results += measure(case, max_rows=options.max_rows, num_repeats=num_repeats, hf_rows=hf_rows)
    print_results("decode", results, num_threads=options.threads)


if __name__ == "__main__":
    main()

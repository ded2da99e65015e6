"""Linear layers whose weights nothing packs, as on a CPU whose oneDNN refuses bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig

from e2p_ray.engine import packed
from e2p_ray.engine.fused import FusedDecoder
from e2p_ray.engine.packed import PackedLinear, activation_of
from tests import tiny_models
from tests.test_compiled_loops import random

# 48 queries, keys and values fill no panel of outputs.
NARROW = LlamaConfig(**tiny_models.common(hidden_size=32, num_key_value_heads=1))


@pytest.fixture(autouse=True)
def without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "onednn_packs", lambda dtype: False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 9])
def test_they_are_multiplied_as_they_are(dtype: torch.dtype, num_rows: int) -> None:
    weight, bias = random(20, 48, seed=1).to(dtype) / 7, random(20, seed=2).to(dtype)
    states, other = random(num_rows, 48, seed=3).to(dtype), random(num_rows, 20, seed=4).to(dtype)
    linear, silu = PackedLinear(weight, bias), activation_of(torch.nn.SiLU())
    assert linear.panels is None
    assert linear.packed is None
    assert silu is not None
    plain, wide = states.double() @ weight.double().T + bias.double(), other.double()

    def is_close(found: Tensor, expected: Tensor) -> bool:
        rounding = 2 * torch.finfo(dtype).eps
        return found.dtype is dtype and bool(((found - expected).abs() <= rounding * (4 + expected.abs())).all())

    assert is_close(linear(states), plain)
    assert is_close(linear.then(states, silu), functional.silu(plain))
    assert is_close(linear.times(states, other), plain * wide)
    assert is_close(linear.plus(states, other), plain + wide)
    assert not is_close(linear.plus(states, other), plain), "the control must fail"


def test_few_rows_in_bfloat16_are_not_numpys() -> None:
    """The plain weights are there, but not beside others, for few rows: numpy has no bfloat16."""
    texts = []
    for keep_plain in (False, True):
        model = tiny_models.random_model(NARROW).to(torch.bfloat16)
        engine = tiny_models.engine_of(NARROW, model=model, drafts=False)
        base = engine._decoder._base
        base.pack(keep_plain=keep_plain)
        assert packed.can_pack(torch.bfloat16, base.device) == isinstance(base.fused, FusedDecoder)
        group = tiny_models.group(tiny_models.contents(1)[0], range(2))
        texts.append([completion.text for completion in engine.generate([group])])
    assert all(texts[0])
    assert texts[0] == texts[1]

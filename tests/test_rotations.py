"""Rotations that are kept are what transformers computes, for every kind of rotary embedding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from e2p_ray.engine.rotations import Rotations

HEAD_DIM = 32
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "dynamic": {"factor": 2.0},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * (HEAD_DIM // 2),
        "long_factor": [3.0] * (HEAD_DIM // 2),
    },
}


def rotary_of(kind: str) -> LlamaRotaryEmbedding:
    config = LlamaConfig(
        hidden_size=2 * HEAD_DIM,
        num_attention_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **KINDS[kind]},
    )
    return LlamaRotaryEmbedding(config)


def expected(rotary: LlamaRotaryEmbedding, positions: Tensor) -> Tensor:
    cos, sin = rotary(torch.empty(0), positions)
    return torch.complex(cos, sin)[..., : HEAD_DIM // 2].reshape(-1, 1, HEAD_DIM // 2)


@pytest.mark.parametrize("kind", KINDS)
def test_rotations_are_those_of_transformers(kind: str) -> None:
    rotary, found = rotary_of(kind), Rotations(rotary_of(kind))
    assert rotary.rope_type == kind
    # Short, longer than all before, beyond what the model was trained for, and short again.
    for positions in ([[3, 1, 2], [7, 0, 9]], [[200, 5, 90]], [[1500, 2, 3]], [[4, 3, 2]]):
        ids = torch.tensor(positions)
        assert torch.equal(found(ids), expected(rotary, ids))
        assert not torch.equal(found(ids + 1), expected(rotary, ids)), "the control must fail"


def test_rotations_are_computed_once() -> None:
    rotary = rotary_of("default")
    num_calls = []
    rotary.register_forward_hook(lambda *_: num_calls.append(1))
    found = Rotations(rotary)
    for last in (5, 100, 1023):
        found(torch.arange(last + 1)[None])
    assert len(num_calls) == 1
    found(torch.tensor([[1024]]))
    assert len(num_calls) == 2

"""Memory that layers write to in turn."""

from __future__ import annotations

import torch

from e2p_ray.engine.workspace import Workspace


def test_a_name_keeps_its_memory_and_no_other_has_it() -> None:
    workspace = Workspace()
    large = workspace.tensor("a", 4, 6, dtype=torch.float32)
    other = workspace.tensor("b", 4, 6, dtype=torch.float32)
    half = workspace.tensor("a", 4, 6, dtype=torch.bfloat16)
    small = workspace.tensor("a", 3, 5, dtype=torch.float32)
    assert small.shape == (3, 5)
    assert small.is_contiguous()
    assert small.data_ptr() == large.data_ptr()
    assert len({tensor.data_ptr() for tensor in (large, other, half)}) == 3


def test_it_grows() -> None:
    workspace = Workspace()
    small = workspace.tensor("a", 2, dtype=torch.float32).fill_(1)
    large = workspace.tensor("a", 1000, dtype=torch.float32).zero_()
    assert small.tolist() == [1, 1]
    assert len(large) == 1000

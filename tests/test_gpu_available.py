"""Where the GPU's kernels are used; what a GPU would say is made up here."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import pytest
import torch

from e2p_ray.engine.gpu import available
from e2p_ray.engine.gpu.available import has_kernels
from e2p_ray.engine.model import pick_device
from e2p_ray.errors import ConfigError

GPU = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is new enough, with Triton, which works."""
    pytest.importorskip("triton", reason="Triton comes with the extra dev")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(available, "_try_one", lambda device: None)


def asked(device: torch.device = GPU) -> bool:
    found: bool = has_kernels.__wrapped__(device)  # what it remembers is another test's
    return found


@pytest.mark.usefixtures("gpu")
class TestAvailable:
    def test_where_it_works(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert asked()

    def test_not_on_a_cpu(self) -> None:
        assert not asked(torch.device("cpu"))

    def test_not_on_an_old_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert not asked()

    def test_not_without_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert not asked()

    def test_without_a_compiler_it_says_so_and_goes_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def failing(device: Any) -> None:
            raise RuntimeError("Failed to find C compiler")

        monkeypatch.setattr(available, "_try_one", failing)
        with pytest.warns(RuntimeWarning, match=r"Failed to find C compiler.*apt-get install gcc"):
            assert not asked()

    def test_a_gpu_that_triton_does_not_know_yet(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.errors import PTXASError

        def failing(device: Any) -> None:
            raise PTXASError("Value 'sm_999' is not defined for option 'gpu-name'")

        monkeypatch.setattr(available, "_try_one", failing)
        with pytest.warns(RuntimeWarning, match=r"sm_999.*transformers' layers are used"):
            assert not asked()

    def test_memory_that_is_full_is_no_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(device: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory (made by the test)")

        monkeypatch.setattr(available, "_try_one", full)
        with pytest.raises(torch.OutOfMemoryError):
            asked()


def test_another_gpu_than_the_first_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(ConfigError, match=r"'cuda:2': .* CUDA_VISIBLE_DEVICES=2 .*device to cuda"):
        pick_device("cuda:2")
    assert [str(pick_device(device)) for device in ("auto", "cuda", "cuda:0")] == ["cuda", "cuda", "cuda:0"]

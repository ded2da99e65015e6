"""Token choice against numpy and plain definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from e2p_ray.config import SamplingConfig
from e2p_ray.engine import sampling as sampling_module
from e2p_ray.engine.row_sampling import RowSampling
from e2p_ray.engine.sampling import choose
from e2p_ray.engine.streams import stream_key, uniforms
from e2p_ray.schema import RequestKey


def rows(sampling: SamplingConfig, num: int) -> RowSampling:
    return RowSampling.of([(sampling, stream_key(RequestKey(f"u{n}", "c", "t"), sampling.seed, 0)) for n in range(num)])


def choices(logits: torch.Tensor, sampling: SamplingConfig, num: int = 20000) -> np.ndarray:
    nothing = np.zeros((num, 1), np.int64)
    return choose(logits.repeat(num, 1), rows(sampling, num), nothing, np.zeros(num, np.int64)).fetched().tokens


def test_sampling_follows_the_tempered_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, -3.0]])
    for temperature in (0.5, 1.0, 2.0):
        drawn = np.bincount(choices(logits, SamplingConfig(temperature=temperature)), minlength=5) / 20000
        expected = torch.softmax(logits[0] / temperature, -1).numpy()
        assert np.abs(drawn - expected).max() < 0.015


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0, -1.0]])
    assert set(choices(logits, SamplingConfig(temperature=1.0, top_k=2))) == {1, 3}
    # softmax: 0.64 0.24 0.09 ...: the smallest set that reaches 0.8 is the first two
    assert set(choices(logits, SamplingConfig(temperature=1.0, top_p=0.8))) == {1, 3}
    assert set(choices(logits, SamplingConfig(temperature=1.0, top_p=1e-6))) == {1}
    assert set(choices(logits, SamplingConfig(temperature=1.0))) == {0, 1, 2, 3, 4}


def test_greedy_rows_beside_sampled_rows_stay_greedy() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    sampled, greedy = SamplingConfig(temperature=1.5), SamplingConfig()
    mixed = RowSampling.of([(greedy if n % 2 else sampled, n) for n in range(6)])
    zeros = np.zeros((6, 1), np.int64)
    chosen = choose(logits.clone(), mixed, zeros, np.zeros(6, np.int64)).fetched()
    assert (chosen.tokens[1::2] == logits.argmax(-1).numpy()[1::2]).all()
    expected = torch.log_softmax(logits, -1)[range(6), chosen.tokens].numpy()
    assert np.allclose(chosen.logprobs, expected, atol=1e-5)


def test_repetition_penalty_equals_its_definition() -> None:
    logits = torch.tensor([[1.0, 2.0, -1.0, 0.5]])
    sampling = SamplingConfig(repetition_penalty=2.0)
    written = np.array([[1, 2]])
    # 2.0 / 2 = 1.0 ties with token 0, which comes first; -1 * 2 = -2
    assert choose(logits.clone(), rows(sampling, 1), written, np.array([2])).fetched().tokens[0] == 0
    assert choose(logits.clone(), rows(sampling, 1), written, np.array([0])).fetched().tokens[0] == 1


def test_rows_without_finite_logits_are_reported() -> None:
    logits = torch.zeros(5, 8)
    logits[1, 3], logits[2, 0], logits[3] = float("nan"), float("inf"), float("-inf")
    logits[4, :7] = float("-inf")
    for sampling in (SamplingConfig(), SamplingConfig(temperature=1.0)):
        chosen = choose(logits.clone(), rows(sampling, 5), np.zeros((5, 1), np.int64), np.zeros(5, np.int64)).fetched()
        assert chosen.finite.tolist() == [True, False, False, False, True]
        assert chosen.tokens[4] == 7


def plain_cut(logits: np.ndarray, temperature: float, top_k: int, top_p: float, draw: float) -> int:
    """Top-k, top-p and inversion as they are defined, one row in plain numpy."""
    scaled = logits.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    kept = order[: top_k or len(order)]
    mass = p[kept] / (p[kept].sum() if top_k else 1.0)
    before = np.cumsum(mass) - mass
    kept = kept[(before < top_p) | (np.arange(len(kept)) == 0)]
    if not top_k and top_p >= 1:
        kept = np.arange(len(p))
    cumulative = np.cumsum(p[kept])
    return int(kept[min(np.searchsorted(cumulative, draw * cumulative[-1], side="right"), len(kept) - 1)])


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.9), (40, 0.7), (3000, 0.99), (0, 0.999)])
def test_a_large_vocabulary_is_cut_as_defined(top_k: int, top_p: float) -> None:
    """3,000 tokens, flat enough that the likeliest thousand do not always suffice, and with many equal logits."""
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(200, 3000, generator=generator) * 2).bfloat16().float()
    sampling = SamplingConfig(temperature=1.1, top_k=top_k, top_p=top_p)
    chosen = (
        choose(logits.clone(), rows(sampling, 200), np.zeros((200, 1), np.int64), np.zeros(200, np.int64))
        .fetched()
        .tokens
    )
    draws = uniforms(rows(sampling, 200).streams, np.zeros(200, np.int64))
    expected = [plain_cut(logits[n].numpy(), 1.1, top_k, top_p, draws[n]) for n in range(200)]
    assert chosen.tolist() == expected
    one_by_one = [
        choose(
            logits[n : n + 1].clone(),
            rows(sampling, 200).take(np.array([n])),
            np.zeros((1, 1), np.int64),
            np.zeros(1, np.int64),
        ).fetched()
        for n in range(0, 200, 20)
    ]
    assert [int(item.tokens[0]) for item in one_by_one] == expected[::20]


@pytest.mark.parametrize("size", [1, 3, 40])
def test_rows_sampled_some_at_a_time_get_the_same_tokens(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    logits = torch.from_numpy(rng.standard_normal((9, 3000), np.float32))
    configs = [SamplingConfig(temperature=0.9 * (at % 3 > 0), top_p=0.5 if at % 4 else 1.0) for at in range(9)]
    sampling = RowSampling.of([(config, at) for at, config in enumerate(configs)])
    written, num_written = np.zeros((9, 4), np.int64), np.zeros(9, np.int64)
    expected = choose(logits.clone(), sampling, written, num_written).fetched()
    widest, plain = 0, sampling_module._sample

    def watched(some: torch.Tensor, *rest: Any) -> torch.Tensor:
        nonlocal widest
        widest = max(widest, len(some))
        return plain(some, *rest)

    monkeypatch.setattr(sampling_module, "_sample", watched)
    choose(logits.clone(), sampling, written, num_written)
    assert widest == 6, "the control"
    monkeypatch.setattr(sampling_module, "_MAX_SAMPLED", {"cpu": size * 3000})
    widest = 0
    found = choose(logits.clone(), sampling, written, num_written).fetched()
    assert widest == min(size, 6)
    assert (found.tokens == expected.tokens).all()
    assert (found.logprobs == expected.logprobs).all()

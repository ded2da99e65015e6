"""Choosing tokens: greedy or sampled, from one counter-based random stream a request.

The number drawn for a request at a step is a function of (seed, request, attempt, step) and of nothing else, so that a
text does not depend on its neighbours, their order, a retry or the number of workers. Philox4x32-10 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from e2p_ray.config import SamplingConfig
from e2p_ray.schema import RequestKey

_UInt32 = npt.NDArray[np.uint64]  # 32-bit words kept in 64 bits, so that products do not overflow
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(counter: Sequence[_UInt32], key: Sequence[_UInt32]) -> tuple[_UInt32, _UInt32, _UInt32, _UInt32]:
    """Philox4x32 with ten rounds: four counter words and two key words, each (n,), to four random words (n,)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _MASK, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def stream_key(key: RequestKey, seed: int, attempt: int) -> int:
    """The 64-bit name of a request's random stream."""
    text = "\x1f".join((*key, str(seed), str(attempt)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def uniforms(streams: npt.NDArray[np.uint64], steps: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each (stream, step), both (n,)."""
    zero = np.zeros_like(streams)
    words = philox((steps.astype(np.uint64), zero, zero, zero), (streams & _MASK, streams >> _SHIFT))
    return ((words[0] << np.uint64(21)) ^ (words[1] >> np.uint64(11))).astype(np.float64) * 2.0**-53


@dataclass(frozen=True, slots=True, eq=False)
class RowSampling:
    """The sampling of every active row of a wave, as arrays (n,)."""

    temperature: npt.NDArray[np.float64]
    top_p: npt.NDArray[np.float64]
    top_k: npt.NDArray[np.int64]
    repetition_penalty: npt.NDArray[np.float64]
    no_repeat_ngram_tokens: npt.NDArray[np.int64]
    streams: npt.NDArray[np.uint64]

    @classmethod
    def of(cls, rows: Sequence[tuple[SamplingConfig, int]]) -> RowSampling:
        """From each row's sampling and stream."""
        configs = [config for config, _ in rows]
        return cls(
            np.array([c.temperature for c in configs], np.float64),
            np.array([c.top_p for c in configs], np.float64),
            np.array([c.top_k for c in configs], np.int64),
            np.array([c.repetition_penalty for c in configs], np.float64),
            np.array([c.no_repeat_ngram_tokens for c in configs], np.int64),
            np.array([stream for _, stream in rows], np.uint64),
        )

    def take(self, rows: npt.NDArray[np.int64]) -> RowSampling:
        return RowSampling(
            self.temperature[rows],
            self.top_p[rows],
            self.top_k[rows],
            self.repetition_penalty[rows],
            self.no_repeat_ngram_tokens[rows],
            self.streams[rows],
        )

    def join(self, other: RowSampling) -> RowSampling:
        return RowSampling(
            np.concatenate((self.temperature, other.temperature)),
            np.concatenate((self.top_p, other.top_p)),
            np.concatenate((self.top_k, other.top_k)),
            np.concatenate((self.repetition_penalty, other.repetition_penalty)),
            np.concatenate((self.no_repeat_ngram_tokens, other.no_repeat_ngram_tokens)),
            np.concatenate((self.streams, other.streams)),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """Tokens (n,), their log-probabilities under the model itself (n,), and which rows had finite logits (n,)."""

    tokens: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float32]
    finite: npt.NDArray[np.bool_]


def choose(
    logits: Tensor, sampling: RowSampling, written: npt.NDArray[np.int64], num_written: npt.NDArray[np.int64]
) -> Chosen:
    """Choose the next token of every row.

    logits (n, V) float32; written (n, max_new) token ids so far, of which num_written (n,) count. A row whose logits
    hold NaN or +Inf, or nothing above -Inf, is reported as not finite and its token means nothing.
    """
    total = torch.logsumexp(logits, dim=-1)
    finite = torch.isfinite(total)
    controlled = np.flatnonzero((sampling.repetition_penalty > 1) | (sampling.no_repeat_ngram_tokens > 0))
    adjusted = logits
    if len(controlled):
        adjusted = logits.clone()
        _control_repetition(adjusted, controlled, sampling, written, num_written)
    tokens = adjusted.argmax(dim=-1)
    sampled = np.flatnonzero(sampling.temperature > 0)
    if len(sampled):
        numbers = uniforms(sampling.streams[sampled], num_written[sampled])
        rows = torch.from_numpy(sampled).to(logits.device)
        tokens[rows] = _sample(adjusted[rows], sampling.take(sampled), numbers)
    logprobs = logits.gather(1, tokens[:, None]).squeeze(1) - total
    return Chosen(tokens.cpu().numpy(), logprobs.cpu().numpy(), finite.cpu().numpy())


def _control_repetition(
    logits: Tensor,
    rows: npt.NDArray[np.int64],
    sampling: RowSampling,
    written: npt.NDArray[np.int64],
    num_written: npt.NDArray[np.int64],
) -> None:
    """Penalise, in place, the tokens a row has written already, and forbid those that would repeat an n-gram."""
    for row in rows:
        tokens = written[row, : num_written[row]]
        penalty = float(sampling.repetition_penalty[row])
        if penalty > 1 and len(tokens):
            seen = torch.from_numpy(np.unique(tokens)).to(logits.device)
            values = logits[row, seen]
            logits[row, seen] = torch.where(values > 0, values / penalty, values * penalty)
        forbidden = _repeating_tokens(tokens, int(sampling.no_repeat_ngram_tokens[row]))
        if len(forbidden):
            logits[row, torch.from_numpy(forbidden).to(logits.device)] = -torch.inf


def _repeating_tokens(tokens: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """The tokens that would complete an n-gram of this size a second time."""
    if size < 1 or len(tokens) < size:
        return tokens[:0]
    grams = np.lib.stride_tricks.sliding_window_view(tokens, size)
    last = tokens[len(tokens) - size + 1 :]
    return np.unique(grams[(grams[:, :-1] == last).all(axis=1), -1])


def _sample(logits: Tensor, sampling: RowSampling, numbers: npt.NDArray[np.float64]) -> Tensor:
    """Inverse-CDF sampling in float64 after temperature, top-k and top-p. Ties keep the order of token ids."""
    device = logits.device
    scaled = logits.double() / torch.from_numpy(sampling.temperature).to(device)[:, None]
    values, order = torch.sort(scaled, dim=-1, descending=True, stable=True)
    probabilities = torch.softmax(values, dim=-1)
    rank = torch.arange(values.shape[1], device=device)
    top_k = torch.from_numpy(sampling.top_k).to(device)[:, None]
    probabilities = probabilities.masked_fill((top_k > 0) & (rank >= top_k), 0.0)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    before = probabilities.cumsum(-1) - probabilities
    top_p = torch.from_numpy(sampling.top_p).to(device)[:, None]
    probabilities = probabilities.masked_fill((before >= top_p) & (rank > 0), 0.0)
    cumulative = probabilities.cumsum(-1)
    target = torch.from_numpy(numbers).to(device)[:, None] * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True)
    last = (probabilities > 0).long().mul(rank).amax(-1, keepdim=True)
    return order.gather(1, torch.minimum(place, last)).squeeze(1)

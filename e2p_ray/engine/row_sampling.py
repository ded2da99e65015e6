"""How the rows of a wave are sampled, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from e2p_ray.config import SamplingConfig


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

    @property
    def is_greedy(self) -> bool:
        """Whether every row takes its likeliest token."""
        free = (self.temperature <= 0) & (self.repetition_penalty <= 1) & (self.no_repeat_ngram_tokens <= 0)
        return bool(free.all())

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

"""What a training tells of itself: its curves and its scores; no torch here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One point of the curves; losses in nats per target token."""

    step: int  # steps done
    loss: float
    learning_rate: float
    gradient_norm: float
    num_tokens: int
    validation_loss: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Nats of every row's target by control, (n,) each; its tokens (n,) and its user (n,), a number without meaning."""

    nll: dict[str, npt.NDArray[np.float64]]
    num_tokens: npt.NDArray[np.int64]
    user: npt.NDArray[np.int32]

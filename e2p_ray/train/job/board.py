"""The board of a training: an actor where workers say how far they are, and the driver reads it."""

from __future__ import annotations

from dataclasses import dataclass

from e2p_ray.errors import E2PError


@dataclass(frozen=True, slots=True)
class TrainProgress:
    """How far a training is. Losses in nats per target token; seconds and tokens of this call's training alone."""

    num_steps: int
    step: int
    first_step: int  # steps done when the workers began or came back
    loss: float | None = None
    validation_loss: float | None = None
    num_tokens: int = 0
    seconds_s: float = 0.0
    num_starts: int = 1  # of the workers; more than one after workers were lost
    words: str = ""  # what else happened, for people

    @property
    def steps_per_s(self) -> float:
        return (self.step - self.first_step) / self.seconds_s if self.seconds_s > 0 else 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds_s if self.seconds_s > 0 else 0.0


class Board:
    """An actor's state. Ray Train hands errors over as text and tries again; here they keep their type and count."""

    def __init__(self) -> None:
        self._progress: TrainProgress | None = None
        self._failure: E2PError | None = None
        self._hashes: dict[int, str] = {}
        self._num_starts = 0

    def start(self, rank: int) -> tuple[int, bool]:
        """How often the workers have started, and whether there is still something to do."""
        self._num_starts += rank == 0
        return self._num_starts, self._failure is None

    def post(self, progress: TrainProgress) -> None:
        self._progress = progress

    def post_hash(self, rank: int, weights_hash: str) -> None:
        """The base model's hash on one worker, after training as before."""
        self._hashes[rank] = weights_hash

    def fail(self, error: E2PError) -> None:
        """What starting the workers again would not mend; the first one stays."""
        self._failure = self._failure or error

    def read(self) -> tuple[TrainProgress | None, E2PError | None]:
        return self._progress, self._failure

    def hashes(self) -> dict[int, str]:
        return self._hashes

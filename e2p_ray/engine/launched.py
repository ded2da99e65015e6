"""A pass that has been launched, and the tokens that come of it: on a GPU, some time later."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from e2p_ray.engine.chosen import Choice

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Launched:
    """Of the rows in slots (n,): guesses (n, width), which follow the last of their own tokens, and how many each has.

    `choices`: what is chosen for some of the places (n, width), by row and column.
    """

    slots: _Ints
    guesses: _Ints
    num_guessed: _Ints
    choices: list[tuple[_Ints, _Ints, Choice]] = field(default_factory=list)

    @property
    def asked(self) -> npt.NDArray[np.bool_]:
        """(n, width): behind each row's own last token, and behind each of its guesses."""
        return np.arange(self.guesses.shape[1]) <= self.num_guessed[:, None]

    def chosen(self) -> tuple[_Ints, npt.NDArray[np.float32]]:
        """Tokens (-1 without finite logits) and log-probabilities, both (n, width); waits until they are there."""
        tokens, logprobs = np.full(self.guesses.shape, -1, np.int64), np.zeros(self.guesses.shape, np.float32)
        for row, column, choice in self.choices:
            found = choice.fetched()
            tokens[row, column] = np.where(found.finite, found.tokens, -1)
            logprobs[row, column] = found.logprobs
        return tokens, logprobs

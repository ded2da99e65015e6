"""When a row is done, and what its text is: end tokens, stop strings, caps on tokens and characters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from e2p_ray.config import SamplingConfig
from e2p_ray.schema import FinishReason

_PARTIAL = "\ufffd"  # what a tokenizer shows for the bytes of an unfinished character
_MAX_UNFINISHED = 4  # tokens of one: three of its bytes, and an end token behind them


class Stopping:
    """Decides after every token; looks at text only when the new token could have completed something.

    Raises nothing; ids beyond the tokenizer's vocabulary (padded output layers) decode to nothing.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        end_tokens: Sequence[int],
        samplings: Mapping[str, SamplingConfig],
    ) -> None:
        self._tokenizer = tokenizer
        self._is_end = np.zeros(vocab_size, np.bool_)
        self._is_end[[token for token in end_tokens if 0 <= token < vocab_size]] = True
        num_known = min(len(tokenizer), vocab_size)
        texts = _texts_within(tokenizer, num_known)
        self._max_chars_of = np.ones(vocab_size, np.int64)  # one more is an upper bound in any case
        self._max_chars_of[:num_known] += [len(text) for text in texts]
        self._numbers = {stop: at for at, stop in enumerate({(), *(sampling.stop for sampling in samplings.values())})}
        self._may_stop = np.zeros((len(self._numbers), vocab_size), np.bool_)
        for stop, at in self._numbers.items():
            if stop:
                last = {text[-1] for text in stop if text}
                self._may_stop[at, :num_known] = [_PARTIAL in text or not last.isdisjoint(text) for text in texts]

    def is_end(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which tokens (n,) end a text."""
        return self._is_end[tokens]

    def max_chars_of(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """An upper bound of the characters each token (n,) adds."""
        return self._max_chars_of[tokens]

    def number_of(self, stop: tuple[str, ...]) -> int:
        """By which `may_stop` knows these stop strings."""
        return self._numbers[stop]

    def may_stop(self, numbers: int | npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of these tokens (n,) can complete one of their rows' stop strings, by number, (n,) or one for all."""
        found: npt.NDArray[np.bool_] = self._may_stop[numbers, tokens]
        return found

    def reason(self, tokens: npt.NDArray[np.int64], sampling: SamplingConfig) -> FinishReason | None:
        """Whether the text of these tokens has reached a stop string, or has more characters than it may have."""
        text, at = self._until_stop(tokens, sampling)
        if sampling.max_chars is not None and len(text) > sampling.max_chars:
            return FinishReason.MAX_CHARS
        return None if at is None else FinishReason.STOP_STRING

    def text(self, tokens: npt.NDArray[np.int64], sampling: SamplingConfig) -> str:
        """The text of these tokens, without leading white space, cut at the first stop string and the cap."""
        return self._until_stop(tokens, sampling)[0][: sampling.max_chars]

    def _until_stop(self, tokens: npt.NDArray[np.int64], sampling: SamplingConfig) -> tuple[str, int | None]:
        """The text without leading white space up to its first stop string, and where that begins."""
        text = self._whole_characters(tokens.tolist())
        at = _first_stop(text, sampling.stop)
        return text[:at].lstrip(), at

    def _whole_characters(self, tokens: list[int]) -> str:
        """Their text without an unfinished character at its end.

        A tokenizer that spells characters in bytes shows a whole run of them as unknown while its last character is
        unfinished, those before it included: without that one's bytes, they are there.
        """
        text = self._decode(tokens)
        if not text.endswith(_PARTIAL):
            return text
        shorter = (self._decode(tokens[:-num_bytes]) for num_bytes in range(1, _MAX_UNFINISHED + 1))
        return max((found.rstrip(_PARTIAL) for found in (text, *shorter)), key=len)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def _texts_within(tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> list[str]:
    """What each of the first tokens adds to a text. Alone, one of SentencePiece loses the blank that it begins with."""
    for reference in range(num_tokens):
        begin = str(tokenizer.decode([reference]))
        if begin.isascii() and begin.isalpha():
            found = tokenizer.batch_decode([[reference, token] for token in range(num_tokens)])
            return [str(text).removeprefix(begin) for text in found]
    return [str(text) for text in tokenizer.batch_decode([[token] for token in range(num_tokens)])]


def _first_stop(text: str, stop: tuple[str, ...]) -> int | None:
    """Where the first stop string begins; one within the leading white space does not count."""
    start = len(text) - len(text.lstrip())
    found = [at for at in (text.find(item, start) for item in stop if item) if at >= 0]
    return min(found) if found else None

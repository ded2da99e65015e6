"""Where texts end: a cap counts whole characters, and no text ends within one, whatever a tokenizer makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from e2p_ray.config import SamplingConfig
from e2p_ray.engine.stopping import Stopping
from e2p_ray.schema import FinishReason
from tests import tiny_models

TOKENIZERS = {
    "bytes": tiny_models.byte_tokenizer(),
    "byte_fallback": tiny_models.byte_fallback_tokenizer("東京都の橋が開く新 abc"),
}
# All of the first two but one character are in the vocabulary of the second tokenizer; of the others, few.
TEXTS = ("abc bcaab", "東京都の橋が開く鬱", "東京鬱龗", "鬱", "🌉🗼🌸🌊", "鬱\ufffd橋", "a\ufffd🌉b")


class Written:
    """A row that writes these tokens one by one, as the engine looks at them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, text: str, end: int | None, **sampling: Any) -> None:
        self.sampling = SamplingConfig(**{"max_new_tokens": 999, "stop": ()} | sampling)
        self.ids = [*tokenizer.encode(text, add_special_tokens=False), *([] if end is None else [end])]
        stopping = Stopping(tokenizer, len(tokenizer), [tokenizer.eos_token_id], {"headline": self.sampling})
        self.so_far = list[str]()
        self.reason: FinishReason | None = None
        for count in range(1, len(self.ids) + 1):
            tokens = np.array(self.ids[:count])
            self.so_far.append(stopping.text(tokens, self.sampling))
            self.reason = stopping.reason(tokens, self.sampling)
            if self.reason is None and stopping.is_end(tokens[-1:])[0]:
                self.reason = FinishReason.END_TOKEN
            if self.reason is not None:
                break

    @property
    def text(self) -> str:
        return self.so_far[-1]


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
class TestCharacters:
    @pytest.mark.parametrize("text", TEXTS)
    def test_a_text_of_exactly_the_cap_is_finished_and_a_longer_one_is_cut_to_it(
        self, tokenizer: PreTrainedTokenizerFast, text: str
    ) -> None:
        for cap in range(1, len(text) + 3):
            found = Written(tokenizer, text, tokenizer.eos_token_id, max_chars=cap)
            reason = FinishReason.END_TOKEN if len(text) <= cap else FinishReason.MAX_CHARS
            assert (found.text, found.reason) == (text[:cap], reason)
            if reason is FinishReason.MAX_CHARS and "\ufffd" not in text:
                seen = tokenizer.decode(found.ids[: len(found.so_far)])
                assert len(seen.lstrip()) == cap + 1, "it costs no more than the next character"

    @pytest.mark.parametrize("stop", ["a ", " ", " b", "の", "鬱"])
    def test_a_token_that_completes_a_stop_string_is_looked_at(
        self, tokenizer: PreTrainedTokenizerFast, stop: str
    ) -> None:
        """Also a blank, of which a tokenizer with byte fallback shows nothing where it stands alone."""
        sampling = SamplingConfig(max_new_tokens=999, stop=(stop,))
        stopping = Stopping(tokenizer, len(tokenizer), [tokenizer.eos_token_id], {"headline": sampling})
        number, num_found = stopping.number_of((stop,)), 0
        for text in (*TEXTS, "ca bca b"):
            ids = np.array(tokenizer.encode(text, add_special_tokens=False))
            reasons = [stopping.reason(ids[:count], sampling) for count in range(1, len(ids) + 1)]
            if FinishReason.STOP_STRING in reasons:
                at = reasons.index(FinishReason.STOP_STRING)
                assert stopping.may_stop(number, ids[at : at + 1])[0]
                num_found += 1
        assert num_found

    @pytest.mark.parametrize("text", TEXTS)
    def test_no_text_ends_within_a_character(self, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        """At whatever token it is looked at, when streamed or cut by max_new_tokens; what was shown stays."""
        found = Written(tokenizer, text, tokenizer.eos_token_id)
        assert found.text == text
        assert set(found.so_far) - {""} == {text[:length].rstrip("\ufffd") for length in range(1, len(text) + 1)} - {""}
        assert found.so_far == sorted(found.so_far, key=len)
        decoded = [tokenizer.decode(found.ids[:count]) for count in range(1, len(found.ids))]
        assert text.isascii() or any(one.endswith("\ufffd") for one in decoded), "the control: they do, as decoded"

    def test_an_end_token_within_a_character(self, tokenizer: PreTrainedTokenizerFast) -> None:
        stopping = Stopping(tokenizer, len(tokenizer), [tokenizer.eos_token_id], {})
        ids = [*tokenizer.encode("橋🌉", add_special_tokens=False)[:-1], tokenizer.eos_token_id]
        assert stopping.text(np.array(ids), SamplingConfig()) == "橋"

    def test_a_cap_comes_before_a_stop_string_behind_it(self, tokenizer: PreTrainedTokenizerFast) -> None:
        for cap, reason in ((2, FinishReason.MAX_CHARS), (3, FinishReason.STOP_STRING)):
            found = Written(tokenizer, "abcの橋", None, max_chars=cap, stop=("の",))
            assert (found.text, found.reason) == ("abc"[:cap], reason)

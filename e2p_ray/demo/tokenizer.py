"""The demo's tokenizer: byte-level BPE for English and Japanese, trained on the newsroom's own texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from e2p_ray.demo.newsroom import ANGLE_WORDS, CUES, TASKS, Article

BOS, EOS, PAD = "<s>", "</s>", "<pad>"

# Scripts never share a token, so a Japanese name has the same tokens whatever particle follows it; numbers up to 99
# are one token each, with and without a space before them, so that copying one takes one step.
_PIECES = r" ?\p{N}{1,2}| ?[\p{Han}々]+| ?\p{Hiragana}+| ?[\p{Katakana}ー]+| ?\p{L}+| ?[^\s\p{L}\p{N}]|\s+(?!\S)|\s+"
_NUMBERS = [space + str(number) for number in range(100) for space in ("", " ")]
_REPEATS = 2000  # puts a piece above every other pair in the count of merges


def train_tokenizer(articles: Sequence[Article], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer in which every angle word and every number from 0 to 99 is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(articles), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)
    words = [word for by_angle in ANGLE_WORDS.values() for word in by_angle.values()]
    for piece in (*words, *_NUMBERS):
        assert len(fast.encode(piece, add_special_tokens=False)) == 1, f"{piece!r} must be one token"
    return fast


def _corpus(articles: Sequence[Article]) -> Iterator[str]:
    for _ in range(_REPEATS):
        yield from _NUMBERS
        for by_angle in ANGLE_WORDS.values():
            yield from by_angle.values()
        for by_task in CUES.values():
            yield from by_task.values()
    for article in articles:
        yield f"{article.title}\n\n{article.body}"
        space = " " if article.language == "en" else ""
        for task in TASKS:
            for angle in article.angles:
                yield from (space + text for text in angle.texts[task])

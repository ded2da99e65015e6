"""Training sequences of the base model: one content, then all its texts as branches that do not see each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from e2p_ray.demo.newsroom import ANGLE_WORDS, ANGLES, CUES, QUOTE, TASKS, TEXT_PREFIX, Article, pick_text

NO_TARGET = -100
_MAX_QUOTES = 2  # an article


@dataclass(slots=True)
class Packed:
    """One article as lists of equal length. A branch's angle position holds two angle words and the first's share."""

    ids: list[int]
    positions: list[int]
    cues: list[int]  # 0 content, 1.. the cue this token belongs to or stands behind
    branches: list[int]  # 0 content and cues, 1.. texts
    targets: list[int]
    mixes: list[tuple[int, int, float]]  # place, other angle word, share of the word at that place

    def add(self, ids: Sequence[int], start: int, cue: int, branch: int, targets: Sequence[int]) -> None:
        self.ids += ids
        self.positions += range(start, start + len(ids))
        self.cues += [cue] * len(ids)
        self.branches += [branch] * len(ids)
        self.targets += targets


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Padded arrays (n, t); visible (n, 1, t, t); mixes as index tensors with shares (m,)."""

    ids: Tensor
    positions: Tensor
    targets: Tensor
    visible: Tensor
    mix_row: Tensor
    mix_place: Tensor
    mix_other: Tensor
    mix_share: Tensor


class Packer:
    """Turns articles into packed sequences; every piece is tokenised by itself, as the engine does."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._bos, self._eos, self._pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        self._words = {
            language: {angle: self._encode(word)[0] for angle, word in by_angle.items()}
            for language, by_angle in ANGLE_WORDS.items()
        }
        self._cues = {
            language: {task: self._encode(cue) for task, cue in by_task.items()} for language, by_task in CUES.items()
        }

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def pack(self, article: Article, random: Random) -> Packed:
        """The content, both cues, and behind each cue a text for every angle, one for a missing angle, one for none."""
        packed = Packed([], [], [], [], [], [])
        content = [self._bos, *self._encode(f"{article.title}\n\n{article.body}")]
        packed.add(content, 0, 0, 0, [NO_TARGET] * len(content))
        branch = 0
        for cue, task in enumerate((*TASKS, QUOTE), start=1):
            ids = self._cues[article.language][task]
            start = len(content) + len(ids)
            plain = self._text(article.plain[task], article.language, random)
            packed.add(ids, len(content), cue, 0, [NO_TARGET] * (len(ids) - 1) + plain[:1])
            branch += 1
            packed.add(plain[:-1], start, cue, branch, plain[1:])
            wishes = self._wishes(article, random)
            for angle, other, share in random.sample(wishes, _MAX_QUOTES) if task == QUOTE else wishes:
                branch += 1
                told = article.angle(angle) or article.angle(other)
                texts = told.texts[task] if told is not None else article.plain[task]
                text = self._text(texts, article.language, random)
                words = self._words[article.language]
                packed.mixes.append((len(packed.ids), words[other], share))
                packed.add([words[angle], *text[:-1]], start, cue, branch, text)
        return packed

    def _text(self, texts: Sequence[str], language: str, random: Random) -> list[int]:
        return [*self._encode(TEXT_PREFIX[language] + pick_text(texts, random)), self._eos]

    @staticmethod
    def _wishes(article: Article, random: Random) -> list[tuple[str, str, float]]:
        """(first wish, second wish, share of the first): mixtures, so that points between the words mean something."""
        has = [angle.angle for angle in article.angles]
        lacks = [angle for angle in ANGLES if angle not in has]
        wishes = [(angle, random.choice(ANGLES), random.choice((1.0, random.uniform(0.6, 1.0)))) for angle in has]
        missing = random.choice(lacks)
        wishes.append((missing, random.choice(has), random.uniform(0.6, 0.9)))
        return wishes

    def batch(self, packed: Sequence[Packed]) -> Batch:
        """Pad to the longest and build the mask: a token sees earlier tokens of its own branch, cue and content."""
        n, t = len(packed), max(len(item.ids) for item in packed)
        ids = torch.full((n, t), self._pad)
        positions = torch.zeros((n, t), dtype=torch.long)
        targets = torch.full((n, t), NO_TARGET)
        cues = torch.full((n, t), -1)
        branches = torch.full((n, t), -1)
        for row, item in enumerate(packed):
            length = len(item.ids)
            for array, values in (
                (ids, item.ids), (positions, item.positions), (targets, item.targets), (cues, item.cues),
                (branches, item.branches),
            ):  # fmt: skip
                array[row, :length] = torch.tensor(values)
        same_branch = branches[:, :, None] == branches[:, None, :]
        trunk = (branches[:, None, :] == 0) & ((cues[:, None, :] == 0) | (cues[:, :, None] == cues[:, None, :]))
        visible = (same_branch & (cues[:, :, None] == cues[:, None, :])) | trunk
        visible = visible & torch.ones(t, t, dtype=torch.bool).tril()
        mixes = [(row, *mix) for row, item in enumerate(packed) for mix in item.mixes]
        rows, places, others, shares = (torch.tensor(column) for column in zip(*mixes, strict=True))
        return Batch(ids, positions, targets, visible[:, None], rows, places, others, shares)

"""Drafts: guesses of what a row will write, verified several tokens at a time instead of decoded one by one.

A guess is the text that an earlier run published for the request, or what other users' rows have written for the same
content. It never changes a text: of the tokens a pass was given, those are kept that the model chose as well, and
a sampled row's random numbers are a function of request and step (speculative decoding, arXiv 2211.17192, with guesses
that cost nothing). Which guess a row has and how it fares is in guesses.py, how far rows are guessed ahead in reach.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from e2p_ray.engine.agreement import Agreement, Source, new_agreements
from e2p_ray.engine.prompt import text_ids
from e2p_ray.engine.row import Row
from e2p_ray.engine.told import TokenIds, Told, ToldTexts
from e2p_ray.engine.worth import Worth, kind_of
from e2p_ray.schema import UserEmbedding

_Number = TypeVar("_Number", int, npt.NDArray[np.int64])

_MAX_REALIGNED = 3  # a row whose draft went wrong is set on it again this many times
_REACH = 8  # tokens around the place that it left
_BLANKS = (" ", "\u0120", "\u2581")  # how tokenizers write the blank that a token begins with
_MAX_SEEN = 64
_MANY = 64  # texts, that become tokens together
_SURE = 16  # texts of which so many more began one way than the other: drafts are tried that way alone


class Guess(NamedTuple):
    """A guess for a row: a whole text that begins with what it wrote."""

    tokens: TokenIds
    source: Source


def pair_of(before: _Number, last: _Number) -> _Number:
    """Two tokens as one number."""
    return before << 32 | last


class RowDraft:
    """What one row may be guessed to write: its own draft, begun in one way or another, and what is told."""

    __slots__ = ("_num_known", "_num_realigned", "_own", "_pairs", "_told", "_user", "_waiting", "kind")

    def __init__(self, given: Sequence[TokenIds], told: Told, user: UserEmbedding | None, kind: int = 0) -> None:
        self._told, self._user, self.kind = told, user, kind
        self._num_known = 0  # of the texts told of its content
        self._waiting = [*self._news(), *(Guess(text, Source.GIVEN) for text in reversed(given))]  # the last one first
        self._own = given[0] if given else ()
        self._pairs: set[int] | None = None
        self._num_realigned = 0

    @property
    def has_news(self) -> bool:
        """Whether texts have been told that the row was not compared with."""
        return self._num_known < self._told.num_new

    @property
    def may_realign(self) -> bool:
        """Whether its own draft may be set on again behind what it writes."""
        return len(self._own) > 2 and self._num_realigned < _MAX_REALIGNED

    def has_pair(self, pair: int) -> bool:
        """Whether two tokens, as `pair_of` says them, stand in its own draft before another one.

        A set of numbers is one object for the garbage collector; places by pairs were dozens a row.
        """
        if self._pairs is None:
            self._pairs = {pair_of(*two) for two in pairwise(self._own[:-1])}
        return pair in self._pairs

    @property
    def likely_length(self) -> int:
        """Of its draft, or of what was told last; 0 where nothing is known."""
        return len(self._own) or len(self._told.last)

    def next(self, written: list[int]) -> Guess | None:
        """The next guess that begins as the row did."""
        while self._waiting or self.has_news:
            if not self._waiting:
                self._waiting = self._news()
            found = self._waiting.pop()
            if len(found.tokens) > len(written) and list(found.tokens[: len(written)]) == written:
                return found
        return None

    def _news(self) -> list[Guess]:
        """What was told since it last looked, the likeliest behind all others."""
        told = self._told.order_for(self._user, self._num_known)
        self._num_known = self._told.num_new
        return [Guess(text, Source.TOLD) for text in reversed(told)]

    def realigned(self, written: list[int]) -> Guess | None:
        """Its own draft behind the nearest place where that has the row's last two tokens."""
        at, last = len(written), tuple(written[-2:])
        places = range(max(at - _REACH, 2), min(at + _REACH, len(self._own) - 1) + 1)
        near = [place for place in places if self._own[place - 2 : place] == last]
        if not near:
            return None
        self._num_realigned += 1
        place = min(near, key=lambda place: abs(place - at))
        return Guess((*written, *self._own[place:]), Source.REALIGNED)


@dataclass(slots=True)
class Experience:
    """What an engine has seen of its drafts."""

    agreements: tuple[Agreement, ...] = field(default_factory=new_agreements)  # by `Source`
    worth: Worth = field(default_factory=Worth)
    num_after_blank: int = 1  # texts that began with a blank, less those that did not
    are_blank: dict[int, bool] = field(default_factory=dict)  # tokens that texts began with, of those that were seen


class Drafts:
    """Guesses for the rows of an engine."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_token: int | None, experience: Experience) -> None:
        self._tokenizer = tokenizer
        self._end = () if end_token is None else (end_token,)
        self.experience = experience
        self.told = ToldTexts()

    def of_one_call(self) -> Self:
        """The same, but of texts nothing is known that was told before."""
        other = copy.copy(self)
        other.told = ToldTexts()
        return other

    def of(self, rows: Sequence[Row], num_running: int) -> list[RowDraft | None]:
        """The guesses for rows that come in beside so many others; None for those that none are worth while for."""
        kinds = [kind_of(num_running + len(rows), has_draft=bool(row.draft)) for row in rows]
        is_tried = {kind: self.experience.worth.is_tried(kind) for kind in set(kinds)}
        given = iter(self._given([row for row, kind in zip(rows, kinds, strict=True) if is_tried[kind]]))
        return [
            RowDraft(next(given), self.told.of(row), row.user_embedding, kind) if is_tried[kind] else None
            for row, kind in zip(rows, kinds, strict=True)
        ]

    def tell(self, row: Row, tokens: TokenIds) -> None:
        """A row is done: what it wrote is a guess for those that come."""
        self.told.tell(row, tokens)
        seen = self.experience.num_after_blank + (1 if self._is_blank(tokens[0]) else -1)
        self.experience.num_after_blank = max(-_MAX_SEEN, min(seen, _MAX_SEEN))

    def _is_blank(self, token: int) -> bool:
        """Whether it begins with a blank; of each token the tokenizer is asked once."""
        known = self.experience.are_blank
        if token not in known:
            known[token] = str(self._tokenizer.convert_ids_to_tokens(token)).startswith(_BLANKS)
        return known[token]

    def _given(self, rows: Sequence[Row]) -> list[list[TokenIds]]:
        """Their drafts as tokens, begun after a blank or right away: first the way that was seen more often."""
        num_after = self.experience.num_after_blank
        ways = [" ", ""] if num_after > 0 else ["", " "]
        if abs(num_after) >= _SURE:
            ways.pop()
        texts = [way + row.draft for row in rows if row.draft for way in ways]
        ids = iter(self._token_ids(texts))
        found = []
        for row in rows:
            given = [(*next(ids), *self._end) for _ in ways] if row.draft else []
            found.append(list(dict.fromkeys(given)))
        return found

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        """Many at once: 25 us a text in place of 100. Few one by one.

        The tokenizer's threads wait for a core on which torch's still spin: eight texts 0.5 to 2.4 ms, one by one 0.4.
        """
        if len(texts) < _MANY:
            return [text_ids(self._tokenizer, text) for text in texts]
        found = self._tokenizer(texts, add_special_tokens=False, split_special_tokens=True)
        return list(found["input_ids"])

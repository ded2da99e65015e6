"""Drafts: guesses of what a row will write, verified several tokens at a time instead of decoded one by one.

A guess is the text that an earlier run published for the request, or what other users' rows have just written for the
same content. It never changes a text: of the tokens a pass was given, those are kept that the model chose as well, and
a sampled row's random numbers are a function of request and step (speculative decoding, arXiv 2211.17192, with guesses
that cost nothing). How far rows are guessed ahead is in reach.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from e2p_ray.engine.agreement import Agreement
from e2p_ray.engine.pass_cost import PassCost
from e2p_ray.engine.reach import Outlook, reach_of_all, reach_of_each
from e2p_ray.engine.row import Row
from e2p_ray.schema import UserEmbedding

TokenIds = tuple[int, ...]

_MAX_TEXTS = 32  # that are remembered of one content
_MAX_CONTENTS = 256
_MAX_REALIGNED = 3  # a row whose draft went wrong is set on it again this many times
_REACH = 8  # tokens around the place that it left
_BLANKS = (" ", "\u0120", "\u2581")  # how tokenizers write the blank that a token begins with
_MAX_SEEN = 64


@dataclass(slots=True, eq=False)
class Told:
    """The distinct texts that rows of one content wrote in this call, with the user each was written for first."""

    texts: list[TokenIds] = field(default_factory=list)
    users: list[UserEmbedding | None] = field(default_factory=list)
    counts: dict[TokenIds, int] = field(default_factory=dict)

    def add(self, text: TokenIds, user: UserEmbedding | None) -> None:
        if text in self.counts:
            self.counts[text] += 1
        elif len(self.texts) < _MAX_TEXTS:
            self.counts[text] = 1
            self.texts.append(text)
            self.users.append(user)

    def order_for(self, user: UserEmbedding | None) -> list[TokenIds]:
        """The nearest user's text first, then the others, the most common ones before."""
        by_count = sorted(self.texts, key=lambda text: -self.counts[text])
        known = [(other, text) for other, text in zip(self.users, self.texts, strict=True) if other is not None]
        if user is None or not known:
            return by_count
        distances = [float(np.square(other - user).sum()) for other, _ in known]
        nearest = known[int(np.argmin(distances))][1]
        return [nearest, *(text for text in by_count if text != nearest)]


class RowDraft:
    """The guesses of one row and how they have fared."""

    __slots__ = ("_agreement", "_experience", "_given", "_guesses", "_num_realigned", "_told", "_told_seen", "guess",
                 "streak", "written")  # fmt: skip

    def __init__(
        self, given: Sequence[TokenIds], first: Sequence[TokenIds], told: Told, experience: Experience
    ) -> None:
        self._given, self._told, self._experience = given, told, experience
        self._guesses = [*((text, experience.given) for text in given), *((text, experience.told) for text in first)]
        self._guesses.reverse()
        self._told_seen = len(told.texts)
        self._num_realigned = 0
        self._agreement = experience.given
        self.guess: TokenIds | None = None
        self.streak = 0
        self.written: list[int] = []
        self._next_guess()

    def outlook(self, num_written: int, max_new: int) -> Outlook:
        """Before a pass, of a row that has written so many tokens and may write max_new."""
        if self.guess is not None:
            return Outlook(self._agreement, self.streak, min(len(self.guess), max_new) - num_written)
        # A text that begins otherwise need not be longer or shorter; of one that is longer already nothing is known.
        lengths = [len(text) for text in (*self._given[:1], *self._told.texts[-1:])]
        likely = next((length for length in lengths if num_written < length < max_new), max_new)
        return Outlook(None, 0, likely - num_written)

    def ahead(self, num_tokens: int) -> TokenIds:
        """The next tokens to try, at most so many."""
        if self.guess is None or num_tokens < 1:
            return ()
        at = len(self.written)
        return self.guess[at : at + num_tokens]

    @property
    def is_idle(self) -> bool:
        """Whether there is no guess, nor anything that could become one before another text of the content is told."""
        return self.guess is None and not (self._given or self._guesses or self._told_seen < len(self._told.texts))

    def follow(self, tokens: Sequence[int]) -> None:
        """What the row really wrote since: judge the guess by it, and find another when it was wrong."""
        if self.is_idle:
            self.written += tokens
            return
        for token in tokens:
            at = len(self.written)
            self.written.append(token)
            if self.guess is not None and at < len(self.guess):
                right = self.guess[at] == token
                self._agreement.see(self.streak, right)
                if right:
                    self.streak += 1
                    continue
                self.guess = None
        if self.guess is None or len(self.written) >= len(self.guess):
            self._next_guess()

    def _next_guess(self) -> None:
        """The next guess that begins as the row did; else the given draft again where it goes on like the row."""
        self.streak, self.guess = 0, None
        texts = self._told.texts
        while self._guesses or self._told_seen < len(texts):
            if not self._guesses:
                self._guesses.append((texts[self._told_seen], self._experience.told))
                self._told_seen += 1
            text, agreement = self._guesses.pop()
            if len(text) > len(self.written) and list(text[: len(self.written)]) == self.written:
                self.guess, self._agreement = text, agreement
                return
        if self._given and self._num_realigned < _MAX_REALIGNED:
            self._realign(self._given[0])

    def _realign(self, text: TokenIds) -> None:
        """Go on with a draft behind the nearest place where it has the row's last two tokens."""
        at = len(self.written)
        if at < 2:
            return
        last = tuple(self.written[-2:])
        places = range(max(at - _REACH, 2), min(at + _REACH, len(text)) + 1)
        found = [place for place in places if text[place - 2 : place] == last and place < len(text)]
        if found:
            place = min(found, key=lambda place: abs(place - at))
            self.guess, self._agreement = (*self.written, *text[place:]), self._experience.realigned
            self._num_realigned += 1


@dataclass(slots=True)
class Experience:
    """What an engine has seen of its drafts: those it was given, the same set on again, those that other rows told."""

    given: Agreement = field(default_factory=Agreement)
    realigned: Agreement = field(default_factory=lambda: Agreement([2.5, 7.5, 18.0], [5.0, 10.0, 20.0]))
    told: Agreement = field(default_factory=lambda: Agreement([2.5, 7.5, 18.0], [5.0, 10.0, 20.0]))
    num_after_blank: int = 1  # texts that began with a blank, less those that did not


def guesses_of(
    drafts: Sequence[RowDraft], num_written: Sequence[int], max_new: Sequence[int], num_tokens: int, cost: PassCost,
    *, each_counts: bool,
) -> list[TokenIds]:  # fmt: skip
    """For each row the tokens to try in a pass of num_tokens besides them."""
    reach = reach_of_each if each_counts else reach_of_all
    rows = [draft.outlook(*at) for draft, *at in zip(drafts, num_written, max_new, strict=True)]
    return [draft.ahead(far) for draft, far in zip(drafts, reach(rows, num_tokens, cost), strict=True)]


class Drafts:
    """Guesses for all rows of one call of the engine; of texts nothing is kept between calls."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_token: int | None, experience: Experience) -> None:
        self._tokenizer = tokenizer
        self._end = () if end_token is None else (end_token,)
        self._experience = experience
        self._told: OrderedDict[tuple[TokenIds, TokenIds], Told] = OrderedDict()
        self.num_told = 0  # texts, so that one may know that there is no new one

    def of(self, row: Row) -> RowDraft:
        """The guesses for a row that comes in."""
        told = self._told_of(row)
        first = told.order_for(row.user_embedding)
        return RowDraft(self._given(row), first, told, self._experience)

    def tell(self, row: Row, tokens: TokenIds) -> None:
        """A row is done: what it wrote is a guess for those that come."""
        self._told_of(row).add(tokens, row.user_embedding)
        self.num_told += 1
        first = str(self._tokenizer.convert_ids_to_tokens(tokens[0]))
        seen = self._experience.num_after_blank + (1 if first.startswith(_BLANKS) else -1)
        self._experience.num_after_blank = max(-_MAX_SEEN, min(seen, _MAX_SEEN))

    def _told_of(self, row: Row) -> Told:
        key = (row.segments.left, row.segments.right)
        told = self._told.setdefault(key, Told())
        self._told.move_to_end(key)
        if len(self._told) > _MAX_CONTENTS:
            self._told.popitem(last=False)
        return told

    def _given(self, row: Row) -> list[TokenIds]:
        """A draft as tokens, begun after a blank or right away: first the way that was seen more often."""
        if not row.draft:
            return []
        found = []
        texts = (" " + row.draft, row.draft)
        for text in texts if self._experience.num_after_blank > 0 else reversed(texts):
            ids = tuple(self._tokenizer.encode(text, add_special_tokens=False)) + self._end
            if ids not in found:
                found.append(ids)
        return found

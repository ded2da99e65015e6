"""What rows have written for a content: guesses for the next rows of the same content."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from e2p_ray.engine.row import Row
from e2p_ray.schema import UserEmbedding

TokenIds = tuple[int, ...]

_MAX_TEXTS = 32  # that are remembered of one content, and as many users for whom they were written
_MAX_CONTENTS = 256


class Told:
    """One content's distinct texts, with how often each was written, and the users for whom the last ones were.

    Where a new text has no room, the rarest makes some, and of these the oldest.
    """

    __slots__ = ("_counts", "_num_users", "_numbers", "_of_users", "_users", "last", "num_new")

    def __init__(self) -> None:
        self._counts: dict[TokenIds, int] = {}
        self._numbers: dict[TokenIds, int] = {}  # of each text: how many new ones there were with it
        self._users: npt.NDArray[np.float32] | None = None  # (_MAX_TEXTS, embedding size), the oldest replaced
        self._of_users: list[TokenIds] = []  # what was written for them
        self._num_users = 0
        self.num_new = 0  # texts that were not known when they were told
        self.last: TokenIds = ()

    def add(self, text: TokenIds, user: UserEmbedding | None) -> None:
        if text not in self._counts:
            if len(self._counts) == _MAX_TEXTS:
                rarest = min(self._counts, key=self._counts.__getitem__)
                del self._counts[rarest], self._numbers[rarest]
            self.num_new += 1
            self._numbers[text] = self.num_new
        self._counts[text] = self._counts.get(text, 0) + 1
        self.last = text
        if user is not None:
            if self._users is None:
                self._users = np.empty((_MAX_TEXTS, len(user)), np.float32)
            place = self._num_users % _MAX_TEXTS
            self._users[place] = user
            self._of_users[place : place + 1] = [text]
            self._num_users += 1

    def order_for(self, user: UserEmbedding | None, since: int = 0) -> list[TokenIds]:
        """The nearest user's text first, then the others, the most common ones before.

        With `since`, an earlier `num_new`, only texts that were new after it.
        """
        found = [text for text, number in self._numbers.items() if number > since]
        found.sort(key=self._counts.__getitem__, reverse=True)
        if user is None or self._users is None or len(found) < 2:
            return found
        distances = np.square(self._users[: len(self._of_users)] - user).sum(axis=1)
        nearest = self._of_users[int(distances.argmin())]
        if self._numbers.get(nearest, 0) <= since:
            return found
        return [nearest, *(text for text in found if text != nearest)]


class ToldTexts:
    """Of the contents that were told of last."""

    def __init__(self) -> None:
        self._by_content: OrderedDict[tuple[TokenIds, TokenIds], Told] = OrderedDict()
        self.num_told = 0  # texts, so that one may know that there is no new one

    def __len__(self) -> int:
        return len(self._by_content)

    def of(self, row: Row) -> Told:
        """What was told of this row's content."""
        key = (row.segments.left, row.segments.right)
        told = self._by_content.setdefault(key, Told())
        self._by_content.move_to_end(key)
        if len(self._by_content) > _MAX_CONTENTS:
            self._by_content.popitem(last=False)
        return told

    def tell(self, row: Row, tokens: TokenIds) -> None:
        """A row is done, and wrote this."""
        self.of(row).add(tokens, row.user_embedding)
        self.num_told += 1

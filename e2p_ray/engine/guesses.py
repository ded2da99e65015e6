"""What the rows of a wave are guessed to write: a guess a slot, how far it held, and what comes when it does not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from e2p_ray.engine.agreement import MAX_STREAK, NUM_CLASSES, Agreement, Source, classes_of
from e2p_ray.engine.drafts import Experience, Guess, RowDraft, pair_of
from e2p_ray.engine.reach import NO_GUESS, Outlook
from e2p_ray.engine.resized import resized

_Ints = npt.NDArray[np.int64]

_MAX_REST = 8  # passes


class Guesses:
    """Of the rows in the slots 0..n-1 of a wave; without drafts there are none of any row.

    What is done for each row and step is done for the whole wave at once: of a 1 B model a row takes a GPU 150 us, and
    an object a row took 280 us of the CPU for 16 tokens that were guessed wrong.
    """

    def __init__(self, max_rows: int, max_new_tokens: int) -> None:
        self._drafts: list[RowDraft | None] = []
        self._num_drafts = 0  # that are not None
        self._has_draft = np.zeros(max_rows, np.bool_)
        self._kinds = np.zeros(max_rows, np.int64)  # `worth.kind_of`
        self._tokens = np.zeros((max_rows, max_new_tokens), np.int64)
        self._lengths = np.zeros(max_rows, np.int64)  # of the guesses, with what is written; 0: no guess
        self._sources = np.zeros(max_rows, np.int64)
        self._streaks = np.zeros(max_rows, np.int64)
        self._num_judged = np.zeros(max_rows, np.int64)  # tokens of the row that its guess was compared with
        self._may_realign = np.zeros(max_rows, np.bool_)
        self._likely = np.zeros(max_rows, np.int64)  # the length of a text of the same content; 0: none is known
        self._num_told = 0
        self._num_vain = 0  # looks at the guesses since any was tried
        self._num_resting = 0  # passes to the next look
        self.num_unseen = 0  # passes since the last one

    def grow(self, max_rows: int, max_new_tokens: int) -> None:
        """Room for so many rows of so many tokens, with what is there."""
        self._tokens = resized(self._tokens, (max_rows, max_new_tokens))
        self._lengths, self._sources, self._streaks, self._num_judged, self._likely = (
            resized(one, (max_rows,))
            for one in (self._lengths, self._sources, self._streaks, self._num_judged, self._likely)
        )
        self._may_realign, self._has_draft = (resized(one, (max_rows,)) for one in (self._may_realign, self._has_draft))
        self._kinds = resized(self._kinds, (max_rows,))

    def add(self, drafts: Sequence[RowDraft | None]) -> None:
        """Of new rows, behind those that are there."""
        assert self.num_unseen == 0, "those that are there have been followed"
        self._num_vain = self._num_resting = 0
        for slot, draft in enumerate(drafts, len(self._drafts)):
            self._drafts.append(draft)
            self._num_drafts += draft is not None
            self._has_draft[slot] = draft is not None
            self._lengths[slot] = self._likely[slot] = self._num_judged[slot] = 0
            self._may_realign[slot] = False
            if draft is not None:
                self._may_realign[slot], self._kinds[slot] = draft.may_realign, draft.kind
                self._find(slot, draft, [])

    def move(self, targets: Sequence[int], sources: Sequence[int], num_left: int) -> None:
        """Rows take other rows' slots, of which num_left stay."""
        if self._num_drafts:
            for array in (self._tokens, self._lengths, self._sources, self._streaks, self._num_judged, self._likely,
                          self._may_realign, self._has_draft, self._kinds):  # fmt: skip
                array[targets] = array[sources]
        for target, source in zip(targets, sources, strict=True):
            self._drafts[target] = self._drafts[source]
        del self._drafts[num_left:]
        self._num_drafts = int(self._has_draft[:num_left].sum())

    def any_from(self, first: int) -> bool:
        """Whether any row from this slot on has a guess that is to be looked at now."""
        can_be = self._num_drafts > 0 and self._num_resting == 0
        return can_be and bool(self._lengths[first : len(self._drafts)].any())

    def tried(self, num_guessed: int) -> None:
        """So many guesses are tried in a pass of all rows.

        Where none was for so many passes that nothing is new any more, they are looked at every second one, fourth and
        so on: the later the more rows there are, as it takes the longer and pays the less often.
        """
        if num_guessed:
            self._num_vain = 0
        elif self._num_resting == 0:
            self._num_vain += 1
            longest = min(_MAX_REST, len(self._drafts))
            self._num_resting = min(2 ** max(self._num_vain - MAX_STREAK, 0), longest)

    def passed(self) -> bool:
        """A pass is done: whether it is time to `follow` it, and those before."""
        if not self._num_drafts:
            return False
        self.num_unseen += 1
        self._num_resting = max(self._num_resting - 1, 0)
        return self._num_resting == 0

    def outlook(self, first: int, num_written: _Ints, max_new: _Ints) -> Outlook:
        """Before a pass of the rows from slot `first` on, which have written and may write so many tokens (n,)."""
        assert self.num_unseen == 0, "guesses are followed before they are used"
        span = slice(first, len(self._drafts))
        lengths, likely = self._lengths[span], self._likely[span]
        # A text that begins otherwise need not be longer or shorter; of one that is longer already nothing is known.
        unsure = np.where((num_written < likely) & (likely < max_new), likely, max_new)
        num_left = np.where(lengths > 0, np.minimum(lengths, max_new), unsure) - num_written
        return Outlook(np.where(lengths > 0, self._sources[span], NO_GUESS), self._streaks[span], num_left)

    def ahead(self, first: int, num_written: _Ints, reach: _Ints) -> _Ints:
        """Of rows from slot `first` on the next reach (n,) tokens of their guesses: (n, the most + 1), then -1."""
        columns = np.arange(int(reach.max()) + 1)
        places = np.minimum(num_written[:, None] + columns, self._tokens.shape[1] - 1)
        tokens = np.take_along_axis(self._tokens[first : first + len(reach)], places, axis=1)
        return np.where(columns < reach[:, None], tokens, -1)

    def follow(self, written: _Ints, num_written: _Ints, num_told: int, experience: Experience) -> None:
        """Judge guesses by what their rows really wrote since, and find others where they were wrong or are used up.

        `written` (rows, tokens) and `num_written` (rows,) are the wave's; num_told texts have been told in all.
        """
        num_passes, self.num_unseen = self.num_unseen, 0
        rows = np.flatnonzero(self._has_draft[: len(self._drafts)])
        num_new = num_written[rows] - self._num_judged[rows]
        experience.worth.see(self._kinds[rows], num_new, np.maximum(num_new - num_passes, 0))
        is_guessed = self._lengths[rows] > 0
        looking = self._judged_wrong(rows[is_guessed], written, num_written, experience.agreements).tolist()
        self._num_judged[rows] = num_written[rows]
        if num_told != self._num_told:  # what was told since may go on as the row did
            looking += [slot for slot in rows[~is_guessed].tolist() if self._drafts[slot].has_news]
            self._num_told = num_told
        for slot in looking:
            self._find(slot, self._drafts[slot], written[slot, : num_written[slot]].tolist())
        self._realign(rows[self._lengths[rows] == 0], written, num_written)

    def _judged_wrong(self, rows: _Ints, written: _Ints, num_written: _Ints, agreements: Sequence[Agreement]) -> _Ints:
        """Those of these rows, which have a guess, that have none any more; agreements learn from all of them."""
        if not len(rows):
            return rows
        begun, ends = self._num_judged[rows, None], self._lengths[rows, None]
        places = begun + np.arange(int((num_written[rows] - begun[:, 0]).max()))
        is_there = places < np.minimum(num_written[rows, None], ends)
        inside = np.minimum(places, self._tokens.shape[1] - 1)
        right = is_there & (self._tokens[rows[:, None], inside] == written[rows[:, None], inside])
        held = np.logical_and.accumulate(right, axis=1)
        judged = is_there.copy()
        judged[:, 1:] &= held[:, :-1]  # up to the first wrong one
        kinds = self._sources[rows, None] * NUM_CLASSES
        kinds = kinds + classes_of(self._streaks[rows, None] + np.arange(places.shape[1]))
        size = (len(Source), NUM_CLASSES)
        num_right, num_seen = (
            np.bincount(kinds[some], minlength=size[0] * size[1]).reshape(size) for some in (held, judged)
        )
        for source, agreement in enumerate(agreements):
            agreement.see(num_right[source].tolist(), num_seen[source].tolist())
        num_held = held.sum(axis=1)
        self._streaks[rows] += num_held
        wrong: _Ints = rows[(num_held < judged.sum(axis=1)) | (num_written[rows] >= ends[:, 0])]
        return wrong

    def _find(self, slot: int, draft: RowDraft, written: list[int]) -> None:
        """Another guess for this row, or none."""
        found = draft.next(written)
        self._lengths[slot], self._likely[slot] = 0, draft.likely_length
        if found is not None:
            self._put(slot, found)

    def _realign(self, rows: _Ints, written: _Ints, num_written: _Ints) -> None:
        """Set these rows, which have no guess, on their own drafts again where these go on like the rows."""
        rows = rows[self._may_realign[rows] & (num_written[rows] > 1)]
        if not len(rows):
            return
        ends = num_written[rows]
        pairs = pair_of(written[rows, ends - 2], written[rows, ends - 1])
        for slot, pair in zip(rows.tolist(), pairs.tolist(), strict=True):
            draft = self._drafts[slot]
            if draft.has_pair(pair) and (found := draft.realigned(written[slot, : num_written[slot]].tolist())):
                self._put(slot, found)
                self._may_realign[slot] = draft.may_realign

    def _put(self, slot: int, guess: Guess) -> None:
        tokens = guess.tokens[: self._tokens.shape[1]]
        self._tokens[slot, : len(tokens)], self._lengths[slot] = tokens, len(tokens)
        self._streaks[slot], self._sources[slot] = 0, guess.source

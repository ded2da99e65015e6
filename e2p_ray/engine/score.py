"""How likely given texts are for given users, on the shared prefixes that generation reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from e2p_ray.engine.lesson import Lesson, LessonRow
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.prefixes import PrefixStore
from e2p_ray.engine.projector import Projector
from e2p_ray.engine.prompt import PromptLayout, Segments, text_ids
from e2p_ray.engine.teaching import lesson_losses
from e2p_ray.errors import RowError
from e2p_ray.schema import ErrorCode, Group, Request, RequestKey, TextScore

# Rows of one pass: matrix products stop gaining beyond a few hundred tokens (see engine/prefixes.py).
MAX_SCORED_ROWS = 128


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Some requests of one content, all with a soft token or all without, and the tokens to be scored."""

    segments: Segments
    requests: list[Request]
    targets: list[list[int]]

    @property
    def num_own_tokens(self) -> int:
        """Of the longest row: what a pass has places for in every row of it."""
        return len(self.segments.right) + max(map(len, self.targets))

    def lesson(self) -> Lesson:
        """Rows without any token of their own take over the last one of the prefix, to have something to run."""
        left, moved = self.segments.left, self.segments.left[:0]
        if self.requests[0].user_embedding is None and not self.segments.right:
            left, moved = left[:-1], left[-1:]
        rows = (
            LessonRow(request.user_embedding, (*moved, *self.segments.right), target)
            for request, target in zip(self.requests, self.targets, strict=True)
        )
        return Lesson(left, tuple(rows))


class Scorer:
    """Scores texts in passes of at most max_rows rows, reading the contents' prefixes from a store.

    What a pass holds, prefixes and the places of its rows' own tokens, takes max_bytes at most, or is of one row.
    """

    def __init__(
        self,
        base: BaseModel,
        projector: Projector,
        tokenizer: PreTrainedTokenizerBase,
        layout: PromptLayout,
        end_token: int | None,
        store: PrefixStore,
        max_rows: int,
        max_bytes: int,
    ) -> None:
        self._base, self._projector, self._store = base, projector, store
        self._tokenizer, self._layout = tokenizer, layout
        self._end = [] if end_token is None else [end_token]
        self._max_rows, self._max_bytes = max_rows, max_bytes

    def run(self, groups: Iterable[Group], texts: Mapping[RequestKey, str]) -> Iterator[TextScore]:
        """One score a request; KeyError for a request without a text."""
        waiting: dict[bool, list[_Piece]] = {True: [], False: []}
        for group in groups:
            try:
                segments = self._layout.segments(group.content, group.task)
            except RowError as error:
                yield from (TextScore(r.key, 0.0, 0, ErrorCode(error.code)) for r in group.requests)
                continue
            targets = [self._ids(texts[request.key]) for request in group.requests]
            codes = [self._refusal(segments, target) for target in targets]
            for request, target, code in zip(group.requests, targets, codes, strict=True):
                if code is not None or not target:
                    yield TextScore(request.key, 0.0, 0, code)
            kept = [at for at, target in enumerate(targets) if target and codes[at] is None]
            for piece in self._pieces(segments, [(group.requests[at], targets[at]) for at in kept]):
                pieces = waiting[piece.requests[0].user_embedding is not None]
                if pieces and not self._fit_together([*pieces, piece]):
                    yield from self._scores(pieces)
                    pieces.clear()
                pieces.append(piece)
        for pieces in waiting.values():
            yield from self._scores(pieces)

    def _fit_together(self, pieces: Sequence[_Piece]) -> bool:
        lefts = [piece.segments.left for piece in pieces]  # a content's pieces follow one another, with one left part
        new = [left for before, left in zip([None, *lefts], lefts, strict=False) if left is not before]
        num_rows = sum(len(piece.requests) for piece in pieces)
        num_own_tokens = max(piece.num_own_tokens for piece in pieces)
        return self._may_be(num_rows, num_own_tokens, sum(map(len, new)))

    def _may_be(self, num_rows: int, num_own_tokens: int, num_prefix_tokens: int) -> bool:
        """Whether a pass has room for so many rows of so many places: keys and values, and a share of what it makes."""
        own = num_rows * (self._projector.manifest.num_soft_tokens + num_own_tokens)
        num_bytes = own * self._base.activation_bytes_per_token + self._store.bytes_of(num_prefix_tokens + own)
        return num_rows <= self._max_rows and num_bytes <= self._max_bytes

    def _ids(self, text: str) -> list[int]:
        return [*text_ids(self._tokenizer, text), *self._end]

    def _refusal(self, segments: Segments, target: list[int]) -> ErrorCode | None:
        """Why a text cannot be scored."""
        num_tokens = segments.num_tokens + self._projector.manifest.num_soft_tokens + len(target)
        return ErrorCode.PROMPT_TOO_LONG if num_tokens > self._base.max_positions else None

    def _pieces(self, segments: Segments, rows: list[tuple[Request, list[int]]]) -> Iterator[_Piece]:
        """Texts of about one length each: every row of a pass has places for its longest one."""
        for soft in (True, False):
            chosen = [row for row in rows if (row[0].user_embedding is not None) == soft]
            chosen.sort(key=lambda row: len(row[1]))
            first = 0
            for end, (_, longest) in enumerate(chosen, 1):
                num_own_tokens = len(segments.right) + len(longest)
                if end - first > 1 and not self._may_be(end - first, num_own_tokens, len(segments.left)):
                    yield _piece(segments, chosen[first : end - 1])
                    first = end - 1
            if chosen:
                yield _piece(segments, chosen[first:])

    def _scores(self, pieces: list[_Piece]) -> Iterator[TextScore]:
        if not pieces:
            return
        soft = pieces[0].requests[0].user_embedding is not None
        lessons = [piece.lesson() for piece in pieces]
        losses = lesson_losses(self._base, self._projector if soft else None, self._store, lessons).tolist()
        rows = [(r, target) for piece in pieces for r, target in zip(piece.requests, piece.targets, strict=True)]
        for (request, target), loss in zip(rows, losses, strict=True):
            yield TextScore(request.key, -loss, len(target))


def _piece(segments: Segments, rows: list[tuple[Request, list[int]]]) -> _Piece:
    return _Piece(segments, [request for request, _ in rows], [target for _, target in rows])

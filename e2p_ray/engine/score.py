"""How likely given texts are for given users, on the shared prefixes that generation reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from e2p_ray.engine.lesson import Lesson, LessonRow
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.prefixes import PrefixStore
from e2p_ray.engine.projector import Projector
from e2p_ray.engine.prompt import PromptLayout, Segments
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

    Those of one pass, which are held together, take max_bytes at most, or are of one content.
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
        num_bytes = sum(self._store.bytes_of(len(left)) for left in new)
        return sum(len(piece.requests) for piece in pieces) <= self._max_rows and num_bytes <= self._max_bytes

    def _ids(self, text: str) -> list[int]:
        return [*self._tokenizer.encode(text, add_special_tokens=False), *self._end]

    def _refusal(self, segments: Segments, target: list[int]) -> ErrorCode | None:
        """Why a text cannot be scored."""
        num_tokens = segments.num_tokens + self._projector.manifest.num_soft_tokens + len(target)
        return ErrorCode.PROMPT_TOO_LONG if num_tokens > self._base.max_positions else None

    def _pieces(self, segments: Segments, rows: list[tuple[Request, list[int]]]) -> Iterator[_Piece]:
        for soft in (True, False):
            chosen = [row for row in rows if (row[0].user_embedding is not None) == soft]
            for start in range(0, len(chosen), self._max_rows):
                part = chosen[start : start + self._max_rows]
                yield _Piece(segments, [request for request, _ in part], [target for _, target in part])

    def _scores(self, pieces: list[_Piece]) -> Iterator[TextScore]:
        if not pieces:
            return
        soft = pieces[0].requests[0].user_embedding is not None
        lessons = [piece.lesson() for piece in pieces]
        losses = lesson_losses(self._base, self._projector if soft else None, self._store, lessons).tolist()
        rows = [(r, target) for piece in pieces for r, target in zip(piece.requests, piece.targets, strict=True)]
        for (request, target), loss in zip(rows, losses, strict=True):
            yield TextScore(request.key, -loss, len(target))

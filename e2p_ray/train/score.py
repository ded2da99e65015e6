"""Likelihood of given texts for given users, on the same shared prefixes that training reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from e2p_ray.engine.lesson import Lesson
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.prefixes import PrefixStore
from e2p_ray.engine.projector import Projector
from e2p_ray.engine.score import MAX_SCORED_ROWS
from e2p_ray.engine.teaching import lesson_losses
from e2p_ray.train.lessons import LessonTable


@dataclass(frozen=True, slots=True, eq=False)
class RowScores:
    """Of every row of a table: cross-entropy of its target (nats, summed) and the number of its tokens."""

    nll: npt.NDArray[np.float64]
    num_tokens: npt.NDArray[np.int64]

    @property
    def mean_nll(self) -> float:
        """Nats per token over all rows."""
        return float(self.nll.sum() / self.num_tokens.sum())


def score(
    base: BaseModel,
    projector: Projector | None,
    table: LessonTable,
    store: PrefixStore,
    *,
    rank: int = 0,
    size: int = 1,
    max_bytes: int | None = None,
) -> RowScores:
    """Score every target of a table; without a projector there is no soft token. Weights do not count here.

    Of `size` workers, worker `rank` scores every size-th lesson; the nll of all other rows is 0, to be summed.
    The prefixes of one pass take `max_bytes` at most, the store's own bound unless given, or are of one content.
    """
    nll = np.zeros(table.num_rows)
    bound = store.max_bytes if max_bytes is None else max_bytes
    sizes = [store.bytes_of(num_tokens) for num_tokens in np.diff(table.lefts.starts).tolist()]
    for places, lessons in _passes(table, range(rank, len(table), size), sizes, bound, soft=projector is not None):
        nll[[row for rows in places for row in rows]] = lesson_losses(base, projector, store, lessons).numpy()
    return RowScores(nll, np.diff(table.targets.starts))


def _passes(
    table: LessonTable, chosen: range, sizes: Sequence[int], max_bytes: int, *, soft: bool
) -> Iterator[tuple[list[Sequence[int]], list[Lesson]]]:
    """Rows of several lessons for one forward pass each; lessons of about as many rows go together.

    `sizes` are the bytes of every lesson's prefix: a pass holds all of its own at once.
    """
    pieces = [
        (lesson, rows[start : start + MAX_SCORED_ROWS])
        for lesson in chosen
        for rows in [table.rows_of(lesson)]
        for start in range(0, len(rows), MAX_SCORED_ROWS)
    ]
    pieces.sort(key=lambda piece: -len(piece[1]))
    first = 0
    while first < len(pieces):
        most = pieces[first : first + max(1, MAX_SCORED_ROWS // len(pieces[first][1]))]
        fitting = np.searchsorted(np.cumsum([sizes[at] for at, _ in most]), max_bytes, side="right")
        together = most[: max(1, int(fitting))]
        first += len(together)
        yield [rows for _, rows in together], [table.lesson(at, rows, soft=soft) for at, rows in together]

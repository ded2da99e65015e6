"""Users who write: their tables from their texts, early, later and in the space of another fit."""

from __future__ import annotations

from tests.real.style import describe_style
from tests.real.tables import TaskTables
from tests.real.vectors import Fit, History, Measures, VectorSettings, fit_vectors


def write_writers(
    tables: TaskTables, early: History, late: History, vectors: VectorSettings, *, seed: int
) -> tuple[str, str]:
    """Write users, users_later (the same basis, from `late`) and users_refit (rotated); the two embedding spaces."""
    assert list(early) == list(late), "the same users, in the same order"
    fit = fit_vectors(early, vectors)
    refit = fit.rotated(seed)
    before, after = fit.measure(early), fit.measure(late)
    for table, basis, history, measures in (
        ("users", fit, early, before),
        ("users_later", fit, late, after),
        ("users_refit", refit, early, before),
    ):
        tables.write_users(
            table,
            basis.project(measures),
            basis.embedding_space,
            user_ids=list(history),
            history_sizes=[len(texts) for texts in history.values()],
            profile_texts=_profiles(basis, measures),
        )
    return fit.embedding_space, refit.embedding_space


def _profiles(fit: Fit, measures: Measures) -> list[str]:
    return [
        describe_style(means) + (f" Often writes: {', '.join(words)}." if words else "")
        for means, words in zip(measures.style, fit.typical_words(measures), strict=True)
    ]

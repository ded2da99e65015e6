"""Every text under the soft tokens of many users: for which of them was it written?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from e2p_ray.downstream.measures.methods import CONSTANT, RIGHT
from e2p_ray.downstream.measures.retrieval import LikelihoodMatrix
from e2p_ray.engine.projector import Projector
from e2p_ray.evaluate.contest import Contest, Ints, finite_score
from e2p_ray.train.lessons import LessonTable, Ragged

_MIN_USERS = 2


def retrieval_matrices(contest: Contest, constant: Projector) -> list[LikelihoodMatrix]:
    """One matrix a language for the projector, and for the constant token, which has to come out at chance."""
    found, languages = [], contest.languages()
    wanted = contest.config.evaluation
    for language in sorted(set(languages.tolist())):
        random = np.random.default_rng([wanted.seed, 7])
        rows = np.flatnonzero(languages == language)
        users = np.unique(contest.table.user[rows]).astype(np.int64)
        users = np.sort(random.permutation(users)[: wanted.num_retrieval_users])
        rows = rows[np.isin(contest.table.user[rows], users)]
        rows = np.sort(random.permutation(rows)[: wanted.num_retrieval_texts])
        if len(users) < _MIN_USERS or not len(rows):
            continue
        contest.say(f"retrieval: {len(rows):,} texts x {len(users):,} users ({language})")
        table = crossed(contest.table, rows, users)
        right = np.searchsorted(users, contest.table.user[rows]).astype(np.intp)
        store = contest.new_store()
        for method, projector in ((RIGHT, contest.projector), (CONSTANT, constant)):
            values = -finite_score(contest.base, projector, table, store).nll.reshape(len(rows), len(users))
            found.append(LikelihoodMatrix(method, language, values, right))
    return found


def crossed(table: LessonTable, rows: Ints, users: Ints) -> LessonTable:
    """Every one of these rows with every one of these users: lesson i holds row rows[i], its users in order."""
    lesson_of = np.repeat(np.arange(len(table)), np.diff(table.first_row))
    repeated = np.repeat(rows, len(users))
    return replace(
        table,
        lefts=Ragged.of(table.lefts[int(lesson_of[row])].tolist() for row in rows),
        first_row=np.arange(len(rows) + 1, dtype=np.int64) * len(users),
        user=np.tile(users, len(rows)).astype(np.int32),
        rights=Ragged.of(table.rights[row].tolist() for row in repeated.tolist()),
        targets=Ragged.of(table.targets[row].tolist() for row in repeated.tolist()),
        weight=table.weight[repeated],
        source=table.source[repeated],
    )

"""Texts written for the held-out pairs by the engine itself, and how fast one of them comes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl

from e2p_ray.downstream.measures.methods import CONSTANT, NO_SOFT_TOKEN, RIGHT, SHUFFLED
from e2p_ray.engine.engine import Engine
from e2p_ray.engine.projector import Projector
from e2p_ray.evaluate.contest import Contest, Ints
from e2p_ray.schema import Group, Request, RequestKey, UserEmbedding

_NUM_TIMED = 9


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """The texts as `downstream` measures them, and the median latency of one request by method (ms)."""

    texts: pl.DataFrame
    latency_ms: dict[str, float]


def write_texts(contest: Contest, constant: Projector) -> Written | None:
    """Greedy or sampled as the tasks say, unchecked: what the model says, not what would be published."""
    rows = _chosen(contest)
    if not len(rows):
        return None
    contest.say(f"writes {len(rows):,} texts for each of four methods")
    own = contest.table.user_embeddings
    shuffled = contest.shuffled().user
    vectors: dict[str, tuple[Projector, list[UserEmbedding | None]]] = {
        RIGHT: (contest.projector, [own[contest.table.user[row]] for row in rows]),
        SHUFFLED: (contest.projector, [own[shuffled[row]] for row in rows]),
        NO_SOFT_TOKEN: (contest.projector, [None] * len(rows)),
        CONSTANT: (constant, [own[contest.table.user[row]] for row in rows]),
    }
    frames, latency_ms = [], {}
    for method, (projector, users) in vectors.items():
        engine = Engine(contest.base, projector, contest.tokenizer, contest.tasks, contest.config.engine)
        groups = list(_groups(contest, rows, users))
        found = {completion.key: completion.text for completion in engine.generate(groups)}
        frames.append(_frame(contest, method, rows, found))
        if method != SHUFFLED:
            latency_ms[method] = _latency_ms(contest, projector, groups)
    return Written(pl.concat(frames), latency_ms)


def _chosen(contest: Contest) -> Ints:
    """Rows to write for: whole contents in a fixed random order, so that texts of one content can be compared."""
    most, seen, rows = contest.config.evaluation.num_written, set[RequestKey](), list[int]()
    order = np.random.default_rng([contest.config.evaluation.seed, 5]).permutation(len(contest.table))
    for lesson in order.tolist():
        for row in contest.table.rows_of(lesson):
            key = _key(contest, row)
            if key not in seen and len(rows) < most:
                seen.add(key)
                rows.append(row)
    return np.array(sorted(rows), np.int64)


def _key(contest: Contest, row: int) -> RequestKey:
    target = contest.data.held_out[contest.table.source[row]]
    return RequestKey(target.user_id, target.content_id, target.task)


def _groups(contest: Contest, rows: Ints, users: list[UserEmbedding | None]) -> Iterator[Group]:
    groups: dict[tuple[str, str], list[Request]] = {}
    for row, user in zip(rows.tolist(), users, strict=True):
        key = _key(contest, row)
        groups.setdefault((key.content_id, key.task), []).append(Request(key, user))
    for (content_id, task), requests in groups.items():
        yield Group(contest.data.contents[content_id], task, tuple(requests))


def _latency_ms(contest: Contest, projector: Projector, groups: list[Group]) -> float:
    """Median over single requests of contents that no store holds yet; the first one warms up and does not count."""
    taken = []
    for group in groups[: _NUM_TIMED + 1]:
        engine = Engine(contest.base, projector, contest.tokenizer, contest.tasks, contest.config.engine)
        started = time.perf_counter()
        for _ in engine.generate([Group(group.content, group.task, group.requests[:1])]):
            pass
        taken.append((time.perf_counter() - started) * 1000)
    return statistics.median(taken[1:] or taken)


def _frame(contest: Contest, method: str, rows: Ints, found: dict[RequestKey, str]) -> pl.DataFrame:
    targets = [contest.data.held_out[contest.table.source[row]] for row in rows]
    contents = [contest.data.contents[target.content_id] for target in targets]
    return pl.DataFrame(
        {
            "method": [method] * len(targets),
            "task": [target.task for target in targets],
            "language": [content.language for content in contents],
            "user_id": [target.user_id for target in targets],
            "content_id": [target.content_id for target in targets],
            "text": [found[_key(contest, row)].strip() for row in rows.tolist()],
            "reference": [target.text.strip() for target in targets],
            "title": [content.title for content in contents],
            "body": [content.body for content in contents],
        }
    )

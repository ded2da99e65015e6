"""From training tables to lessons by Ray: read by Ray Data, joined, tokenised; flat arrays stay in the object store.

No row passes through the driver, which holds references and counts only. The workers map the arrays where they lie.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch

from e2p_ray.config import BaseModelConfig, TaskConfig
from e2p_ray.engine.manifest import BaseModelFolder, resolve_base_model
from e2p_ray.engine.projector import ReferenceStatistics
from e2p_ray.engine.prompt import load_tokenizer
from e2p_ray.errors import InputError
from e2p_ray.plan.inputs import Space
from e2p_ray.schema import Content
from e2p_ray.storage import Storage
from e2p_ray.train.data.joins import Chunk, Joined, JoinSettings
from e2p_ray.train.data.rows import gather, joined_rows, named, read_wanted
from e2p_ray.train.data.tables import SourceTable, read_contents, read_targets, read_users
from e2p_ray.train.lessons import LessonTable, Ragged, Target, UserTable, lessons_of, refuse_constant
from e2p_ray.train.settings import TrainSettings

_SETS = ("training", "validation")


@dataclass(frozen=True, slots=True)
class Reading:
    """What the tasks need to know. Picklable."""

    storage: Storage
    base_model: BaseModelConfig
    folder: BaseModelFolder
    tasks: dict[str, TaskConfig]
    settings: TrainSettings
    joins: JoinSettings
    max_positions: int


@dataclass(frozen=True, slots=True)
class LessonCounts:
    """What became of the rows, by set: training, validation."""

    num_targets: dict[str, int]  # given
    num_used: dict[str, int]
    num_truncated: dict[str, int]  # of the used ones: longer than max_target_tokens
    skipped: dict[str, dict[str, int]]
    num_contents: dict[str, int]  # lessons: contents times tasks
    num_users: dict[str, int]
    num_contents_without_target: int


@dataclass(frozen=True, slots=True)
class PreparedLessons:
    """References to the lessons of both sets and to the training users' statistics; and what fits a driver."""

    training: ray.ObjectRef[Any]
    validation: ray.ObjectRef[Any] | None
    reference: ray.ObjectRef[Any]
    space: Space
    counts: LessonCounts


def folder_here(config: BaseModelConfig, folder: BaseModelFolder, storage: Storage) -> BaseModelFolder:
    """The base model's folder on this machine: the driver's where it can be seen, else found again."""
    return folder if folder.path.is_dir() else resolve_base_model(config, storage)


def prepare_lessons(reading: Reading, sources: dict[str, SourceTable]) -> PreparedLessons:
    """Read, join, tokenise. Raises InputError where a table is at fault, or no target of one can be used."""
    storage, tasks = reading.storage, reading.joins.tasks
    targets = gather(sources["targets"].pieces, partial(read_targets, storage, tasks=tasks))
    held = None
    if "validation" in sources:
        held = gather(sources["validation"].pieces, partial(read_targets, storage, tasks=tasks))
    users_named, contents_named = ray.remote(named).options(num_returns=2).remote(*targets, *(held or []))
    users = gather(sources["users"].pieces, partial(read_wanted, read_users, storage, users_named))
    contents = gather(sources["contents"].pieces, partial(read_wanted, read_contents, storage, contents_named))
    places = {"targets": len(targets), "held": -1 if held is None else len(held), "users": len(users)}
    stream = ray.remote(joined_rows).options(num_returns="streaming")
    found = iter(stream.remote(reading.joins, places, *targets, *(held or []), *users, *contents))
    joined: Joined = ray.get(next(found))
    matrix = next(found)
    teach = ray.remote(_tokenise)
    parts = [teach.remote(reading, chunk) for chunk in found]
    merge = ray.remote(_merge).options(num_returns=4)
    num_contents = sources["contents"].num_rows
    training, validation, reference, counts = merge.remote(reading, joined, num_contents, matrix, *parts)
    counted: LessonCounts = ray.get(counts)
    held_out = validation if counted.num_used["validation"] else None
    return PreparedLessons(training, held_out, reference, joined.space, counted)


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """A chunk as lessons whose `user` are rows of all user embeddings, what was skipped, how many targets are cut."""

    validation: bool
    table: LessonTable
    skipped: dict[str, int]
    num_truncated: int


def _tokenise(reading: Reading, chunk: Chunk) -> _Part:
    folder = folder_here(reading.base_model, reading.folder, reading.storage)
    rows = chunk.targets["user"].unique().sort().to_numpy()
    users = UserTable([str(row) for row in rows], np.zeros((0, 1), np.float32), reading.joins.embedding_space or "")
    targets = [
        Target(str(user), content_id, task, text, weight)
        for content_id, task, user, text, weight in chunk.targets.iter_rows()
    ]
    contents = [Content(*row) for row in chunk.contents.iter_rows()]
    table, skipped, num_truncated = lessons_of(
        load_tokenizer(folder.path), reading.tasks, users, contents, targets, reading.settings, reading.max_positions
    )
    return _Part(chunk.validation, replace(table, user=rows[table.user].astype(np.int32)), skipped, num_truncated)


def _merge(
    reading: Reading,
    joined: Joined,
    num_contents: int,
    user_embeddings: npt.NDArray[np.float32],
    *parts: _Part,
) -> tuple[LessonTable, LessonTable | None, dict[str, npt.NDArray[Any]], LessonCounts]:
    tables, skipped, num_truncated = {}, {name: Counter(joined.skipped.get(name, {})) for name in _SETS}, {}
    for name in _SETS:
        chosen = [part for part in parts if part.validation == (name == "validation")]
        tables[name] = merge_tables([part.table for part in chosen], user_embeddings)
        num_truncated[name] = sum(part.num_truncated for part in chosen)
        for part in chosen:
            # What the validation's contents skip is told with the table they came from.
            skipped[name if name in joined.num_targets else "training"].update(part.skipped)
    training, validation = (tables[name] for name in _SETS)
    for name, uri in (("training", reading.joins.targets_uri), ("validation", reading.joins.validation_uri)):
        if uri is not None and not tables[name].num_rows:
            raise _nothing_left(uri, joined.num_targets[name], skipped[name])
    if reading.settings.kind != "constant":
        refuse_constant(training, reading.joins.users_uri)
    reference = ReferenceStatistics.of(torch.from_numpy(training.user_embeddings)).tensors()
    counts = LessonCounts(
        num_targets=joined.num_targets,
        num_used={name: table.num_rows for name, table in tables.items()},
        num_truncated=num_truncated,
        skipped={name: {k: n for k, n in sorted(skipped[name].items()) if n} for name in joined.num_targets},
        num_contents={name: len(table) for name, table in tables.items()},
        num_users={name: len(table.user_embeddings) for name, table in tables.items()},
        num_contents_without_target=num_contents - joined.num_contents,
    )
    return training, validation, {name: value.numpy() for name, value in reference.items()}, counts


def merge_tables(tables: Sequence[LessonTable], user_embeddings: npt.NDArray[np.float32]) -> LessonTable:
    """One table of all; of the user embeddings that `user` counts in, only those of its own users are kept."""
    user = np.concatenate([np.zeros(0, np.int32), *(table.user for table in tables)])
    used, place = np.unique(user, return_inverse=True)
    rows = np.cumsum([0, *(table.num_rows for table in tables)])
    firsts = [table.first_row[1:] + start for table, start in zip(tables, rows[:-1], strict=True)]
    return LessonTable(
        lefts=_joined([table.lefts for table in tables]),
        first_row=np.concatenate([np.zeros(1, np.int64), *firsts]).astype(np.int64),
        user=place.astype(np.int32).reshape(-1),
        rights=_joined([table.rights for table in tables]),
        targets=_joined([table.targets for table in tables]),
        weight=np.concatenate([np.zeros(0, np.float32), *(table.weight for table in tables)]),
        source=np.arange(len(user), dtype=np.int64),
        user_embeddings=user_embeddings[used],
    )


def _joined(parts: Sequence[Ragged]) -> Ragged:
    sizes = np.concatenate([np.zeros(1, np.int64), *(np.diff(part.starts) for part in parts)])
    return Ragged(np.concatenate([np.zeros(0, np.int32), *(part.ids for part in parts)]), np.cumsum(sizes))


def _nothing_left(uri: str, num_targets: int, skipped: Counter[str]) -> InputError:
    found = ", ".join(f"{name} {number:,}" for name, number in skipped.most_common() if number) or "nothing skipped"
    return InputError(
        f"none of the {num_targets:,} targets can be used ({found})",
        uri=uri,
        remedy="A target needs a user with a user embedding who is not opted out, a content, a task of the "
        "configuration and a text.",
    )

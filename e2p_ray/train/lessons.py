"""Lessons: targets as tokens, all of one content and task together, in flat arrays that processes can share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from e2p_ray.config import TaskConfig, for_language
from e2p_ray.engine.lesson import Lesson, LessonRow
from e2p_ray.engine.prompt import PromptLayout, text_ids
from e2p_ray.errors import ConfigError, InputError, RowError
from e2p_ray.schema import Content
from e2p_ray.train.settings import TrainSettings

SKIPPED = ("unknown_user", "missing_content", "empty_text", "prompt_too_long")


@dataclass(frozen=True, slots=True)
class Target:
    """One text that was right for a user and a content."""

    user_id: str
    content_id: str
    task: str
    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class UserTable:
    """User embeddings (n, d), finite, of one embedding space; they are what the projector normalises by."""

    user_ids: Sequence[str]
    user_embeddings: npt.NDArray[np.float32]
    embedding_space: str


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """Sequences of token ids in one flat array; `starts` (n + 1,)."""

    ids: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, sequences: Iterable[Sequence[int]]) -> Ragged:
        parts = [np.asarray(sequence, np.int32) for sequence in sequences]
        starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return cls(np.concatenate([*parts, np.zeros(0, np.int32)]), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, at: int) -> npt.NDArray[np.int32]:
        return self.ids[self.starts[at] : self.starts[at + 1]]


@dataclass(frozen=True, slots=True, eq=False)
class LessonTable:
    """All lessons of a training set.

    Lesson i has the tokens `lefts[i]` before the soft token and the rows first_row[i] .. first_row[i + 1]. Row r has
    its user's row in `user_embeddings` (n, d), the tokens `rights[r]` between soft token and text, the text's tokens
    `targets[r]`, its weight, and `source[r]`: which of the given targets it was made from.
    """

    lefts: Ragged
    first_row: npt.NDArray[np.int64]
    user: npt.NDArray[np.int32]
    rights: Ragged
    targets: Ragged
    weight: npt.NDArray[np.float32]
    source: npt.NDArray[np.int64]
    user_embeddings: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.lefts)

    @property
    def num_rows(self) -> int:
        return len(self.user)

    def rows_of(self, lesson: int) -> range:
        """The rows of one lesson."""
        return range(int(self.first_row[lesson]), int(self.first_row[lesson + 1]))

    def lesson(self, at: int, rows: Sequence[int], *, soft: bool = True) -> Lesson:
        """Some rows of one lesson; without `soft` they get no soft token, and their content's last token instead."""
        left = tuple(self.lefts[at].tolist())
        left, moved = (left, ()) if soft else (left[:-1], left[-1:])
        chosen = (
            LessonRow(
                self.user_embeddings[self.user[row]] if soft else None,
                [*moved, *self.rights[row].tolist()],
                self.targets[row].tolist(),
                float(self.weight[row]),
            )
            for row in rows
        )
        return Lesson(left, tuple(chosen))


def make_lessons(
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, TaskConfig],
    users: UserTable,
    contents: Sequence[Content],
    targets: Sequence[Target],
    settings: TrainSettings,
    max_positions: int,
) -> tuple[LessonTable, dict[str, int]]:
    """Targets grouped by content and task, in the order of their keys, and how many were skipped for what.

    Raises ConfigError when none is left, or for a tokenizer without an end token.
    """
    table, skipped, _ = lessons_of(tokenizer, tasks, users, contents, targets, settings, max_positions)
    if not table.num_rows:
        raise ConfigError(
            f"none of the {len(targets)} targets can be used (skipped: {skipped}). Give targets whose user_id is in "
            "the users table with a user embedding and whose content_id is in the contents table"
        )
    return table, skipped


def lessons_of(
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, TaskConfig],
    users: UserTable,
    contents: Sequence[Content],
    targets: Sequence[Target],
    settings: TrainSettings,
    max_positions: int,
) -> tuple[LessonTable, dict[str, int], int]:
    """What `make_lessons` returns, also when no lesson is left, and how many targets are cut.

    Raises ConfigError for a tokenizer without an end.
    """
    row_of = {user_id: row for row, user_id in enumerate(users.user_ids)}
    content_of = {content.content_id: content for content in contents}
    groups, skipped = _groups(targets, row_of.keys(), content_of.keys())
    layout = PromptLayout(
        tokenizer, settings.layout, tasks, num_soft_tokens=settings.num_soft_tokens, max_positions=max_positions
    )
    end, num_truncated = _end_token(tokenizer), 0
    lefts, rights, ids, sources, sizes = [], list[tuple[int, ...]](), list[list[int]](), list[int](), [0]
    for (content_id, task), places in sorted(groups.items()):
        content = content_of[content_id]
        try:
            segments = layout.segments(content, task)
        except RowError as error:
            skipped[error.code] = skipped.get(error.code, 0) + len(places)
            continue
        # The layout leaves room for what is generated, and a target may be longer. Its last token is only predicted.
        room = max_positions - segments.num_tokens - settings.num_soft_tokens + 1
        whole = {place: [*_target_ids(tokenizer, targets[place].text, content, settings), end] for place in places}
        fitting = [place for place in places if min(len(whole[place]), settings.max_target_tokens) <= room]
        skipped["prompt_too_long"] += len(places) - len(fitting)
        if not fitting:
            continue
        lefts.append(segments.left)
        rights += [segments.right] * len(fitting)
        # What is cut has no end: a projector would learn to stop in the middle.
        ids += [whole[place][: settings.max_target_tokens] for place in fitting]
        num_truncated += sum(len(whole[place]) > settings.max_target_tokens for place in fitting)
        sources += fitting
        sizes.append(len(fitting))
    table = LessonTable(
        lefts=Ragged.of(lefts),
        first_row=np.cumsum(sizes, dtype=np.int64),
        user=np.array([row_of[targets[place].user_id] for place in sources], np.int32),
        rights=Ragged.of(rights),
        targets=Ragged.of(ids),
        weight=np.array([targets[place].weight for place in sources], np.float32),
        source=np.array(sources, np.int64),
        user_embeddings=users.user_embeddings,
    )
    return table, skipped, num_truncated


def _groups(
    targets: Sequence[Target], user_ids: Set[str], content_ids: Set[str]
) -> tuple[dict[tuple[str, str], list[int]], dict[str, int]]:
    """The places of usable targets by content and task, and how many are skipped for what."""
    skipped = dict.fromkeys(SKIPPED, 0)
    groups: dict[tuple[str, str], list[int]] = {}
    for place, target in enumerate(targets):
        if target.user_id not in user_ids:
            skipped["unknown_user"] += 1
        elif target.content_id not in content_ids:
            skipped["missing_content"] += 1
        elif not target.text.strip():
            skipped["empty_text"] += 1
        else:
            groups.setdefault((target.content_id, target.task), []).append(place)
    return groups, skipped


def _target_ids(tokenizer: PreTrainedTokenizerBase, text: str, content: Content, settings: TrainSettings) -> list[int]:
    prefix = for_language(settings.target_prefix, content.language) or ""
    return text_ids(tokenizer, prefix + text)


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ConfigError("the base model's tokenizer has no end token: a projector could not learn where a text ends")
    return int(tokenizer.eos_token_id)


def refuse_constant(lessons: LessonTable, users_uri: str) -> None:
    """InputError where all user embeddings are one and the same: nothing could be learned from them."""
    used = lessons.user_embeddings[np.unique(lessons.user)]
    if not (used != used[0]).any():
        several = f"all {len(used):,} users of the targets have one and the same user embedding"
        raise InputError(
            f"{several if len(used) > 1 else 'all targets are of one user'}: there is nothing to personalise by",
            uri=users_uri,
            column="embedding",
            remedy="Look at the job that writes this table, or set projector.kind to constant.",
        )

"""Lessons with every user's profile in words in the prompt: what a team would try before training a projector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from e2p_ray.config import PromptTemplate, TaskConfig
from e2p_ray.engine.prompt import text_ids
from e2p_ray.schema import Content
from e2p_ray.train.lessons import LessonTable, Ragged, Target, UserTable, make_lessons
from e2p_ray.train.settings import TrainSettings

_BEFORE_PROFILE = "\n\n"  # as between a title and a body


def profile_lessons(
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, TaskConfig],
    users: UserTable,
    contents: Sequence[Content],
    targets: Sequence[Target],
    profile_of: Mapping[str, str],
    settings: TrainSettings,
    max_positions: int,
    *,
    max_profile_tokens: int = 64,
) -> tuple[LessonTable, dict[str, int]]:
    """The lessons of `make_lessons` with the prompt [head content] SOFT [profile cue], and what was skipped.

    Everything the users share stands before the soft token whatever the settings' layout, so the content is still
    shared; scored without one, the prompt is [head content profile cue]. `profile_of` is by user id; users without a
    profile, or with an empty one, get the cue alone. Longer profiles keep their head. Rows are those of
    `make_lessons`, but where a profile's room leaves none for any content or the target: compare by `source`. Raises as
    it does.
    """
    # The profile's room is taken from the content's, as a long soft token's would be.
    room = settings.num_soft_tokens + max_profile_tokens
    layout = replace(settings, layout="content_first", num_soft_tokens=room)
    late = {name: _cue_last(task) for name, task in tasks.items()}
    table, skipped = make_lessons(tokenizer, late, users, contents, targets, layout, max_positions)

    def tokens_of(user_id: str) -> list[int]:
        profile = profile_of.get(user_id, "").strip()
        return text_ids(tokenizer, _BEFORE_PROFILE + profile)[:max_profile_tokens] if profile else []

    profiles = {row: tokens_of(users.user_ids[row]) for row in set(table.user.tolist())}
    rights = Ragged.of([*profiles[user], *table.rights[row].tolist()] for row, user in enumerate(table.user.tolist()))
    return replace(table, rights=rights), skipped


def _cue_last(task: TaskConfig) -> TaskConfig:
    """The task with its whole cue after the soft token."""
    prompts = {
        language: PromptTemplate(
            head=prompt.head, content=prompt.content, cue_after=prompt.cue_before + prompt.cue_after
        )
        for language, prompt in task.prompts.items()
    }
    return task.model_copy(update={"prompts": prompts})

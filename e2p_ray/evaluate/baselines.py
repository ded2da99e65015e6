"""What a team would try instead: the user's taste as text in the prompt, prefix tuning, LoRA."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import assert_never

import numpy as np

from e2p_ray.config import EvaluateConfig, ExtraMethod
from e2p_ray.downstream.evaluation import MethodCost
from e2p_ray.errors import ConfigError
from e2p_ray.evaluate.contest import Contest, Scored, refuse_non_finite, soft_token_scores
from e2p_ray.evaluate.controls import num_parameters, train_on
from e2p_ray.evaluate.data import EvaluationData
from e2p_ray.train.baselines.adapters import AdapterKind, train_adapter
from e2p_ray.train.baselines.profile import profile_lessons
from e2p_ray.train.lessons import LessonTable, Target
from e2p_ray.train.score import RowScores


def score_baseline(contest: Contest, method: ExtraMethod) -> Scored:
    """Train what has to be trained, then score the held-out rows. ConfigError when its inputs are missing."""
    contest.say(f"baseline {method}")
    match method:
        case "profile_text":
            return _in_rows_of(
                contest,
                table := _profiles(contest, contest.data.held_out),
                soft_token_scores(contest, method, table, None, contest.new_store(), 0),
            )
        case "profile_text_constant":
            return _profile_and_constant(contest, method)
        case "prefix_tuning" | "lora":
            return _adapter(contest, method, method, contest.lessons(contest.data.training), contest.table)
        case "lora_profile_text":
            training = _profiles(contest, contest.data.training)
            return _adapter(contest, method, "lora", training, _profiles(contest, contest.data.held_out))
    assert_never(method)


def _profile_and_constant(contest: Contest, method: str) -> Scored:
    settings = replace(contest.settings, kind="constant", layout="content_first")
    trained = train_on(contest, _profiles(contest, contest.data.training), settings)
    table = _profiles(contest, contest.data.held_out)
    found = soft_token_scores(contest, method, table, trained, contest.new_store(), num_parameters(trained))
    return _in_rows_of(contest, table, found)


def _adapter(contest: Contest, method: str, kind: AdapterKind, training: LessonTable, table: LessonTable) -> Scored:
    adapter = train_adapter(
        contest.folder.path,
        kind,
        training,
        contest.settings,
        num_parameters=num_parameters(contest.projector),
        dtype=contest.config.base_model.dtype,
        device=contest.config.base_model.device,
    )
    started = time.perf_counter()
    scores = refuse_non_finite(adapter.score(table))
    seconds = time.perf_counter() - started
    lefts = np.repeat(np.diff(table.lefts.starts), np.diff(table.first_row))
    rights = np.diff(table.rights.starts)
    cost = MethodCost(
        method,
        num_trainable_parameters=adapter.num_trainable_parameters,
        num_prompt_tokens=float((lefts + rights).mean()) + adapter.num_virtual_tokens,
        num_own_tokens=float(rights.mean()) + 1,  # the same for all users: their contents can be shared as well
        rows_per_s=table.num_rows / seconds,
    )
    return _in_rows_of(contest, table, Scored(method, scores, cost))


def refuse_without_profiles(config: EvaluateConfig, data: EvaluationData) -> None:
    """ConfigError where a method needs the users' taste as text and the users table has none."""
    asked = [method for method in config.evaluation.methods if "profile_text" in method]
    if asked and not data.profile_of:
        raise ConfigError(
            f"evaluation.methods: {', '.join(asked)} needs the user's taste as text: give the users table a column "
            "profile_text, or leave it out"
        )


def refuse_long_profiles(contest: Contest) -> None:
    """ConfigError where a profile would leave a held-out prompt no room, before anything is trained."""
    asked = [method for method in contest.config.evaluation.methods if "profile_text" in method]
    if asked:
        _places(contest, _profiles(contest, contest.data.held_out), ", ".join(asked))


def _profiles(contest: Contest, targets: tuple[Target, ...]) -> LessonTable:
    table, _ = profile_lessons(
        contest.tokenizer,
        contest.tasks,
        contest.data.users,
        list(contest.data.contents.values()),
        targets,
        contest.data.profile_of,
        contest.settings,
        contest.base.max_positions,
    )
    return table


def _in_rows_of(contest: Contest, table: LessonTable, found: Scored) -> Scored:
    """Scores in the row order of the contest's own table."""
    rows = _places(contest, table, found.method)
    return replace(found, scores=RowScores(found.scores.nll[rows], found.scores.num_tokens[rows]))


def _places(contest: Contest, table: LessonTable, methods: str) -> list[int]:
    """The row of this table for every row of the contest's own. ConfigError where there is none."""
    place_of = {int(source): row for row, source in enumerate(table.source)}
    missing = [source for source in contest.table.source.tolist() if source not in place_of]
    if missing:
        raise ConfigError(
            f"evaluation.methods: {methods} leaves no room for the content or the target in {len(missing):,} "
            "prompts. Lower tasks.*.max_content_tokens or training.max_target_tokens, or leave the method out"
        )
    return [place_of[source] for source in contest.table.source.tolist()]

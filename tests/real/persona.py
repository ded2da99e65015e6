"""Synthetic-Persona-Chat: a user is one persona of one dialogue, a target its next utterance.

Dialogues are split, so every user of a validation or test target is unseen, and the basis of the user embeddings is
fitted to training personas alone. But the data has only some hundred characters, each in about twenty wordings: most
test users have a near twin in training. With `new_characters` no one of a test user's character is in training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
from numpy.random import Generator, default_rng

from tests.real.tables import SPLITS, Answer, RealTask, TaskTables
from tests.real.vectors import VectorSettings, Written, fit_vectors

TEMPLATE = {"content": "{body}", "cue_before": "\n\nReply:"}
VECTORS = VectorSettings(num_style=0, num_words=64, char_ngram=0, prior_texts=0.0)
_NOW = datetime(2023, 12, 1, tzinfo=UTC)
_SHARES = (0.7, 0.1, 0.2)  # of the dialogues
_MAX_SHOWN = 4  # utterances in a content
_MAX_TARGETS = 6  # of a user
_MIN_WORDS = 4  # of a target: "Me too!" is anyone's
_UTTERANCE = re.compile(r"^[*\[\s]*User ([12])[*\s]*:[*\s]*(.+?)[*\]\s]*$")


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Two personas (lines by speaker, "1" and "2") and what they said in turn: (speaker, text)."""

    dialogue_id: str
    personas: Mapping[str, Sequence[str]]
    utterances: Sequence[tuple[str, str]]

    def user_id(self, speaker: str) -> str:
        return f"{self.dialogue_id}/{speaker}"


def write_persona(
    data: Path, folder: Path, *, seed: int = 0, vectors: VectorSettings = VECTORS, new_characters: bool = False
) -> RealTask:
    """Write the task's tables; `data` is the folder with synthetic_persona_chat.parquet.

    With `new_characters` the speakers of validation and test dialogues whose character is known from elsewhere have
    no targets.
    """
    dialogues = read_dialogues(data)
    split_of_user = _split_users(dialogues, default_rng([seed, 1]), new_characters=new_characters)
    splits: dict[str, list[Dialogue]] = {split: [] for split in SPLITS}
    for dialogue in dialogues:
        latest = max((split_of_user[dialogue.user_id(speaker)] for speaker in dialogue.personas), key=SPLITS.index)
        splits[latest].append(dialogue)
    contents: list[tuple[str, str, str]] = []
    answers: dict[str, list[Answer]] = {split: [] for split in SPLITS}
    random = default_rng([seed, 2])
    for split, chosen in splits.items():
        for dialogue in chosen:
            for place in _turns(dialogue, random):
                speaker, text = dialogue.utterances[place]
                if split_of_user[dialogue.user_id(speaker)] != split:
                    continue
                content_id = f"{dialogue.dialogue_id}/{place}"
                contents.append((content_id, "", _shown(dialogue, place)))
                answers[split].append(Answer(dialogue.user_id(speaker), content_id, text))
    tables = TaskTables(folder, task="reply", now=_NOW)
    tables.write_contents(pl.DataFrame(contents, schema=["content_id", "title", "body"], orient="row"))
    for split in SPLITS:
        tables.write_targets(split, answers[split])
    spaces = _write_users(tables, dialogues, splits["train"], vectors, seed)
    return RealTask(
        name="persona_new" if new_characters else "persona",
        folder=folder,
        task="reply",
        template=TEMPLATE,
        target_prefix=" ",
        language="en",
        embedding_space=spaces[0],
        refit_space=spaces[1],
        embedding_dim=vectors.num_axes,
        num_users=2 * len(dialogues),
        num_contents=len(contents),
        num_targets={split: len(answers[split]) for split in SPLITS},
    )


def read_dialogues(data: Path) -> list[Dialogue]:
    """The dialogues up to their first line that no speaker says; those with fewer than four utterances are left out."""
    table = pl.read_parquet(data / "synthetic_persona_chat.parquet")
    dialogues = []
    for number, (first, second, conversation) in enumerate(table.iter_rows()):
        utterances = []
        for line in filter(str.strip, conversation.split("\n")):
            said = _UTTERANCE.match(line)
            if said is None:
                break
            utterances.append((said[1], " ".join(said[2].split())))
        personas = {"1": first.split("\n"), "2": second.split("\n")}
        if len(utterances) >= 4 and all(any(map(str.strip, lines)) for lines in personas.values()):
            lines = {speaker: [line.strip() for line in own if line.strip()] for speaker, own in personas.items()}
            dialogues.append(Dialogue(f"d{number:04d}", lines, utterances))
    return dialogues


def characters_of(dialogues: Sequence[Dialogue]) -> dict[str, int]:
    """A number for the character of every user: personas with two lines in common are one character."""
    characters: list[set[str]] = []
    place_of: dict[str, int] = {}
    for dialogue in dialogues:
        for speaker, lines in dialogue.personas.items():
            own = {line.lower() for line in lines}
            found = (place for place, known in enumerate(characters) if len(own & known) >= 2)
            place = next(found, len(characters))
            if place == len(characters):
                characters.append(set())
            characters[place] |= own
            place_of[dialogue.user_id(speaker)] = place
    return place_of


def _split_users(dialogues: Sequence[Dialogue], random: Generator, *, new_characters: bool) -> dict[str, str]:
    """Users by split: whole dialogues at random, or whole characters."""
    place_of = {d.user_id(s): place for place, d in enumerate(dialogues) for s in d.personas}
    if new_characters:
        place_of = characters_of(dialogues)
    order = random.permutation(max(place_of.values()) + 1)
    first, second = round(_SHARES[0] * len(order)), round((_SHARES[0] + _SHARES[1]) * len(order))
    names = np.repeat(SPLITS, [first, second - first, len(order) - second])
    return {user_id: str(names[order[place]]) for user_id, place in place_of.items()}


def _turns(dialogue: Dialogue, random: Generator) -> list[int]:
    """Places of the utterances that are targets: after both opened, long enough, and not said before as they are."""
    turns: list[int] = []
    for speaker in ("1", "2"):
        own = [
            place
            for place, (said_by, text) in enumerate(dialogue.utterances)
            if said_by == speaker
            and place >= 2
            and len(text.split()) >= _MIN_WORDS
            and text.lower() not in _shown(dialogue, place).lower()
        ]
        turns.extend(own[i] for i in sorted(random.permutation(len(own))[:_MAX_TARGETS].tolist()))
    return turns


def _shown(dialogue: Dialogue, place: int) -> str:
    """The dialogue just before: "A" is who will reply."""
    speaker, _ = dialogue.utterances[place]
    before = dialogue.utterances[max(0, place - _MAX_SHOWN) : place]
    return "\n".join(f"{'A' if said_by == speaker else 'B'}: {text}" for said_by, text in before)


def _history(dialogues: Sequence[Dialogue], *, opened: bool) -> dict[str, list[Written]]:
    """The persona lines of every user; with what he said in the first two utterances, which are never targets."""
    history = {}
    for dialogue in sorted(dialogues, key=lambda dialogue: dialogue.dialogue_id):
        for speaker, lines in dialogue.personas.items():
            said = [text for said_by, text in dialogue.utterances[:2] if said_by == speaker and opened]
            history[dialogue.user_id(speaker)] = [Written(text) for text in (*lines, *said)]
    return history


def _write_users(
    tables: TaskTables, dialogues: Sequence[Dialogue], train: Sequence[Dialogue], vectors: VectorSettings, seed: int
) -> tuple[str, str]:
    fit = fit_vectors(_history(train, opened=False), vectors)
    refit = fit.rotated(seed)
    early, late = _history(dialogues, opened=False), _history(dialogues, opened=True)
    for table, basis, history in (("users", fit, early), ("users_later", fit, late), ("users_refit", refit, early)):
        tables.write_users(
            table,
            basis.project(basis.measure(history)),
            basis.embedding_space,
            user_ids=list(history),
            history_sizes=[len(texts) for texts in history.values()],
            profile_texts=[" ".join(written.text for written in texts) for texts in history.values()],
        )
    return fit.embedding_space, refit.embedding_space

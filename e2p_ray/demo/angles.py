"""Which angle of its article a text shows, and how often that is the one its user likes best."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import polars as pl
import pyarrow as pa

Markers = Mapping[str, Sequence[str]]  # angle -> the numbers and names that belong to it alone


@dataclass(frozen=True, slots=True)
class Truth:
    """What the newsroom knows and the pipeline does not: what every user likes, what every content tells."""

    ranking: Mapping[str, Sequence[str]]  # user_id -> angles, the best-liked first
    markers: Mapping[str, Markers]  # content_id -> facts by angle
    language: Mapping[str, str]  # content_id -> language

    def expected_angle(self, user_id: str, content_id: str) -> str:
        """The user's best-liked angle among those that the content has."""
        return next(angle for angle in self.ranking[user_id] if angle in self.markers[content_id])


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Shares of texts that show the expected angle: of their own user, and of another user put in his place."""

    num_texts: int
    right: float
    shuffled: float

    @property
    def ratio(self) -> float:
        return self.right / self.shuffled if self.shuffled else float("inf")


def load_truth(folder: Path) -> Truth:
    """Read truth.parquet and truth_contents.parquet of a world."""
    users = pl.read_parquet(folder / "truth.parquet")
    contents = pl.read_parquet(folder / "truth_contents.parquet")
    markers: dict[str, dict[str, list[str]]] = {}
    for row in contents.iter_rows(named=True):
        markers.setdefault(row["content_id"], {})[row["angle"]] = row["markers"]
    ranking = dict(zip(users["user_id"], users["ranking"].to_list(), strict=True))
    language = dict(zip(contents["content_id"], contents["language"], strict=True))
    return Truth(ranking, markers, language)


def shown_angle(text: str, markers: Markers) -> str | None:
    """The angle most of whose facts the text names; None without any, or when two angles are level."""
    found = ((sum(_names(text, fact) for fact in facts), angle) for angle, facts in markers.items())
    counts = sorted(found, reverse=True)
    if not counts or counts[0][0] == 0 or (len(counts) > 1 and counts[1][0] == counts[0][0]):
        return None
    return counts[0][1]


def _names(text: str, fact: str) -> bool:
    if fact.isdecimal():
        return re.search(rf"(?<!\d){fact}(?!\d)", text) is not None
    return fact in text


def angle_accuracy(
    generations: pa.Table, truth: Truth, *, task: str | None = None, seed: int = 0
) -> dict[str, Accuracy]:
    """Accuracy by language over the texts meant for their user: all but the suppressed; a fallback counts as it reads.

    `generations` needs user_id, content_id, task, text, status. Shuffled: the users of a language change places, nobody
    keeps his own, and each text is held against the angle that the other user would have liked best in that content.
    """
    rows = pl.DataFrame(pl.from_arrow(generations.select(["user_id", "content_id", "task", "text", "status"])))
    rows = rows.filter(pl.col("status") != "suppressed")
    if task is not None:
        rows = rows.filter(pl.col("task") == task)
    by_language: dict[str, list[tuple[str, str, str]]] = {}
    for user_id, content_id, text in rows.select("user_id", "content_id", "text").iter_rows():
        by_language.setdefault(truth.language[content_id], []).append((user_id, content_id, text))
    return {language: _accuracy(texts, truth, seed) for language, texts in sorted(by_language.items())}


def _accuracy(texts: Sequence[tuple[str, str, str]], truth: Truth, seed: int) -> Accuracy:
    other = _change_places((user_id for user_id, _, _ in texts), seed)
    right = shuffled = 0
    for user_id, content_id, text in texts:
        shown = shown_angle(text, truth.markers[content_id])
        right += shown == truth.expected_angle(user_id, content_id)
        shuffled += shown == truth.expected_angle(other[user_id], content_id)
    return Accuracy(len(texts), right / len(texts), shuffled / len(texts))


def _change_places(user_ids: Iterable[str], seed: int) -> dict[str, str]:
    """A random cycle through all users: everybody is replaced by somebody else."""
    order = sorted(set(user_ids))
    Random(seed).shuffle(order)
    return dict(zip(order, order[1:] + order[:1], strict=True))

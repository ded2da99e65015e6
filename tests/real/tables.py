"""A real task as the tables that every job reads, and what there is in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

SPLITS = ("train", "validation", "test")


class Answer(NamedTuple):
    """A target: what was right for this user and content."""

    user_id: str
    content_id: str
    text: str


@dataclass(frozen=True, slots=True)
class RealTask:
    """Tables of one real task: users, users_later, users_refit, contents, targets_train, _validation and _test.

    `users_later` has the same users in the same embedding space, from later history; `users_refit` has them in another
    embedding space. The column `history_size` counts the texts or clicks behind a user embedding.
    """

    name: str
    folder: Path
    task: str  # what the column `task` of the targets says
    template: Mapping[str, str]  # of the prompt
    target_prefix: str
    language: str
    embedding_space: str
    refit_space: str
    embedding_dim: int
    num_users: int
    num_contents: int
    num_targets: Mapping[str, int]  # by split
    num_impressions: int = 0

    def uri(self, table: str) -> str:
        return str(self.folder / f"{table}.parquet")

    def describe(self) -> str:
        """One line for people."""
        targets = ", ".join(f"{self.num_targets[split]:,} {split}" for split in SPLITS)
        shown = f", {self.num_impressions:,} impressions" if self.num_impressions else ""
        return (
            f"{self.name}: {self.num_users:,} users (d = {self.embedding_dim}), {self.num_contents:,} contents, "
            f"targets {targets}{shown}"
        )


class TaskTables:
    """Writes the tables of one task into a folder."""

    def __init__(self, folder: Path, *, task: str, now: datetime) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._task, self._now = folder, task, now

    def write_users(
        self,
        table: str,
        vectors: npt.NDArray[np.float32],
        space: str,
        *,
        user_ids: Sequence[str],
        history_sizes: Sequence[int],
        profile_texts: Sequence[str],
    ) -> None:
        frame = pl.DataFrame(
            {
                "user_id": user_ids,
                "embedding": pl.Series(vectors, dtype=pl.Array(pl.Float32, vectors.shape[1])),
                "history_size": pl.Series(history_sizes, dtype=pl.Int64),
                "profile_text": profile_texts,
            }
        ).with_columns(
            embedding_space=pl.lit(space), personalize=pl.lit(True), updated_at=pl.lit(self._now), locale=pl.lit("en")
        )
        self.write(table, frame)

    def write_contents(self, contents: pl.DataFrame) -> None:
        """Columns content_id, title and body."""
        self.write("contents", contents.with_columns(language=pl.lit("en"), updated_at=pl.lit(self._now)))

    def write_targets(self, split: str, answers: Sequence[Answer]) -> None:
        frame = pl.DataFrame(answers, schema=dict.fromkeys(Answer._fields, pl.String), orient="row")
        frame = frame.with_columns(task=pl.lit(self._task), weight=pl.lit(1.0, pl.Float32))
        self.write(f"targets_{split}", frame.select("user_id", "content_id", "task", "text", "weight"))

    def write(self, table: str, frame: pl.DataFrame) -> None:
        frame.write_parquet(self._folder / f"{table}.parquet", compression="zstd")

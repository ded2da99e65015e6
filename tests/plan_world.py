"""Small messy input tables, and a planner in plain Python that says what must become of them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from e2p_ray.config import JobConfig
from e2p_ray.storage import parquet_bytes

DIM, SPACE = 3, "space-1"
TASKS = ("explanation", "headline")
START = datetime(2026, 1, 1, tzinfo=UTC)
_TIME = pa.timestamp("us", tz="UTC")
USERS = pa.schema(
    {
        "user_id": pa.string(),
        "embedding": pa.list_(pa.float32()),
        "embedding_space": pa.string(),
        "personalize": pa.bool_(),
        "updated_at": _TIME,
    }
)
CONTENTS = pa.schema(
    {"content_id": pa.string(), "title": pa.string(), "body": pa.string(), "language": pa.string(), "updated_at": _TIME}
)
CANDIDATES = pa.schema(
    {
        "user_id": pa.string(),
        "content_id": pa.string(),
        "rank": pa.int32(),
        "score": pa.float32(),
        "source": pa.string(),
    }
)

Row = dict[str, Any]
Key = tuple[str, str, str]


def user(user_id: str | None, vector: Any = (1.0, 2.0, 3.0), **fields: Any) -> Row:
    row = {"user_id": user_id, "embedding": vector, "embedding_space": SPACE, "personalize": True, "updated_at": START}
    return {**row, **fields}


def content(content_id: str | None, title: str | None = "title", body: str | None = "body", **fields: Any) -> Row:
    row = {"content_id": content_id, "title": title, "body": body, "language": "en", "updated_at": START}
    return {**row, **fields}


def broken(column: pa.ChunkedArray, row: int) -> pa.Array:
    """The column with bytes that are no UTF-8 in one row, as a writer that does not look makes it."""
    values = [None if value is None else value.encode() for value in column.to_pylist()]
    values[row] = "港に新しい橋".encode("shift_jis")
    data = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(data), data.buffers())


def with_broken(table: pa.Table, column: str, row: int) -> pa.Table:
    """The table with such a column in place of its own."""
    return table.set_column(table.schema.get_field_index(column), column, broken(table[column], row))


def candidate(user_id: str | None, content_id: str | None, rank: int = 1) -> Row:
    return {"user_id": user_id, "content_id": content_id, "rank": rank, "score": 0.5, "source": "test"}


@dataclass(frozen=True)
class World:
    """The rows of the three tables."""

    users: list[Row] = field(default_factory=list)
    contents: list[Row] = field(default_factory=list)
    candidates: list[Row] = field(default_factory=list)

    def tables(self) -> dict[str, pa.Table]:
        return {
            "users": pa.Table.from_pylist(self.users, USERS),
            "contents": pa.Table.from_pylist(self.contents, CONTENTS),
            "candidates": pa.Table.from_pylist(self.candidates, CANDIDATES),
        }

    def shuffled(self, seed: int) -> World:
        chance = random.Random(seed)
        return replace(
            self,
            users=chance.sample(self.users, len(self.users)),
            contents=chance.sample(self.contents, len(self.contents)),
            candidates=chance.sample(self.candidates, len(self.candidates)),
        )

    def write(self, folder: Path, num_files: int = 1) -> Path:
        for name, table in self.tables().items():
            write_files(folder / name, table, num_files)
        return folder


def write_files(folder: Path, table: pa.Table, num_files: int) -> None:
    folder.mkdir(parents=True)
    step = max(1, math.ceil(table.num_rows / num_files))
    for start in range(0, max(1, table.num_rows), step):
        pq.write_table(table.slice(start, step), folder / f"part-{start:05d}.parquet", row_group_size=max(1, step // 2))


def upload(storage: Any, uri: str, world: World) -> None:
    for name, table in world.tables().items():
        storage.write_bytes(f"{uri}/{name}/part-0.parquet", parquet_bytes(table))


def job(inputs: str | Path, output: str | Path, tasks: Sequence[str] = TASKS, **plan: Any) -> JobConfig:
    """A job over the tables in one folder; `plan` are settings of its section."""
    return JobConfig.model_validate(
        {
            "inputs": {f"{name}_uri": f"{inputs}/{name}" for name in ("users", "contents", "candidates")},
            "output": {"uri": str(output)},
            "base_model": {"uri": "none"},
            "projector": {"uri": "none"},
            "tasks": {task: {"prompts": {"default": {}}} for task in tasks},
            "plan": plan,
        }
    )


def messy_world(seed: int, num_candidates: int = 800) -> World:
    """Every kind of trouble, often enough to meet every other kind."""
    chance = random.Random(seed)

    def some_time() -> datetime | None:
        return chance.choice([None, START, START + timedelta(days=1), START + timedelta(microseconds=1)])

    def vector() -> Any:
        good = [chance.uniform(-1, 1) for _ in range(DIM)]
        bad = [None, [], good[:-1], [*good, 1.0], [0.0] * DIM, [*good[:-1], math.nan], [math.inf, *good[1:]],
               [None, *good[1:]]]  # fmt: skip
        return chance.choice(bad) if chance.random() < 0.3 else good

    def one_user() -> Row:
        return user(
            chance.choice([None, ""]) if chance.random() < 0.02 else f"user-{chance.randrange(110)}",
            vector(),
            embedding_space=chance.choice([SPACE] * 6 + ["space-0", None]),
            personalize=chance.choice([True] * 6 + [False, None]),
            updated_at=some_time(),
        )

    def one_content() -> Row:
        text = chance.choice(["", " ", "　", None, "日本語の本文", "a body", "another body\nwith 2 lines", "é\0x"])
        title = chance.choice(["", None, "題名", "a title", "a title"])
        language = chance.choice(["en", "ja", None])
        name = None if chance.random() < 0.02 else f"content-{chance.randrange(25)}"
        # No two at once: of two as late, a fixed one is taken, and the reference does not say which.
        time = START + timedelta(seconds=chance.random() * 1e6)
        return content(name, title, text, language=language, updated_at=time)

    def one_candidate() -> Row:
        lost_user, lost_content = chance.random() < 0.03, chance.random() < 0.03
        hot = chance.random() < 0.3
        return candidate(
            chance.choice([None, ""]) if lost_user else f"user-{chance.randrange(120)}",
            chance.choice([None, ""]) if lost_content else "content-7" if hot else f"content-{chance.randrange(30)}",
            chance.randrange(5),
        )

    return World(
        users=[one_user() for _ in range(160)],
        contents=[*(one_content() for _ in range(40)), content("content-7", "hot", "hot body")],
        candidates=[one_candidate() for _ in range(num_candidates)],
    )


# -- the reference planner

Outcome = tuple[str, str, str, str | None, tuple[float, ...] | None]  # title, body, language, reason, user embedding


def reference_plan(world: World) -> tuple[dict[Key, set[Outcome]], dict[Key, str]]:
    """What every request may be (one thing, but for rows that tie), and every dead letter's code."""
    planned: dict[Key, set[Outcome]] = {}
    dead: dict[Key, str] = {}
    for row in world.candidates:
        user_id, content_id = row["user_id"] or "", row["content_id"] or ""
        users = _latest([u for u in world.users if u["user_id"] == user_id])
        users = [u for u in users if not u["personalize"]] or users
        contents = _latest([c for c in world.contents if c["content_id"] == content_id])
        texts = {(c["title"] or "", c["body"] or "", c["language"] or "") for c in contents}
        for task in TASKS:
            key = (user_id, content_id, task)
            if not user_id or not content_id:
                dead[key] = "null_key"
            elif not users:
                dead[key] = "unknown_user"
            elif not contents:
                dead[key] = "missing_content"
            elif not any(title.strip() or body.strip() for title, body, _ in texts):
                dead[key] = "empty_content"
            else:
                planned[key] = {(*text, *_reason(u)) for text in texts for u in users}
    return planned, dead


def _latest(rows: list[Row]) -> list[Row]:
    times = [row["updated_at"] or datetime.min.replace(tzinfo=UTC) for row in rows]
    return [row for row, time in zip(rows, times, strict=True) if time == max(times)]


def _reason(row: Row) -> tuple[str | None, tuple[float, ...] | None]:
    vector = row["embedding"]
    if not row["personalize"]:
        return "opted_out", None
    if vector is None:
        return "embedding_null", None
    if len(vector) != DIM:
        return "embedding_wrong_size", None
    if row["embedding_space"] != SPACE:
        return "embedding_other_space", None
    if any(x is None or not math.isfinite(x) for x in vector):
        return "embedding_non_finite", None
    if not any(vector):
        return "embedding_zero", None
    return None, tuple(pa.array(vector, pa.float32()).to_pylist())

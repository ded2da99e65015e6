"""One request from the input tables to the published row, as Markdown: `python -m tests.walk > tests/golden/walk.md`.

Every value is what the code returns; `tests/test_walk.py` compares the golden file with it. The engine is the fake one,
so that no model's weights can change the page.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from e2p_ray.check import check
from e2p_ray.config import JobConfig
from e2p_ray.engine.fake import FakeEngine
from e2p_ray.generate import Generator
from e2p_ray.plan import make_plan, read_shard
from e2p_ray.schema import Content, Group
from e2p_ray.storage import Storage

SPACE, DIM = "mf-2026-11", 4
USER_ID, CONTENT_ID, TASK = "user-7", "bridge", "headline"
BODY = (
    "The city opened a bridge over the harbour on Monday. It cost 40 million dollars, 5 million more than planned. "
    "Cyclists welcomed its wide lanes."
)
_TIME = pa.timestamp("us", tz="UTC")
_NOW = datetime(2026, 11, 1, tzinfo=UTC)

Segments = Callable[[Content, str], Sequence[tuple[str, str]]]


def make_config(folder: Path) -> JobConfig:
    return JobConfig.model_validate(
        {
            "inputs": {f"{name}_uri": f"{folder}/{name}.parquet" for name in ("users", "contents", "candidates")},
            "output": {"uri": f"{folder}/out"},
            "base_model": {"uri": "none"},
            "projector": {"uri": "none"},
            "tasks": {TASK: {"prompts": {"en": {"head": "News of the day.\n", "cue_before": "\n\nHeadline:"}}}},
        }
    )


def write_inputs(config: JobConfig, storage: Storage) -> None:
    """Three users, of whom one has opted out, and one content."""
    users = ["user-7", "user-8", "user-9"]
    user_embeddings = np.eye(DIM, dtype=np.float32)[[1, 2, 3]]
    table = {
        "user_id": pa.array(users),
        "embedding": pa.array([row.tolist() for row in user_embeddings], pa.list_(pa.float32(), DIM)),
        "embedding_space": pa.array([SPACE] * 3),
        "personalize": pa.array([True, True, False]),
        "updated_at": pa.array([_NOW] * 3, _TIME),
    }
    storage.write_table(config.inputs.users_uri, pa.table(table))
    table = {
        "content_id": pa.array([CONTENT_ID]),
        "title": pa.array(["Harbour bridge opens"]),
        "body": pa.array([BODY]),
        "language": pa.array(["en"]),
        "updated_at": pa.array([_NOW], _TIME),
    }
    storage.write_table(config.inputs.contents_uri, pa.table(table))
    table = {
        "user_id": pa.array(users),
        "content_id": pa.array([CONTENT_ID] * 3),
        "rank": pa.array([1] * 3, pa.int32()),
        "score": pa.array([0.9, 0.8, 0.7]),
        "source": pa.array(["two-tower"] * 3),
    }
    storage.write_table(config.inputs.candidates_uri, pa.table(table))


def text_segments(config: JobConfig) -> Segments:
    """The prompt as text around the soft token; with a tokenizer, `engine.prompt` gives the token ids of the same."""

    def segments(content: Content, task: str) -> list[tuple[str, str]]:
        template = config.tasks[task].prompt_for(content.language)
        assert template is not None
        text = template.content.replace("{title}", content.title).replace("{body}", content.body)
        return [
            ("head", template.head),
            ("content", text),
            ("cue before", template.cue_before),
            ("SOFT", "one position: projector(user embedding)"),
            ("cue after", template.cue_after),
        ]

    return segments


def walk(folder: Path) -> str:
    """The page. `folder` is empty and is written to."""
    config, storage = make_config(folder), Storage()
    write_inputs(config, storage)
    plan = make_plan(config, storage, embedding_space=SPACE, embedding_dim=DIM)
    (shard,) = plan.shards
    (group,) = read_shard(storage, plan.uri, shard.shard_id)
    return "\n\n".join(
        [
            *_planned(storage, f"{plan.uri}/shards/{shard.shard_id}.parquet", shard.shard_id),
            *_grouped(group),
            *_prompted(group, text_segments(config)),
            *_written(group, config),
        ]
    )


def _planned(storage: Storage, uri: str, shard_id: str) -> list[str]:
    (row,) = [row for row in storage.read_table(uri).to_pylist() if row["user_id"] == USER_ID]
    row["user_embedding"] = f"({len(row['user_embedding'])} numbers; they are printed nowhere)"
    return [
        "**1. A planned row.** `plan` joined a candidate with its user and its content, looked at the user's own "
        f"switch, and wrote this row into the shard `{shard_id}`, whose id is a hash of what is in it.",
        _table(row),
    ]


def _grouped(group: Group) -> list[str]:
    rows = [
        f"| {request.key.user_id} | {'yes' if request.user_embedding is not None else 'no'} | {_cell(request.reason)} |"
        for request in group.requests
    ]
    return [
        f"**2. Its group.** The {len(group.requests)} requests of content `{group.content.content_id}` and task "
        f"`{group.task}` share one prefix. A user who opted out has no user embedding from here on.",
        "\n".join(["| user | user embedding | reason |", "|---|---|---|", *rows]),
    ]


def _prompted(group: Group, segments: Segments) -> list[str]:
    rows = [f"| {name} | {_cell(text)} |" for name, text in segments(group.content, group.task)]
    return [
        "**3. The prompt.** Everything left of SOFT is the shared prefix: computed once for all users of the content.",
        "\n".join(["| segment | holds |", "|---|---|", *rows]),
    ]


def _written(group: Group, config: JobConfig) -> list[str]:
    engine = FakeEngine(tasks=config.tasks, embedding_space=SPACE, embedding_dim=DIM)
    (completion,) = [c for c in engine.generate([group]) if c.key.user_id == USER_ID]
    limits = config.tasks[TASK].limits
    verdict = check(completion.text, group.content, completion, limits, config.checks)
    wrong = completion.text.replace("40", "14")
    rejected = check(wrong, group.content, completion, limits, config.checks)
    rows, dead_letters = Generator(engine, config, run_id="3f1c9a7e52d04b68").generate([group])
    assert not dead_letters
    (row,) = [row for row in rows if row.user_id == USER_ID]
    published = {name: getattr(row, name) for name in row.__slots__} | {"generated_at": "(the time of the call)"}
    completed = {name: getattr(completion, name) for name in completion.__slots__} | {"key": ", ".join(completion.key)}
    return [
        "**4. The completion.** What the engine wrote (here the fake one, which quotes a sentence of the content).",
        _table(completed),
        f"**5. The verdict.** {'Accepted' if verdict.accepted else 'Rejected'}: every number and name occurs in the "
        f"content. Had the engine written “{wrong}”, the verdict would be `{rejected.reason}`, detail "
        f"“{rejected.detail}”, and the user would get a second try, then the unpersonalised text, then the title.",
        "**6. The published row.** `commit` writes it with its shard; `publish` makes it visible with its run.",
        _table(published),
    ]


def _table(row: dict[str, Any]) -> str:
    return "\n".join(
        ["| column | value |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in row.items())]
    )


def _cell(value: object) -> str:
    """One line of Markdown; line breaks are shown as ⏎."""
    if value is None or value == "":
        return "–"
    text = str(value.value if isinstance(value, Enum) else value)
    return text.replace("|", "\\|").replace("\n", "⏎")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.write(walk(Path(folder)) + "\n")


if __name__ == "__main__":
    main()

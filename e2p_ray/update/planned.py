"""The rows of a plan's shard with the fingerprints that their texts would have."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from e2p_ray.fingerprint import TextSettings, content_part, embedding_part, reason_part
from e2p_ray.plan.inputs import as_binary, stable_hash, text_digest
from e2p_ray.plan.shards import read_planned
from e2p_ray.schema import Content
from e2p_ray.storage import Storage

SettingsOf = Callable[[str, str], TextSettings]  # of a task and a language

REQUESTS = pl.Schema(
    {
        "user_id": pl.String,
        "content_id": pl.String,
        "task": pl.String,
        "reason": pl.String,
        "user_embedding": pl.Binary,
        "prompt_id": pl.String,
        "fingerprint": pl.String,
    }
)
CONTENTS = pl.Schema(
    {
        "content_id": pl.String,
        "title": pl.String,
        "body": pl.String,
        "language": pl.String,
        "digest": pl.Binary,
        "content_hash": pl.UInt64,
    }
)


class PlannedRows(NamedTuple):
    """Requests as `REQUESTS`, and their contents, each once, as `CONTENTS`."""

    requests: pl.DataFrame
    contents: pl.DataFrame


def read_planned_rows(storage: Storage, plan_uri: str, shard_id: str, settings_of: SettingsOf) -> PlannedRows:
    """One shard. Texts of contents are looked at once a group, not once a row."""
    table = read_planned(storage, plan_uri, shard_id)
    starts = np.flatnonzero(np.diff(table["group"].to_numpy(), prepend=-1))
    heads = table.select(["content_id", "title", "body", "language", "task"]).take(starts).to_pylist()
    contents = [Content(*(head[name] for name in ("content_id", "title", "body", "language"))) for head in heads]
    settings = [settings_of(head["task"], head["language"]) for head in heads]
    groups = pl.DataFrame(
        {
            "content_part": [content_part(content) for content in contents],
            "settings_part": [found.part for found in settings],
            "prompt_id": [found.prompt_id for found in settings],
        }
    )[np.repeat(np.arange(len(starts)), np.diff(starts, append=len(table)))]
    names = ["user_id", "content_id", "task", "reason"]
    vectors, parts = _users(table)
    requests = pl.DataFrame(pl.from_arrow(table.select(names))).with_columns(
        user_embedding=vectors,
        prompt_id=groups["prompt_id"],
        fingerprint=groups["content_part"] + parts + groups["settings_part"],
    )
    return PlannedRows(requests.match_to_schema(REQUESTS), _contents(contents))


def _contents(contents: list[Content]) -> pl.DataFrame:
    distinct = list({content.content_id: content for content in contents}.values())
    rows = [(c.content_id, c.title, c.body, c.language) for c in distinct]
    texts = pl.DataFrame(rows, schema=dict(list(CONTENTS.items())[:4]), orient="row")
    return texts.with_columns(
        digest=pl.Series([text_digest(row) for row in rows], dtype=pl.Binary),
        content_hash=pl.Series(stable_hash(texts["content_id"]), dtype=pl.UInt64),
    )


def _users(table: pa.Table) -> tuple[pl.Series, pl.Series]:
    """Of every row: the bytes of its user embedding or null, and the user's part of the fingerprint."""
    column = table["user_embedding"].combine_chunks()
    is_there = column.is_valid().to_numpy(zero_copy_only=False)
    matrix = np.ascontiguousarray(column.flatten().to_numpy(), "<f4").reshape(-1, column.type.list_size)
    parts = [reason_part(reason or "") for reason in table["reason"].to_pylist()] if not is_there.all() else []
    found = np.array(parts or [""] * len(table), dtype=object)
    found[is_there] = [embedding_part(vector.data) for vector in matrix]
    places = pl.Series(np.cumsum(is_there) - 1).set(pl.Series(~is_there), None)
    vectors = as_binary(matrix)
    return vectors.gather(places) if len(matrix) else pl.Series([None] * len(table), dtype=pl.Binary), pl.Series(
        found.tolist(), dtype=pl.String
    )

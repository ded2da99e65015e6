"""What an evaluation is made on: held-out targets, their contents, and users whose embeddings may be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import pyarrow as pa

from e2p_ray.config import EvaluateConfig
from e2p_ray.errors import InputError
from e2p_ray.plan.inputs import Space, as_matrix, latest, user_rows
from e2p_ray.schema import Content, validate_schema
from e2p_ray.storage import Storage
from e2p_ray.storage.utf8 import require_utf8
from e2p_ray.train.lessons import Target, UserTable

_USER_COLUMNS = ("user_id", "embedding", "embedding_space", "personalize", "updated_at")
_MORE_USER_COLUMNS = ("profile_text", "history_size")  # read where the table has them
_TARGET_COLUMNS = ("user_id", "content_id", "text", "weight")
_IMPRESSION_COLUMNS = {
    "impression_id": pl.String,
    "user_id": pl.String,
    "content_id": pl.String,
    "text": pl.String,
    "clicked": pl.Boolean,
}


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationData:
    """Pairs to evaluate on and to train the controls on; only users with a usable user embedding."""

    users: UserTable
    profile_of: Mapping[str, str]  # by user id, where the table has profile_text
    history_of: Mapping[str, int]  # by user id, where the table has history_size
    contents: Mapping[str, Content]
    held_out: tuple[Target, ...]
    training: tuple[Target, ...]
    impressions: pl.DataFrame | None
    num_skipped: Mapping[str, int]  # of the held-out targets
    share_seen_contents: float  # of the held-out targets: their content is in the training targets too

    def language_of(self, target: Target) -> str:
        return self.contents[target.content_id].language


def read_data(config: EvaluateConfig, storage: Storage, space: Space) -> EvaluationData:
    """Read the tables, a fixed sample of the held-out targets, and count what cannot be used.

    Raises InputError when no held-out target is left, or when all of them were trained on.
    """
    inputs, task = config.inputs, next(iter(config.tasks))
    training = read_targets(storage, inputs.training_targets_uri, task)
    held_out = read_targets(storage, inputs.targets_uri, task)
    impressions = None if inputs.impressions_uri is None else _impressions(storage, inputs.impressions_uri, config)
    wanted = pl.concat(frame["user_id"] for frame in (training, held_out, impressions) if frame is not None)
    users = _users(storage, inputs.users_uri, wanted.unique(), space)
    shown = pl.concat(frame["content_id"] for frame in (training, held_out, impressions) if frame is not None)
    contents = _contents(storage, inputs.contents_uri, shown.unique())
    usable = users.filter(pl.col("reason").is_null()).sort("user_id")
    kept, skipped = _usable(held_out, usable["user_id"], contents, training)
    if kept.is_empty():
        raise InputError(
            f"none of its {len(held_out):,} targets can be evaluated (skipped: {dict(skipped)})",
            uri=inputs.targets_uri,
            remedy="Give targets that the projector was not trained on, of users with a user embedding in its space",
        )
    kept = kept.sample(min(config.evaluation.max_targets, len(kept)), seed=config.evaluation.seed)
    kept = kept.sort("content_id", "user_id", "task", "text")
    known = training["content_id"].unique()
    trained, _ = _usable(training, usable["user_id"], contents, None)
    return EvaluationData(
        users=user_table(usable, space),
        profile_of={user_id: str(text) for user_id, text in _by_user(usable, "profile_text")},
        history_of={user_id: int(size) for user_id, size in _by_user(usable, "history_size")},
        contents=contents,
        held_out=tuple(Target(*row) for row in kept.iter_rows()),
        training=tuple(Target(*row) for row in trained.iter_rows()),
        impressions=impressions,
        num_skipped=dict(skipped),
        share_seen_contents=float(kept["content_id"].is_in(known.implode()).sum() / len(kept)),
    )


def read_targets(storage: Storage, uri: str, only_task: str) -> pl.DataFrame:
    """user_id, content_id, task, text, weight; without a column `task` all are of the configuration's first one."""
    frames = []
    for info in storage.parquet_files(uri):
        with storage.open_parquet(info) as file:
            validate_schema("targets", file.schema_arrow, info.uri)
            names = [*_TARGET_COLUMNS, *(["task"] if "task" in file.schema_arrow.names else [])]
            frame = _frame(file.read(columns=names), info.uri)
        task = pl.col("task").fill_null(only_task) if "task" in frame.columns else pl.lit(only_task)
        frames.append(
            frame.select("user_id", "content_id", task.alias("task"), "text", pl.col("weight").cast(pl.Float64))
        )
    found = pl.concat(frames).with_columns(pl.col("weight").fill_null(1.0))
    return found.filter(pl.col("weight").is_finite() & (pl.col("weight") > 0)).drop_nulls()


def read_user_vectors(storage: Storage, uri: str, wanted: Sequence[str], space: Space) -> UserTable:
    """The usable users of another users table, of one space."""
    frame = _users(storage, uri, pl.Series(wanted, dtype=pl.String), space)
    return user_table(frame.filter(pl.col("reason").is_null()).sort("user_id"), space)


def space_of(storage: Storage, uri: str) -> str:
    """The embedding space that a users table names in its first row."""
    for info in storage.parquet_files(uri):
        with storage.open_parquet(info) as file:
            validate_schema("users", file.schema_arrow, info.uri)
            for batch in file.iter_batches(batch_size=1, columns=["embedding_space"]):
                require_utf8(batch, info.uri)
                return str(batch.column(0)[0].as_py())
    raise InputError("has no rows", uri=uri, remedy="Give a users table, or leave this input out")


def user_table(frame: pl.DataFrame, space: Space) -> UserTable:
    """Rows of usable users as arrays."""
    return UserTable(frame["user_id"].to_list(), as_matrix(frame["user_embedding"], space.dim).copy(), space.name)


def _users(storage: Storage, uri: str, wanted: pl.Series, space: Space) -> pl.DataFrame:
    frames = []
    for info in storage.parquet_files(uri):
        with storage.open_parquet(info) as file:
            validate_schema("users", file.schema_arrow, info.uri)
            more = [name for name in _MORE_USER_COLUMNS if name in file.schema_arrow.names]
            num_before = 0
            for group in range(file.metadata.num_row_groups):
                table = file.read_row_group(group, columns=[*_USER_COLUMNS, *more])
                require_utf8(table, info.uri, num_before)
                num_before += len(table)
                rows = user_rows(table, space)
                extra = [pl.Series(name, table[name].to_pylist()) for name in more]
                frames.append(rows.with_columns(extra).filter(pl.col("user_id").is_in(wanted.implode())))
    return latest(pl.concat(frames, how="diagonal_relaxed"), "user_id")


def _contents(storage: Storage, uri: str, wanted: pl.Series) -> dict[str, Content]:
    found = []
    for info in storage.parquet_files(uri):
        with storage.open_parquet(info) as file:
            validate_schema("contents", file.schema_arrow, info.uri)
            names = ["content_id", "title", "body", "language", "updated_at"]
            frame = _frame(file.read(columns=names), info.uri)
            found.append(frame.filter(pl.col("content_id").is_in(wanted.implode())))
    newest = pl.concat(found).sort("updated_at", nulls_last=False).unique("content_id", keep="last")
    texts = newest.select(pl.col("content_id", "title", "body", "language").fill_null("")).sort("content_id")
    return {row[0]: Content(*row) for row in texts.iter_rows()}


def _frame(table: pa.Table, uri: str) -> pl.DataFrame:
    """A whole file's table, its strings looked at."""
    require_utf8(table, uri)
    return pl.DataFrame(pl.from_arrow(table))


def _impressions(storage: Storage, uri: str, config: EvaluateConfig) -> pl.DataFrame:
    table = pl.concat(_frame(storage.read_table(info.uri), info.uri) for info in storage.parquet_files(uri))
    for name in _IMPRESSION_COLUMNS:
        if name not in table.columns:
            raise InputError(
                "is missing",
                uri=uri,
                column=name,
                remedy=f"An impressions table has {', '.join(_IMPRESSION_COLUMNS)}: what was shown, and if clicked",
            )
    table = table.select(pl.col(name).cast(kind) for name, kind in _IMPRESSION_COLUMNS.items()).drop_nulls()
    ids = table["impression_id"].unique().sort()
    chosen = ids.sample(min(config.evaluation.max_impressions, len(ids)), seed=config.evaluation.seed)
    return table.filter(pl.col("impression_id").is_in(chosen.implode())).sort("impression_id", "content_id")


def _usable(
    targets: pl.DataFrame, user_ids: pl.Series, contents: Mapping[str, Content], trained: pl.DataFrame | None
) -> tuple[pl.DataFrame, Counter[str]]:
    """Targets of known users and contents that were not trained on, each once, and how many fell away for what."""
    skipped: Counter[str] = Counter()
    known = pl.Series(list(contents), dtype=pl.String)
    for reason, keep in (
        ("user_without_embedding", pl.col("user_id").is_in(user_ids.implode())),
        ("missing_content", pl.col("content_id").is_in(known.implode())),
        ("empty_text", pl.col("text").str.strip_chars() != ""),
    ):
        skipped[reason] = len(targets) - len(targets := targets.filter(keep))
    if trained is not None:
        keys = ["user_id", "content_id", "task"]
        skipped["trained_on"] = len(targets) - len(targets := targets.join(trained, on=keys, how="anti"))
    return targets.unique(maintain_order=True), +skipped


def _by_user(users: pl.DataFrame, column: str) -> list[tuple[str, Any]]:
    if column not in users.columns:
        return []
    return list(users.select("user_id", column).drop_nulls().iter_rows())

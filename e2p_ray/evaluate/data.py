"""What an evaluation is made on: held-out targets, their contents, and users whose embeddings may be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl
import pyarrow as pa

from e2p_ray.config import EvaluateConfig
from e2p_ray.errors import InputError
from e2p_ray.plan.inputs import USERS, Space, as_matrix, latest, user_rows
from e2p_ray.schema import Content
from e2p_ray.storage import ObjectInfo, Storage
from e2p_ray.storage.utf8 import require_utf8
from e2p_ray.train.data.joins import concat
from e2p_ray.train.data.tables import read_contents, read_piece, read_targets, scan_table
from e2p_ray.train.lessons import Target, UserTable

_MORE_USER_COLUMNS = ("profile_text", "history_size")  # read where the table has them
_USERS = pl.Schema([*USERS.items(), ("profile_text", pl.String()), ("history_size", pl.Int64())])
_IMPRESSION_COLUMNS = {
    "impression_id": pl.String,
    "user_id": pl.String,
    "content_id": pl.String,
    "text": pl.String,
    "clicked": pl.Boolean,
}
_KEY = ["user_id", "content_id", "task"]


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationData:
    """Pairs to evaluate on and to train the controls on; only users with a usable user embedding."""

    users: UserTable
    profile_of: Mapping[str, str]  # by user id, where the table has profile_text
    history_of: Mapping[str, int]  # by user id, where the table has history_size
    contents: Mapping[str, Content]
    held_out: tuple[Target, ...]
    training: tuple[Target, ...]
    impressions: pl.DataFrame | None  # only candidates that can be scored
    num_trained_impressions: int  # left out whole, as a pair of theirs was trained on
    num_skipped: Mapping[str, int]  # of the held-out targets
    share_seen_contents: float  # of the held-out targets: their content is in the training targets too

    def language_of(self, target: Target) -> str:
        return self.contents[target.content_id].language


def read_data(config: EvaluateConfig, storage: Storage, space: Space) -> EvaluationData:
    """Read the tables, a fixed sample of the held-out targets, and count what cannot be used.

    Raises InputError when no held-out target is left, or when all of them were trained on.
    """
    inputs, tasks = config.inputs, tuple(config.tasks)
    training = read_all_targets(storage, inputs.training_targets_uri, tasks)
    held_out = read_all_targets(storage, inputs.targets_uri, tasks)
    trained_on = training.filter(_has_weight())
    impressions, num_trained = _impressions(storage, config, trained_on)
    named = [frame for frame in (training, held_out, impressions) if frame is not None]
    users = read_all_users(storage, inputs.users_uri, pl.concat(frame["user_id"] for frame in named).unique(), space)
    contents = _contents(storage, inputs.contents_uri, pl.concat(frame["content_id"] for frame in named).unique())
    usable = users.filter(pl.col("reason").is_null()).sort("user_id")
    kept, skipped = _usable(held_out, usable["user_id"], contents, tasks, trained_on)
    if kept.is_empty():
        raise InputError(
            f"none of its {len(held_out):,} targets can be evaluated (skipped: {dict(skipped)})",
            uri=inputs.targets_uri,
            remedy="Give targets that the projector was not trained on, of users with a user embedding in its space",
        )
    kept = kept.sample(min(config.evaluation.max_targets, len(kept)), seed=config.evaluation.seed)
    kept = kept.sort("content_id", "user_id", "task", "text")
    known = trained_on["content_id"].unique()
    trained, _ = _usable(training, usable["user_id"], contents, tasks, None)
    return EvaluationData(
        users=user_table(usable, space),
        profile_of={user_id: str(text) for user_id, text in _by_user(usable, "profile_text")},
        history_of={user_id: int(size) for user_id, size in _by_user(usable, "history_size")},
        contents=contents,
        held_out=tuple(Target(*row) for row in kept.iter_rows()),
        training=tuple(Target(*row) for row in trained.iter_rows()),
        impressions=_scorable(impressions, usable["user_id"], contents, inputs.impressions_uri),
        num_trained_impressions=num_trained,
        num_skipped=dict(skipped),
        share_seen_contents=float(kept["content_id"].is_in(known.implode()).sum() / len(kept)),
    )


def read_all_targets(storage: Storage, uri: str, tasks: tuple[str, ...]) -> pl.DataFrame:
    """Every row, as jobs.train reads it; one that does not name its task is of the configuration's first one."""
    pieces = scan_table(storage, "targets", uri).pieces
    return concat([read_targets(storage, piece, tasks[:1]) for piece in pieces], "targets")


def read_all_users(storage: Storage, uri: str, wanted: pl.Series, space: Space) -> pl.DataFrame:
    """One row of each wanted user who is there; of a user embedding that cannot be used, `reason` says why."""
    frames = [_USERS.to_frame()]
    for piece in scan_table(storage, "users", uri).pieces:
        table, _ = read_piece(storage, piece, _MORE_USER_COLUMNS)
        more = _more_of_users(table, piece.info.uri)
        frames.append(pl.concat([user_rows(table, space), more], how="horizontal").filter(_is_in("user_id", wanted)))
    return latest(pl.concat(frames).filter(pl.col("user_id") != ""), "user_id")


def user_table(frame: pl.DataFrame, space: Space) -> UserTable:
    """Rows of usable users as arrays."""
    return UserTable(frame["user_id"].to_list(), as_matrix(frame["user_embedding"], space.dim).copy(), space.name)


def _more_of_users(table: pa.Table, uri: str) -> pl.DataFrame:
    """profile_text and history_size of a users table's rows, null where it does not have them."""
    found = {name: pl.Series(name, [None] * len(table), pl.Null) for name in _MORE_USER_COLUMNS}
    found |= {name: pl.Series(name, table[name]) for name in _MORE_USER_COLUMNS if name in table.column_names}
    expected = {
        "history_size": ("a number", (), "a number of items (null where unknown)"),
        "profile_text": ("a string", (pl.String, pl.Categorical), "one string (null where there is none)"),
    }
    for name, (wanted, kinds, form) in expected.items():
        kind = found[name].dtype
        if not (kind.is_numeric() or kind in (pl.Null, *kinds)):
            remedy = f"Write it as {form}, or leave it out."
            raise InputError(f"expected {wanted}, found {kind}", uri=uri, column=name, remedy=remedy)
    return pl.DataFrame(found).select(
        pl.col("profile_text").cast(pl.String),
        # Not strict: what is no finite number becomes null.
        pl.col("history_size").cast(pl.Float64).cast(pl.Int64, strict=False),
    )


def _contents(storage: Storage, uri: str, wanted: pl.Series) -> dict[str, Content]:
    pieces = scan_table(storage, "contents", uri).pieces
    found = latest(concat([read_contents(storage, piece, wanted) for piece in pieces], "contents"), "content_id")
    texts = found.filter(pl.col("content_id") != "").select("content_id", "title", "body", "language")
    return {row[0]: Content(*row) for row in texts.sort("content_id").iter_rows()}


def _impressions(storage: Storage, config: EvaluateConfig, trained_on: pl.DataFrame) -> tuple[pl.DataFrame | None, int]:
    """A fixed sample of the impressions without a pair that was trained on, and how many have one."""
    uri = config.inputs.impressions_uri
    if uri is None:
        return None, 0
    table = pl.concat(_shown(storage, info) for info in storage.parquet_files(uri))
    # Were only the pair dropped, what was not clicked of an impression would be ranked without what was.
    learned = table.join(trained_on, on=["user_id", "content_id"], how="semi")["impression_id"].unique()
    table = table.drop_nulls()
    ids = table.filter(~_is_in("impression_id", learned))["impression_id"].unique().sort()
    chosen = ids.sample(min(config.evaluation.max_impressions, len(ids)), seed=config.evaluation.seed)
    return table.filter(_is_in("impression_id", chosen)).sort("impression_id", "content_id"), len(learned)


def _shown(storage: Storage, info: ObjectInfo) -> pl.DataFrame:
    """The rows of one file of impressions, in the columns' own kinds."""
    with storage.open_parquet(info) as file:
        for name in _IMPRESSION_COLUMNS:
            if name not in file.schema_arrow.names:
                raise InputError(
                    "is missing",
                    uri=info.uri,
                    column=name,
                    remedy=f"An impressions table has {', '.join(_IMPRESSION_COLUMNS)}: what was shown, and if clicked",
                )
        table = file.read(columns=list(_IMPRESSION_COLUMNS), use_threads=False)
    require_utf8(table, info.uri)
    frame = pl.DataFrame(pl.from_arrow(table))
    for name, kind in _IMPRESSION_COLUMNS.items():
        try:
            frame = frame.with_columns(pl.col(name).cast(kind))
        except pl.exceptions.PolarsError as error:
            raise InputError(
                f"found {frame.schema[name]}, which cannot be read as {kind}",
                uri=info.uri,
                column=name,
                remedy="Write ids and texts as strings, and what was clicked as boolean.",
            ) from error
    return frame


def _scorable(
    impressions: pl.DataFrame | None, user_ids: pl.Series, contents: Mapping[str, Content], uri: str | None
) -> pl.DataFrame | None:
    """Candidates of known users and contents with a text. InputError when there is none."""
    if impressions is None or uri is None:
        return None
    known = pl.Series(list(contents), dtype=pl.String)
    has_text = pl.col("text").str.strip_chars() != ""
    kept = impressions.filter(_is_in("user_id", user_ids), _is_in("content_id", known), has_text)
    if kept.is_empty():
        raise InputError(
            "none of its impressions can be ranked",
            uri=uri,
            remedy="Give impressions of users with a user embedding and of contents of the contents table, without "
            "pairs that the projector was trained on; or leave this input out",
        )
    return kept


def _usable(
    targets: pl.DataFrame,
    user_ids: pl.Series,
    contents: Mapping[str, Content],
    tasks: tuple[str, ...],
    trained_on: pl.DataFrame | None,
) -> tuple[pl.DataFrame, Counter[str]]:
    """Targets of known users and contents that were not trained on, each once, and how many fell away for what."""
    skipped: Counter[str] = Counter()
    known = pl.Series(list(contents), dtype=pl.String)
    for reason, keep in (
        ("other_task", pl.col("task").is_in(tasks)),
        ("bad_weight", _has_weight()),
        ("user_without_embedding", _is_in("user_id", user_ids)),
        ("missing_content", _is_in("content_id", known)),
        ("empty_text", pl.col("text").str.strip_chars() != ""),
    ):
        skipped[reason] = len(targets) - len(targets := targets.filter(keep))
    if trained_on is not None:
        skipped["trained_on"] = len(targets) - len(targets := targets.join(trained_on, on=_KEY, how="anti"))
    return targets.unique(maintain_order=True), +skipped


def _has_weight() -> pl.Expr:
    """Whether anything was learned from a training target, or is to be measured on a held-out one."""
    return pl.col("weight").is_finite() & (pl.col("weight") > 0)


def _is_in(name: str, values: pl.Series) -> pl.Expr:
    return pl.col(name).is_in(values.implode())


def _by_user(users: pl.DataFrame, column: str) -> list[tuple[str, Any]]:
    return list(users.select("user_id", column).drop_nulls().iter_rows())

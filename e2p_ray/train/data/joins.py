"""Targets joined with users and contents: what can be learned from, and why the rest cannot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from e2p_ray.errors import ConfigError, InputError
from e2p_ray.plan.inputs import CONTENTS, Space, as_matrix, latest, stable_hash
from e2p_ray.schema import Reason
from e2p_ray.train.data.tables import TARGETS, TRAINING_USERS

# More users than this of another size are no accident: the table then mixes two kinds of user embeddings.
_MAX_ODD_SHARE = 0.1
_MAX_NAMED = 5
# Of the median user's. One such user would set the scale that all others are seen at, and they would look alike.
_MAX_NORM_RATIO = 1e4


@dataclass(frozen=True, slots=True)
class JoinSettings:
    """What decides which targets are used, and for what. Picklable."""

    tasks: tuple[str, ...]
    embedding_space: str | None
    validation_share: float  # 0 where the validation targets are a table of their own
    validation_uri: str | None
    targets_per_chunk: int
    targets_uri: str
    users_uri: str


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Targets of some contents, to be tokenised by one task.

    targets: content_id, task, user (a row of the user embeddings), text, weight; contents: content_id, title, body,
    language.
    """

    validation: bool
    targets: pl.DataFrame
    contents: pl.DataFrame


@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """The usable user embeddings, the chunks, and counts of what was left out, by code."""

    space: Space
    user_embeddings: npt.NDArray[np.float32]
    chunks: tuple[Chunk, ...]
    num_targets: dict[str, int]  # given: training, validation
    skipped: dict[str, Counter[str]]
    num_contents: int  # that a usable target names


def join(
    targets: pl.DataFrame, validation: pl.DataFrame | None, users: pl.DataFrame, contents: pl.DataFrame, s: JoinSettings
) -> Joined:
    """Users and contents hold at least those that the targets name. Raises ConfigError, InputError."""
    users = latest(users.filter(pl.col("user_id") != ""), "user_id").sort("user_id")
    contents = latest(contents.filter(pl.col("content_id") != ""), "content_id")
    space = find_space(users, s)
    users = _without_giants(_with_reason(users, space), space)
    usable = users.filter(pl.col("reason").is_null()).with_row_index("user")
    known = users.select("user_id", "reason", known=True).join(
        usable.select("user_id", "user"), on="user_id", how="left"
    )
    given = {"training": targets} | ({} if validation is None else {"validation": validation})
    found = {name: _usable(frame, known, contents, s) for name, frame in given.items()}
    parts = {name: frame for name, (frame, _) in found.items()}
    if validation is not None:
        held = parts["validation"].join(parts["training"], on=["content_id", "task", "user"], how="anti")
        # A gain there would be one of learning by heart.
        found["validation"][1]["trained_on"] = parts["validation"].height - held.height
        parts["validation"] = held
    else:
        parts = _hold_out(parts["training"], s.validation_share)
    named = pl.concat([frame["content_id"] for frame in parts.values()]).unique()
    texts = contents.select("content_id", "title", "body", "language")
    chunks = [
        chunk
        for name, frame in parts.items()
        for chunk in _chunks(frame, texts, s.targets_per_chunk, name != "training")
    ]
    return Joined(
        space=space,
        user_embeddings=as_matrix(usable["user_embedding"], space.dim).copy(),
        chunks=tuple(chunks),
        num_targets={name: frame.height for name, frame in given.items()},
        skipped={name: skipped for name, (_, skipped) in found.items()},
        num_contents=len(named),
    )


def find_space(users: pl.DataFrame, s: JoinSettings) -> Space:
    """The embedding space to train in, and the size of its user embeddings."""
    usable = users.filter(pl.col("reason").is_null())
    spaces = usable["space"].value_counts(sort=True).head(_MAX_NAMED)
    said = ", ".join(f"{name!r} ({number:,} users)" for name, number in spaces.iter_rows()) or "none"
    name = s.embedding_space
    if name is None:
        if spaces.height > 1:
            raise ConfigError(
                f"{s.users_uri}: users of the targets are of several embedding spaces: {said}. Vectors of two spaces "
                "mean different things: set projector.embedding_space to the one to train for"
            )
        name = spaces["space"][0] if spaces.height else ""
    elif usable.height and name not in set(usable["space"]):
        raise ConfigError(
            f"{s.users_uri}: no user of the targets is of projector.embedding_space {name!r}; found: {said}"
        )
    sizes = usable.filter(pl.col("space") == name)["dim"].value_counts(sort=True)
    if not sizes.height:
        return Space(name, 1)
    if sizes["count"][0] < (1 - _MAX_ODD_SHARE) * float(sizes["count"].sum()):
        found = ", ".join(f"{size} ({number:,} users)" for size, number in sizes.head(_MAX_NAMED).iter_rows())
        raise InputError(
            f"user embeddings of embedding space {name!r} have several sizes: {found}",
            uri=s.users_uri,
            column="embedding",
            remedy="All of one space have one size: give every fit of the model an embedding_space of its own.",
        )
    return Space(name, int(sizes["dim"][0]))


def _with_reason(users: pl.DataFrame, space: Space) -> pl.DataFrame:
    reason = (
        pl.when(pl.col("reason").is_not_null()).then("reason")
        .when(pl.col("space") != space.name).then(pl.lit(Reason.EMBEDDING_OTHER_SPACE.value))
        .when(pl.col("dim") != space.dim).then(pl.lit(Reason.EMBEDDING_WRONG_SIZE.value))
    )  # fmt: skip
    return users.with_columns(reason=reason)


def _without_giants(users: pl.DataFrame, space: Space) -> pl.DataFrame:
    """With a reason for users whose embedding is far longer than others'."""
    usable = users.filter(pl.col("reason").is_null()).select("user_id", "user_embedding")
    vectors = as_matrix(usable["user_embedding"], space.dim)
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    longest = _MAX_NORM_RATIO * np.median(norms) if len(norms) else np.inf
    giants = usable["user_id"].filter(pl.Series(norms > longest))
    is_giant = pl.col("reason").is_null() & pl.col("user_id").is_in(giants.implode())
    return users.with_columns(reason=pl.when(is_giant).then(pl.lit("embedding_far_longer")).otherwise("reason"))


def _usable(
    targets: pl.DataFrame, known: pl.DataFrame, contents: pl.DataFrame, s: JoinSettings
) -> tuple[pl.DataFrame, Counter[str]]:
    """Targets with their user's row, in an order that the files do not change; and how many are left out for what."""
    empty = (pl.col("title").str.strip_chars() == "") & (pl.col("body").str.strip_chars() == "")
    joined = targets.join(known, on="user_id", how="left").join(
        contents.select("content_id", no_text=empty), on="content_id", how="left"
    )
    weight = pl.col("weight")
    why = (
        pl.when(~pl.col("task").is_in(s.tasks)).then(pl.lit("other_task"))
        .when(~(weight.is_finite() & (weight > 0))).then(pl.lit("bad_weight"))
        .when(pl.col("known").is_null()).then(pl.lit("unknown_user"))
        .when(pl.col("reason").is_not_null()).then("reason")
        .when(pl.col("no_text").is_null()).then(pl.lit("missing_content"))
        .when("no_text").then(pl.lit("empty_content"))
        .when(pl.col("text").str.strip_chars() == "").then(pl.lit("empty_text"))
    )  # fmt: skip
    judged = joined.with_columns(why=why)
    skipped = judged.filter(pl.col("why").is_not_null())["why"].value_counts().sort("why")
    order = ["content_id", "task", "user", "text", "weight"]
    return judged.filter(pl.col("why").is_null()).select(order).sort(order), Counter(dict(skipped.iter_rows()))


def _hold_out(targets: pl.DataFrame, share: float) -> dict[str, pl.DataFrame]:
    """Some contents for validation, chosen by a hash of their ids: the same ones whatever else the table holds."""
    ids = targets["content_id"].unique().sort()
    hashes = stable_hash(ids)
    held = hashes < np.uint64(min(int(share * 2.0**64), 2**64 - 1))
    if share and len(ids) > 1:  # a small table gives at least one content to either side
        held[np.argmin(hashes)], held[np.argmax(hashes)] = True, False
    else:
        held[:] = False  # a lone content is for training
    chosen = ids.filter(pl.Series(held))
    is_held = pl.col("content_id").is_in(chosen.implode())
    return {"training": targets.filter(~is_held), "validation": targets.filter(is_held)}


def _chunks(targets: pl.DataFrame, contents: pl.DataFrame, size: int, validation: bool) -> Iterator[Chunk]:
    """About `size` targets each; those of one content stay together, in the order of their keys."""
    rows = targets["content_id"].rle_id() if targets.height else pl.Series([], dtype=pl.UInt32)
    number = pl.Series(range(targets.height), dtype=pl.Int64) // size
    # The chunk of a content is that of its first row.
    frame = targets.with_columns(chunk=number, run=rows).with_columns(pl.col("chunk").first().over("run"))
    for part in frame.partition_by("chunk", maintain_order=True):
        found = contents.join(part.select("content_id").unique(), on="content_id", how="semi")
        yield Chunk(validation, part.drop("chunk", "run"), found)


def concat(frames: Sequence[pl.DataFrame], kind: str) -> pl.DataFrame:
    """All rows of one kind of table: targets, users or contents."""
    schemas = {"targets": TARGETS, "users": TRAINING_USERS, "contents": CONTENTS}
    return pl.concat([schemas[kind].to_frame(), *frames])

"""Candidates joined with users and contents: the pairs that become requests, and the dead letters of the others."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from e2p_ray.errors import IncompatibleError
from e2p_ray.plan.inputs import latest, stable_hash
from e2p_ray.schema import DEAD_LETTERS, ErrorCode
from e2p_ray.storage import Storage

PAIRS = pl.Schema({"user_id": pl.String, "content_id": pl.String, "reason": pl.String, "user_embedding": pl.Binary})
_DEAD = pl.Schema({"user_id": pl.String, "content_id": pl.String, "error_code": pl.String})
_MESSAGES = {
    ErrorCode.NULL_KEY: "the candidate has no user_id or no content_id",
    ErrorCode.UNKNOWN_USER: "the users table has no such user",
    ErrorCode.MISSING_CONTENT: "the contents table has no such content",
    ErrorCode.EMPTY_CONTENT: "the content has neither a title nor a body",
}
_MAX_SPACES = 5  # that are named when the projector's is not among them


class UserJoin(NamedTuple):
    """Pairs whose user is known, the others, and what was counted."""

    pairs: pl.DataFrame
    dead: pl.DataFrame
    counts: Counter[str]


class ContentJoin(NamedTuple):
    """Requests sorted by content and user, their contents in order of hash, and the pairs that have none.

    `requests.content` is a row number of `contents`.
    """

    requests: pl.DataFrame
    contents: pl.DataFrame
    dead: pl.DataFrame


def join_users(candidates: pl.DataFrame, users: pl.DataFrame, space_name: str) -> UserJoin:
    """Drop repeated candidates and give every pair its user's row. A user's rows must all be in one call."""
    distinct = candidates.unique()
    keyed = distinct.filter((pl.col("user_id") != "") & (pl.col("content_id") != ""))
    users = latest(users.join(keyed.select("user_id").unique(), on="user_id", how="semi"), "user_id")
    joined = keyed.join(users.select("user_id", "reason", "user_embedding", known=True), on="user_id", how="left")
    unknown = joined.filter(pl.col("known").is_null())
    counts = Counter(num_pairs=distinct.height, num_users=users.height)
    spaces = users.filter(pl.col("space") != space_name)["space"].value_counts(sort=True).head(_MAX_SPACES)
    counts.update({f"other_space:{name}": number for name, number in spaces.iter_rows()})
    counts["num_in_space"] = users.filter(pl.col("space") == space_name).height
    return UserJoin(
        pairs=joined.filter(pl.col("known")).select(PAIRS.names()),
        dead=pl.concat(
            [
                _dead(distinct.join(keyed, on=["user_id", "content_id"], how="anti"), ErrorCode.NULL_KEY),
                _dead(unknown, ErrorCode.UNKNOWN_USER),
            ]
        ),
        counts=counts,
    )


def check_space(counts: Counter[str], space_name: str) -> None:
    """IncompatibleError when there are usable user embeddings and not one is in the projector's space."""
    others = {key.partition(":")[2]: number for key, number in counts.items() if key.startswith("other_space:")}
    if counts["num_in_space"] or not others:
        return
    found = ", ".join(f"{name!r} ({number} users)" if name else f"none named ({number} users)"
                      for name, number in sorted(others.items(), key=lambda item: -item[1])[:_MAX_SPACES])  # fmt: skip
    raise IncompatibleError(
        f"the projector was trained for user embeddings of the space {space_name!r}, the users table has only {found}. "
        f"Give a projector that was trained for that space, or user embeddings of {space_name!r}."
    )


def join_contents(pairs: pl.DataFrame, contents: pl.DataFrame) -> ContentJoin:
    """Give every pair its content. A content's pairs and rows must all be in one call."""
    contents = latest(contents.join(pairs.select("content_id").unique(), on="content_id", how="semi"), "content_id")
    blank = (pl.col("title").str.strip_chars() == "") & (pl.col("body").str.strip_chars() == "")
    hashes = pl.Series("content_hash", stable_hash(contents["content_id"]), dtype=pl.UInt64)
    full = contents.with_columns(hashes).filter(~blank).sort("content_hash", "content_id").with_row_index("content")
    requests = pairs.join(full.select("content_id", "content"), on="content_id")
    return ContentJoin(
        requests=requests.select("content", "user_id", "reason", "user_embedding").sort("content", "user_id"),
        contents=full,
        dead=pl.concat(
            [
                _dead(pairs.join(contents, on="content_id", how="anti"), ErrorCode.MISSING_CONTENT),
                _dead(pairs.join(contents.filter(blank), on="content_id", how="semi"), ErrorCode.EMPTY_CONTENT),
            ]
        ),
    )


def _dead(keys: pl.DataFrame, code: ErrorCode) -> pl.DataFrame:
    return keys.select("user_id", "content_id", error_code=pl.lit(code.value)).match_to_schema(_DEAD)


def write_dead_letters(storage: Storage, uri: str, dead: pl.DataFrame, tasks: tuple[str, ...]) -> Counter[str]:
    """Write one dead letter a pair and task; nothing when there is none. Counts them, and sums hashes of them."""
    counts = Counter[str]()
    if dead.is_empty():
        return counts
    letters = dead.join(pl.DataFrame({"task": tasks}), how="cross").sort("user_id", "content_id", "task")
    messages = {code.value: message for code, message in _MESSAGES.items()}
    table = letters.select(
        "user_id",
        "content_id",
        "task",
        "error_code",
        message=pl.col("error_code").replace_strict(messages),
        shard_id=pl.lit("plan"),
        run_id=pl.lit(""),
    )
    storage.write_table(uri, table.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(DEAD_LETTERS))
    counts.update({f"dead:{code}": number for code, number in letters["error_code"].value_counts().iter_rows()})
    # A sum does not depend on which partition a letter came from.
    counts["dead_digest"] = sum(_letter_hash(row) for row in table.select(DEAD_LETTERS.names[:4]).iter_rows())
    return counts


def _letter_hash(row: tuple[str, ...]) -> int:
    digest = hashlib.blake2b("".join(f"{len(text)}:{text}" for text in row).encode(), digest_size=16)
    return int.from_bytes(digest.digest(), "little")


def num_buckets(num_requests: int, requests_per_shard: int) -> int:
    """The smallest power of two of buckets that hold no more than this on average."""
    return 1 << max(0, -(-num_requests // requests_per_shard) - 1).bit_length()


def bucket_of(content_hashes: npt.NDArray[np.uint64], num_buckets: int) -> npt.NDArray[np.int64]:
    """The top bits of every content's hash."""
    num_bits = num_buckets.bit_length() - 1
    return (
        (content_hashes >> np.uint64(64 - num_bits)).astype(np.int64)
        if num_bits
        else np.zeros(len(content_hashes), np.int64)
    )

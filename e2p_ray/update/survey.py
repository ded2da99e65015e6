"""What an update would change, counted before anything is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from e2p_ray.commit.spool import HashSpool, hash_rows
from e2p_ray.plan import ShardSize
from e2p_ray.update.compare import Bucket, Cause, Comparison, UpdateJob
from e2p_ray.update.failed import is_settled
from e2p_ray.update.limits import Limits

_MAX_TIERS = 8  # each content is prefilled once a tier
DEFERRED = -1
_UNTRIED, _SETTLED = 0, 2  # standings: how much there is to say against trying a request now
_RANK = (
    pl.col("priority").fill_null(np.inf),
    pl.col("at").is_null().alias("is_new"),
    pl.col("generated_at").min().over("content_id").to_physical().fill_null(0).alias("content_since"),
    pl.col("generated_at").to_physical().fill_null(0).alias("since"),
    (pl.col("letter").is_not_null().cast(pl.Int8) + is_settled().cast(pl.Int8)).alias("standing"),
)


@dataclass(frozen=True)
class Changes:
    """What a new version changes."""

    causes: dict[str, int] = field(default_factory=dict)  # requests that need a new text, by `Cause`
    num_carried: int = 0  # requests whose published row still holds
    num_removed: int = 0  # published rows that are wanted no more
    num_deferred: int = 0  # of the requests that need a new text, those beyond the limit
    num_settled: int = 0  # those beyond it whose last try, with all the same, came to a dead letter

    @property
    def num_changed(self) -> int:
        return sum(self.causes.values())

    @property
    def num_to_write(self) -> int:
        return self.num_changed - self.num_deferred - self.num_settled

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Order:
    """Which of the changed requests are written, and when: a tier of each, in the order of the buckets' rows.

    Tier 0 is first, `DEFERRED` never. Without limits there is one tier, and `tiers` is None.
    """

    num_tiers: int = 1
    tiers: npt.NDArray[np.int8] | None = None

    def of(self, start: int, num_rows: int) -> pl.Series:
        if self.tiers is None:
            return pl.Series(np.zeros(num_rows, dtype=np.int8))
        return pl.Series(self.tiers[start : start + num_rows])


def survey(job: UpdateJob, say: Callable[[str], None]) -> Changes:
    """What a run without limits would change."""
    with Comparison(job) as comparison:
        changes, _ = count(comparison, Limits(), say)
        return changes


def count(comparison: Comparison, limits: Limits, say: Callable[[str], None]) -> tuple[Changes, Order]:
    """One way through all buckets."""
    causes, num_carried, num_removed = Counter[str](), 0, 0
    ranks = list[pl.DataFrame]()
    with HashSpool() as undecided:
        for bucket in comparison.buckets():
            counted = bucket.changed["cause"].value_counts().drop_nulls("cause")
            causes.update(dict(counted.iter_rows()))
            unknown = bucket.changed.filter(pl.col("cause").is_null())
            undecided.add(hash_rows(unknown["user_id"].to_arrow()))
            num_carried, num_removed = num_carried + len(bucket.carried), num_removed + bucket.num_removed
            if limits:
                ranks.append(bucket.changed.select(_RANK))
            _say_progress(comparison, bucket, say)
        causes.update(_of_new_pairs(undecided, comparison.users))
    changes = Changes({c: causes[c] for c in map(str, Cause) if causes[c]}, num_carried, num_removed)
    if not limits:
        return changes, Order()
    ranked = pl.concat(ranks)
    order = _order(ranked, limits, comparison.job.shard_size)
    are_settled = ranked.filter(order.of(0, ranked.height) == DEFERRED)["standing"] == _SETTLED
    num_settled = int(are_settled.sum())
    return replace(changes, num_deferred=len(are_settled) - num_settled, num_settled=num_settled), order


def _say_progress(comparison: Comparison, bucket: Bucket, say: Callable[[str], None]) -> None:
    done = bucket.number + 1
    if done % 16 == 0 and done < comparison.num_buckets:
        say(f"compared {done:,} of {comparison.num_buckets:,} parts of the plan with the published table")


def _of_new_pairs(undecided: HashSpool, known_users: HashSpool) -> Counter[str]:
    """Of the pairs of known contents that have no row, those of new users and the others."""
    num_new_users = 0
    for pairs, known in zip(undecided.frames(), known_users.frames(), strict=True):
        num_new_users += int(pairs.join(known, on=["a", "b"], how="anti")["count"].sum())
    return Counter(
        {
            str(Cause.NEW_USER): num_new_users,
            str(Cause.NEW_CANDIDATE): undecided.num_hashes - num_new_users,
        }
    )


def _order(ranks: pl.DataFrame, limits: Limits, shard_size: ShardSize) -> Order:
    """By priority, those that failed before last; of equals first those that have no text at all, then the oldest.

    The contents with the oldest texts, and their oldest first: where inputs change faster than a limit lets texts be
    written, the same ones would otherwise be written in every run, and others never.

    Without a priority contents stay whole as far as they can: new requests are one tier, those that have a text
    another, those that failed before the last.
    """
    num_rows = ranks.height
    names = ("priority", "is_new", "content_since", "since", "standing")
    priorities, are_new, content_since, since, standings = (ranks[name].to_numpy() for name in names)
    ranked = np.lexsort((np.arange(num_rows), since, content_since, ~are_new, priorities, standings))
    num_chosen = min(num_rows, limits.max_requests or num_rows)
    chosen = ranked[:num_chosen]
    tiers = np.full(num_rows, DEFERRED, dtype=np.int8)
    if limits.max_seconds is None:
        num_tiers, places = 1, np.zeros(num_chosen, dtype=np.int8)
    elif limits.priority is None:
        num_tiers, places = 3, np.where(standings[chosen] > _UNTRIED, 2, ~are_new[chosen]).astype(np.int8)
    else:
        num_tiers = max(1, min(_MAX_TIERS, num_chosen // shard_size.among(num_chosen)))
        places = (np.arange(num_chosen) * num_tiers // max(num_chosen, 1)).astype(np.int8)
    tiers[chosen] = places
    return Order(num_tiers, tiers)

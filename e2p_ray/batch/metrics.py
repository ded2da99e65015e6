"""What generator actors count for Prometheus, through Ray: every name in one table.

Ray exports a name with `ray_` before it (`ray_e2p_rows_total`) and adds labels of its own (node, actor). Our labels are
words of the configuration and of `schema.py` only: no ids of users, contents, shards or runs.
"""

from __future__ import annotations

from collections import Counter as CountOf
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ray.util.metrics import Counter

from e2p_ray.commit import ShardStats
from e2p_ray.schema import DeadLetter, Generation


@dataclass(frozen=True, slots=True)
class MetricName:
    """One counter: its name, its labels, and what it counts."""

    name: str
    labels: tuple[str, ...]
    says: str


ROWS = MetricName("e2p_rows_total", ("task", "status", "reason"), "Rows written; reason is empty where none is given")
DEAD_LETTERS = MetricName("e2p_dead_letters_total", ("task", "code"), "Requests without any text")
PROMPT_TOKENS = MetricName("e2p_prompt_tokens_total", (), "Prompt tokens as if nothing were shared")
COMPUTED_TOKENS = MetricName("e2p_computed_tokens_total", (), "Prompt tokens really run through the model")
OUTPUT_TOKENS = MetricName("e2p_output_tokens_total", (), "New tokens")
DRAFT_TOKENS = MetricName("e2p_draft_tokens_total", (), "Guessed tokens, run through the model")
ACCEPTED_TOKENS = MetricName("e2p_accepted_draft_tokens_total", (), "Guessed tokens that the model wrote as well")
GENERATING = MetricName("e2p_generating_seconds_total", (), "Time in the engine and the checks, summed over actors")
SHARDS = MetricName("e2p_shards_total", ("outcome",), "Shards by outcome: done, piece (part of one), failed (each try)")
WORKERS = MetricName("e2p_workers_total", ("outcome",), "Actors by what became of their start: ready, refused")
LOADING = MetricName("e2p_loading_seconds_total", (), "Time until actors were ready, summed over them")

METRICS = (
    ROWS,
    DEAD_LETTERS,
    PROMPT_TOKENS,
    COMPUTED_TOKENS,
    OUTPUT_TOKENS,
    DRAFT_TOKENS,
    ACCEPTED_TOKENS,
    GENERATING,
    SHARDS,
    WORKERS,
    LOADING,
)


class BatchMetrics:
    """The counters of one generator actor. They start at nothing with it; `rate()` and `increase()` know that."""

    def __init__(self) -> None:
        self._counters = {metric: Counter(metric.name, metric.says, metric.labels) for metric in METRICS}

    def worker_ready(self, seconds_s: float) -> None:
        """Count a start, and how long the artifacts took to find, fetch and load."""
        self._add(WORKERS, 1, {"outcome": "ready"})
        self._add(LOADING, seconds_s)

    def worker_refused(self) -> None:
        """Count an actor that can write nothing: a missing GPU, artifacts that do not belong together."""
        self._add(WORKERS, 1, {"outcome": "refused"})

    def shard_done(
        self,
        generations: Sequence[Generation],
        dead_letters: Sequence[DeadLetter],
        stats: ShardStats,
        *,
        is_piece: bool = False,
    ) -> None:
        """Count a committed shard, or a written piece of one."""
        rows = CountOf((row.task, str(row.status), str(row.reason or "")) for row in generations)
        for (task, status, reason), number in rows.items():
            self._add(ROWS, number, {"task": task, "status": status, "reason": reason})
        for (task, code), number in CountOf((one.task, str(one.error_code)) for one in dead_letters).items():
            self._add(DEAD_LETTERS, number, {"task": task, "code": code})
        self._add(PROMPT_TOKENS, stats.num_prompt_tokens)
        self._add(COMPUTED_TOKENS, stats.num_computed_tokens)
        self._add(OUTPUT_TOKENS, stats.num_output_tokens)
        self._add(DRAFT_TOKENS, stats.num_draft_tokens)
        self._add(ACCEPTED_TOKENS, stats.num_accepted_tokens)
        self._add(GENERATING, stats.seconds_s)
        self._add(SHARDS, 1, {"outcome": "piece" if is_piece else "done"})

    def shard_failed(self) -> None:
        """Count a failed try of a shard."""
        self._add(SHARDS, 1, {"outcome": "failed"})

    def _add(self, metric: MetricName, number: float, labels: Mapping[str, str] | None = None) -> None:
        if number > 0:  # Ray refuses to add nothing
            self._counters[metric].inc(number, tags=dict(labels or {}))

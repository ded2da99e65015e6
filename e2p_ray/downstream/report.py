"""A run's report: counts, lengths, throughput, sharing and sample texts, from its markers and data files alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from functools import partial
from typing import Any

import polars as pl

from e2p_ray.commit import PublishedVersion, Run, read_markers
from e2p_ray.commit.consent import refusing
from e2p_ray.commit.run import map_ahead, summed
from e2p_ray.commit.verify import bad_files
from e2p_ray.downstream.pages.html import render_html
from e2p_ray.downstream.samples import Sample, Samples, SampleText
from e2p_ray.downstream.terminal import render_terminal
from e2p_ray.errors import ConservationError, InputError, ObjectNotFoundError
from e2p_ray.plan import Plan
from e2p_ray.schema import Status
from e2p_ray.storage import Storage

__all__ = [
    "Report",
    "Sample",
    "SampleText",
    "build_report",
    "read_report",
    "render_html",
    "render_terminal",
    "with_consent",
    "write_report",
]

_MAX_BINS = 48
_PAUSE_S = 30.0  # no worker was at any shard for this long: the job was not running
# What report.json holds besides the fields.
_DERIVED = (
    "sharing_ratio",
    "rows_per_s",
    "tokens_per_s",
    "estimated_saved_by_carrying_s",
    "estimated_saved_by_drafts_s",
)
_TEXT_COLUMNS = ["user_id", "content_id", "task", "text", "status", "reason"]


@dataclass(frozen=True)
class Rate:
    """Requests finished a second from `start_s` on, counted from the run's start, until the next one's start."""

    start_s: float
    rows_per_s: float


@dataclass(frozen=True)
class Report:
    """A complete run in numbers and samples. Holds ids and texts, never user embeddings."""

    run_id: str
    plan_id: str
    plan_uri: str
    table_uri: str
    projector_id: str
    base_model_id: str
    embedding_space: str
    num_candidates: int
    num_duplicates: int
    num_requests: int  # planned, dead letters of the plan too
    num_groups: int
    num_contents: int
    num_users: int
    num_shards: int
    statuses: dict[str, int]
    reasons: dict[str, int]  # of fallbacks and suppressed rows; a marker counts ok rows after a second try, too
    arms: dict[str, int]
    tasks: dict[str, int]
    plan_dead_letters: dict[str, int]
    run_dead_letters: dict[str, int]
    num_truncated: int
    lengths: dict[str, dict[str, dict[int, int]]]  # characters of texts: task -> language -> length -> texts
    num_prompt_tokens: int  # if nothing were shared
    num_computed_tokens: int
    num_output_tokens: int
    num_draft_tokens: int
    num_accepted_tokens: int  # of those, the ones that the model wrote as well
    num_drafts: int  # texts that had a published text as their draft
    num_texts_kept: int  # of those, the ones that came out the same
    num_rows_generated: int  # the run's own; the next two were not generated
    num_carried: int  # requests whose published row still holds
    num_deferred: int  # requests that a limit left for a later run
    num_removed: int  # published rows that are wanted no more
    causes: dict[str, int]  # why requests needed a new text; empty in a run that is no update
    num_workers: int
    started_at: str
    finished_at: str
    generating_s: float  # seconds at work, without pauses between an interrupted call and its resumption
    rates: tuple[Rate, ...]
    samples: tuple[Sample, ...]
    config: dict[str, Any]
    version: PublishedVersion | None = None

    @property
    def num_dead_letters(self) -> int:
        return sum(self.plan_dead_letters.values()) + sum(self.run_dead_letters.values())

    @property
    def sharing_ratio(self) -> float:
        """Prompt tokens as if nothing were shared, over those that were run through the model."""
        return self.num_prompt_tokens / max(self.num_computed_tokens, 1)

    @property
    def rows_per_s(self) -> float:
        return self.num_rows_generated / self.generating_s if self.generating_s else 0.0

    @property
    def acceptance(self) -> float:
        """Of the tokens of drafts, the share that the model wrote as well."""
        return self.num_accepted_tokens / max(self.num_draft_tokens, 1)

    @property
    def is_update(self) -> bool:
        """Whether it changed a table that was published before."""
        return bool(self.causes or self.num_carried or self.num_removed or self.num_deferred)

    @property
    def estimated_saved_by_carrying_s(self) -> float | None:
        """Seconds that the carried rows would have taken at this run's own rows a second; start and end not counted.

        None where nothing was carried, or nothing generated to reckon by.
        """
        if not (self.num_carried and self.rows_per_s):
            return None
        return self.num_carried / self.rows_per_s

    @property
    def estimated_saved_by_drafts_s(self) -> float | None:
        """Seconds that the accepted tokens would have taken at this run's own output tokens a second; None without any.

        Rough, as no run without drafts is there to compare: they saved more than that where a pass takes as long for
        one token as for several (few rows), less where arithmetic is the bound.
        """
        if not (self.num_accepted_tokens and self.tokens_per_s):
            return None
        return self.num_accepted_tokens / self.tokens_per_s

    @property
    def tokens_per_s(self) -> float:
        return self.num_output_tokens / self.generating_s if self.generating_s else 0.0

    def with_version(self, version: PublishedVersion) -> Report:
        return replace(self, version=version)

    def to_json(self) -> str:
        derived = {name: getattr(self, name) for name in _DERIVED}
        return json.dumps(asdict(self) | derived, ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def from_json(cls, data: bytes) -> Report:
        """What `to_json` wrote; TypeError or KeyError for another release's."""
        read = json.loads(data)
        values = {field.name: read[field.name] for field in fields(cls)}
        values["rates"] = tuple(Rate(**rate) for rate in values["rates"])
        values["samples"] = tuple(
            Sample(**sample | {"texts": tuple(SampleText(**text) for text in sample["texts"])})
            for sample in values["samples"]
        )
        values["lengths"] = {
            task: {language: {int(n): count for n, count in counts.items()} for language, counts in languages.items()}
            for task, languages in values["lengths"].items()
        }
        values["version"] = PublishedVersion(**values["version"]) if values["version"] else None
        return cls(**values)


def build_report(
    storage: Storage,
    run: Run,
    plan: Plan,
    config: Mapping[str, Any],
    *,
    causes: Mapping[str, int] | None = None,
    num_removed: int = 0,
) -> Report:
    """Read a complete run's markers and, one after the other, its data files; memory does not grow with rows.

    `causes` and `num_removed` are those of an update. ConservationError for markers whose data file is gone or damaged.
    """
    markers = read_markers(storage, run)
    generated = [marker for marker in markers if marker["stats"]["worker"]]
    lengths: Counter[tuple[str, str, int]] = Counter()
    reasons: Counter[str] = Counter()
    samples = Samples()
    for rows in map_ahead(partial(_shard_rows, storage, run), run.shard_ids):
        _count_lengths(rows, lengths)
        reasons.update(rows.filter(pl.col("status") != str(Status.OK))["reason"].drop_nulls())
        samples.add(rows)
    spans = sorted((_seconds(marker, "started_at"), _seconds(marker, "finished_at")) for marker in generated)
    counts = plan.counts
    return Report(
        run_id=run.run_id,
        plan_id=plan.plan_id,
        plan_uri=run.plan_uri,
        table_uri=run.table_uri,
        projector_id=run.projector_id,
        base_model_id=run.base_model_id,
        embedding_space=run.embedding_space,
        num_candidates=counts.num_candidates,
        num_duplicates=counts.num_duplicates,
        num_requests=counts.num_requests + sum(counts.dead_letters.values()),
        num_groups=counts.num_groups,
        num_contents=counts.num_contents,
        num_users=counts.num_users,
        num_shards=len(run.shard_ids),
        statuses=_sum(markers, "statuses"),
        reasons=_ordered(reasons),
        arms=_sum(markers, "arms"),
        tasks=_sum(markers, "tasks"),
        plan_dead_letters=dict(counts.dead_letters),
        run_dead_letters=_sum(markers, "error_codes"),
        num_truncated=_total(markers, "num_truncated"),
        lengths=_nested(lengths),
        num_prompt_tokens=_total(markers, "num_prompt_tokens"),
        num_computed_tokens=_total(markers, "num_computed_tokens"),
        num_output_tokens=_total(markers, "num_output_tokens"),
        num_draft_tokens=_total(markers, "num_draft_tokens"),
        num_accepted_tokens=_total(markers, "num_accepted_tokens"),
        num_drafts=_total(markers, "num_drafts"),
        num_texts_kept=_total(markers, "num_texts_kept"),
        num_rows_generated=sum(marker["num_rows"] for marker in generated),
        num_carried=_total(markers, "num_carried"),
        num_deferred=_total(markers, "num_deferred"),
        num_removed=num_removed,
        causes=dict(causes or {}),
        num_workers=len({marker["stats"]["worker"] for marker in generated}),
        started_at=min((marker["stats"]["started_at"] for marker in generated or markers), default=""),
        finished_at=max((marker["stats"]["finished_at"] for marker in generated or markers), default=""),
        generating_s=_covered(spans),
        rates=_rates(generated, spans),
        samples=samples.chosen(),
        config=dict(config),
    )


def with_consent(storage: Storage, report: Report, users_uri: str) -> Report:
    """The report without sample texts of users who want no personalisation now, or are gone from the users table."""
    refused = refusing(storage, (text.user_id for sample in report.samples for text in sample.texts), users_uri)
    samples = (sample.without(refused) for sample in report.samples)
    return replace(report, samples=tuple(sample for sample in samples if sample.texts))


def write_report(storage: Storage, run: Run, report: Report) -> None:
    """report.json and report.html in the run's folder; an earlier one is replaced."""
    storage.write_bytes(f"{run.uri}/report.json", report.to_json().encode())
    storage.write_bytes(f"{run.uri}/report.html", render_html(report).encode())


def read_report(storage: Storage, run: Run) -> Report | None:
    """The report of a run, if one was written by this release."""
    try:
        return Report.from_json(storage.read_bytes(f"{run.uri}/report.json"))
    except (ObjectNotFoundError, KeyError, TypeError, ValueError):  # ValueError: no JSON, so nobody's
        return None


def _shard_rows(storage: Storage, run: Run, shard_id: str) -> pl.DataFrame:
    """A shard's texts with the title and language of their contents."""
    try:
        texts = pl.from_arrow(storage.read_table(run.data_uri(shard_id), _TEXT_COLUMNS))
    except (ObjectNotFoundError, InputError) as error:
        present = {info.uri for info in storage.list_objects(f"{run.table_uri}/data/{run.run_id}")}
        missing = {name: "is missing" for name in run.shard_ids if run.data_uri(name) not in present}
        problems = {shard_id: "cannot be read"} | missing
        raise ConservationError(f"run {run.run_id}: {bad_files(run, problems)}") from error
    contents = pl.from_arrow(storage.read_table(run.planned_uri(shard_id), ["content_id", "title", "language"]))
    assert isinstance(texts, pl.DataFrame), "a table becomes a frame"
    assert isinstance(contents, pl.DataFrame), "a table becomes a frame"
    return texts.join(contents.unique("content_id"), on="content_id", how="left")


def _count_lengths(rows: pl.DataFrame, lengths: Counter[tuple[str, str, int]]) -> None:
    counted = rows.group_by("task", "language", pl.col("text").str.len_chars().alias("length")).len()
    for task, language, length, number in counted.iter_rows():
        lengths[task, language, length] += number


def _nested(lengths: Mapping[tuple[str, str, int], int]) -> dict[str, dict[str, dict[int, int]]]:
    nested: dict[str, dict[str, dict[int, int]]] = {}
    for (task, language, length), number in sorted(lengths.items()):
        nested.setdefault(task, {}).setdefault(language, {})[length] = number
    return nested


def _sum(markers: Iterable[Mapping[str, Any]], name: str) -> dict[str, int]:
    return _ordered(summed(markers, name))


def _ordered(counts: Mapping[str, int]) -> dict[str, int]:
    """The most frequent first."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _total(markers: Iterable[Mapping[str, Any]], name: str) -> int:
    return sum(int(marker["stats"][name]) for marker in markers)


def _seconds(marker: Mapping[str, Any], name: str) -> float:
    return datetime.fromisoformat(marker["stats"][name]).timestamp()


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds from the first start to the last end of sorted spans, without the pauses between two calls of a job."""
    covered, end = 0.0, spans[0][0] if spans else 0.0
    for start, stop in spans:
        covered += max(0.0, stop - (start if start - end > _PAUSE_S else end))
        end = max(end, stop)
    return covered


def _rates(markers: Sequence[Mapping[str, Any]], spans: Sequence[tuple[float, float]]) -> tuple[Rate, ...]:
    """Each shard's requests spread evenly over the time it took."""
    if not spans:
        return ()
    start, stop = spans[0][0], max(stop for _, stop in spans)
    num_bins = min(_MAX_BINS, max(2 * len(spans), 2))
    size = max(stop - start, 1e-6) / num_bins
    rows = [0.0] * num_bins
    for marker in markers:
        begin, end = _seconds(marker, "started_at") - start, _seconds(marker, "finished_at") - start
        end = max(end, begin + 1e-9)
        first, last = int(begin / size), min(int(end / size), num_bins - 1)
        for index in range(min(first, num_bins - 1), last + 1):
            overlap = min(end, (index + 1) * size) - max(begin, index * size)
            rows[index] += marker["num_requests"] * max(overlap, 0.0) / (end - begin)
    return tuple(Rate(index * size, number / size) for index, number in enumerate(rows))

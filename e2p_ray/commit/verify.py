"""Row conservation and the gates: what a run has to pass before anybody sees it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from e2p_ray.commit.run import ARTIFACTS, Run, is_carried, map_ahead, pending_shards
from e2p_ray.commit.shard import ShardData, describe, key_difference, parse_data, planned_keys, request_keys
from e2p_ray.commit.spool import HashSpool, hash_rows, is_among
from e2p_ray.config import GatesConfig
from e2p_ray.errors import ConservationError, GateError, IncompleteRunError, ObjectNotFoundError, ShardError
from e2p_ray.schema import DEAD_LETTERS, ErrorCode, RequestKey, Status, to_table
from e2p_ray.storage import Storage

_MIN_TEXTS = 50  # below this many texts of a task, one text that recurs says nothing
_NUM_NAMED = 3
_MAX_FILES_NAMED = 20


@dataclass(frozen=True)
class DataFile:
    """A data file that a publish can add to the table."""

    shard_id: str
    path: str  # relative to the table
    size_bytes: int
    num_rows: int
    statistics: str  # JSON, in Delta's form


@dataclass(frozen=True)
class RunSummary:
    """A complete run in numbers; dead letters are those of the plan and of the run."""

    run_id: str
    num_shards: int
    num_requests: int  # planned, plan dead letters too
    num_rows: int
    statuses: Mapping[str, int]
    reasons: Mapping[str, int]
    arms: Mapping[str, int]
    error_codes: Mapping[str, int]
    num_texts: Mapping[str, int]  # personalised texts, by task
    same_text_shares: Mapping[str, float]  # by task: the share of its personalised texts that are one and the same
    files: tuple[DataFile, ...]
    num_deferred: int = 0  # requests left for a later run, with their old rows or as dead letters
    num_failed_before: int = 0  # of these, dead letters of an earlier run whose cause may be gone

    @property
    def num_dead_letters(self) -> int:
        return sum(self.error_codes.values())

    @property
    def dead_letter_share(self) -> float:
        """Of all planned requests; those that a limit left for a later run are no failures."""
        num_waiting = self.error_codes.get(ErrorCode.DEFERRED, 0) + self.num_failed_before
        return (self.num_dead_letters - num_waiting) / max(1, self.num_requests)

    @property
    def fallback_share(self) -> float:
        """Of the rows that personalisation was meant for."""
        num_fallbacks = self.statuses.get(Status.FALLBACK, 0)
        return num_fallbacks / max(1, num_fallbacks + self.statuses.get(Status.OK, 0))


def verify(storage: Storage, run: Run, *, users: HashSpool | None = None) -> RunSummary:
    """Read a whole run back and prove that every planned key has exactly one result.

    `users` collects the users whose rows are not suppressed. Raises IncompleteRunError, ConservationError, or
    IncompatibleError where a newer release wrote a shard.
    """
    if pending := pending_shards(storage, run):
        problem = f"{len(pending)} of {len(run.shard_ids)} shards of run {run.run_id} are not generated"
        raise IncompleteRunError(f"{problem}. Run the same command again to resume")
    with ExitStack() as stack:
        tally = _Tally(stack, run, users)
        for checked in map_ahead(partial(_check_shard, storage, run), run.shard_ids):
            tally.add_shard(checked)
        for info in storage.list_objects(f"{run.plan_uri}/dead_letters"):
            tally.add_plan_dead_letters(storage.read_table(info.uri, DEAD_LETTERS.names[:4]))
        problems = tally.problems()
        if len(repeated := tally.keys.repeated()):
            keys = _keys_of(storage, run, repeated)
            problems.append(describe("in more than one place", len(repeated), keys))
        if problems:
            raise ConservationError(f"run {run.run_id}: " + "; ".join(problems))
        return tally.summary()


def check_gates(summary: RunSummary, gates: GatesConfig) -> None:
    """Raise GateError when a complete run should not be seen by anybody."""
    if not summary.num_rows:
        raise GateError(f"run {summary.run_id} has no text at all: publishing it would empty the table. See its plan")
    checks = [
        ("max_fallback_share", summary.fallback_share, gates.max_fallback_share, "the reasons of its fallbacks"),
        ("max_dead_letter_share", summary.dead_letter_share, gates.max_dead_letter_share, "its dead letters' codes"),
    ]
    for task, share in summary.same_text_shares.items():
        if summary.num_texts[task] >= _MIN_TEXTS:
            checks.append(("max_same_text_share", share, gates.max_same_text_share, f"the texts of task {task!r}"))
    failed = [
        f"{gate} is {value:.3f}, the limit {limit:g}: look at {where} in the run's report"
        for gate, value, limit, where in checks
        if value > limit
    ]
    if failed:
        raise GateError(f"run {summary.run_id} is complete but not published. " + "; ".join(failed))


def file_statistics(rows: pa.Table) -> str:
    """Delta's statistics of a data file: what lets a reader skip it."""
    bounds = {name: pc.min_max(rows[name]).as_py() for name in ("user_id", "content_id", "task")}
    return json.dumps(
        {
            "numRecords": rows.num_rows,
            "minValues": {name: bound["min"] for name, bound in bounds.items()},
            "maxValues": {name: bound["max"] for name, bound in bounds.items()},
            "nullCount": {name: rows[name].null_count for name in rows.column_names},
        },
        ensure_ascii=False,
    )


def bad_files(run: Run, problems: Mapping[str, str]) -> str:
    """What is wrong with shards' data files, by shard id, and what helps."""
    named = ", ".join(f"{shard_id} ({problem})" for shard_id, problem in list(problems.items())[:_MAX_FILES_NAMED])
    data, markers = f"{run.table_uri}/data/{run.run_id}", run.markers_uri
    remedy = f"Delete data file and marker of each in {data} and {markers}"
    if len(problems) > _MAX_FILES_NAMED:
        named += ", ..."
        remedy += " (or both folders, and everything is generated anew)"
    if any(map(is_carried, problems)):  # nobody generates these: they are committed while the update is written
        remedy += f", and {run.plan_uri}/manifest.json"
    return f"the data file of {len(problems)} shard(s): {named}. {remedy}, and generate again"


@dataclass(frozen=True)
class _Checked:
    """One shard as it was found: its problem, or its data and differences."""

    shard_id: str
    problem: str | None = None
    differences: Mapping[str, list[RequestKey]] = field(default_factory=dict)
    data: ShardData | None = None
    file: DataFile | None = None


def _check_shard(storage: Storage, run: Run, shard_id: str) -> _Checked:
    marker: dict[str, Any] = json.loads(storage.read_bytes(run.marker_uri(shard_id)))
    uri = run.data_uri(shard_id)
    try:
        data = storage.read_bytes(uri)
        if (len(data), hashlib.sha256(data).hexdigest()) != (marker["data_size_bytes"], marker["data_sha256"]):
            return _Checked(shard_id, "is not the one that was committed")
        shard = parse_data(data, uri)
        if shard.dead_letters and not _same_dead_letters(storage, run, shard_id, shard):
            return _Checked(shard_id, "has other dead letters than its dead letter file")
    except ObjectNotFoundError:
        return _Checked(shard_id, "or its dead letter file is missing")
    except ShardError as error:
        return _Checked(shard_id, f"cannot be read: {error}")
    if foreign := _foreign(run, shard.rows):
        return _Checked(shard_id, f"has rows of another {foreign}")
    file = DataFile(shard_id, run.data_path(shard_id), len(data), shard.rows.num_rows, file_statistics(shard.rows))
    return _Checked(shard_id, None, key_difference(planned_keys(storage, run, shard_id), shard.keys()), shard, file)


def _foreign(run: Run, rows: pa.Table) -> str | None:
    """What some rows were written with that is not the run's; rows carried over from other runs have their own."""
    own = rows.filter(pc.equal(rows["run_id"], run.run_id))
    for name in ARTIFACTS:
        if not set(own[name].unique().to_pylist()) <= {getattr(run, name)}:
            return name
    return None


def _same_dead_letters(storage: Storage, run: Run, shard_id: str, shard: ShardData) -> bool:
    written: pa.Table = storage.read_table(run.dead_letter_uri(shard_id))
    return bool(written.equals(to_table(shard.dead_letters, DEAD_LETTERS)))


class _Tally:
    """Sums over the shards; memory does not grow with rows."""

    def __init__(self, stack: ExitStack, run: Run, users: HashSpool | None) -> None:
        self._stack, self._run, self._users = stack, run, users
        self.keys = stack.enter_context(HashSpool())
        self._texts: dict[str, HashSpool] = {}
        self._counts: dict[str, Counter[str]] = {name: Counter() for name in ("status", "reason", "arm", "error_code")}
        self._files: list[DataFile] = []
        self._num_keys = self._num_deferred = self._num_failed_before = 0
        self._bad_files: dict[str, str] = {}
        self._num_wrong: Counter[str] = Counter()
        self._some_wrong: dict[str, list[RequestKey]] = {}

    def add_shard(self, shard: _Checked) -> None:
        if shard.problem or shard.data is None or shard.file is None:
            self._bad_files[shard.shard_id] = shard.problem or ""
            return
        for kind, keys in shard.differences.items():
            self._num_wrong[kind] += len(keys)
            self._some_wrong[kind] = sorted(self._some_wrong.get(kind, []) + keys)[: _NUM_NAMED + 1]
        rows = shard.data.rows
        self._files.append(shard.file)
        self._num_deferred += int(shard.data.stats.get("num_deferred", 0))
        self._num_failed_before += int(shard.data.stats.get("num_failed_before", 0))
        for name in ("status", "reason", "arm"):
            self._count(name, rows[name])
        letters = to_table(shard.data.dead_letters, DEAD_LETTERS)
        self._count("error_code", letters["error_code"])
        self._add_keys(rows)
        self._add_keys(letters)
        self._add_texts(rows)
        if self._users is not None:
            self._users.add(hash_rows(rows.filter(pc.not_equal(rows["status"], str(Status.SUPPRESSED)))["user_id"]))

    def add_plan_dead_letters(self, letters: pa.Table) -> None:
        self._count("error_code", letters["error_code"])
        # Candidates whose user or content is null have no key to tell them apart by.
        self._num_keys += letters.num_rows
        keyed = letters.filter(pc.not_equal(letters["error_code"], str(ErrorCode.NULL_KEY)))
        self.keys.add(hash_rows(*(keyed[name] for name in RequestKey._fields)))

    def problems(self) -> list[str]:
        said = [describe(kind, number, self._some_wrong[kind]) for kind, number in self._num_wrong.items()]
        if self._bad_files:
            said.append(bad_files(self._run, self._bad_files))
        return said

    def summary(self) -> RunSummary:
        run = self._run
        plain = {name: dict(sorted(counts.items())) for name, counts in self._counts.items()}
        return RunSummary(
            run_id=run.run_id,
            num_shards=len(run.shard_ids),
            num_requests=self._num_keys,
            num_rows=sum(file.num_rows for file in self._files),
            statuses=plain["status"],
            reasons=plain["reason"],
            arms=plain["arm"],
            error_codes=plain["error_code"],
            num_texts={task: spool.num_hashes for task, spool in sorted(self._texts.items())},
            same_text_shares={
                task: spool.max_count() / max(1, spool.num_hashes) for task, spool in sorted(self._texts.items())
            },
            files=tuple(self._files),
            num_deferred=self._num_deferred,
            num_failed_before=self._num_failed_before,
        )

    def _count(self, name: str, column: pa.ChunkedArray) -> None:
        self._counts[name].update(value for value in column.to_pylist() if value is not None)

    def _add_keys(self, table: pa.Table) -> None:
        self._num_keys += table.num_rows
        self.keys.add(hash_rows(*(table[name] for name in RequestKey._fields)))

    def _add_texts(self, rows: pa.Table) -> None:
        # Titles and unpersonalised texts are the same for many users by design.
        personalized = rows.filter(rows["personalized"])
        for task in personalized["task"].unique().to_pylist():
            if task not in self._texts:
                self._texts[task] = self._stack.enter_context(HashSpool())
            self._texts[task].add(hash_rows(personalized.filter(pc.equal(personalized["task"], task))["text"]))


def _keys_of(storage: Storage, run: Run, hashes: Any) -> list[RequestKey]:
    """The keys that have these hashes, found by reading the run once more; only a broken run pays for it."""

    def some(uri: str) -> list[RequestKey]:
        table = storage.read_table(uri, RequestKey._fields)
        return request_keys(table.filter(pa.array(is_among(hash_rows(*table.columns), hashes))))

    letters = [info.uri for info in storage.list_objects(f"{run.plan_uri}/dead_letters")]
    letters += [info.uri for info in storage.list_objects(run.dead_letters_uri)]
    found: set[RequestKey] = set()
    for keys in map_ahead(some, [run.data_uri(shard_id) for shard_id in run.shard_ids] + letters):
        found = set(_first([*found, *keys]))
    return sorted(found)


def _first(keys: Iterable[RequestKey]) -> list[RequestKey]:
    return sorted(set(keys))[: _NUM_NAMED + 1]

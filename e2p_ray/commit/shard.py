"""One shard: its data, then its dead letters, then its marker. All names are fixed, and the data decides.

The data file is written only if absent and carries the shard's dead letters and statistics in its Parquet footer.
Everything after it is a function of its bytes alone. So a second writer of a shard (a retry, a node that was thought
lost) and one that comes after a kill end with the same objects as the first, whatever they generated themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from e2p_ray.commit.run import Run
from e2p_ray.errors import IncompatibleError, ShardError
from e2p_ray.schema import DEAD_LETTERS, GENERATIONS, DeadLetter, ErrorCode, Generation, RequestKey, to_table
from e2p_ray.storage import Storage, parquet_bytes

FOOTER = b"e2p_ray.shard"
_KEY_COLUMNS = list(RequestKey._fields)


@dataclass(frozen=True)
class ShardStats:
    """What it took to generate a shard."""

    num_requests: int
    num_prompt_tokens: int
    num_computed_tokens: int  # prompt tokens really run through the model
    num_output_tokens: int
    num_truncated: int
    seconds_s: float
    started_at: datetime
    finished_at: datetime
    worker: str  # host:pid; empty for a shard that nobody generated
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0  # of those, the ones that the model wrote as well
    num_drafts: int = 0  # texts that had a draft
    num_texts_kept: int = 0  # of those, the ones that came out the same
    num_carried: int = 0  # requests whose published row still holds
    num_deferred: int = 0  # requests left for a later run: their old rows, and dead letters where there is none
    num_failed_before: int = 0  # of these, the dead letters of an earlier run that other inputs may have made good

    @property
    def num_generated(self) -> int:
        return self.num_requests - self.num_carried - self.num_deferred


@dataclass(frozen=True)
class ShardData:
    """A shard's data file, read: its rows and what its footer says."""

    rows: pa.Table
    dead_letters: tuple[DeadLetter, ...]
    stats: dict[str, Any]

    def keys(self) -> list[RequestKey]:
        """The keys of all its requests, those of dead letters last."""
        return request_keys(self.rows) + [letter.key for letter in self.dead_letters]


def commit_shard(
    storage: Storage,
    run: Run,
    shard_id: str,
    generations: Sequence[Generation],
    dead_letters: Sequence[DeadLetter],
    stats: ShardStats,
) -> None:
    """Make a shard's results durable, once: whoever was first is kept.

    Raises ShardError when the results' keys are not exactly the planned ones.
    """
    commit_rows(storage, run, shard_id, rows_of(generations), dead_letters, stats)


def rows_of(generations: Sequence[Generation]) -> pa.Table:
    """Generations as a data file has them, sorted."""
    return to_table(sorted(generations, key=lambda row: (row.content_id, row.task, row.user_id)), GENERATIONS)


def commit_rows(
    storage: Storage, run: Run, shard_id: str, rows: pa.Table, dead_letters: Sequence[DeadLetter], stats: ShardStats
) -> None:
    """`commit_shard` of rows that are a table already, of the schema `GENERATIONS`."""
    planned = planned_keys(storage, run, shard_id)
    results = request_keys(rows) + [letter.key for letter in dead_letters]
    _refuse_difference(key_difference(planned, results), shard_id)
    data_uri = run.data_uri(shard_id)
    data = data_bytes(rows, dead_letters, stats)
    if not storage.put_if_absent(data_uri, data):
        data = storage.read_bytes(data_uri)
    shard = parse_data(data, data_uri)
    _refuse_difference(key_difference(planned, shard.keys()), shard_id, f"delete {data_uri}, it has ")
    if shard.dead_letters:
        storage.write_table(run.dead_letter_uri(shard_id), to_table(shard.dead_letters, DEAD_LETTERS))
    storage.put_if_absent(run.marker_uri(shard_id), marker_bytes(run.run_id, shard_id, shard, data))


def planned_keys(storage: Storage, run: Run, shard_id: str) -> list[RequestKey]:
    """The keys that the plan holds for a shard."""
    return request_keys(storage.read_table(run.planned_uri(shard_id), _KEY_COLUMNS))


def request_keys(table: pa.Table) -> list[RequestKey]:
    """The request keys of any table that has their columns."""
    columns = (table.column(name).to_pylist() for name in _KEY_COLUMNS)
    return [RequestKey(*key) for key in zip(*columns, strict=True)]


def key_difference(planned: Iterable[RequestKey], results: Iterable[RequestKey]) -> dict[str, list[RequestKey]]:
    """How the results' keys differ from the planned ones, by kind of difference; empty when each is there once."""
    planned, counts = set(planned), Counter(results)
    differences = {
        "planned, but without a result": planned - counts.keys(),
        "not planned": counts.keys() - planned,
        "with more than one result": {key for key, count in counts.items() if count > 1},
    }
    return {kind: sorted(keys) for kind, keys in differences.items() if keys}


def describe(kind: str, num_requests: int, keys: Sequence[RequestKey]) -> str:
    """A difference for people: how many, and up to three keys."""
    more = ", ..." if num_requests > 3 else ""
    return f"{num_requests} request(s) {kind}: " + ", ".join("/".join(key) for key in keys[:3]) + more


def _refuse_difference(differences: dict[str, list[RequestKey]], shard_id: str, found: str = "") -> None:
    if differences:
        said = "; ".join(describe(kind, len(keys), keys) for kind, keys in differences.items())
        raise ShardError(f"shard {shard_id}: {found}{said}")


def parse_data(data: bytes, uri: str) -> ShardData:
    """A shard's data file from its bytes; ShardError when they are none, IncompatibleError when a newer release's."""
    try:
        rows = pq.read_table(pa.BufferReader(data), use_threads=False)
        footer = json.loads((rows.schema.metadata or {})[FOOTER])
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise ShardError(f"{uri} is not a shard's data file. Delete it and generate again") from error
    rows = rows.replace_schema_metadata(None)
    if rows.schema != GENERATIONS:
        raise ShardError(f"{uri} has another schema than this version writes. Delete it and generate again")
    try:
        letters = [DeadLetter(**row | {"error_code": ErrorCode(row["error_code"])}) for row in footer["dead_letters"]]
    except (TypeError, ValueError) as error:  # of a field, or of a code, that a newer release brought
        said = f"{uri} has dead letters that this version does not know. Install the newer one"
        raise IncompatibleError(said) from error
    return ShardData(rows, tuple(letters), footer["stats"])


def data_bytes(rows: pa.Table, dead_letters: Sequence[DeadLetter], stats: ShardStats) -> bytes:
    """A data file: rows of the schema `GENERATIONS`, the rest in its footer."""
    footer = {
        "dead_letters": [asdict(letter) for letter in sorted(dead_letters, key=lambda letter: letter.key)],
        "stats": asdict(stats),
    }
    text = json.dumps(footer, ensure_ascii=False, default=datetime.isoformat)
    return parquet_bytes(rows.replace_schema_metadata({FOOTER: text.encode()}))


def marker_bytes(run_id: str, shard_id: str, shard: ShardData, data: bytes) -> bytes:
    """The marker of a shard, a function of its data file alone."""
    rows = shard.rows
    marker = {
        "run_id": run_id,
        "shard_id": shard_id,
        "num_requests": rows.num_rows + len(shard.dead_letters),
        "num_rows": rows.num_rows,
        "statuses": _counts(rows["status"]),
        "reasons": _counts(rows["reason"]),
        "arms": _counts(rows["arm"]),
        "tasks": _counts(rows["task"]),
        "error_codes": dict(sorted(Counter(str(letter.error_code) for letter in shard.dead_letters).items())),
        "data_size_bytes": len(data),
        "data_sha256": hashlib.sha256(data).hexdigest(),
        "stats": shard.stats,
    }
    return json.dumps(marker, ensure_ascii=False, indent=1).encode()


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    return dict(sorted(Counter(value for value in column.to_pylist() if value is not None).items()))

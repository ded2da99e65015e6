"""Requests that had no text when the shown run was done, for a reason of their own: under a limit they come last.

Otherwise what can never be written would take every run's share before what can. Such a request keeps its dead letter
until it is tried again, however many runs that takes. While nothing that texts are made of is another, its dead letter
is settled: nothing waits for a later run.
"""

from __future__ import annotations

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from e2p_ray.commit import PublishedTable, Run, load_run
from e2p_ray.commit.run import dead_letter_files, map_ahead
from e2p_ray.errors import ConfigError
from e2p_ray.schema import DEAD_LETTERS, ErrorCode, RequestKey
from e2p_ray.storage import Storage
from e2p_ray.update.buckets import BucketSpool

FAILED = pa.schema([*DEAD_LETTERS, pa.field("settled", pa.bool_())])
_KEY = list(RequestKey._fields)
_LETTER = [name for name in FAILED.names if name not in _KEY]
LETTER = pl.Struct([pl.Field(name, pl.Boolean if name == "settled" else pl.String) for name in _LETTER])


def spool_failed(storage: Storage, table: PublishedTable, run: Run, spool: BucketSpool) -> None:
    """The dead letters of the run that the table shows, those that only wait left out.

    And those of rows that consent left out at publishing: what these users get now, nobody has tried to write.
    `run` is the one to come: a dead letter is settled when the run that wrote it was of the same source.
    """
    output_uri = run.uri.rpartition("/runs/")[0]
    shown = _run(storage, output_uri, table.shown.run_id) if table.shown else None
    if shown is not None:
        sources = {shown.run_id: shown.source_id}
        uris = [info.uri for info in dead_letter_files(storage, shown).values()]
        for letters in map_ahead(storage.read_table, uris):
            failed = letters.filter(pc.not_equal(letters["error_code"], str(ErrorCode.DEFERRED)))
            for run_id in set(failed["run_id"].unique().to_pylist()) - sources.keys():
                found = _run(storage, output_uri, run_id)
                sources[run_id] = found.source_id if found else ""
            settled = [sources[run_id] == run.source_id for run_id in failed["run_id"].to_pylist()]
            spool.add(failed.append_column(FAILED.field("settled"), pa.array(settled, pa.bool_())).cast(FAILED))
    spool.close()


def _run(storage: Storage, output_uri: str, run_id: str) -> Run | None:
    try:
        return load_run(storage, output_uri, run_id)
    except ConfigError:
        return None  # its folder was removed


def with_letters(requests: pl.DataFrame, failed: pa.Table) -> pl.DataFrame:
    """Requests with a further column `letter`: the rest of the dead letter with their key, null without one."""
    letters = pl.DataFrame(pl.from_arrow(failed)).select(*_KEY, letter=pl.struct(_LETTER).cast(LETTER))
    return requests.join(letters.unique(_KEY), on=_KEY, how="left", maintain_order="left")


def letters_of(requests: pl.DataFrame) -> pa.Table:
    """The way back: the rows of `FAILED` of those requests that have one."""
    found = requests.filter(pl.col("letter").is_not_null()).select(*_KEY, "letter").unnest("letter")
    return found.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(FAILED)


def is_settled() -> pl.Expr:
    """Whether a request's dead letter is settled."""
    return pl.col("letter").struct.field("settled").fill_null(False)

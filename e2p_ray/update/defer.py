"""What becomes of the shards that a run's time did not suffice for."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from e2p_ray.commit import Run
from e2p_ray.commit.run import map_ahead
from e2p_ray.plan.shards import shard_uri
from e2p_ray.schema import RequestKey
from e2p_ray.storage import Storage
from e2p_ray.update.failed import FAILED, with_letters
from e2p_ray.update.kept import commit_kept, failed_folder, failed_uri, old_rows_uri

_KEY = list(RequestKey._fields)


def defer_shards(storage: Storage, run: Run, shard_ids: Sequence[str]) -> int:
    """Commit shards of an update without generating them: old rows, and dead letters where there are none.

    Returns the number of requests that were deferred. A worker that commits one of them first is kept.
    """
    with_failed = {info.uri for info in storage.list_objects(failed_folder(run.plan_uri))}

    def deferred(shard_id: str) -> int:
        planned = pl.DataFrame(pl.from_arrow(storage.read_table(shard_uri(run.plan_uri, shard_id), _KEY)))
        rows = storage.read_table(old_rows_uri(run.plan_uri, shard_id))
        waiting = planned.join(pl.DataFrame(pl.from_arrow(rows.select(_KEY))), on=_KEY, how="anti")
        uri = failed_uri(run.plan_uri, shard_id)
        failed = storage.read_table(uri) if uri in with_failed else FAILED.empty_table()
        return commit_kept(storage, run, shard_id, rows, with_letters(waiting, failed), num_carried=0)

    return sum(map_ahead(deferred, shard_ids))

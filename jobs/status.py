"""Say how far a run is."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC
from typing import Any

from e2p_ray.commit import Run, load_run
from e2p_ray.commit.progress import PendingShard, RunProgress, run_progress
from e2p_ray.config import JobConfig
from e2p_ray.errors import ConfigError
from e2p_ray.storage import Storage
from jobs.cli import Job, end, run_job
from jobs.tables import duration_text, print_pairs, print_table

_MAX_NAMED = 10
_MAX_CHARS = 300  # of a failure's message; --json has all of it


def status(config: JobConfig, options: argparse.Namespace) -> None:
    """Print one run's progress."""
    storage = Storage(config.storage)
    is_named = options.run is not None
    run = load_run(storage, config.output.uri, options.run) if is_named else newest_run(storage, config.output.uri)
    progress = run_progress(storage, run)
    if options.json:
        print(json.dumps(as_json(progress), ensure_ascii=False, indent=1))
        return
    print_pairs(_pairs(progress))
    rows = [*_rows("", progress.statuses), *_rows("reason: ", progress.reasons)]
    rows += [
        *_rows("dead letter: ", progress.error_codes),
        *_rows("dead letter of the plan: ", progress.plan_error_codes),
    ]
    if rows:
        print_table(("so far", "requests"), rows)
    if progress.pending:
        # Those that failed first: there is something to do about them.
        named = sorted(progress.pending, key=lambda shard: shard.failure is None)[:_MAX_NAMED]
        print_table(("pending shard", "requests", "what is known"), map(_shard_row, named))
        if len(progress.pending) > _MAX_NAMED:
            print(f"... and {len(progress.pending) - _MAX_NAMED:,} more (--json lists all)")


def newest_run(storage: Storage, output_uri: str) -> Run:
    """The run of which anything was recorded last."""
    records = [
        (found.modified_s, found.info.uri.split("/")[-2])
        for found in storage.list_dated(f"{output_uri}/runs")
        if found.info.uri.endswith("/run.json")
    ]
    if not records:
        raise ConfigError(f"{output_uri}/runs: there is no run. Generate one first")
    return load_run(storage, output_uri, max(records)[1])


def as_json(progress: RunProgress) -> dict[str, Any]:
    """All of it, with what follows from it."""
    found = asdict(progress)
    for name in ("started_at", "last_finished_at", "looked_at"):
        found[name] = found[name].isoformat() if found[name] else None
    for shard in found["pending"]:
        if shard["failure"]:
            shard["failure"]["at"] = shard["failure"]["at"].isoformat()
    derived = ("num_done", "num_failed", "rows_per_s", "left_s", "idle_s")
    return found | {name: getattr(progress, name) for name in derived}


def _pairs(progress: RunProgress) -> dict[str, str]:
    pending = progress.num_pending_requests
    work = f"{duration_text(progress.generating_s)} by {progress.num_workers} workers"
    if progress.versions:
        shown = ", ".join(map(str, progress.versions))
        published = f"as version {shown}" + ("" if progress.is_current else " (readers see another one now)")
    else:
        published = "no" if progress.pending else "no: complete, jobs.publish makes it visible"
    failed = f", {progress.num_failed:,} of these failed" if progress.num_failed else ""
    pairs = {
        "run": progress.run_id,
        "shards": f"{progress.num_done:,} of {progress.num_shards:,} done, {len(progress.pending):,} pending{failed}",
        "requests": f"{progress.num_requests:,} done, {'unknown' if pending is None else f'{pending:,}'} pending",
        "generated": f"{progress.num_generated:,} in {work}",
        "rows/s": "unknown" if progress.rows_per_s is None else f"{progress.rows_per_s:,.1f}",
        "time left": _time_left(progress),
        "published": published,
    }
    if progress.idle_s is not None:
        pairs["last shard"] = f"{duration_text(max(progress.idle_s, 0.0))} ago"
    return pairs


def _time_left(progress: RunProgress) -> str:
    if not progress.pending:
        return "none: every shard is done"
    if progress.left_s is None:
        return "unknown: no shard was generated yet, or the plan's manifest is gone"
    return f"{duration_text(progress.left_s)} of generation at this rate"


def _rows(before: str, counts: Mapping[str, int]) -> Sequence[tuple[str, str]]:
    return [(before + name, f"{number:,}") for name, number in counts.items()]


def _shard_row(shard: PendingShard) -> tuple[str, str, str]:
    size = "?" if shard.num_requests is None else f"{shard.num_requests:,}"
    if not shard.is_planned:
        return shard.shard_id, size, "cannot be generated: its planned file is gone"
    known = []
    if shard.num_pieces:
        known.append(f"it ended its workers; {shard.num_pieces:,} pieces of it are written")
    elif shard.has_data:
        known.append("its writer stopped before the marker")
    if (failure := shard.failure) is not None:
        when = failure.at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        where = f" on {failure.worker}" if failure.worker else ""
        message = failure.message if len(failure.message) <= _MAX_CHARS else failure.message[:_MAX_CHARS] + " ..."
        known.append(f"failed at {when}, attempt {failure.attempt}{where}: {failure.error_type}: {message}")
    return shard.shard_id, size, "; ".join(known) or "no result yet"


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", metavar="RUN_ID", help="also as the first word; default: the run that was opened last")
    parser.add_argument("--json", action="store_true", help="print JSON, with all pending shards")


def main(words: Sequence[str]) -> int:
    """`RUN_ID` as the first word is `--run RUN_ID`."""
    named = ["--run"] if words and not words[0].startswith("-") else []
    return run_job(JOB, [*named, *words])


JOB = Job(
    prog="jobs.status",
    description="Say how far a run is (usage: python -m jobs.status [RUN_ID] --config FILE): shards done and pending,\n"
    "failed shards and why, rows by status and reason, dead letters by code, rows per second, the time that is left,\n"
    "and whether it is published. Reads storage only.",
    config=JobConfig,
    call=status,
    add_options=_options,
)


if __name__ == "__main__":
    end(main(sys.argv[1:]))

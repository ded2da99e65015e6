"""Write a run's plan and say what the run would do."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass

from e2p_ray.commit import PublishedTable, as_of_last_change, read_published
from e2p_ray.config import JobConfig
from e2p_ray.engine.prompt import PromptLayout, load_tokenizer
from e2p_ray.errors import ConfigError, GateError, RowError
from e2p_ray.plan import Plan, read_shard
from e2p_ray.update import Changes, Limits, shows_already, survey
from jobs.cli import Job, main
from jobs.steps import Setup, full_run, planned, say, set_up, source_id_of, update_job, update_runs
from jobs.tables import bytes_text, duration_text, print_pairs, print_table
from jobs.whole_run import dead_letters_left

_SAMPLE_SHARDS, _SAMPLE_GROUPS = 4, 200
_CHARS_PER_TOKEN = 3.0  # where no tokenizer can be loaded
_NO_WINDOW = 1 << 30


@dataclass(frozen=True)
class TokenEstimate:
    """Prompt tokens of a plan, from a sample of its groups."""

    num_alone: int  # if every request were prefilled by itself
    num_shared: int  # with each group's prefix computed once
    max_output: int
    how: str

    @property
    def sharing_ratio(self) -> float:
        return self.num_alone / max(self.num_shared, 1)


def plan(config: JobConfig, options: argparse.Namespace) -> None:
    """Make the plan, or find it finished, and print it."""
    if options.rows_per_s is not None and not 0 < options.rows_per_s < math.inf:
        raise ConfigError(f"--rows-per-s {options.rows_per_s:g}: give a number above 0, or leave it out")
    setup = set_up(config)
    made = planned(config, setup)
    table = read_published(setup.storage, config.output.table_uri)
    changes = _changes(config, setup, made, table)
    tokens = estimate_tokens(config, setup, made)
    counts = made.counts
    pairs = {
        "plan": made.uri,
        "run": _run_id(config, setup, made, table, changes),
        "candidates": f"{counts.num_candidates:,} ({counts.num_duplicates:,} duplicates)",
        "requests": f"{counts.num_requests:,} of {counts.num_users:,} users and {counts.num_contents:,} contents"
        f" ({', '.join(made.tasks)})",
        "groups": f"{counts.num_groups:,}",
        "shards": f"{len(made.shards):,}",
        "bytes": bytes_text(sum(shard.num_bytes for shard in made.shards)),
        "prompt tokens": f"about {tokens.num_shared:,} with sharing, {tokens.num_alone:,} without ({tokens.how})",
        "sharing ratio": f"{tokens.sharing_ratio:,.1f}",
        "output tokens": f"at most {tokens.max_output:,}",
    }
    rows_per_s, where = options.rows_per_s, "given"
    if rows_per_s is None:
        rows_per_s, where = last_rows_per_s(config, setup)
    num_to_write = counts.num_requests if changes is None else changes.num_changed
    pairs["estimated time"] = (
        f"{duration_text(num_to_write / rows_per_s)} at {rows_per_s:,.1f} rows/s ({where})"
        if rows_per_s
        else "unknown: no run has been reported yet; give --rows-per-s"
    )
    if closed := _closed_gate(config, made):
        pairs["gate"] = closed
    print_pairs(pairs)
    rows = [("no soft token: " + reason, f"{number:,}") for reason, number in sorted(counts.reasons.items())]
    rows += [("dead letter: " + code, f"{number:,}") for code, number in sorted(counts.dead_letters.items())]
    if rows:
        print_table(("not personalised", "requests"), rows)
    if table is not None and changes is not None:
        _print_changes(table, changes)


def _closed_gate(config: JobConfig, made: Plan) -> str | None:
    """Why no run of this plan could be published, whatever is generated."""
    try:
        dead_letters_left(config, made)
    except GateError as error:
        return str(error)
    return None


def _changes(config: JobConfig, setup: Setup, made: Plan, table: PublishedTable | None) -> Changes | None:
    """What a run would change of the published table; None where nothing is published."""
    if table is None:
        return None
    if table.shows_all_of(source_id_of(config, setup, made)):
        return Changes(num_carried=table.num_rows)
    return survey(update_job(config, setup, made, table), say)


def _run_id(config: JobConfig, setup: Setup, made: Plan, table: PublishedTable | None, changes: Changes | None) -> str:
    if table is None or changes is None:
        return full_run(config, setup, made).run_id
    if shows_already(table, changes):
        return f"none: version {table.version} shows this already"
    return next(update_runs(config, setup, made, as_of_last_change(setup.storage, table), Limits())).run_id


def _print_changes(table: PublishedTable, changes: Changes) -> None:
    """Counts by cause."""
    rows = [(f"write: {cause}", f"{number:,}") for cause, number in changes.causes.items()]
    rows += [("carry over", f"{changes.num_carried:,}"), ("remove", f"{changes.num_removed:,}")]
    print_table((f"change of version {table.version}", "rows"), rows)


def last_rows_per_s(config: JobConfig, setup: Setup) -> tuple[float | None, str]:
    """The speed of the run that was reported last under this output, and its name."""
    found: list[tuple[str, float, str]] = []
    for info in setup.storage.list_objects(f"{config.output.uri}/runs"):
        if info.uri.endswith("/report.json"):
            report = json.loads(setup.storage.read_bytes(info.uri))
            if not report["rows_per_s"]:
                continue  # an update that only removed rows
            found.append((report["finished_at"], report["rows_per_s"], f"as run {report['run_id']}"))
    if not found:
        return None, ""
    _, rows_per_s, where = max(found)
    return rows_per_s, where


def estimate_tokens(config: JobConfig, setup: Setup, plan: Plan) -> TokenEstimate:
    """Tokens by the base model's own tokenizer over a sample of groups, scaled by characters."""
    counts = plan.counts
    max_output = sum(task.sampling.max_new_tokens for task in config.tasks.values())
    max_output *= counts.num_requests // max(len(plan.tasks), 1)
    left, right, how = _per_char(config, setup, plan)
    num_soft = setup.manifest.num_soft_tokens
    alone = left * counts.request_chars + (right + num_soft) * counts.num_requests
    if setup.manifest.layout == "soft_first":
        return TokenEstimate(round(alone), round(alone), max_output, how)
    chars_per_group = counts.content_chars / max(counts.num_contents, 1)
    shared = left * chars_per_group * counts.num_groups + (right + num_soft) * counts.num_requests
    return TokenEstimate(round(alone), round(shared), max_output, how)


def _per_char(config: JobConfig, setup: Setup, plan: Plan) -> tuple[float, float, str]:
    """Tokens of the shared part a character of the content, and tokens after the soft token a request."""
    try:
        tokenizer = load_tokenizer(setup.base.path)
    except Exception as error:  # noqa: BLE001 - a plan does not need the tokenizer, and what it raises has no type
        say(f"no tokenizer ({type(error).__name__}): tokens are guessed from characters")
        return 1 / _CHARS_PER_TOKEN, 0.0, f"guessed, {_CHARS_PER_TOKEN:g} characters a token"
    layout = PromptLayout(
        tokenizer,
        "content_first",
        config.tasks,
        num_soft_tokens=setup.manifest.num_soft_tokens,
        max_positions=_NO_WINDOW,
    )
    num_left = num_right = num_chars = num_groups = 0
    step = max(1, len(plan.shards) // _SAMPLE_SHARDS)
    for shard in plan.shards[::step][:_SAMPLE_SHARDS]:
        for group in read_shard(setup.storage, plan.uri, shard.shard_id)[: _SAMPLE_GROUPS // _SAMPLE_SHARDS]:
            try:
                segments = layout.segments(group.content, group.task)
            except RowError:
                continue
            num_left, num_right = num_left + len(segments.left), num_right + len(segments.right)
            num_chars += len(group.content.title) + len(group.content.body)
            num_groups += 1
    if not num_chars:
        return 1 / _CHARS_PER_TOKEN, 0.0, "nothing to count"
    return num_left / num_chars, num_right / num_groups, f"from {num_groups} sampled groups"


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows-per-s", type=float, metavar="NUMBER", help="to say how long the run would take")


JOB = Job(
    prog="jobs.plan",
    description="Write the plan of a run under output.uri and say what the run would do: requests, groups, shards,\n"
    "tokens with and without sharing, bytes, and what cannot be personalised; where a table is published, also what\n"
    "would be written anew and why, carried over and removed, and whether its dead letters alone close a gate.\n"
    "Nothing is generated.",
    config=JobConfig,
    call=plan,
    add_options=_options,
)


if __name__ == "__main__":
    main(JOB)

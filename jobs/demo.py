"""The whole of it in one command: a small newsroom, a projector trained for it, and the main job over both."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pyarrow as pa
from deltalake import DeltaTable

from e2p_ray.config import JobConfig, load_config
from e2p_ray.demo.angles import Truth, angle_accuracy, load_truth
from e2p_ray.demo.project import train_demo_projector, write_job
from e2p_ray.demo.world import write_world
from e2p_ray.downstream.report import render_terminal
from e2p_ray.schema import Status
from jobs.cli import guarded
from jobs.generate import generate_run
from jobs.progress import duration_text
from jobs.steps import say
from jobs.tables import print_table

PROG = "jobs.demo"
DESCRIPTION = """\
Make a small newsroom in English and Japanese with readers and their clicks, user embeddings from the clicks, and a
projector; then run the main job over them exactly as jobs.generate does, and show what different readers got.
Everything is written to one folder. What is there already is used again: remove the folder for a fresh start."""
_TEXTS = 4
_SEED = 7


def demo(folder: Path, rest: Sequence[str]) -> None:
    """Make what is missing, generate, publish, and print what came out. `rest` are configuration options."""
    started_s = time.monotonic()
    job_file = _job_file(folder)
    config = load_config(JobConfig, ["--config", str(job_file), *rest], prog=PROG, description=DESCRIPTION)
    say(f"[3/4] the main job; the same as: python -m jobs.generate --config {job_file}")
    report = generate_run(config)
    say("[4/4] what came out\n")
    truth, table = load_truth(folder / "world"), _published(config)
    _print_samples(table, truth, folder)
    _print_accuracy(table, truth)
    print(render_terminal(report))
    say(f"\ndone in {duration_text(time.monotonic() - started_s)}; the published table: {config.output.table_uri}")


def _job_file(folder: Path) -> Path:
    """The demo's job file; world and projector are made first when it is not there, it comes last."""
    job_file = folder / "job.yaml"
    if job_file.exists():
        say(f"[1/4] [2/4] newsroom and projector are in {folder} already")
        return job_file
    world = write_world(folder / "world", seed=_SEED)
    say(
        f"[1/4] a newsroom: {world.num_contents:,} articles, {world.num_users:,} readers, {world.num_clicks:,} clicks "
        f"-> user embeddings of {world.embedding_dim} dimensions, {world.num_candidates:,} candidates"
    )
    say(f"[2/4] training the projector on {world.num_targets:,} texts")
    result = train_demo_projector(folder / "world", str(folder / "projector"), on_progress=_TrainingLine())
    say(f"      projector {result.projector.manifest.projector_id}")
    return write_job(job_file, world=folder / "world", output=folder / "output", projector=folder / "projector")


class _TrainingLine:
    """Says the loss now and then."""

    def __init__(self, every_s: float = 5.0) -> None:
        self._every_s = every_s
        self._said_s = time.monotonic()

    def __call__(self, step: int, loss: float) -> None:
        if time.monotonic() - self._said_s >= self._every_s:
            self._said_s = time.monotonic()
            say(f"      step {step:,}: {loss:.3f} nats a token")


def _published(config: JobConfig) -> pa.Table:
    return DeltaTable(config.output.table_uri).to_pyarrow_table()


def _print_samples(table: pa.Table, truth: Truth, folder: Path) -> None:
    """For each language and task one article, its title, and what readers of different tastes got."""
    contents = pl.read_parquet(folder / "world" / "contents.parquet").select("content_id", "title", "language")
    rows = pl.DataFrame(pl.from_arrow(table)).filter(pl.col("status") == str(Status.OK)).join(contents, on="content_id")
    liked = [truth.expected_angle(*pair) for pair in rows.select("user_id", "content_id").iter_rows()]
    rows = (
        rows.with_columns(likes=pl.Series(liked))
        .sort("user_id")
        .unique(["content_id", "task", "likes"], keep="first", maintain_order=True)
    )
    for (language, task), part in sorted(rows.group_by("language", "task"), key=lambda item: item[0]):
        best = part.group_by("content_id").len().sort("len", "content_id", descending=[True, False])["content_id"][0]
        shown = part.filter(pl.col("content_id") == best).head(_TEXTS)
        print(f"{task} ({language}); the original title: {shown['title'][0]}")
        print_table(("reader", "likes", "text"), shown.select("user_id", "likes", "text").iter_rows())


def _print_accuracy(table: pa.Table, truth: Truth) -> None:
    """How often a text shows the angle its reader likes best, against the same texts given to somebody else."""
    rows = []
    for task in sorted(set(table["task"].to_pylist())):
        for language, accuracy in angle_accuracy(table, truth, task=task).items():
            right, shuffled = f"{accuracy.right:.1%}", f"{accuracy.shuffled:.1%}"
            rows.append(
                (
                    task,
                    language,
                    f"{accuracy.num_texts:,}",
                    right,
                    shuffled,
                    f"{accuracy.ratio:.1f}x" if accuracy.right else "-",
                )
            )
    print("texts that show the angle their reader likes best:")
    print_table(("task", "language", "texts", "right reader", "shuffled readers", "ratio"), rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {PROG}", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--folder", type=Path, default=Path("demo-run"), help="where it all goes (default: demo-run)")
    options, rest = parser.parse_known_args(argv)
    return guarded(lambda: demo(options.folder, rest), PROG)


if __name__ == "__main__":
    sys.exit(main())

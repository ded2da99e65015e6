"""The whole of it in one command: a small newsroom, a projector trained for it, and the main job over both."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import polars as pl
import pyarrow as pa
from deltalake import DeltaTable

from e2p_ray.config import Config, EvaluateConfig, JobConfig, TrainConfig, load_config
from e2p_ray.demo.angles import Truth, angle_accuracy, load_truth
from e2p_ray.demo.configs import JobFiles, write_configs
from e2p_ray.demo.world import write_world
from e2p_ray.downstream.report import render_terminal
from e2p_ray.engine_process import engine_forks
from e2p_ray.schema import Status
from e2p_ray.storage import Storage
from jobs.cli import end, guarded
from jobs.evaluate import RESULT_FILE, read_evaluation, run_evaluation
from jobs.steps import say
from jobs.tables import duration_text, print_table
from jobs.train import train_projector
from jobs.whole_run import generate_run

C = TypeVar("C", bound=Config)

PROG = "jobs.demo"
DESCRIPTION = """\
Make a small newsroom in English and Japanese with readers and their clicks, and user embeddings from the clicks; train
a projector as jobs.train does, hold it against controls as jobs.evaluate does, run the main job as jobs.generate does,
and show what different readers got.
Everything is written to one folder. What is there already is used again: remove the folder for a fresh start."""
_TEXTS = 4
_SEED = 7


def demo(folder: Path, rest: Sequence[str]) -> None:
    """Make what is missing, train, evaluate, generate, publish, and print what came out. `rest` are options."""
    started_s = time.monotonic()
    job_files = _job_files(folder)
    config = load_config(JobConfig, ["--config", str(job_files.generate), *rest], prog=PROG, description=DESCRIPTION)
    say(f"[2/5] trains the projector; the same as: python -m jobs.train --config {job_files.train}")
    trained = train_projector(_read(TrainConfig, job_files.train))
    say(f"[3/5] does it personalise? the same as: python -m jobs.evaluate --config {job_files.evaluate}")
    _evaluate_once(_read(EvaluateConfig, job_files.evaluate), again=trained is not None)
    say(f"[4/5] the main job; the same as: python -m jobs.generate --config {job_files.generate}")
    with engine_forks(config) as forks:
        report = generate_run(config, forks=forks)
    say("[5/5] what came out\n")
    truth, table = load_truth(folder / "world"), _published(config)
    _print_samples(table, truth, folder)
    _print_accuracy(table, truth)
    print(render_terminal(report))
    say(f"\ndone in {duration_text(time.monotonic() - started_s)}; the published table: {config.output.table_uri}")


def _job_files(folder: Path) -> JobFiles:
    """The demo's job files; the world is made first when they are not there."""
    if (folder / "job.yaml").exists():
        say(f"[1/5] the newsroom is in {folder} already")
        return JobFiles(folder / "train.yaml", folder / "evaluate.yaml", folder / "job.yaml")
    world = write_world(folder / "world", seed=_SEED)
    say(
        f"[1/5] a newsroom: {world.num_contents:,} articles, {world.num_users:,} readers, {world.num_clicks:,} clicks "
        f"-> user embeddings of {world.embedding_dim} dimensions, {world.num_candidates:,} candidates, "
        f"{world.num_targets:,} texts to learn from"
    )
    return write_configs(folder, world=folder / "world")


def _read(model: type[C], path: Path) -> C:
    """A job file as it was written; options on the command line are the main job's."""
    return load_config(model, ["--config", str(path)], prog=PROG, description=DESCRIPTION)


def _evaluate_once(config: EvaluateConfig, *, again: bool) -> None:
    if again or not Path(config.output.uri, RESULT_FILE).exists():
        run_evaluation(config)
    else:
        print(read_evaluation(Storage(), config.output.uri).lines())


def _published(config: JobConfig) -> pa.Table:
    uri = config.output.table_uri
    return DeltaTable(uri, storage_options=Storage(config.storage).delta_options(uri)).to_pyarrow_table()


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
    # The job files are for any working directory, and Ray may have been started in another one.
    return guarded(lambda: demo(options.folder.absolute(), rest), PROG)


if __name__ == "__main__":
    end(main())

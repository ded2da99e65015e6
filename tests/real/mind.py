"""MIND as an input of the main job: users by matrix factorisation of real histories, candidates as they were logged.

As a command it runs the whole job over all known pairs: python -m tests.real.mind --output FOLDER_OR_S3_URI.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import torch

from e2p_ray.config import BaseModelConfig, JobConfig, StorageConfig, TaskConfig
from e2p_ray.downstream.report import render_terminal
from e2p_ray.engine.manifest import resolve_base_model
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.prompt import load_tokenizer
from e2p_ray.schema import Content
from e2p_ray.storage import Storage
from e2p_ray.train.lessons import Target, UserTable
from e2p_ray.train.projector import TrainResult, train_projector
from e2p_ray.train.settings import TrainSettings
from e2p_ray.upstream.factorise import FactoriseSettings, factorise
from jobs.whole_run import generate_run
from tests.real.data import FOLDER

BASE_MODEL = FOLDER / "models" / "news-lm-6m"
TASK: dict[str, Any] = {
    "prompts": {"en": {"content": "{body}", "cue_before": "\n\nHeadline:"}},
    "sampling": {"max_new_tokens": 24, "stop": ["\n"]},
    "limits": {"min_chars": 8, "max_chars": 160},
    "max_content_tokens": 256,
}
_NOW = datetime(2019, 11, 15, tzinfo=UTC)


@dataclass(frozen=True)
class Mind:
    """The tables of the job, and the targets its projector learns from."""

    users: pl.DataFrame
    contents: pl.DataFrame
    candidates: pl.DataFrame
    targets: list[Target]


def read_mind(num_users: int | None = None, *, num_factors: int = 32) -> Mind:
    """Users from click histories, candidates with a known content, targets from clicked titles."""
    contents = pl.read_parquet(FOLDER / "data" / "mind_contents.parquet")
    log = pl.read_parquet(FOLDER / "data" / "mind_impressions.parquet").sort("impression_id")
    histories = log.unique("user_id", keep="first", maintain_order=True).select("user_id", item_id="history")
    clicks = histories.explode("item_id").drop_nulls()
    factors = factorise(clicks, FactoriseSettings(num_factors=num_factors))
    users = pl.DataFrame(
        {
            "user_id": factors.user_ids,
            "embedding": pl.Series(factors.user_embeddings, dtype=pl.Array(pl.Float32, num_factors)),
        }
    ).with_columns(embedding_space=pl.lit(factors.embedding_space), personalize=pl.lit(True), updated_at=pl.lit(_NOW))
    chosen = users["user_id"].head(num_users) if num_users is not None else users["user_id"]
    known = contents["content_id"]
    shown = pl.concat(
        log.select("user_id", content_id=column, score=pl.lit(score, pl.Float32)).explode("content_id")
        for column, score in (("clicked", 1.0), ("not_clicked", 0.0))
    )
    candidates = (
        shown.filter(pl.col("user_id").is_in(chosen.implode()), pl.col("content_id").is_in(known.implode()))
        .with_columns(rank=pl.int_range(pl.len(), dtype=pl.Int32).over("user_id"), source=pl.lit("mind"))
        .select("user_id", "content_id", "rank", "score", "source")
    )
    titles = dict(contents.select("content_id", "title").iter_rows())
    targets = [
        Target(user_id, item_id, "headline", titles[item_id])
        for user_id, item_id in clicks.iter_rows()
        if item_id in titles
    ]
    tables = contents.select("content_id", "title", "body", language=pl.lit("en"), updated_at=pl.lit(_NOW))
    return Mind(users, tables, candidates, targets)


def write_tables(mind: Mind, storage: Storage, uri: str) -> None:
    """The job's inputs, users in two files."""
    half = len(mind.users) // 2
    parts: dict[str, pl.DataFrame] = {
        "users/part-0": mind.users[:half],
        "users/part-1": mind.users[half:],
        "contents/part-0": mind.contents,
        "candidates/part-0": mind.candidates,
    }
    for name, frame in parts.items():
        table: pa.Table = frame.to_arrow()
        storage.write_table(f"{uri}/{name}.parquet", table)


def train(mind: Mind, storage: Storage, uri: str, *, num_steps: int) -> TrainResult:
    """A projector for news-lm-6m from clicked titles; how well it personalises is another measurement."""
    folder = resolve_base_model(BaseModelConfig(uri=str(BASE_MODEL)), storage)
    users = UserTable(
        mind.users["user_id"].to_list(),
        np.array(mind.users["embedding"].to_numpy(), np.float32),  # a copy that torch may own
        mind.users["embedding_space"][0],
    )
    result = train_projector(
        BaseModel.load(folder.path, "float32", torch.device("cpu")),
        folder,
        load_tokenizer(folder.path),
        {"headline": TaskConfig.model_validate(TASK)},
        users,
        [Content(*row) for row in mind.contents.select("content_id", "title", "body", "language").iter_rows()],
        mind.targets,
        TrainSettings(num_steps=num_steps, target_prefix={"en": " "}),
    )
    result.projector.save_pretrained(storage, uri)
    return result


def job_config(inputs_uri: str, output_uri: str, storage: StorageConfig, **changes: Any) -> JobConfig:
    """The job over these inputs."""
    return JobConfig.model_validate(
        {
            "inputs": {name: f"{inputs_uri}/{name.removesuffix('_uri')}" for name in _INPUTS},
            "output": {"uri": output_uri},
            "base_model": {"uri": str(BASE_MODEL)},
            "projector": {"uri": f"{inputs_uri}/projector"},
            "tasks": {"headline": TASK},
            "storage": storage,
            # A weak 6.5 M model invents names and numbers: the checks are there to catch that.
            "gates": {"max_fallback_share": 1.0, "max_same_text_share": 1.0},
        }
        | changes
    )


_INPUTS = ("users_uri", "contents_uri", "candidates_uri")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="where tables and runs go; default: a new temporary folder")
    parser.add_argument("--endpoint", help="S3 endpoint; credentials from the usual chain")
    parser.add_argument("--users", type=int, help="the first so many users only")
    parser.add_argument("--steps", type=int, default=100, help="training steps of the projector")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    output = options.output or tempfile.mkdtemp(prefix="mind-")
    storage_config = StorageConfig(endpoint_url=options.endpoint)
    storage = Storage(storage_config)
    mind = read_mind(options.users)
    write_tables(mind, storage, f"{output}/inputs")
    start = time.perf_counter()
    result = train(mind, storage, f"{output}/inputs/projector", num_steps=options.steps)
    print(
        f"projector: {result.num_examples:,} targets, {time.perf_counter() - start:.0f} s, loss {result.losses[-1]:.3f}"
    )
    workers = {"min_size": options.workers, "max_size": options.workers}
    config = job_config(f"{output}/inputs", f"{output}/out", storage_config, workers=workers)
    start = time.perf_counter()
    report = generate_run(config)
    print(render_terminal(report))
    published = pl.scan_delta(config.output.table_uri, storage_options=storage.delta_options())
    num_rows = published.select(pl.len()).collect().item()
    print(f"{num_rows:,} rows read back from {config.output.table_uri} in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()

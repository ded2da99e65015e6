"""What an update of a published table costs beside its first run: python -m tests.bench.update.

`jobs.generate` as a process of its own over one table of requests: a first run, the same again with nothing changed,
with another user embedding for one user in a hundred, with another body of one content; `jobs.backfill` with another
projector, and the same by `--full`, without drafts. A 30 M Llama with random weights that writes letters only, so that
texts are tokens and a published text can be a right draft; nothing of the job is replaced.

It ends with code 1 and says why where other requests are written than those that changed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import yaml

from e2p_ray.engine.projector import Projector
from tests.bench.backfill import model_of_letters
from tests.bench.harness import print_results
from tests.bench.job import write_job, write_projector
from tests.bench.workloads import MODEL_SIZES, Case
from tests.tiny_models import EMBEDDING_DIM, random_projector

_ONE_IN = 100
# Of random numbers that are added to the projector's weights (of a standard deviation of 0.5): see `same_texts`.
_RETRAINED_STD = 0.002


def retrained(drawn: Projector, seed: int = 3) -> Projector:
    """A projector a little beside this one."""
    torch.manual_seed(seed)
    found = Projector(drawn.manifest, drawn.reference)
    found.load_state_dict({
        name: value + _RETRAINED_STD * torch.randn_like(value) if value.is_floating_point() else value
        for name, value in drawn.state_dict().items()
    })  # fmt: skip
    return found


def change_users(uri: str, seed: int = 4) -> int:
    """Another user embedding for one user in a hundred; how many that are."""
    users, rng = pl.read_parquet(uri), np.random.default_rng(seed)
    vectors = np.array(users["embedding"].to_list(), np.float32)
    chosen = rng.permutation(users.height)[: max(users.height // _ONE_IN, 1)]
    vectors[chosen] = rng.standard_normal((len(chosen), EMBEDDING_DIM))
    column = pl.Series("embedding", vectors, dtype=pl.Array(pl.Float32, EMBEDDING_DIM))
    users.with_columns(column).write_parquet(uri)
    return len(chosen)


def change_content(uri: str) -> None:
    """The first content's body backwards, as long as it was."""
    contents = pl.read_parquet(uri)
    bodies = contents["body"].to_list()
    contents.with_columns(pl.Series("body", [bodies[0][::-1], *bodies[1:]])).write_parquet(uri)


def run(folder: Path, values: Mapping[str, Any], *arguments: str) -> tuple[float, dict[str, Any]]:
    """Seconds of one job over the same output, and the report of the run that it shows afterwards."""
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump({**values, "output": {"uri": str(folder / "output")}}), "utf-8")
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", *arguments, "--config", str(path)], check=True, capture_output=True)
    seconds = time.perf_counter() - start
    newest = max(folder.glob("output/runs/*/report.json"), key=lambda report: report.stat().st_mtime_ns)
    return seconds, json.loads(newest.read_text("utf-8"))


def measure(folder: Path, case: Case, requests_per_shard: int, num_actors: int) -> list[dict[str, Any]]:
    """A line for each run, in the order in which one table sees them."""
    size = MODEL_SIZES["30m"]
    drawn = random_projector(size.hidden_size)
    values = write_job(folder, case, requests_per_shard, model_of_letters(size), drawn)
    values["workers"] = {"min_size": num_actors, "max_size": num_actors}
    other = str(folder / "other_projector")
    write_projector(other, retrained(drawn), folder / "model")
    num_all, inputs = case.num_contents * case.num_users, values["inputs"]
    results: list[dict[str, Any]] = []
    runs = set[str]()

    def step(system: str, num_changed: int, *arguments: str) -> None:
        seconds, report = run(folder, values, *arguments)
        line = {
            "case": f"{case.shape}, {num_all:,} requests",
            "system": system,
            "changed": num_changed,
            "written": 0,
            "seconds": seconds,
            "of_first": seconds / results[0]["seconds"] if results else 1.0,
        }
        results.append(line)
        if report["run_id"] in runs:  # the one that the table has been showing
            return
        runs.add(report["run_id"])
        line["written"] = report["num_rows_generated"]
        line["writing_rows_per_s"] = report["rows_per_s"]
        if report["num_drafts"]:
            line["same_texts"] = report["num_texts_kept"] / report["num_drafts"]
        if report["num_draft_tokens"]:
            line["accepted"] = report["num_accepted_tokens"] / report["num_draft_tokens"]

    step("first run", num_all, "jobs.generate")
    step("nothing changed", 0, "jobs.generate")
    step("1 % of users", change_users(inputs["users_uri"]) * case.num_contents, "jobs.generate")
    change_content(inputs["contents_uri"])
    step("one content", case.num_users, "jobs.generate")
    values["projector"] = {"uri": other}
    step("another projector", num_all, "jobs.backfill")
    step("the same by --full", num_all, "jobs.generate", "--full")
    return results


def problems_of(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Runs that wrote other requests than those that changed."""
    return [
        f"{line['system']}: {line['written']:,} requests written, {line['changed']:,} changed"
        for line in results
        if line["written"] != line["changed"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contents", type=int, default=40)
    parser.add_argument("--users", type=int, default=256, help="of every content")
    parser.add_argument("--shard", type=int, default=1024, help="requests a shard")
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a fifth of the contents")
    options = parser.parse_args()
    case = Case(max(options.contents // 5, 1) if options.quick else options.contents, options.users, 128)
    with tempfile.TemporaryDirectory() as place:
        results = measure(Path(place), case, options.shard, options.actors)
    print_results("update", results)
    if problems := problems_of(results):
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()

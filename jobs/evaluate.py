"""Does a projector personalise? Measure it against controls and baselines on held-out pairs."""

from __future__ import annotations

import argparse
import importlib.util
from typing import TYPE_CHECKING

from e2p_ray.config import EvaluateConfig
from e2p_ray.errors import ConfigError, ObjectNotFoundError
from e2p_ray.storage import Storage
from jobs.cli import Job, main
from jobs.steps import say

if TYPE_CHECKING:
    from e2p_ray.downstream.evaluation import Evaluation

RESULT_FILE = "evaluation.json"
PAGE_FILE = "report.html"


def evaluate(config: EvaluateConfig, options: argparse.Namespace) -> None:
    """Evaluate and print the table."""
    run_evaluation(config)


def run_evaluation(config: EvaluateConfig) -> Evaluation:
    """Evaluate, print the table, write evaluation.json and report.html."""
    require_extra(config)
    from e2p_ray.downstream.pages.comparison import render_comparison
    from e2p_ray.downstream.pages.evaluation_page import render_evaluation
    from e2p_ray.evaluate import evaluate as run  # torch: only once the configuration has been read

    storage = Storage(config.storage)
    others = {name: read_evaluation(storage, uri) for name, uri in config.compare.items()}
    found = run(config, storage, say)
    uri = config.output.uri
    try:
        storage.write_bytes(f"{uri}/{RESULT_FILE}", found.to_json().encode())
    finally:  # should one of the two fail, it was not for nothing
        print(found.lines())
    storage.write_bytes(f"{uri}/{PAGE_FILE}", render_evaluation(found).encode())
    if others:
        storage.write_bytes(f"{uri}/comparison.html", render_comparison({"this one": found} | others).encode())
        print(f"side by side with {', '.join(others)}: {uri}/comparison.html")
    print(f"the page: {uri}/{PAGE_FILE}")
    return found


def require_extra(config: EvaluateConfig) -> None:
    """ConfigError without the packages that evaluation alone needs, and LoRA where it is asked for."""
    needed = ["rouge_score", "sacrebleu"]
    if any(method.startswith("lora") for method in config.evaluation.methods):
        needed.append("peft")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"evaluation needs {', '.join(missing)}. Install the extra: pip install 'e2p_ray[evaluate]'")


def read_evaluation(storage: Storage, uri: str) -> Evaluation:
    """An earlier evaluation's result. Raises ConfigError when there is none."""
    from e2p_ray.downstream.evaluation import Evaluation

    try:
        return Evaluation.from_json(storage.read_bytes(f"{uri}/{RESULT_FILE}").decode())
    except ObjectNotFoundError as error:
        raise ConfigError(f"compare: {uri} holds no {RESULT_FILE}. Give the output of an earlier evaluation") from error
    except ValueError as error:
        raise ConfigError(f"compare: {uri}/{RESULT_FILE} cannot be read: {error}") from error


JOB = Job(
    prog="jobs.evaluate",
    description="Score held-out texts under the right user's soft token and under controls (another user's, the mean\n"
    "user's, none, a constant learned one) and baselines; write texts, rank, look for the right user, drift.\n"
    "Prints a table; writes evaluation.json and report.html. Nothing is published.",
    config=EvaluateConfig,
    call=evaluate,
    on_interrupt="interrupted. Nothing is kept; run the same command again and it starts anew",
)


if __name__ == "__main__":
    main(JOB)

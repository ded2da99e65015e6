"""Does it personalise on real data? Train and evaluate projectors for one real task in several layouts, side by side.

    python -m tests.real.measure pens --output DIR            # the default layout with every baseline
    python -m tests.real.measure pens --output DIR --variants all --steps 150

Every variant is a real `jobs.train` and a real `jobs.evaluate` on the same tables and the same held-out pairs. What is
finished is not done again: run the same command to go on. Nothing of the data, nor weights trained on it, may be kept
in the repository: DIR must lie outside.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from e2p_ray.config import EvaluateConfig, TrainConfig
from e2p_ray.downstream.evaluation import Evaluation
from e2p_ray.downstream.pages.comparison import comparison_lines, render_comparison
from e2p_ray.storage import Storage
from jobs.evaluate import RESULT_FILE, read_evaluation, run_evaluation
from jobs.train import train_projector
from tests.real.data import FOLDER
from tests.real.task import WRITERS, RealTask

BASE_MODEL = FOLDER / "models" / "news-lm-6m"
BASELINES = ("profile_text", "profile_text_constant", "prefix_tuning", "lora", "lora_profile_text")


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to place and size the soft token."""

    name: str
    layout: str = "content_first"
    cue: str = "before"
    num_soft_tokens: int = 1


VARIANTS = (
    Variant("soft last"),
    Variant("cue after", cue="after"),
    Variant("soft first", layout="soft_first"),
    Variant("2 soft tokens", num_soft_tokens=2),
    Variant("4 soft tokens", num_soft_tokens=4),
)


@dataclass(frozen=True, slots=True)
class Size:
    """How much is trained and measured."""

    num_steps: int
    contents_per_step: int
    learning_rate: float
    max_targets: int
    baselines: tuple[str, ...] = BASELINES


def configs(task: RealTask, variant: Variant, size: Size, output: Path, *, full: bool) -> tuple[TrainConfig, Any]:
    """The two jobs' configurations of one variant; only a `full` one has baselines, texts, retrieval and drift."""
    template = {"content": task.template["content"], f"cue_{variant.cue}": task.template["cue_before"]}
    common: dict[str, Any] = {
        "base_model": {"uri": str(BASE_MODEL)},
        "tasks": {
            task.task: {
                "prompts": {task.language: template},
                "sampling": {"max_new_tokens": 24, "repetition_penalty": 1.2},
                "max_content_tokens": 192,
            }
        },
    }
    training = {
        "num_steps": size.num_steps,
        "contents_per_step": size.contents_per_step,
        "learning_rate": size.learning_rate,
        "warmup_steps": 10,
        "validate_every": size.num_steps,
        "validation_share": 0.0,  # a full one has validation targets of its own
        "max_target_tokens": 40,
        "target_prefix": {task.language: task.target_prefix},
    }
    tables = {name: task.uri(name) for name in ("users", "contents")}
    place = output / task.name / variant.name.replace(" ", "-")
    train = {
        **common,
        "inputs": {
            "users_uri": tables["users"],
            "contents_uri": tables["contents"],
            "targets_uri": task.uri("targets_train"),
            "validation_uri": task.uri("targets_validation") if full else None,
        },
        "output": {"uri": str(place / "training")},
        "projector": {"layout": variant.layout, "num_soft_tokens": variant.num_soft_tokens},
        "training": training,
    }
    evaluation: dict[str, Any] = {"max_targets": size.max_targets}
    more: dict[str, str] = {}
    if full:
        evaluation |= {"methods": size.baselines, "num_retrieval_texts": 100, "num_written": 100}
        more = {"later_users_uri": task.uri("users_later"), "refit_users_uri": task.uri("users_refit")}
        if task.num_impressions:
            more["impressions_uri"] = task.uri("impressions")
    else:
        evaluation |= {"num_retrieval_texts": 0, "num_written": 0, "noise": ()}
    measured = {
        **common,
        "inputs": {
            "users_uri": tables["users"],
            "contents_uri": tables["contents"],
            "targets_uri": task.uri("targets_test"),
            "training_targets_uri": task.uri("targets_train"),
            **more,
        },
        "output": {"uri": str(place / "evaluation")},
        "projector": {"uri": str(place / "training" / "projector")},
        "evaluation": evaluation,
        "engine": {"num_threads": 1},
    }
    return TrainConfig.model_validate(train), EvaluateConfig.model_validate(measured)


def written(name: str, folder: Path) -> RealTask:
    """The tables of a task: written once, since a rewritten file is another training."""
    record = folder / "task.json"
    if record.exists():
        return TypeAdapter(RealTask).validate_json(record.read_text("utf-8"))
    task = WRITERS[name](FOLDER / "data", folder)
    record.write_bytes(TypeAdapter(RealTask).dump_json(task))
    return task


def measure(task: RealTask, variant: Variant, size: Size, output: Path, *, full: bool) -> Evaluation:
    """Train and evaluate one variant, or read what an earlier call left."""
    storage = Storage()
    train, measured = configs(task, variant, size, output, full=full)
    if not storage.exists(f"{measured.output.uri}/{RESULT_FILE}"):
        for name, config in (("train", train), ("evaluate", measured)):
            path = output / task.name / f"{variant.name.replace(' ', '-')}-{name}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(yaml.safe_dump(config.resolved(), allow_unicode=True), "utf-8")
        started = time.perf_counter()
        train_projector(train)
        trained = time.perf_counter()
        run_evaluation(measured)
        print(
            f"{task.name}, {variant.name}: trained in {trained - started:.0f} s, evaluated in "
            f"{time.perf_counter() - trained:.0f} s",
            flush=True,
        )
    return read_evaluation(storage, measured.output.uri)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(WRITERS))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--variants", default="soft last", help="names with commas between, or all")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--contents", type=int, default=16, help="contents a step")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate")
    parser.add_argument("--targets", type=int, default=1500, help="held-out targets")
    parser.add_argument("--plain", action="store_true", help="no baselines, texts, retrieval and drift")
    parser.add_argument("--baselines", nargs="*", default=BASELINES, choices=BASELINES)
    options = parser.parse_args()
    chosen = [v for v in VARIANTS if options.variants == "all" or v.name in options.variants.split(",")]
    task = written(options.task, options.output / options.task / "tables")
    print(task.describe(), flush=True)
    size = Size(options.steps, options.contents, options.rate, options.targets, tuple(options.baselines))
    found = {
        v.name: measure(task, v, size, options.output, full=v == VARIANTS[0] and not options.plain) for v in chosen
    }
    if len(found) > 1:
        page = options.output / options.task / "comparison.html"
        page.write_text(render_comparison(found), "utf-8")
        print(comparison_lines(found))
        print(page)


if __name__ == "__main__":
    main()

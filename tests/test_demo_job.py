"""jobs.demo from nothing to the printed report, and the bar: the demo's projector personalises in both languages."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml
from deltalake import DeltaTable

from e2p_ray.config import Config, EvaluateConfig, TrainConfig, load_config
from e2p_ray.demo import configs, world
from e2p_ray.demo.newsroom import LANGUAGES
from jobs import demo
from jobs.evaluate import run_evaluation
from jobs.train import train_projector

BASE_MODEL = Path(os.environ.get("E2P_TEST_BASE_MODEL", configs.BASE_MODEL))
C = TypeVar("C", bound=Config)

SMALL = ["--gates.max_fallback_share", "1", "--gates.max_same_text_share", "1", "--plan.requests_per_shard", "150"]
QUICK = {"num_retrieval_texts": 0, "num_written": 0, "noise": []}
needs_base_model = pytest.mark.skipif(
    not (BASE_MODEL / "model.safetensors").is_file(), reason="the demo's base model is not there"
)


def _write_small(folder: Path, *, world: Path, train: dict[str, Any], evaluation: dict[str, Any]) -> configs.JobFiles:
    found = configs.write_configs(folder, world=world, base_model=BASE_MODEL)
    for path, section, changes in ((found.train, "training", train), (found.evaluate, "evaluation", evaluation)):
        values = yaml.safe_load(path.read_text("utf-8"))
        values[section] |= changes
        path.write_text(yaml.safe_dump(values, allow_unicode=True), "utf-8")
    return found


def _read(model: type[C], path: Path) -> C:
    return load_config(model, ["--config", str(path)], prog="test", description="")


@needs_base_model
def test_demo_from_nothing_and_again(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "write_world", partial(world.write_world, num_users=80, num_contents=8))
    small = partial(_write_small, train={"num_steps": 3}, evaluation=QUICK | {"max_targets": 40})
    monkeypatch.setattr(demo, "write_configs", small)
    folder = tmp_path / "demo-run"
    assert demo.main(["--folder", str(folder), *SMALL]) == 0
    shown = capsys.readouterr()
    accuracies = shown.out.split("right reader")[1].splitlines()[1:5]
    assert [line.split()[:2] for line in accuracies] == [
        [task, language] for task in ("explanation", "headline") for language in ("en", "ja")
    ]
    assert "published: " in shown.out
    assert "constant token" in shown.out
    assert "[5/5]" in shown.err
    table = DeltaTable(str(folder / "output" / "generations")).to_pyarrow_table()
    assert set(table["task"].to_pylist()) == {"headline", "explanation"}
    assert len(list((folder / "output" / "runs").glob("*/report.html"))) == 1

    assert demo.main(["--folder", str(folder), *SMALL]) == 0
    again = capsys.readouterr()
    assert "is finished" in again.err
    assert "constant token" in again.out
    assert DeltaTable(str(folder / "output" / "generations")).version() == 0


@needs_base_model
@pytest.mark.timeout(600)
def test_the_right_reader_beats_every_control_in_both_languages(tmp_path: Path, ray_cluster: None) -> None:
    """By intervals that do not meet, though trained for half as long as the demo and on half as many readers."""
    world.write_world(tmp_path / "world", num_users=500)
    found = _write_small(
        tmp_path,
        world=tmp_path / "world",
        train={"num_steps": 90, "validate_every": 90},
        evaluation=QUICK | {"max_targets": 500},
    )
    assert train_projector(_read(TrainConfig, found.train)) is not None
    evaluation = run_evaluation(_read(EvaluateConfig, found.evaluate))
    assert evaluation.languages == tuple(sorted(LANGUAGES))
    for language in evaluation.languages:
        right = evaluation.score("right", language)
        assert right is not None
        for method in ("shuffled", "mean", "constant"):
            control = evaluation.score(method, language)
            assert control is not None
            assert right.nll_per_token.high < control.nll_per_token.low, (language, method)


def test_options_of_the_configuration_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.yaml").write_text("{}", encoding="utf-8")
    assert demo.main(["--folder", str(tmp_path), "--gates.nothing", "1"]) == 2
    assert "gates.nothing: unknown key" in capsys.readouterr().err

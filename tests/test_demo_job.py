"""jobs.demo from nothing to the printed report, and the bar: the demo's projector personalises in both languages."""

from __future__ import annotations

import contextlib
import io
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
import yaml
from deltalake import DeltaTable, write_deltalake

from e2p_ray.demo import configs, world
from e2p_ray.demo.newsroom import LANGUAGES
from e2p_ray.storage import Storage
from jobs import demo
from jobs.evaluate import read_evaluation
from tests.s3 import S3Server
from tests.small_job import write_small_job

BASE_MODEL = Path(os.environ.get("E2P_TEST_BASE_MODEL", configs.BASE_MODEL))
NUM_SERVED = 40  # readers who get recommendations: four articles each, with two tasks

SMALL = ["--gates.max_fallback_share", "1", "--gates.max_same_text_share", "1", "--plan.requests_per_shard", "150"]
# Half of the demo's steps and less than half of its readers.
TRAINING = {"num_steps": 60, "validate_every": 60}
EVALUATION = {"num_retrieval_texts": 0, "num_written": 0, "noise": [], "max_targets": 400}
needs_base_model = pytest.mark.skipif(
    not (BASE_MODEL / "model.safetensors").is_file(), reason="the demo's base model is not there"
)


@dataclass(frozen=True)
class Shown:
    """What a call of the demo printed, and where it wrote."""

    folder: Path
    out: str
    err: str

    @property
    def table(self) -> DeltaTable:
        return DeltaTable(str(self.folder / "output" / "generations"))


def _small_world(folder: Path, *, seed: int) -> world.World:
    made = world.write_world(folder, seed=seed, num_users=400, num_contents=40)
    path = folder / "candidates.parquet"
    candidates = pl.read_parquet(path)
    served = candidates["user_id"].unique(maintain_order=True).head(NUM_SERVED)
    candidates.filter(pl.col("user_id").is_in(served.implode())).write_parquet(path)
    return made


def _small_configs(folder: Path, *, world: Path) -> configs.JobFiles:
    found = configs.write_configs(folder, world=world, base_model=BASE_MODEL)
    changes: dict[Path, tuple[str, dict[str, Any]]] = {
        found.train: ("training", TRAINING),
        found.evaluate: ("evaluation", EVALUATION),
    }
    for path, (section, values) in changes.items():
        config = yaml.safe_load(path.read_text("utf-8"))
        config[section] |= values
        path.write_text(yaml.safe_dump(config, allow_unicode=True), "utf-8")
    return found


def _demo(folder: Path) -> Shown:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = demo.main(["--folder", str(folder), *SMALL])
    assert code == 0, err.getvalue()
    return Shown(folder, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def shown(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """A smaller demo, from nothing, in a folder that is given as people may give it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "write_world", _small_world)
        patch.setattr(demo, "write_configs", _small_configs)
        patch.chdir(tmp_path_factory.mktemp("demo"))
        shown = _demo(Path("demo: run 1"))
        return replace(shown, folder=shown.folder.absolute())


@needs_base_model
@pytest.mark.timeout(600)
def test_demo_from_nothing(shown: Shown) -> None:
    accuracies = shown.out.split("right reader")[1].splitlines()[1:5]
    assert [line.split()[:2] for line in accuracies] == [
        [task, language] for task in ("explanation", "headline") for language in ("en", "ja")
    ]
    assert "published: " in shown.out
    assert "constant token" in shown.out
    assert "[5/5]" in shown.err
    table = shown.table.to_pyarrow_table()
    assert set(table["task"].to_pylist()) == {"headline", "explanation"}
    assert len(set(table["user_id"].to_pylist())) == NUM_SERVED
    assert len(list((shown.folder / "output" / "runs").glob("*/report.html"))) == 1
    places = yaml.safe_load((shown.folder / "job.yaml").read_text("utf-8"))["inputs"].values()
    assert {Path(place).parent for place in places} == {shown.folder / "world"}, "good from any working directory"


@needs_base_model
def test_the_right_reader_beats_every_control_in_both_languages(shown: Shown) -> None:
    """By intervals that do not meet, on articles that nothing was trained on."""
    evaluation = read_evaluation(Storage(), str(shown.folder / "evaluation"))
    assert evaluation.languages == tuple(sorted(LANGUAGES))
    for language in evaluation.languages:
        right = evaluation.score("right", language)
        assert right is not None
        for method in ("shuffled", "mean", "constant"):
            control = evaluation.score(method, language)
            assert control is not None
            assert right.nll_per_token.high < control.nll_per_token.low, (language, method)


@needs_base_model
def test_the_same_again_does_nothing_again(shown: Shown) -> None:
    again = _demo(shown.folder)
    assert "is finished" in again.err
    assert "constant token" in again.out
    assert "trains the constant token" not in again.err
    assert "trains the constant token" in shown.err, "control: this is how it is said"
    assert again.table.version() == 0


def test_the_published_table_may_be_on_s3(s3_server: S3Server, tmp_path: Path) -> None:
    config, _ = write_small_job(tmp_path, place=s3_server.new_bucket(), storage=s3_server.config)
    uri, rows = config.output.table_uri, pa.table({"task": ["headline"]})
    write_deltalake(uri, rows, storage_options=Storage(config.storage).delta_options(uri))
    assert demo._published(config).to_pylist() == rows.to_pylist()


def test_options_of_the_configuration_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.yaml").write_text("{}", encoding="utf-8")
    assert demo.main(["--folder", str(tmp_path), "--gates.nothing", "1"]) == 2
    assert "gates.nothing: unknown key" in capsys.readouterr().err

"""jobs.demo from nothing to the printed report, on a smaller newsroom and with a projector that has learned little."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
from deltalake import DeltaTable

from e2p_ray.demo import project, world
from jobs import demo

BASE_MODEL = Path(os.environ.get("E2P_TEST_BASE_MODEL", project.BASE_MODEL))
SMALL = ["--gates.max_fallback_share", "1", "--gates.max_same_text_share", "1", "--plan.requests_per_shard", "150"]


@pytest.mark.skipif(not (BASE_MODEL / "model.safetensors").is_file(), reason="the demo's base model is not there")
def test_demo_from_nothing_and_again(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "write_world", partial(world.write_world, num_users=80, num_contents=8))
    monkeypatch.setattr(
        demo, "train_demo_projector", partial(project.train_demo_projector, num_steps=3, base_model=BASE_MODEL)
    )
    monkeypatch.setattr(demo, "write_job", partial(project.write_job, base_model=BASE_MODEL))
    folder = tmp_path / "demo-run"
    assert demo.main(["--folder", str(folder), *SMALL]) == 0
    shown = capsys.readouterr()
    accuracies = shown.out.split("right reader")[1].splitlines()[1:5]
    assert [line.split()[:2] for line in accuracies] == [
        [task, language] for task in ("explanation", "headline") for language in ("en", "ja")
    ]
    assert "published: " in shown.out
    assert "[4/4]" in shown.err
    table = DeltaTable(str(folder / "output" / "generations")).to_pyarrow_table()
    assert set(table["task"].to_pylist()) == {"headline", "explanation"}
    assert len(list((folder / "output" / "runs").glob("*/report.html"))) == 1

    assert demo.main(["--folder", str(folder), *SMALL]) == 0
    again = capsys.readouterr()
    assert "are in" in again.err
    assert DeltaTable(str(folder / "output" / "generations")).version() == 0


def test_options_of_the_configuration_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.yaml").write_text("{}", encoding="utf-8")
    assert demo.main(["--folder", str(tmp_path), "--gates.nothing", "1"]) == 2
    assert "gates.nothing: unknown key" in capsys.readouterr().err

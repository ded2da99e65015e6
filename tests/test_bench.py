"""The benches still run, and still measure: each on a model so small that its figures mean nothing."""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.bench
from e2p_ray.engine.drafts import Drafts, RowDraft, Told
from e2p_ray.engine.model import BaseModel
from tests.bench import backfill, decode, peers, serve_site, train, workloads
from tests.bench.peers_start import save_model
from tests.bench.peers_torch import SYSTEMS, Setting
from tests.bench.workloads import Case, ModelSize
from tests.test_imports import danger_problems
from tests.tiny_models import random_model

MODULES = [module.name for module in pkgutil.iter_modules(tests.bench.__path__)]
TINY = ModelSize(64, 128, 2, 4, 2)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The benches' model with weights so large that it is as lively as theirs; they may set the threads."""
    monkeypatch.setitem(workloads.MODEL_SIZES, "30m", TINY)
    monkeypatch.setattr(backfill, "_WEIGHTS_STD", 0.3)
    monkeypatch.setattr(decode, "LIVELY", 0.3)
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def results_of(
    bench: Any, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[dict[str, Any]]:
    """What `python -m tests.bench.<name>` says in its last line."""
    monkeypatch.setattr(sys, "argv", [bench.__name__, *arguments])
    bench.main()
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["bench"] == bench.__name__.rpartition(".")[2]
    results: list[dict[str, Any]] = found["results"]
    return results


@pytest.mark.parametrize("name", MODULES)
def test_every_bench_is_imported_without_work(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"tests.bench.{name}")
    assert capsys.readouterr().out == ""
    assert not danger_problems(Path(name), Path(str(module.__file__)).read_text(encoding="utf-8"))
    assert len(MODULES) > 15


class TestBackfill:
    @pytest.fixture(autouse=True)
    def short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backfill, "ROWS_PER_CALL", (1, 4))
        monkeypatch.setattr(backfill, "NEW_TOKENS", 12)

    def test_drafts_are_accepted_where_texts_stay_the_same(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lines = results_of(backfill, ["--rows", "20", "--repeats", "1"], monkeypatch, capsys)
        lines = [line for line in lines if line["system"] == "drafts"]
        alone = {line["case"]: line for line in lines if line["rows_per_call"] == 1}
        assert [line["equal_to_full"] for line in lines] == [1.0] * 6
        assert [line["same_texts"] for line in alone.values()][:2] == [0.8, 1.0]
        assert alone["unchanged0"]["same_texts"] < 0.5
        assert alone["unchanged100"]["accepted"] > 0.7
        assert 0.3 < alone["unchanged80"]["accepted"] < alone["unchanged100"]["accepted"]

    def test_it_measures_the_compiled_loops_where_there_are_any(self) -> None:
        base = backfill.base_of_letters(TINY, torch.float32)
        plain = BaseModel(random_model(workloads.llama(TINY)))
        plain.pack()
        assert (base.greedy is None) == (plain.greedy is None)
        assert type(base) is BaseModel

    def test_it_refuses_where_no_draft_is_accepted(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(Drafts, "of", lambda _, rows: [RowDraft([], Told(), None) for _ in rows])
        with pytest.raises(SystemExit, match=r"unchanged80: none of 0 draft tokens accepted"):
            results_of(backfill, ["--rows", "8", "--quick"], monkeypatch, capsys)
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["bench"] == "backfill", "the figures all the same"

    def test_it_refuses_other_texts(self) -> None:
        line = {"system": "drafts", "case": "c", "rows_per_call": 4, "draft_tokens": 9, "same_texts": 0.8}
        assert backfill.problems_of([line | {"equal_to_full": 1.0, "accepted": 0.5}]) == []
        (problem,) = backfill.problems_of([line | {"equal_to_full": 0.9, "accepted": 0.5}])
        assert "10.0% of the texts differ" in problem

    def test_it_refuses_texts_that_are_not_their_tokens(self) -> None:
        base = BaseModel(random_model(workloads.llama(TINY, 0.3)))
        with pytest.raises(AssertionError, match="not its own tokens"):
            backfill.measure(base, 4, 1, 0.8, 1)


def test_decode_compares_with_hf(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(decode, "CASES", (Case(2, 16, 24, 4),))
    theirs, ours = results_of(decode, ["--quick"], monkeypatch, capsys)
    assert ours["equal_texts"] == 1.0
    assert ours["ratio"] == pytest.approx(ours["rows_per_s"] / theirs["rows_per_s"])


def test_peers_write_the_same_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.bench.peers_start.LIVELY", 0.3)
    setting = Setting(Case(2, 32, 24, 4), tmp_path, torch.float32, save_model(tmp_path), 64, 64, 1)
    answers = {name: SYSTEMS[name](setting)()() for name in ("hf_generate", "hf_cache_copy", "e2p_ray")}
    texts = {name: peers.texts_by_row(answer) for name, answer in answers.items()}
    assert {len(written) for written in texts.values()} == {64}
    assert peers.equal_share(texts["e2p_ray"], texts["hf_generate"]) == 1.0
    assert peers.equal_share(texts["hf_cache_copy"], texts["hf_generate"]) == 1.0
    assert peers.distinct(texts["e2p_ray"]) > 0.5


def test_train_compares_losses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(train, "CASES", (train.Case(4, 24, 2),))
    plain, *ours = results_of(train, ["--quick"], monkeypatch, capsys)
    assert plain["ratio"] == 1.0
    assert [line["system"] for line in ours] == ["e2p_ray", "e2p_ray, kept prefixes"]


def test_a_service_has_texts_to_serve(tmp_path: Path) -> None:
    bench = serve_site.write_bench(tmp_path, 2)
    assert len(bench.content_ids) == 2
    assert len(bench.published_ids) == serve_site.NUM_PUBLISHED_CONTENTS

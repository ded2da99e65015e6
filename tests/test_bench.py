"""The benches still run, and still measure: each on a model so small that its figures mean nothing."""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

import tests.bench
from e2p_ray.engine import decode as decoder
from e2p_ray.engine import teaching
from e2p_ray.engine.drafts import Drafts, RowDraft
from e2p_ray.engine.engine import Engine
from e2p_ray.engine.greedy import GreedyHead, Likeliest
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.projector import Projector
from e2p_ray.engine.told import Told
from e2p_ray.schema import Group, RequestKey
from tests.bench import backfill, decode, harness, peers, serve_site, train, update, workloads
from tests.bench.peers_start import save_model
from tests.bench.peers_torch import SYSTEMS, Setting
from tests.bench.workloads import Case, ModelSize
from tests.test_imports import danger_problems
from tests.tiny_models import EMBEDDING_DIM, pass_cost, random_model

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
        # Every guess is tried, however many rows a call and whatever else this machine does.
        monkeypatch.setattr(decoder, "measure_pass_cost", lambda base: pass_cost(1024))
        lines = results_of(backfill, ["--rows", "20", "--repeats", "1"], monkeypatch, capsys)
        lines = [line for line in lines if line["system"] == "drafts"]
        assert [line["equal_to_full"] for line in lines] == [1.0] * 10
        for rows_per_call, same_texts in ((1, 0.8), (4, 0.75)):
            found = {line["case"].split()[0]: line for line in lines if line["rows_per_call"] == rows_per_call}
            assert found["unchanged80"]["same_texts"] == same_texts
            assert found["unchanged100"]["same_texts"] == 1.0
            assert found["unchanged0"]["same_texts"] < 0.5
            accepted = [found[f"unchanged{share}"]["accepted"] for share in (0, 80, 100)]
            assert accepted[0] < accepted[1] < accepted[2]
            assert accepted[1] > 0.3
            assert accepted[2] > 0.7
            assert all(line["draft_tokens"] > 0 for line in found.values())
            assert 0.75 < found["kept80"]["same_texts"] < 0.95
            assert found["kept80"]["accepted"] > 0.3
            assert found["first"]["same_texts"] > 0.7
            assert found["first"]["accepted"] > 0.5

    def test_it_measures_the_compiled_loops_where_there_are_any(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(decoder, "measure_pass_cost", lambda base: pass_cost(1024))
        base, used = backfill.base_of_letters(TINY, torch.float32), set[str]()
        plain_logits, plain_head = BaseModel.logits, GreedyHead.__call__

        def logits(self: BaseModel, hidden: Tensor) -> Tensor:
            used.add("logits")
            return plain_logits(self, hidden)

        def head(self: GreedyHead, hidden: Tensor, max_rows: int) -> Likeliest:
            used.add("greedy head")
            return plain_head(self, hidden, max_rows)

        monkeypatch.setattr(BaseModel, "logits", logits)
        monkeypatch.setattr(GreedyHead, "__call__", head)
        backfill.measure(base, 4, 4, 0.8, 1)
        plain = BaseModel(random_model(workloads.llama(TINY)))
        plain.pack()
        assert (type(base.fused), type(base.greedy)) == (type(plain.fused), type(plain.greedy))
        assert used == {"logits" if plain.greedy is None else "greedy head"}

    def test_it_refuses_where_no_draft_is_accepted(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(Drafts, "of", lambda _, rows, num_running: [RowDraft([], Told(), None) for _ in rows])
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
    texts, plain = dict[RequestKey, str](), decode.run_engine

    def watched(engine: Engine, groups: list[Group]) -> tuple[float, dict[RequestKey, str]]:
        rate, found = plain(engine, groups)
        texts.update(found)
        return rate, found

    monkeypatch.setattr(decode, "run_engine", watched)
    theirs, ours = results_of(decode, ["--quick"], monkeypatch, capsys)
    assert ours["equal_texts"] == 1.0
    assert len(set(texts.values())) > 0.5 * len(texts) == 16, "else that would say nothing"
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
    for line in ours:
        assert float(line["loss_difference"]) < train.MAX_LOSS_DIFFERENCE
        assert line["ratio"] == pytest.approx(line["rows_per_s"] / plain["rows_per_s"])


def test_train_refuses_other_losses_and_losses_that_no_user_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_losses, plain_projector = teaching.row_losses, train.projector_of

    def measured() -> list[dict[str, Any]]:
        return train.measure(train.Case(4, 24, 2), num_repeats=1, plain_rows=4)

    with monkeypatch.context() as patch:
        patch.setattr(train, "row_losses", lambda *arguments: 1.001 * plain_losses(*arguments))
        with pytest.raises(AssertionError, match="the two systems disagree by 1"):
            measured()

    def telling_nothing(*arguments: Any) -> Projector:
        projector = plain_projector(*arguments)
        for parameter in projector.parameters():
            torch.nn.init.zeros_(parameter)
        return projector

    monkeypatch.setattr(train, "projector_of", telling_nothing)
    with pytest.raises(AssertionError, match="the control must differ"):
        measured()


def test_update_changes_what_it_says_and_refuses_other_writes(tmp_path: Path) -> None:
    uris = {name: str(tmp_path / f"{name}.parquet") for name in ("users", "contents")}
    vectors = np.arange(300 * EMBEDDING_DIM, dtype=np.float32).reshape(300, EMBEDDING_DIM)
    users = pl.DataFrame({"user_id": [str(at) for at in range(300)], "embedding": vectors})
    contents = pl.DataFrame({"content_id": ["a", "b"], "body": ["one body", "another"]})
    users.write_parquet(uris["users"])
    contents.write_parquet(uris["contents"])
    num_changed = update.change_users(uris["users"])
    found = pl.read_parquet(uris["users"])
    assert found["user_id"].equals(users["user_id"])
    assert (
        sum(one != other for one, other in zip(found["embedding"].to_list(), vectors.tolist(), strict=True))
        == num_changed
        == 3
    )
    update.change_content(uris["contents"])
    assert pl.read_parquet(uris["contents"])["body"].to_list() == ["ydob eno", "another"]
    lines = [{"system": "one", "written": 5, "changed": 5}, {"system": "other", "written": 4, "changed": 5}]
    assert update.problems_of(lines) == ["other: 4 requests written, 5 changed"]


def test_systems_take_turns_there_and_back_and_their_medians_count(capsys: pytest.CaptureFixture[str]) -> None:
    order, figures = list[str](), {"a": [1.0, 9.0, 2.0], "b": [5.0, 4.0, 30.0]}

    def run(name: str) -> float:
        order.append(name)
        return figures[name][order.count(name) - 1]

    assert harness.interleaved("8x64", {name: partial(run, name) for name in "ab"}, 3) == {"a": 2.0, "b": 5.0}
    assert "".join(order) == "abbaab"
    # A bench that is stopped has said what it measured until then.
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 6
    assert told[2] == "8x64, b: 4.00 rows/s (run 2 of 3)"


def test_a_service_has_texts_to_serve(tmp_path: Path) -> None:
    bench = serve_site.write_bench(tmp_path, 2)
    assert len(bench.content_ids) == 2
    assert len(bench.published_ids) == serve_site.NUM_PUBLISHED_CONTENTS

"""The real engine runs out of memory, or its model gives NaN: only those requests are lost, and nothing is made up."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from deltalake import DeltaTable

import jobs.whole_run
from e2p_ray.config import JobConfig
from e2p_ray.engine.decode import Decoder, is_out_of_memory
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.rows_step import RowsStep
from e2p_ray.storage import Storage
from jobs.whole_run import generate_run
from tests.chaos.conservation import Key, assert_conserved
from tests.chaos.real_job import batch_here, write_real_job
from tests.s3 import IS_LONG
from tests.test_jobs import expected_keys
from tests.tiny_models import choose_by_logits, write_letters_only

Rows = dict[Key, tuple[object, ...]]


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    write_letters_only(monkeypatch)
    monkeypatch.setattr(jobs.whole_run, "run_batch", batch_here)


def rows_of(config: JobConfig) -> Rows:
    """Everything of the published rows but when they were written and how surely: sums in other orders differ."""
    rows = DeltaTable(config.output.table_uri).to_pyarrow_table().drop_columns(["generated_at", "mean_logprob"])
    return {(r["user_id"], r["content_id"], r["task"]): tuple(r.values()) for r in rows.to_pylist()}


def dead_letters(config: JobConfig, run_id: str) -> dict[Key, str]:
    storage = Storage(config.storage)
    tables = (
        storage.read_table(i.uri) for i in storage.list_objects(f"{config.output.uri}/runs/{run_id}/dead_letters")
    )
    return {(r["user_id"], r["content_id"], r["task"]): r["error_code"] for t in tables for r in t.to_pylist()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    with pytest.MonkeyPatch.context() as patch:
        write_letters_only(patch)
        patch.setattr(jobs.whole_run, "run_batch", batch_here)
        config = write_real_job(tmp_path_factory.mktemp("undisturbed"))
        report = generate_run(config)
        assert_conserved(config, expected_keys(20))
        rows = rows_of(config)
    assert not dead_letters(config, report.run_id)
    statuses = Counter(status for *_, status in ((row[4],) for row in rows.values()))
    assert statuses["ok"] > 60, "texts that depend on the user"
    assert len({row[3] for row in rows.values()}) > 60
    return rows


@pytest.mark.parametrize("max_tokens", [1, 5, 20] if IS_LONG else [5])
def test_out_of_memory_above_some_rows_loses_nothing(
    max_tokens: int, undisturbed: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, thrown = BaseModel.hidden, Counter[str]()

    def limited(self: BaseModel, inputs_embeds: Any, position_ids: Any, step: Any) -> Any:
        if isinstance(step, RowsStep) and inputs_embeds.shape[1] > max_tokens:
            thrown["oom"] += 1
            raise torch.OutOfMemoryError("CUDA out of memory (made by the test)")
        return plain(self, inputs_embeds, position_ids, step)

    monkeypatch.setattr(BaseModel, "hidden", limited)
    config = write_real_job(tmp_path)
    report = generate_run(config)
    assert thrown["oom"] >= 3, "the control: waves were halved"
    assert not dead_letters(config, report.run_id)
    assert_conserved(config, expected_keys(20))
    assert rows_of(config) == undisturbed


def chosen_keys(undisturbed: Rows, seed: int, number: int) -> set[Key]:
    """Some requests whose text was the user's own."""
    personal = sorted(key for key, row in undisturbed.items() if row[6])
    return set(random.Random(seed).sample(personal, number))


def assert_only_these_are_lost(config: JobConfig, run_id: str, lost: set[Key], code: str, undisturbed: Rows) -> None:
    assert dead_letters(config, run_id) == dict.fromkeys(lost, code)
    assert assert_conserved(config, expected_keys(20)).num_dead_letters == len(lost)
    assert rows_of(config) == {key: row for key, row in undisturbed.items() if key not in lost}


@pytest.mark.parametrize("seed", range(5 if IS_LONG else 1))
def test_a_row_that_alone_does_not_fit_is_a_dead_letter(
    seed: int, undisturbed: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, plain = chosen_keys(undisturbed, seed, 3), Decoder._enter

    def limited(self: Decoder, wave: Any, rows: Any, prefixes: Any) -> None:
        if any(tuple(row.key) in lost for row in rows):
            raise MemoryError("made by the test")
        plain(self, wave, rows, prefixes)

    monkeypatch.setattr(Decoder, "_enter", limited)
    config = write_real_job(tmp_path)
    report = generate_run(config)
    assert_only_these_are_lost(config, report.run_id, lost, "out_of_memory", undisturbed)


@pytest.mark.parametrize("seed", range(5 if IS_LONG else 1))
def test_nothing_is_published_from_logits_that_are_not_finite(
    seed: int, undisturbed: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, plain = chosen_keys(undisturbed, seed, 6), Decoder._pick
    rng, num_bad = random.Random(seed), Counter[Key]()
    steps = {key: rng.randrange(3) for key in sorted(lost)}

    def poisoned(self: Decoder, wave: Any, slots: Any, written: Any, num_written: Any, logits: Any) -> Any:
        for at, (slot, step) in enumerate(zip(slots, num_written, strict=True)):
            key = tuple(wave.rows[slot].key)
            if key in lost and step >= steps[key]:
                num_bad[key] += 1
                logits = logits.clone()
                logits[at, 100 + steps[key]] = (float("nan"), float("inf"), float("-inf"))[steps[key]] or 0
                logits[at, 17] = float("nan")
        return plain(self, wave, slots, written, num_written, logits)

    choose_by_logits(monkeypatch)
    monkeypatch.setattr(Decoder, "_pick", poisoned)
    config = write_real_job(tmp_path)
    report = generate_run(config)
    hit = set(num_bad)
    assert len(hit) >= 4, "the control: logits were poisoned; a text may end before its step comes"
    assert_only_these_are_lost(config, report.run_id, hit, "non_finite_logits", undisturbed)


def test_control_the_check_sees_another_text(
    undisturbed: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose_by_logits(monkeypatch)
    plain = BaseModel.logits
    monkeypatch.setattr(BaseModel, "logits", lambda self, hidden: plain(self, hidden).roll(1, dims=1))
    config = write_real_job(tmp_path)
    generate_run(config)
    assert rows_of(config) != undisturbed


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (MemoryError(), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), False),
        (RuntimeError("Triton Error [CUDA]: invalid argument"), False),
    ],
)
def test_every_way_of_saying_that_memory_ran_out_is_known(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected

"""The layers as a GPU runs them against transformers' own forward; without a GPU by Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any
from weakref import WeakSet, ref

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen3Config

pytest.importorskip("triton", reason="Triton comes with the extra dev")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("torch finds no GPU, and Triton's interpreter is off", allow_module_level=True)

from e2p_ray.engine import decode, waves
from e2p_ray.engine.engine import Engine
from e2p_ray.engine.gpu.attend import GpuRows
from e2p_ray.engine.gpu.blocks import TILES
from e2p_ray.engine.gpu.graphs import Graphs
from e2p_ray.engine.gpu.layers import GpuDecoder, fits_gpu
from e2p_ray.engine.gpu.tables import PassTables
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.prefixes import PrefixStore
from e2p_ray.engine.readers import Readers
from e2p_ray.engine.rows_step import RowsStep
from e2p_ray.engine.shared_prefix import SuffixSlots
from e2p_ray.schema import Content
from tests import tiny_models

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = 1e-4


def base_of(name: str) -> tuple[Any, BaseModel]:
    """A model, and the same one with its layers as a GPU runs them."""
    config = tiny_models.configs()[name]
    plain, twin = (tiny_models.random_model(config) for _ in range(2))
    tiny_models.shake(plain)
    tiny_models.shake(twin)
    base = BaseModel(twin.to(DEVICE))
    assert fits_gpu(base.model)
    base.fused = GpuDecoder(base.model)
    return plain.to(DEVICE), base


def embeds_of(base: BaseModel, num: int, seed: int) -> Tensor:
    return torch.randn(num, base.d_model, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


class Rows:
    """Rows behind shared prefixes, two of them behind the same and one behind none, and the tokens they have so far."""

    def __init__(self, plain: Any, base: BaseModel, *, lengths: Sequence[int] = (26, 9, 25), seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        lefts = [tuple(rng.integers(0, 250, length).tolist()) for length in lengths]
        self._lefts = [lefts[0], lefts[1], (), *lefts[2:], lefts[0]]
        prefixes = PrefixStore(base, 1 << 30).get(self._lefts)
        self._readers = Readers.of(prefixes, [len(left) for left in self._lefts])
        self._plain, self._base, self._slots = plain, base, base.slots(len(self._lefts) + 1, 8)
        self._own = [embeds_of(base, 8, 100 * seed + row) for row in range(len(self._lefts))]
        self._before = np.zeros(len(self._lefts), np.int64)

    def differences(self, *counts: int) -> list[float]:
        """Of so many next tokens' states, row by row, from those of one plain forward over all of a row.

        Last of all the control: the last row's, from those with the first one's own tokens.
        """
        before, new = self._before, np.array(counts)
        given = torch.cat([own[b : b + c] for own, b, c in zip(self._own, before, new, strict=True)])
        step = RowsStep(self._slots, 1, before, new, self._readers)
        found = torch.split(self._base.hidden(given[None], step.position_ids, step)[0].clone(), list(counts))
        self._before = before + new
        ends = self._before.tolist()
        rows = [*zip(self._lefts, self._own, ends, found, strict=True)]
        return [*(self._difference(*row) for row in rows), self._difference(rows[-1][0], self._own[0], *rows[-1][2:])]

    def _difference(self, left: tuple[int, ...], own: Tensor, end: int, found: Tensor) -> float:
        embeds = torch.cat([self._base.embed(torch.tensor(left, dtype=torch.long, device=DEVICE)), own[:end]])[None]
        states = self._plain.base_model(inputs_embeds=embeds).last_hidden_state[0]
        return float((states[-len(found) :] - found).abs().max())


def are_right(differences: list[float]) -> bool:
    *of_rows, stranger = differences
    assert stranger > 100 * TOLERANCE, "the control must fail: another row's own tokens"
    return max(of_rows) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
@torch.inference_mode()
def test_rows_behind_prefixes(name: str) -> None:
    rows = Rows(*base_of(name))
    assert are_right(rows.differences(2, 1, 3, 1, 1))
    assert are_right(rows.differences(1, 2, 1, 1, 1))


class Captures:
    """torch's part in captured passes, where no GPU is: a replay runs anew what was launched under the capture.

    As with torch, a capture gets none of the memory that torch keeps, which is all there is while `is_short`, and a
    pool whose graphs are gone takes no other one.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_captures = self.num_replays = 0
        self.is_short = self.stays_short = False
        self.has_none = False  # not for what is not captured either
        self.capturing: Graph | None = None
        self.failed: ref[Graph] | None = None
        self.graphs_of: dict[object, WeakSet[Graph]] = {}
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(self))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", self._empty_cache)

    def use_in(self, base: BaseModel) -> None:
        """Let the model's passes be captured."""
        decoder = base.fused
        assert isinstance(decoder, GpuDecoder)
        decoder._graphs = Graphs(self.launched(decoder._run), decoder._rows, decoder._tables)

    def launched(self, run: Callable[[Tensor, GpuRows], Tensor]) -> Callable[[Tensor, GpuRows], Tensor]:
        def launch(states: Tensor, rows: GpuRows) -> Tensor:
            graph = self.capturing
            if self.has_none or (graph is not None and self.is_short):
                self.failed = None if graph is None else ref(graph)
                raise torch.OutOfMemoryError("CUDA out of memory (made by the test)")
            if graph is None:
                return run(states, rows)
            outputs = torch.full_like(states, torch.nan)
            graph.replay_launched = lambda: outputs.copy_(run(states, rows))
            return outputs

        return launch

    def _empty_cache(self) -> None:
        assert self.capturing is None, "torch gives nothing back under a capture"
        holds_memory = self.failed is not None and self.failed() is not None
        self.is_short = self.stays_short or (self.is_short and holds_memory)


class Graph:
    """One of torch's."""

    def __init__(self, captures: Captures) -> None:
        self._captures = captures
        self.replay_launched: Callable[[], Tensor] | None = None

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        graphs = self._captures.graphs_of.setdefault(pool, WeakSet([self]))
        assert len(graphs), "INTERNAL ASSERT FAILED: the pool's use count is above zero"
        graphs.add(self)
        self._captures.capturing = self

    def capture_end(self) -> None:
        self._captures.capturing = None
        self._captures.num_captures += self.replay_launched is not None

    def replay(self) -> None:
        assert self.replay_launched is not None, "nothing was captured"
        self._captures.num_replays += 1
        self.replay_launched()


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    return Captures(monkeypatch)


@torch.inference_mode()
def test_captured_passes_of_other_rows_and_of_fewer_tokens(captures: Captures) -> None:
    plain, base = base_of("qwen3")
    captures.use_in(base)
    one, other = Rows(plain, base, lengths=(26, 9, 25, 8)), Rows(plain, base, lengths=(5, 30, 17), seed=1)
    assert are_right(one.differences(2, 1, 1, 2, 1, 1))
    assert are_right(other.differences(1, 2, 1, 1, 2))
    assert are_right(one.differences(1, 1, 1, 1, 1, 1))
    assert (captures.num_captures, captures.num_replays) == (1, 2), "all are of up to 8 tokens"


def doubling(captures: Captures) -> Graphs:
    """Captured passes without layers: states are doubled."""

    def no_rows(*_: object) -> Any:
        return None

    return Graphs(captures.launched(lambda states, _: 2 * states), no_rows, PassTables(1, 1, DEVICE, TILES))


def doubles(graphs: Graphs, num_rows: int) -> bool:
    slots = SuffixSlots(1, num_rows, 1, 2, 4, dtype=torch.float32, device=DEVICE)
    zeros, ones = np.zeros(num_rows, np.int64), np.ones(num_rows, np.int64)
    step = RowsStep(slots, 0, zeros, ones, Readers.of([None] * num_rows, [0] * num_rows))
    states = torch.randn(num_rows, 3, device=DEVICE)
    found = graphs(states, step)
    return found is not None and torch.equal(found, 2 * states)


def test_a_pass_is_captured_once_one_of_its_size_went_well(captures: Captures) -> None:
    graphs = doubling(captures)
    captures.has_none = True
    with pytest.raises(torch.OutOfMemoryError):
        doubles(graphs, 3)
    captures.has_none = False
    assert doubles(graphs, 4)
    assert captures.num_captures == 0, "nothing had warmed up"
    assert doubles(graphs, 3)
    assert captures.num_captures == 1


def test_all_captures_share_one_pool_of_memory(captures: Captures) -> None:
    graphs = doubling(captures)
    captures.is_short = True
    assert all(doubles(graphs, num_rows) for num_rows in (3, 4, 7, 6, 3, 8))
    assert captures.num_captures == 2
    assert sorted(map(len, captures.graphs_of.values())) == [0, 2], "a failed one had its own"


@pytest.mark.parametrize("stays_short", [False, True])
def test_memory_that_is_short_under_a_capture_costs_no_text(stays_short: bool, captures: Captures) -> None:
    groups = [tiny_models.group(Content("c0", "", "A bridge.", "en"), range(4), without=[1])]
    expected = {item.key: item.text for item in engine_of(by_kernels=False).generate(groups)}
    engine = engine_of(by_kernels=True)
    captures.use_in(engine._decoder._base)
    captures.is_short, captures.stays_short = True, stays_short
    found = [*engine.generate(groups)]
    assert [item.error_code for item in found] == [None] * 4
    assert {item.key: item.text for item in found} == expected
    assert captures.failed is not None
    assert (captures.num_captures == 0) == stays_short


def test_weights_that_packing_frees_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What rows may take is measured behind it, where what torch keeps counts as used."""
    base = BaseModel(tiny_models.random_model(tiny_models.configs()["llama"]).to(DEVICE))
    weights = [ref(layer.self_attn.q_proj.weight) for layer in base.model.base_model.layers]
    living: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: living.append(sum(one() is not None for one in weights)))
    base._pack_for_gpu()
    assert isinstance(base.fused, GpuDecoder)
    assert living == [0]


def test_heads_that_no_multiprocessor_has_room_for_are_not_taken() -> None:
    small, large = (
        LlamaConfig(**tiny_models.common(head_dim=head_dim, num_hidden_layers=1)) for head_dim in (512, 1024)
    )
    assert fits_gpu(tiny_models.random_model(small))
    assert not fits_gpu(tiny_models.random_model(large))


def engine_of(*, by_kernels: bool) -> Engine:
    """An engine on the CPU; by_kernels: with a GPU's layers."""
    config = Qwen3Config(**tiny_models.common(head_dim=16, num_hidden_layers=2))
    model = tiny_models.random_model(config)
    tiny_models.shake(model)
    tasks = {"headline": tiny_models.task(max_new_tokens=3), "sampled": tiny_models.task(cue_after=" so", **SAMPLED)}
    engine = tiny_models.engine_of(config, model=model.to(DEVICE), tasks=tasks, max_rows=4)
    if by_kernels:
        base = engine._decoder._base
        base.fused = GpuDecoder(base.model)
    return engine


SAMPLED: dict[str, Any] = {"max_new_tokens": 3, "temperature": 0.8, "seed": 3}


def test_a_whole_engine_in_a_gpu_s_order_with_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, river = Content("c0", "", "A bridge.", "en"), Content("c1", "", "橋", "ja")
    groups = [tiny_models.group(bridge, range(3), without=[1])]
    groups += [tiny_models.group(river, range(3, 5), task_name="sampled")]
    expected = {item.key: item for item in engine_of(by_kernels=False).generate(groups)}
    texts = {key: item.text + " and" for key, item in expected.items()}
    scores = {item.key: item for item in engine_of(by_kernels=False).score(groups, texts)}

    monkeypatch.setattr(waves, "LEAST_ROWS", 2)
    monkeypatch.setattr(decode, "num_waves", lambda device, max_rows: 2)
    monkeypatch.setattr(decode, "looks_later", lambda device: True)
    engine = engine_of(by_kernels=True)
    found = {item.key: item for item in engine.generate(groups)}
    assert {key: item.text for key, item in found.items()} == {key: item.text for key, item in expected.items()}
    for key, item in found.items():
        assert item.mean_logprob == pytest.approx(expected[key].mean_logprob, abs=1e-3)
    for score in engine.score(groups, texts):
        assert score.logprob == pytest.approx(scores[score.key].logprob, abs=1e-2)
    others = [*scores.values()]
    assert abs(others[0].logprob - others[-1].logprob) > 0.1, "control: scores differ"

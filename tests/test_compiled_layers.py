"""All layers of a pass in one call of the compiled loops, against the same loops called one by one."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from e2p_ray.engine import torch_threads
from e2p_ray.engine.compiled import has_loops
from e2p_ray.engine.compiled_layers import CompiledLayers
from e2p_ray.engine.engine import Engine
from e2p_ray.engine.fused import FusedDecoder
from e2p_ray.engine.layers_table import LayersTable
from e2p_ray.engine.packed import can_pack
from e2p_ray.engine.prefixes import PrefixStore
from e2p_ray.engine.rows_step import RowsStep
from e2p_ray.engine.shared_prefix import Prefix
from e2p_ray.schema import Completion
from tests import tiny_models
from tests.listening import Listening
from tests.test_engine_architectures import TOLERANCE, largest_difference, run_traced

pytestmark = pytest.mark.skipif(not has_loops(), reason="the compiled loops need AVX2")

# Wide enough for a panel of outputs; a last panel that begins where it ends with the outputs; biases; a window.
_WIDTHS: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**tiny_models.common(**_WIDTHS)),
    "qwen2": Qwen2Config(**tiny_models.common(**_WIDTHS)),
    "mistral": MistralConfig(**tiny_models.common(**_WIDTHS, sliding_window=70)),
}


@pytest.fixture(params=[1, 2], ids=["one_thread", "two_threads"], autouse=True)
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def engine_of(name: str, dtype: torch.dtype) -> tuple[Engine, CompiledLayers]:
    model = tiny_models.random_model(CONFIGS[name]).to(dtype)
    engine = tiny_models.engine_of(CONFIGS[name], max_rows=40, model=model, drafts=False)
    base = engine._decoder._base
    base.pack()
    if not can_pack(dtype, base.device):
        pytest.skip("neither loops nor oneDNN pack bfloat16 here")
    assert isinstance(base.fused, FusedDecoder)
    if dtype is torch.bfloat16 and base.fused._compiled is None:
        pytest.skip("with AMX products of bfloat16 are not ours")
    assert base.fused._compiled is not None
    return engine, base.fused._compiled


def run(engine: Engine) -> list[Completion]:
    """Contents with many users and few, some without a prefix of their own, waves that refill."""
    contents = tiny_models.contents(4)
    groups = [tiny_models.group(content, range(at, at + 25), without=[at]) for at, content in enumerate(contents)]
    engine._decoder.store.trim(0)
    return sorted(engine.generate(groups), key=lambda completion: completion.key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_one_call_is_the_same_as_many(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, compiled = engine_of(name, dtype)
    fused = engine._decoder._base.fused
    assert fused is not None
    taken, takes = list[bool](), CompiledLayers.takes

    def spy(self: CompiledLayers, states: Any, step: Any) -> bool:
        taken.append(takes(self, states, step))
        return taken[-1]

    monkeypatch.setattr(CompiledLayers, "takes", spy)
    by_table = run(engine)
    assert any(taken)
    assert all(taken) or name == "mistral", "a window's reach is left to torch"
    assert isinstance(fused, FusedDecoder)
    fused._compiled = None
    one_by_one = run(engine)
    assert by_table == one_by_one
    layers = [*compiled._layers]
    fused._compiled = CompiledLayers([layers[0], *layers[:0:-1]], compiled._norm, compiled._window)
    assert run(engine) != one_by_one, "the control must fail"


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_it_gives_the_logits_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = engine_of(name, torch.float32)
    groups = [tiny_models.group(content, range(5), without=[1]) for content in tiny_models.contents(4)]
    trace = run_traced(engine, groups, monkeypatch)
    model = tiny_models.random_model(CONFIGS[name])
    assert largest_difference(model, engine, groups, trace) < TOLERANCE
    assert largest_difference(model, engine, groups, trace, swap=True) > 100 * TOLERANCE, "the control must fail"


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_in_bf16_it_is_as_near_as_the_models_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = engine_of(name, torch.bfloat16)
    groups = [tiny_models.group(content, range(5)) for content in tiny_models.contents(3)]
    trace = run_traced(engine, groups, monkeypatch)
    model = tiny_models.random_model(CONFIGS[name])
    ours = largest_difference(model, engine, groups, trace)
    rounded = tiny_models.random_model(CONFIGS[name]).to(torch.bfloat16)
    plain = tiny_models.engine_of(CONFIGS[name], max_rows=40, model=rounded)
    theirs = largest_difference(model, plain, groups, run_traced(plain, groups, monkeypatch))
    print(ours, theirs, largest_difference(model, engine, groups, trace, swap=True))
    assert 0 < ours < 1.5 * theirs
    assert largest_difference(model, engine, groups, trace, swap=True) > 1.5 * theirs, "the control must fail"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_contents_go_through_as_rows_do(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their keys and values are those of padded batches, layer by layer, which end before the last layer's rest."""
    engine, _ = engine_of(name, dtype)
    base, rng = engine._decoder._base, np.random.default_rng(0)
    lefts = [tuple(rng.integers(1, 250, size).tolist()) for size in (60, 61, 64, 70, 12, 3)]
    num_calls, run_table = list[int](), torch_threads.run_table

    def counted(table: npt.NDArray[np.int64]) -> None:
        num_calls.append(len(table))
        run_table(table)

    monkeypatch.setattr(torch_threads, "run_table", counted)
    packed = PrefixStore(base, 1 << 30).get(lefts)
    assert 0 < len(num_calls) < len(lefts), "several contents in one call"
    num_calls.clear()
    monkeypatch.setattr(type(base), "packs_contents", lambda *_: False)
    padded = PrefixStore(base, 1 << 30).get(lefts)
    assert not num_calls

    def differences(ours: Sequence[Prefix | None], theirs: Sequence[Prefix | None]) -> list[float]:
        """Of keys and values of every layer, as a share of them; of the shorter one's tokens."""
        found = []
        for one, other in zip(ours, theirs, strict=True):
            assert one is not None
            assert other is not None
            length = min(one.length, other.length)
            for a, b in zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True):
                a, b = a[:, :, :length].float(), b[:, :, :length].float()
                found.append(float((a - b).norm() / b.norm()))
        return found

    assert max(differences(packed, padded)) < (1e-5 if dtype is torch.float32 else 0.02)
    assert min(differences(packed[1:], padded[:-1])) > 0.3, "the control must fail"


class TestKeptTable:
    """The calls of a pass are those of the one before where only a token came to each row."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", ["llama", "qwen2"])
    def test_texts_are_those_of_new_tables(
        self, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine, _ = engine_of(name, dtype)
        num_kept, advanced = 0, LayersTable.advanced

        def counted(self: LayersTable) -> LayersTable:
            nonlocal num_kept
            num_kept += 1
            return advanced(self)

        monkeypatch.setattr(LayersTable, "advanced", counted)
        kept = run(engine)
        assert num_kept > 2
        monkeypatch.setattr(LayersTable, "advanced", lambda self: self)
        assert run(engine) != kept, "the control must fail"
        monkeypatch.setattr(RowsStep, "precedes", lambda *_: False)
        assert run(engine) == kept

    def test_another_pass_in_between_may_take_more_memory(self) -> None:
        """What a wider pass between two steps makes anew is not what the calls were told to use."""
        engine, _ = engine_of("llama", torch.float32)
        fused = engine._decoder._base.fused
        assert isinstance(fused, FusedDecoder)
        content, *others = tiny_models.contents(8)
        few, many = [tiny_models.group(content, range(2))], [tiny_models.group(one, range(5)) for one in others]
        expected = [engine_of("llama", torch.float32)[0].generate(groups) for groups in (few, many)]
        other = engine._decoder.with_bounds(engine._decoder.given_bounds)
        before, are_there, found = list[weakref.ref[Tensor]](), list[bool](), list[Completion]()

        def between(step: int) -> None:
            if step == 4:
                before.extend(map(weakref.ref, fused._workspace.memory))
                found.extend(other.run(engine._rows(many)))
            if step == 6:
                are_there.extend(one() is not None for one in before)

        engine.listener = Listening(between=between)
        texts = [*engine.generate(few)]
        assert len(are_there) > 5
        assert all(are_there)
        assert not any(one() is not None for one in before), "the control: the workspace has other memory now"
        for ours, theirs in zip((texts, found), expected, strict=True):
            assert {one.key: one.text for one in ours} == {one.key: one.text for one in theirs}


def test_layers_that_the_loops_do_not_know_are_left_to_others() -> None:
    _, compiled = engine_of("llama", torch.float32)
    layer = compiled._layers[1]
    layer.mlp._is_one = False
    assert CompiledLayers.of(compiled._layers, compiled._norm, None) is None


def test_few_rows_go_to_plain_weights_where_they_are_kept() -> None:
    model = tiny_models.random_model(CONFIGS["llama"])
    engine = tiny_models.engine_of(CONFIGS["llama"], model=model)
    base = engine._decoder._base
    base.pack(keep_plain=True)
    assert isinstance(base.fused, FusedDecoder)
    compiled: Any = base.fused._compiled
    step: Any = SimpleNamespace(is_within=lambda window: window is None)
    assert not compiled.takes(torch.zeros(4, 96), step)
    assert compiled.takes(torch.zeros(5, 96), step)

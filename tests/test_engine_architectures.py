"""Every supported architecture: shared-prefix logits equal plain per-pair logits of transformers' own attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from e2p_ray.engine import compiled_attention, fused, panels, sampling
from e2p_ray.engine.compiled import has_loops
from e2p_ray.engine.decode import Decoder
from e2p_ray.engine.engine import Engine
from e2p_ray.engine.few_rows import FewRows
from e2p_ray.engine.fused import FUSED_MODEL_TYPES
from e2p_ray.engine.manifest import Layout
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.packed import PackedLinear
from e2p_ray.engine.rows_attention import RowsAttention
from e2p_ray.engine.rows_step import RowsStep
from e2p_ray.engine.wave import Ended
from e2p_ray.errors import UnsupportedModelError
from e2p_ray.schema import Content, Group, RequestKey
from tests import tiny_models

TOLERANCE = 1e-4
ARCHITECTURES = tiny_models.configs()


@pytest.fixture(params=["compiled", "torch"])
def operations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of what there are two for."""
    if request.param == "torch":
        for module in (compiled_attention, fused, panels, sampling):
            monkeypatch.setattr(module, "has_loops", lambda: False)
    elif not has_loops():
        pytest.skip("the compiled loops need AVX2")


@dataclass
class Trace:
    """The logits of every choice an engine made, by request and step, and the tokens it chose."""

    logits: dict[tuple[RequestKey, int], Tensor] = field(default_factory=dict)
    tokens: dict[RequestKey, list[int]] = field(default_factory=dict)


def run_traced(engine: Engine, groups: list[Group], monkeypatch: pytest.MonkeyPatch) -> Trace:
    trace = Trace()
    pick, completion = Decoder._pick, Decoder._completion

    def spy(self: Decoder, wave: Any, slots: Any, written: Any, num_written: Any, logits: Tensor) -> Any:
        for at, (slot, step) in enumerate(zip(slots, num_written, strict=True)):
            trace.logits[wave.rows[slot].key, int(step)] = logits[at].clone()
        return pick(self, wave, slots, written, num_written, logits)

    def done(self: Decoder, ended: Ended) -> Any:
        trace.tokens[ended.row.key] = ended.tokens.tolist()
        return completion(self, ended)

    with monkeypatch.context() as patch:
        tiny_models.choose_by_logits(patch)
        patch.setattr(Decoder, "_pick", spy)
        patch.setattr(Decoder, "_completion", done)
        list(engine.generate(groups))
    return trace


@torch.inference_mode()
def naive_logits(
    model: Any, engine: Engine, content: Content, embedding: np.ndarray | None, tokens: list[int]
) -> Tensor:
    """One plain forward of one pair's whole sequence: the logits before each of `tokens`."""
    segments = engine.layout.segments(content, "headline")
    embed = model.get_input_embeddings()
    parts = [embed(torch.tensor(segments.left, dtype=torch.long))]
    if embedding is not None:
        parts.append(engine._decoder._projector(torch.from_numpy(embedding)[None])[0])
    parts += [embed(torch.tensor(ids, dtype=torch.long)) for ids in (segments.right, tuple(tokens[:-1]))]
    sequence = torch.cat(parts)[None]
    logits: Tensor = model(inputs_embeds=sequence).logits[0, -len(tokens) :].float()
    return logits


def largest_difference(model: Any, engine: Engine, groups: list[Group], trace: Trace, *, swap: bool = False) -> float:
    """The largest difference over all pairs and steps; `swap` gives every user the next one's user embedding."""
    worst = 0.0
    for group in groups:
        embeddings = [request.user_embedding for request in group.requests]
        if swap:
            embeddings = embeddings[1:] + embeddings[:1]
        for request, embedding in zip(group.requests, embeddings, strict=True):
            tokens = trace.tokens[request.key]
            expected = naive_logits(model, engine, group.content, embedding, tokens)
            found = torch.stack([trace.logits[request.key, step] for step in range(len(tokens))])
            worst = max(worst, float((expected - found).abs().max()))
    return worst


@pytest.mark.usefixtures("operations")
@pytest.mark.parametrize("num_soft_tokens", [1, 2])
@pytest.mark.parametrize(
    ("layout", "cue_after"), [("content_first", ""), ("content_first", " headline:"), ("soft_first", "")]
)
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_logits_equal_plain_forward(
    name: str, layout: Layout, cue_after: str, num_soft_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ARCHITECTURES[name]
    tasks = {"headline": tiny_models.task(cue_after=cue_after)}
    engine = tiny_models.engine_of(config, layout=layout, num_soft_tokens=num_soft_tokens, tasks=tasks, max_rows=7)
    sizes = (5, 1, 3, 4)
    groups, first = [], 0
    for content, size in zip(tiny_models.contents(4), sizes, strict=True):
        groups.append(tiny_models.group(content, range(first, first + size), without=[first + 1]))
        first += size
    trace = run_traced(engine, groups, monkeypatch)
    assert len(trace.tokens) == sum(sizes)
    model = tiny_models.random_model(config)
    assert largest_difference(model, engine, groups, trace) < TOLERANCE
    assert largest_difference(model, engine, groups, trace, swap=True) > 100 * TOLERANCE, "the control must fail"


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_a_soft_token_is_made_as_large_as_the_layers_read_tokens(name: str) -> None:
    model = tiny_models.random_model(ARCHITECTURES[name])
    read = model.get_input_embeddings()(torch.arange(ARCHITECTURES[name].vocab_size)).float().detach()
    base = BaseModel(model)
    assert base.token_embedding_rms == pytest.approx(float(read.square().mean().sqrt()))
    torch.testing.assert_close(base.token_embeddings(), read)
    scale = ARCHITECTURES[name].hidden_size ** 0.5 if name.startswith("gemma") else 1.0
    plain = float(model.get_input_embeddings().weight.float().square().mean().sqrt())
    assert base.token_embedding_rms == pytest.approx(scale * plain, rel=1e-3)


def packed_engine(
    name: str, layout: Layout, cue_after: str, dtype: torch.dtype, *, keep_plain: bool = False
) -> tuple[Any, Engine]:
    """A model, and an engine with the same weights, packed; in passes over few rows where it has the plain ones too."""
    model, twin = (tiny_models.random_model(ARCHITECTURES[name]) for _ in range(2))
    tiny_models.shake(model)
    twin.load_state_dict(model.state_dict())
    engine = tiny_models.engine_of(
        ARCHITECTURES[name],
        layout=layout,
        tasks={"headline": tiny_models.task(cue_after=cue_after)},
        max_rows=3 if keep_plain else 7,
        model=twin.to(dtype),
    )
    engine._decoder._base.pack(keep_plain=keep_plain)
    return model, engine


@pytest.mark.usefixtures("operations")
@pytest.mark.parametrize(
    ("layout", "cue_after", "keep_plain"),
    [
        ("content_first", "", False),
        ("content_first", " headline:", False),
        ("soft_first", "", False),
        ("content_first", "", True),
        ("content_first", " headline:", True),
        ("soft_first", "", True),
    ],
)
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_packed_weights_give_the_same_logits(
    name: str, layout: Layout, cue_after: str, keep_plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, engine = packed_engine(name, layout, cue_after, torch.float32, keep_plain=keep_plain)
    base = engine._decoder._base
    assert (base.fused is not None) == (ARCHITECTURES[name].model_type in FUSED_MODEL_TYPES)
    packed = [module for module in base.model.modules() if isinstance(module, PackedLinear)]
    assert packed or name == "gpt2", "gpt2 has no linear layers, but convolutions of width 1"
    assert all((module.plain is not None) == keep_plain for module in packed)
    short = of_length(8, "short")  # a window must reach back to a soft token that comes first
    groups = [tiny_models.group(content, range(5), without=[1]) for content in (short, *tiny_models.contents(3))]
    asked, by_numpy = list[bool](), FewRows.takes

    def takes(self: FewRows, step: RowsStep) -> bool:
        asked.append(by_numpy(self, step))
        return asked[-1]

    monkeypatch.setattr(FewRows, "takes", takes)
    trace = run_traced(engine, groups, monkeypatch)
    assert any(asked) == (keep_plain and base.fused is not None), "few rows go their own way"
    if any(asked) and getattr(ARCHITECTURES[name], "sliding_window", None):
        assert not all(asked), "but where a window ends"
    assert largest_difference(model, engine, groups, trace) < TOLERANCE
    assert largest_difference(model, engine, groups, trace, swap=True) > 100 * TOLERANCE, "the control must fail"


@pytest.mark.usefixtures("operations")
@pytest.mark.parametrize("name", sorted(FUSED_MODEL_TYPES))
def test_fused_layers_in_bf16_are_as_near_as_the_models_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, engine = packed_engine(name, "content_first", "", torch.bfloat16)
    groups = [tiny_models.group(content, range(5)) for content in tiny_models.contents(3)]
    trace = run_traced(engine, groups, monkeypatch)
    ours = largest_difference(model, engine, groups, trace)
    rounded = tiny_models.random_model(ARCHITECTURES[name])
    rounded.load_state_dict(model.state_dict())
    plain = tiny_models.engine_of(ARCHITECTURES[name], max_rows=7, model=rounded.to(torch.bfloat16))
    theirs = largest_difference(model, plain, groups, run_traced(plain, groups, monkeypatch))
    print(ours, theirs, largest_difference(model, engine, groups, trace, swap=True))
    assert 0 < ours < 1.5 * theirs
    assert largest_difference(model, engine, groups, trace, swap=True) > 1.5 * theirs, "the control must fail"


def of_length(num_bytes: int, content_id: str) -> Content:
    letters = np.random.default_rng(list(content_id.encode())).choice(list("abcdefgh "), num_bytes)
    return Content(content_id, "", "".join(letters), "en")


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_contents_with_few_readers_are_read_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours of one prefill batch, of equal and of unequal length, all with two users; then one with three."""
    lengths = (66, 60, 60, 61, 63, 60, 66, 40)
    groups = [
        tiny_models.group(of_length(length, f"c{at}"), range(3 * at, 3 * at + 2 + (at == 5)))
        for at, length in enumerate(lengths)
    ]
    engine = tiny_models.engine_of(ARCHITECTURES[name])
    widest: list[int] = []
    attention_of = RowsAttention.__init__

    def spy(self: RowsAttention, *args: Any) -> None:
        attention_of(self, *args)
        widest.append(max(end - first for first, end in self._runs))

    monkeypatch.setattr(RowsAttention, "__init__", spy)
    monkeypatch.setattr(compiled_attention, "has_loops", lambda: False)
    trace = run_traced(engine, groups, monkeypatch)
    assert max(widest) >= 3, "some were read together"
    model = tiny_models.random_model(ARCHITECTURES[name])
    assert largest_difference(model, engine, groups, trace) < TOLERANCE
    assert largest_difference(model, engine, groups, trace, swap=True) > 100 * TOLERANCE, "the control must fail"


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_greedy_texts_equal_hf_generate(name: str) -> None:
    config = ARCHITECTURES[name]
    engine = tiny_models.engine_of(config)
    groups = [tiny_models.group(content, range(3)) for content in tiny_models.contents(3)]
    texts = {completion.key: completion.text for completion in engine.generate(groups)}
    model, tokenizer = tiny_models.random_model(config), tiny_models.byte_tokenizer()
    embed = model.get_input_embeddings()
    for group in groups:
        left = embed(torch.tensor(engine.layout.segments(group.content, "headline").left))
        for request in group.requests:
            assert request.user_embedding is not None
            soft = engine._decoder._projector(torch.from_numpy(request.user_embedding)[None])[0]
            sequence = torch.cat([left, soft])[None]
            output = model.generate(inputs_embeds=sequence, max_new_tokens=8, do_sample=False)
            expected = tokenizer.decode(output[0], skip_special_tokens=True).lstrip()
            assert texts[request.key] == expected.rstrip("\ufffd")


def test_an_architecture_that_does_not_fit_is_refused_by_name() -> None:
    from transformers import BloomConfig, LlamaConfig

    bloom = BloomConfig(vocab_size=300, hidden_size=48, n_layer=2, n_head=4)
    with pytest.raises(UnsupportedModelError, match="'bloom'"):
        tiny_models.engine_of(bloom)
    values = tiny_models.common(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    with pytest.raises(UnsupportedModelError, match="'dynamic'"):
        tiny_models.engine_of(LlamaConfig(**values))

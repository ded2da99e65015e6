"""Tokens of greedy rows found in one call of the compiled loops, against choices from whole rows of logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from e2p_ray.engine import decode
from e2p_ray.engine import engine as engine_module
from e2p_ray.engine.compiled import has_loops
from e2p_ray.engine.contract import EngineStats
from e2p_ray.engine.decode import Decoder
from e2p_ray.engine.drafts import Drafts
from e2p_ray.engine.greedy import GreedyHead, Likeliest
from e2p_ray.engine.packed import PackedLinear, can_pack
from e2p_ray.engine.row import Row
from e2p_ray.engine.wave import Ended, Wave
from e2p_ray.schema import Completion, ErrorCode, RequestKey
from tests import tiny_models
from tests.test_compiled_loops import TOLERANCE, difference, random

pytestmark = pytest.mark.skipif(not has_loops(), reason="the compiled loops need AVX2")

LLAMA = LlamaConfig(**tiny_models.common(hidden_size=96, num_attention_heads=6, num_key_value_heads=2))
TASKS = {"headline": tiny_models.task(), "sampled": tiny_models.task(temperature=0.9, seed=5)}


@pytest.fixture(params=[1, 2], ids=["one_thread", "two_threads"], autouse=True)
def num_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def head_of(dtype: torch.dtype, *, keep_plain: bool = False) -> tuple[GreedyHead, Tensor, Tensor]:
    weight, bias = random(150, 64, seed=1).to(dtype), random(150, seed=2).to(dtype)
    if not can_pack(dtype, weight.device):
        pytest.skip("neither loops nor oneDNN pack bfloat16 here")
    head = GreedyHead.of(PackedLinear(weight, bias, keep_plain=keep_plain))
    if head is None:
        pytest.skip("with AMX products of bfloat16 are not ours")
    return head, weight, bias


@pytest.mark.parametrize("max_rows", [1, 7, 20, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_logits_and_sums_of_rows_some_at_a_time(dtype: torch.dtype, max_rows: int) -> None:
    head, weight, bias = head_of(dtype)
    hidden = random(20, 64, seed=3).to(dtype)
    hidden[5] = torch.nan
    found = head(hidden, max_rows)
    logits = (hidden.float() @ weight.float().T + bias.float()).to(dtype).double()
    real = torch.arange(20) != 5
    assert found.sums[5].isnan()
    assert torch.equal(found.tokens[real], logits.argmax(-1)[real])
    assert difference(found.logits[real], logits.amax(-1)[real]) < (TOLERANCE if dtype is torch.float32 else 0.01)
    logprobs = logits.log_softmax(-1).amax(-1)[real]
    assert difference(-found.sums.log()[real], logprobs) < (TOLERANCE if dtype is torch.float32 else 0.01)
    assert difference(-found.sums.log()[real].roll(1), logprobs) > 0.02, "the control must fail"


def test_what_is_left_to_others() -> None:
    head, _, _ = head_of(torch.float32, keep_plain=True)
    assert not head.takes(torch.zeros(0, 64))
    assert not head.takes(torch.zeros(4, 64)), "the plain weight is faster"
    assert head.takes(torch.zeros(5, 64))
    assert GreedyHead.of(nn.Linear(64, 150)) is None
    assert GreedyHead.of(PackedLinear(random(20, 64, seed=1), None)) is None, "narrower than a panel"


def run(dtype: torch.dtype, task: str, drafts: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Completion], int]:
    """All completions of a packed engine, and how many choices came from the greedy head."""
    engine = tiny_models.engine_of(
        LLAMA, tasks=TASKS, max_rows=40, model=tiny_models.random_model(LLAMA).to(dtype), drafts=drafts
    )
    base = engine._decoder._base
    base.pack()
    if base.greedy is None:
        pytest.skip("with AMX products of bfloat16 are not ours")
    found, plain = list[Likeliest](), GreedyHead.__call__

    def watched(self: GreedyHead, hidden: Tensor, max_rows: int) -> Likeliest:
        found.append(plain(self, hidden, max_rows))
        return found[-1]

    contents = tiny_models.contents(4)
    groups = [tiny_models.group(one, range(25), task_name=task, without=[at]) for at, one in enumerate(contents)]
    with monkeypatch.context() as patch:
        patch.setattr(GreedyHead, "__call__", watched)
        completions = sorted(engine.generate(groups), key=lambda completion: completion.key)
    return completions, len(found)


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_texts_are_those_that_whole_logits_give(
    dtype: torch.dtype, drafts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, num_choices = run(dtype, "headline", drafts, monkeypatch)
    assert num_choices > 0
    sampled, num_choices = run(dtype, "sampled", drafts, monkeypatch)
    assert num_choices == 0, "a sampled row's token is chosen from its logits"
    tiny_models.choose_by_logits(monkeypatch)
    by_logits, num_choices = run(dtype, "headline", drafts, monkeypatch)
    assert num_choices == 0
    assert fast == by_logits
    assert [one.text for one in sampled] != [one.text for one in by_logits], "the control must fail"


def test_rows_without_finite_logits_end_as_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = run(torch.float32, "headline", False, monkeypatch)
    plain = Decoder._likeliest

    def poisoned(self: Decoder, wave: Wave, rows: Any, hidden: Tensor, *rest: Any) -> Likeliest | None:
        hidden[0] = torch.inf
        return plain(self, wave, rows, hidden, *rest)

    monkeypatch.setattr(Decoder, "_likeliest", poisoned)
    found, _ = run(torch.float32, "headline", False, monkeypatch)
    lost = {one.key for one in found if one.error_code is ErrorCode.NON_FINITE_LOGITS}
    assert 0 < len(lost) < len(found)
    assert [one for one in found if one.key not in lost] == [one for one in expected if one.key not in lost]


class ExactDrafts(Drafts):
    """A draft is token ids, as a tokenizer that reads all texts back would make of it."""

    def _given(self, rows: Sequence[Row]) -> list[list[tuple[int, ...]]]:
        return [[tuple(map(int, row.draft.split()))] if row.draft else [] for row in rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drafts_of_exact_tokens_change_no_text(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right ones are accepted, wrong ones cost tokens; all of it in the compiled loops."""
    # Every guess that may hold is tried.
    monkeypatch.setattr(decode, "measure_pass_cost", lambda base: tiny_models.pass_cost(1024))
    monkeypatch.setattr(engine_module, "Drafts", ExactDrafts)
    tokens, num_greedy, plain, choose = dict[RequestKey, list[int]](), 0, Decoder._completion, GreedyHead.__call__

    def completed(self: Decoder, ended: Ended) -> Completion:
        tokens[ended.row.key] = ended.tokens.tolist()
        return plain(self, ended)

    def chosen(self: GreedyHead, hidden: Tensor, max_rows: int) -> Likeliest:
        nonlocal num_greedy
        num_greedy += len(hidden)
        return choose(self, hidden, max_rows)

    monkeypatch.setattr(Decoder, "_completion", completed)
    monkeypatch.setattr(GreedyHead, "__call__", chosen)
    tasks = {"headline": tiny_models.task(max_new_tokens=16)}
    groups = [tiny_models.group(one, range(12), without=[at]) for at, one in enumerate(tiny_models.contents(3))]

    def written(drafts: Mapping[RequestKey, list[int]]) -> tuple[dict[RequestKey, list[int]], EngineStats]:
        """All tokens, with the drafts that are not empty."""
        model = tiny_models.random_model(LLAMA).to(dtype)
        engine = tiny_models.engine_of(LLAMA, tasks=tasks, max_rows=64, model=model, drafts=bool(drafts))
        engine._decoder._base.pack()
        if engine._decoder._base.greedy is None:
            pytest.skip("with AMX products of bfloat16 are not ours")
        drafted = [
            replace(one, requests=tuple(
                replace(request, draft=" ".join(map(str, drafts.get(request.key, ())))) for request in one.requests
            ))
            for one in groups
        ]  # fmt: skip
        tokens.clear()
        assert not [one for one in engine.generate(drafted) if one.error_code]
        return dict(tokens), engine.stats

    expected, plain_stats = written({})
    right, right_stats = written(expected)
    assert right == expected
    assert right_stats.num_accepted_tokens > 0.9 * right_stats.num_draft_tokens > 0
    assert right_stats.num_steps < 0.7 * plain_stats.num_steps
    other = {key: found[:2] + [(token + 1) % 250 for token in found[2:]] for key, found in expected.items()}
    wrong, wrong_stats = written(other)
    assert wrong == expected
    assert wrong_stats.num_draft_tokens > 2 * wrong_stats.num_accepted_tokens
    assert plain_stats.num_draft_tokens == 0
    assert num_greedy > sum(map(len, expected.values())) * 2, "no logits in between"
    assert right != {key: expected[next(iter(expected))] for key in expected}, "the control: texts differ"

"""Scores of given texts: equal to a plain forward pass a pair, and to what generation says of its own texts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from e2p_ray.config import TaskConfig
from e2p_ray.engine.engine import Engine
from e2p_ray.engine.fake import FakeEngine
from e2p_ray.engine.manifest import Layout
from e2p_ray.schema import ErrorCode, FinishReason, Group, RequestKey, TextScore
from tests import tiny_models

LLAMA = tiny_models.configs()["llama"]
TEXTS = ("", " a", " Nine people, one bridge.", "都営バスが値上げへ", " and\nsome more words than the others have")


def scores(
    engine: Engine | FakeEngine, groups: list[Group], texts: dict[RequestKey, str]
) -> dict[RequestKey, TextScore]:
    found = list(engine.score(groups, texts))
    assert sorted(score.key for score in found) == sorted(r.key for group in groups for r in group.requests)
    return {score.key: score for score in found}


def cases(num_users: int = 6) -> tuple[list[Group], dict[RequestKey, str]]:
    groups = [
        tiny_models.group(content, range(at, at + num_users), without=[at + 1])
        for at, content in enumerate(tiny_models.contents(4))
    ]
    keys = [request.key for group in groups for request in group.requests]
    return groups, {key: TEXTS[at % len(TEXTS)] for at, key in enumerate(keys)}


@torch.inference_mode()
def plain_logprob(model: Any, engine: Engine, group: Group, user_embedding: Any, text: str) -> float:
    """One forward pass over one pair's whole sequence."""
    segments, embed = engine.layout.segments(group.content, group.task), model.get_input_embeddings()
    target = [*tiny_models.byte_tokenizer().encode(text, add_special_tokens=False), tiny_models.EOS]
    parts = [embed(torch.tensor(segments.left, dtype=torch.long))]
    if user_embedding is not None:
        parts.append(engine._decoder._projector(torch.from_numpy(user_embedding)[None])[0])
    parts.append(embed(torch.tensor([*segments.right, *target], dtype=torch.long)))
    logprobs = torch.log_softmax(model(inputs_embeds=torch.cat(parts)[None]).logits[0].float(), -1)
    before = logprobs[-len(target) - 1 : -1]
    return float(before.gather(1, torch.tensor(target)[:, None]).sum())


@pytest.mark.parametrize("max_rows", [1, 5, 64])
@pytest.mark.parametrize(
    ("layout", "cue_after"), [("content_first", ""), ("content_first", " headline:"), ("soft_first", "")]
)
def test_scores_equal_a_plain_forward_pass(layout: Layout, cue_after: str, max_rows: int) -> None:
    tasks = {"headline": tiny_models.task(cue_after=cue_after)}
    engine = tiny_models.engine_of(LLAMA, layout=layout, tasks=tasks, max_rows=max_rows)
    groups, texts = cases()
    found, model = scores(engine, groups, texts), tiny_models.random_model(LLAMA)
    swapped = []
    for group in groups:
        users = [request.user_embedding for request in group.requests]
        for request, other in zip(group.requests, [*users[1:], users[0]], strict=True):
            expected = plain_logprob(model, engine, group, request.user_embedding, texts[request.key])
            assert found[request.key].logprob == pytest.approx(expected, abs=1e-3)
            assert found[request.key].num_tokens == len(texts[request.key].encode()) + 1
            swapped.append(abs(plain_logprob(model, engine, group, other, texts[request.key]) - expected))
    assert max(swapped) > 0.1, "the control must fail: another user's soft token gives another score"


def test_scores_agree_with_what_generation_says_of_its_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that ended by themselves score what their mean_logprob says."""
    tiny_models.write_letters_only(monkeypatch)
    engine = tiny_models.engine_of(LLAMA, tasks={"headline": tiny_models.task(max_new_tokens=40)})
    groups = [tiny_models.group(content, range(30)) for content in tiny_models.contents(3)]
    written = {completion.key: completion for completion in engine.generate(groups)}
    tokenizer = tiny_models.byte_tokenizer()
    checked = 0
    for key, score in scores(engine, groups, {key: completion.text for key, completion in written.items()}).items():
        completion = written[key]
        num_tokens = len(tokenizer.encode(completion.text, add_special_tokens=False)) + 1
        if completion.finish_reason is FinishReason.END_TOKEN and num_tokens == completion.num_output_tokens:
            assert score.mean_logprob == pytest.approx(completion.mean_logprob, abs=1e-4)
            checked += 1
    assert checked >= 30


def test_a_content_is_prefilled_once_for_writing_and_scoring() -> None:
    engine = tiny_models.engine_of(LLAMA)
    groups = [tiny_models.group(content, range(4)) for content in tiny_models.contents(3)]
    list(engine.generate(groups))
    computed = engine._decoder.store.num_computed_tokens
    scores(engine, groups, {request.key: " text" for group in groups for request in group.requests})
    assert engine._decoder.store.num_computed_tokens == computed > 0


def test_what_cannot_be_scored_says_so_and_the_others_go_on() -> None:
    groups, texts = cases()
    first, second = groups[0].requests[0].key, groups[1].requests[0].key
    texts[first] = "x" * 5000
    tasks: dict[str, TaskConfig] = {"headline": tiny_models.task()}
    engine = tiny_models.engine_of(LLAMA, tasks=tasks)
    found = scores(engine, groups, texts)
    assert found[first].error_code is ErrorCode.PROMPT_TOO_LONG
    assert found[second].error_code is None
    assert found[second].logprob < 0
    del texts[second]
    with pytest.raises(KeyError):
        scores(engine, groups, texts)


def test_the_fake_engine_keeps_the_contract() -> None:
    groups, texts = cases()
    found = scores(FakeEngine(), groups, texts)
    own = scores(FakeEngine(), groups, dict.fromkeys(texts, "another text"))
    assert all(score.logprob <= 0 for score in found.values())
    assert {score.num_tokens for score in own.values()} == {3}
    changed = [replace(group, requests=group.requests[:1]) for group in groups]
    assert len(scores(FakeEngine(), changed, texts)) == len(groups)

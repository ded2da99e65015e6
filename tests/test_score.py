"""Scores of given texts: equal to a plain forward pass a pair, and to what generation says of its own texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from e2p_ray.config import TaskConfig
from e2p_ray.engine import teaching
from e2p_ray.engine.attention import attention
from e2p_ray.engine.engine import Engine
from e2p_ray.engine.fake import FakeEngine
from e2p_ray.engine.lesson import Batch, Lesson, LessonRow
from e2p_ray.engine.manifest import Layout
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.prefixes import PrefixStore
from e2p_ray.engine.row import Row
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
def plain_logprob(
    model: Any, engine: Engine, group: Group, user_embedding: Any, text: str, *, spelled_out: bool = True
) -> float:
    """One forward pass over one pair's whole sequence."""
    segments, embed = engine.layout.segments(group.content, group.task), model.get_input_embeddings()
    tokenizer = tiny_models.byte_tokenizer()
    target = [*tokenizer.encode(text, add_special_tokens=False, split_special_tokens=spelled_out), tiny_models.EOS]
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


def test_a_text_ends_with_the_tokenizer_s_own_end_token_whichever_else_end_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As projectors learn it; a model's generation config may name others before it (Llama 3, Qwen 2.5)."""
    groups, texts = cases()
    expected = scores(tiny_models.engine_of(LLAMA), groups, texts)
    model = tiny_models.random_model(LLAMA)
    model.generation_config.eos_token_id = [7, tiny_models.EOS]
    engine = tiny_models.engine_of(LLAMA, model=model)
    assert scores(engine, groups, texts) == expected
    drafts = engine._decoder._drafts
    assert drafts is not None
    ((given, *_),) = drafts._given([replace(next(rows_of(engine, groups)), draft="ab")])
    assert given[-1] == tiny_models.EOS
    assert engine._decoder._stopping.is_end(np.array([7, tiny_models.EOS, 8])).tolist() == [True, True, False]
    monkeypatch.setattr(engine._scorer, "_end", [7])
    assert scores(engine, groups, texts) != expected, "the control: it matters which"


def rows_of(engine: Engine, groups: list[Group]) -> Iterator[Row]:
    return (row for row in engine._rows(groups) if isinstance(row, Row))


def logits_at_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many are made in each call from now on."""
    sizes, plain = list[int](), BaseModel.logits

    def watched(self: BaseModel, hidden: Tensor) -> Tensor:
        sizes.append(len(hidden) * self.vocab_size)
        return plain(self, hidden)

    monkeypatch.setattr(BaseModel, "logits", watched)
    return sizes


def test_logits_of_some_tokens_at_a_time_give_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the vocabulary: what is not learned from needs no more than these logits at once."""
    sizes = logits_at_once(monkeypatch)
    groups, texts = cases()
    expected, whole = scores(tiny_models.engine_of(LLAMA), groups, texts), sizes.copy()
    sizes.clear()
    most = 10 * tiny_models.VOCAB_SIZE
    monkeypatch.setattr(teaching, "_MAX_LOGITS", most)
    found = scores(tiny_models.engine_of(LLAMA), groups, texts)
    for key, score in expected.items():
        assert found[key].logprob == pytest.approx(score.logprob, abs=1e-4)
    assert max(sizes) <= most < max(whole), "the control: they were made at once"
    assert sum(sizes) == sum(whole)


def test_what_is_learned_from_has_all_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base, projector = BaseModel(tiny_models.random_model(LLAMA)), tiny_models.random_projector(LLAMA.hidden_size)
    rows = [LessonRow(tiny_models.user_embedding(at), (), [5, 6, 7 + at, tiny_models.EOS]) for at in range(3)]
    batch = Batch.of([Lesson((1, 2, 3), tuple(rows))], 1, base.device)
    store = PrefixStore(base, 1 << 20)
    prefixes = teaching.prefixes_of(store, base, [(1, 2, 3)])
    users = batch.user_embeddings
    assert users is not None
    sizes = logits_at_once(monkeypatch)
    monkeypatch.setattr(teaching, "_MAX_LOGITS", 5 * base.vocab_size)
    soft = projector(users).requires_grad_()
    losses = teaching.row_losses(base, soft, prefixes, batch)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert sizes == [12 * base.vocab_size]
    assert soft.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(teaching.row_losses(base, soft, prefixes, batch), losses.detach())
    assert sizes == [size * base.vocab_size for size in (12, 5, 5, 2)]


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


def test_no_pass_has_more_rows_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many contents with few rows, and one with many; with soft tokens and without."""
    sizes, plain = list[int](), Batch.of

    def watched(lessons: Sequence[Lesson], *rest: Any) -> Batch:
        sizes.append(sum(len(lesson.rows) for lesson in lessons))
        return plain(lessons, *rest)

    monkeypatch.setattr(Batch, "of", watched)
    contents = tiny_models.contents(9)
    groups = [tiny_models.group(one, range(3), without=[1]) for one in contents[:8]]
    groups.append(tiny_models.group(contents[8], range(23), without=range(1, 23, 2)))
    texts = {request.key: " text" for group in groups for request in group.requests}
    for max_rows in (5, 64):
        sizes.clear()
        scores(tiny_models.engine_of(LLAMA, max_rows=max_rows), groups, texts)
        assert sum(sizes) == 8 * 3 + 23
        assert max(sizes) <= max_rows
    assert len(sizes) == 2, "the control: as many as it may"


def test_prefixes_of_one_pass_stay_within_the_engine_s_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = tiny_models.contents(12)
    groups = [tiny_models.group(one, range(2)) for one in contents]
    texts = {request.key: " text" for each in groups for request in each.requests}
    expected, plain, found = scores(tiny_models.engine_of(LLAMA), groups, texts), PrefixStore.get, list[list[int]]()

    def watched(self: PrefixStore, lefts: Sequence[tuple[int, ...]]) -> Any:
        found.append([self.bytes_of(len(left)) for left in lefts])
        return plain(self, lefts)

    monkeypatch.setattr(PrefixStore, "get", watched)
    scores(tiny_models.engine_of(LLAMA), groups, texts)
    ((*sizes,),) = found
    assert len(sizes) == 12, "the control: together where there is room"
    for max_bytes, num_rows in ((3 * max(sizes), 2), (1, 1)):
        found.clear()
        engine = tiny_models.engine_of(LLAMA)
        engine._scorer._max_bytes = max_bytes  # less than a configuration may say
        within = scores(engine, groups, texts)
        assert all(sum(one) <= max_bytes or len(one) == 1 for one in found)
        assert sum(map(len, found)) == 24 / num_rows
        assert within.keys() == expected.keys()
        assert all(abs(within[key].logprob - expected[key].logprob) < 1e-4 for key in expected)


def test_rows_of_one_pass_have_no_more_places_than_the_engine_s_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One long text among short ones gives no short one as many places; scores stay those of their texts."""
    group = tiny_models.group(tiny_models.contents(1)[0], range(24), without=range(1, 24, 2))
    keys = [request.key for request in group.requests]
    texts = {key: "a longer text " * 20 if at in (6, 7) else f" text {at}" for at, key in enumerate(keys)}
    expected, plain, grids = scores(tiny_models.engine_of(LLAMA), [group], texts), Batch.of, list[tuple[int, int]]()

    def watched(lessons: Sequence[Lesson], *rest: Any) -> Batch:
        batch = plain(lessons, *rest)
        grids.append((batch.ids.shape[0], batch.ids.shape[1] + 1))
        return batch

    monkeypatch.setattr(Batch, "of", watched)
    scores(tiny_models.engine_of(LLAMA), [group], texts)
    assert [rows for rows, _ in grids] == [12, 12], "the control: together where there is room"
    engine = tiny_models.engine_of(LLAMA)
    num_bytes = engine._base.activation_bytes_per_token + engine._base.kv_bytes_per_token
    for max_places in (400, 100):
        grids.clear()
        prefix_bytes = engine._scorer._store.bytes_of(len(engine.layout.segments(group.content, "headline").left))
        engine._scorer._max_bytes = max_places * num_bytes + prefix_bytes
        within = scores(engine, [group], texts)
        assert all(rows * places <= max_places or rows == 1 for rows, places in grids)
        assert sum(rows for rows, _ in grids) == 24
        assert within.keys() == expected.keys()
        assert all(abs(within[key].logprob - expected[key].logprob) < 1e-3 for key in expected)
    assert len(grids) < 24, "the control: short ones go together"


@pytest.mark.parametrize(
    ("name", "layout"), [("llama", "content_first"), ("gemma2", "content_first"), ("gemma2", "soft_first")]
)
def test_attention_scores_of_some_queries_at_a_time_give_the_same(
    name: str, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the texts' lengths: what is not learned from keeps no more than these at once."""
    groups, texts = cases()
    config = tiny_models.configs()[name]
    sizes = list[int]()

    def watched(queries: Tensor, keys: Tensor, *rest: Any, **named: Any) -> Any:
        sizes.append(queries.shape[:3].numel() * keys.shape[2])
        return attention(queries, keys, *rest, **named)

    monkeypatch.setattr(teaching, "attention", watched)
    expected, whole = scores(tiny_models.engine_of(config, layout=layout), groups, texts), sizes.copy()
    sizes.clear()
    most = max(whole) // 3
    monkeypatch.setattr(teaching, "_MAX_SCORES", most)
    found = scores(tiny_models.engine_of(config, layout=layout), groups, texts)
    assert max(sizes) <= most < max(whole), "the control: they were made at once"
    assert sum(sizes) == sum(whole)
    for key, score in expected.items():
        assert found[key].logprob == pytest.approx(score.logprob, abs=1e-4)


def test_a_text_may_fill_the_window_to_its_last_token() -> None:
    engine, (group, *_) = tiny_models.engine_of(LLAMA), cases()[0]
    room = LLAMA.max_position_embeddings - engine.layout.segments(group.content, group.task).num_tokens - 2
    fitting, too_long = (
        scores(engine, [group], {r.key: "x" * size for r in group.requests}) for size in (room, room + 1)
    )
    assert {score.error_code for score in fitting.values()} == {None}
    assert {score.num_tokens for score in fitting.values()} == {room + 1}
    assert {(score.error_code, score.num_tokens) for score in too_long.values()} == {(ErrorCode.PROMPT_TOO_LONG, 0)}


def test_special_tokens_spelled_out_in_texts_stay_text() -> None:
    engine, (group, *_), text = tiny_models.engine_of(LLAMA), cases()[0], " a<|eos|>b"
    model, (request, *_) = tiny_models.random_model(LLAMA), group.requests
    found = scores(engine, [replace(group, requests=(request,))], {request.key: text})[request.key]
    assert found.num_tokens == len(text) + 1
    expected, other = (
        plain_logprob(model, engine, group, request.user_embedding, text, spelled_out=spelled_out)
        for spelled_out in (True, False)
    )
    assert found.logprob == pytest.approx(expected, abs=1e-3)
    assert found.logprob != pytest.approx(other, abs=1e-1), "the control"


def test_without_an_end_token_nothing_is_certain(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, texts = cases()
    engine = tiny_models.engine_of(LLAMA)
    monkeypatch.setattr(engine._scorer, "_end", [])
    found = scores(engine, groups, texts)
    assert {(found[key].logprob == 0, found[key].num_tokens) for key, text in texts.items() if not text} == {(True, 0)}
    assert all(found[key].num_tokens == len(text.encode()) for key, text in texts.items())
    assert all(found[key].logprob < 0 for key, text in texts.items() if text)
    assert {score.error_code for score in found.values()} == {None}


def test_the_fake_engine_keeps_the_contract() -> None:
    groups, texts = cases()
    found = scores(FakeEngine(), groups, texts)
    own = scores(FakeEngine(), groups, dict.fromkeys(texts, "another text"))
    assert all(score.logprob <= 0 for score in found.values())
    assert {score.num_tokens for score in own.values()} == {3}
    changed = [replace(group, requests=group.requests[:1]) for group in groups]
    assert len(scores(FakeEngine(), changed, texts)) == len(groups)

"""The engine's promises: a text depends on its request alone, rows end as they should, memory is bounded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from e2p_ray.config import TaskConfig
from e2p_ray.engine.admission import Admission, Bounds
from e2p_ray.engine.decode import Decoder
from e2p_ray.engine.engine import Engine
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.prompt import LeftPart
from e2p_ray.engine.rows_step import RowsStep
from e2p_ray.engine.shared_prefix import SuffixSlots
from e2p_ray.engine.wave import Ended, Wave
from e2p_ray.errors import ConfigError
from e2p_ray.generate import Generator
from e2p_ray.plan import make_plan, read_shard
from e2p_ray.schema import Completion, Content, ErrorCode, FinishReason, Group, Request, RequestKey
from e2p_ray.storage import Storage
from tests import plan_world, tiny_models
from tests.tiny_models import engine_of, group, task

LLAMA = LlamaConfig(**tiny_models.common())


def run(engine: Engine, groups: Sequence[Group], *, attempt: int = 0) -> dict[RequestKey, Completion]:
    found: dict[RequestKey, Completion] = {}
    for completion in engine.generate([replace(item, attempt=attempt) for item in groups]):
        assert completion.key not in found, "one completion a request"
        found[completion.key] = completion
    assert set(found) == {request.key for item in groups for request in item.requests}
    return found


def texts(completions: dict[RequestKey, Completion]) -> dict[RequestKey, tuple[str, FinishReason]]:
    return {key: (completion.text, completion.finish_reason) for key, completion in completions.items()}


def messy_groups(num_contents: int = 10, seed: int = 3) -> list[Group]:
    rng = np.random.default_rng(seed)
    groups, user = [], 0
    for content in tiny_models.contents(num_contents, seed=seed):
        size = int(rng.integers(1, 9))
        groups.append(group(content, range(user, user + size), without=[user] if size > 3 else []))
        user += size
    return groups


SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 7}
CONTROLLED: dict[str, Any] = {"repetition_penalty": 1.3, "no_repeat_ngram_tokens": 2}


@pytest.mark.parametrize("sampling", [{}, SAMPLED, CONTROLLED, SAMPLED | CONTROLLED], ids=str)
@pytest.mark.parametrize("layout", ["content_first", "soft_first"])
def test_texts_do_not_depend_on_batch_or_order(layout: Any, sampling: dict[str, Any]) -> None:
    tasks = {"headline": task(**sampling)}
    groups = messy_groups()
    alone = texts(run(engine_of(LLAMA, layout=layout, tasks=tasks, max_rows=1), groups))
    together = texts(run(engine_of(LLAMA, layout=layout, tasks=tasks, max_rows=64), groups))
    assert together == alone
    shuffled = [groups[at] for at in np.random.default_rng(0).permutation(len(groups))]
    shuffled = [Group(item.content, item.task, tuple(reversed(item.requests))) for item in shuffled]
    assert texts(run(engine_of(LLAMA, layout=layout, tasks=tasks, max_rows=13), shuffled)) == alone
    assert len({text for text, _ in alone.values()}) > len(alone) // 2, "the control: users and contents differ"


def test_sampled_texts_change_with_seed_and_attempt_but_not_with_neighbours() -> None:
    groups = messy_groups()
    engine = engine_of(LLAMA, tasks={"headline": task(**SAMPLED)})
    first = texts(run(engine, groups))
    assert texts(run(engine, groups)) == first
    assert texts(run(engine, groups[3:5])) == {key: first[key] for item in groups[3:5] for key in _keys(item)}
    assert texts(run(engine, groups, attempt=1)) != first
    assert texts(run(engine_of(LLAMA, tasks={"headline": task(**SAMPLED | {"seed": 8})}), groups)) != first


def _keys(item: Group) -> list[RequestKey]:
    return [request.key for request in item.requests]


def test_two_tasks_in_one_wave_keep_their_own_sampling() -> None:
    tasks = {"headline": task(max_new_tokens=4), "explanation": task("\nWhy:", max_new_tokens=9, **SAMPLED)}
    engine = engine_of(LLAMA, tasks=tasks)
    [content] = tiny_models.contents(1)
    both = [group(content, range(4)), group(content, range(4), task_name="explanation")]
    found = run(engine, both)
    for item in both:
        assert texts(run(engine, [item])) == {key: texts(found)[key] for key in _keys(item)}
    assert {found[key].num_output_tokens for key in _keys(both[0])} <= set(range(1, 5))
    assert max(found[key].num_output_tokens for key in _keys(both[1])) > 4


def test_a_wave_takes_the_slots_of_the_last_one_and_nothing_that_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = list[SuffixSlots]()
    plain = Wave.__init__

    def watched(self: Wave, slots: SuffixSlots, max_new_tokens: int) -> None:
        taken.append(slots)
        plain(self, slots, max_new_tokens)

    monkeypatch.setattr(Wave, "__init__", watched)
    contents = tiny_models.contents(3)
    tasks = {"headline": task(max_new_tokens=9, **SAMPLED), "explanation": task("\nWhy:", max_new_tokens=30, **SAMPLED)}
    engine = engine_of(LLAMA, tasks=tasks)
    many, few, more = (group(content, range(size)) for content, size in zip(contents, (30, 7, 40), strict=True))
    longer = group(contents[0], range(40), task_name="explanation")
    new, again = False, True
    for part, is_same in (
        (many, new), (few, again), (many, again), (more, new), (few, again), (longer, new), (few, new),
    ):  # fmt: skip
        found = texts(run(engine, [part]))
        assert (len(taken) > 1 and taken[-1] is taken[-2]) == is_same
        assert found == texts(run(engine_of(LLAMA, tasks=tasks), [part]))
        del taken[-1]


def test_a_content_is_prefilled_once_and_a_user_costs_one_token() -> None:
    engine = engine_of(LLAMA)
    [content] = tiny_models.contents(1)
    completions = run(engine, [group(content, range(50))])
    length = len(engine.layout.segments(content, "headline").left)
    assert engine.stats.num_prefix_tokens == length
    assert engine.stats.num_computed_tokens == length + 50
    assert engine.stats.num_prompt_tokens == 50 * (length + 1)
    assert {completion.num_prompt_tokens for completion in completions.values()} == {length + 1}


def test_mean_logprob_is_that_of_the_chosen_tokens() -> None:
    config = LLAMA
    engine = engine_of(config)
    [content] = tiny_models.contents(1)
    [completion] = run(engine, [group(content, [1])]).values()
    model = tiny_models.random_model(config)
    left = model.get_input_embeddings()(torch.tensor(engine.layout.segments(content, "headline").left))
    soft = engine._decoder._projector(torch.from_numpy(tiny_models.user_embedding(1))[None])[0]
    output = model.generate(
        inputs_embeds=torch.cat([left, soft])[None],
        max_new_tokens=8,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    chosen = [torch.log_softmax(step[0], -1).max() for step in output.logits]
    assert completion.mean_logprob == pytest.approx(float(torch.stack(chosen).mean()), abs=1e-4)


class TestEndings:
    content = Content("c0", "Bridge plan", "A new bridge over the river.", "en")

    def test_end_token(self) -> None:
        engine = engine_of(LLAMA, tasks={"headline": task(max_new_tokens=200)})
        found = run(engine, [group(self.content, range(40))]).values()
        ended = [item for item in found if item.finish_reason is FinishReason.END_TOKEN]
        assert ended
        assert all("<|" not in item.text for item in found)
        assert all(item.num_output_tokens == 200 for item in found if item.finish_reason is FinishReason.MAX_TOKENS)

    def test_stop_string(self) -> None:
        plain = run(engine_of(LLAMA, tasks={"headline": task(max_new_tokens=30)}), [group(self.content, range(40))])
        key, long = max(plain.items(), key=lambda item: len(item[1].text.strip()))
        stop = long.text.strip()[3:5]
        stopped = run(
            engine_of(LLAMA, tasks={"headline": task(max_new_tokens=30, stop=(stop,))}),
            [group(self.content, range(40))],
        )
        assert stopped[key].finish_reason is FinishReason.STOP_STRING
        assert stopped[key].text == long.text[: long.text.index(stop)]
        assert stopped[key].num_output_tokens < long.num_output_tokens
        for other, completion in stopped.items():
            assert stop not in completion.text
            assert plain[other].text.startswith(completion.text)

    def test_a_stop_string_of_several_bytes_is_found_when_its_last_byte_comes(self) -> None:
        from e2p_ray.engine.stopping import Stopping

        sampling = task(stop=("。",), max_new_tokens=99).sampling
        stopping = Stopping(tiny_models.byte_tokenizer(), tiny_models.VOCAB_SIZE, [257], {"headline": sampling})
        ids = tiny_models.byte_tokenizer().encode("橋。", add_special_tokens=False)
        assert stopping.reason(np.array(ids[:-1]), sampling) is None
        last = np.array([ids[-1], *tiny_models.byte_tokenizer().encode("a", add_special_tokens=False)])
        assert stopping.may_stop(stopping.number_of(sampling.stop), last).tolist() == [True, False]
        assert not stopping.may_stop(stopping.number_of(()), last).any()
        assert stopping.reason(np.array(ids), sampling) is FinishReason.STOP_STRING
        assert stopping.text(np.array(ids), sampling) == "橋"

    def test_leading_white_space_is_not_a_stop(self) -> None:
        from e2p_ray.engine.stopping import Stopping

        sampling = task(stop=("\n",)).sampling
        stopping = Stopping(tiny_models.byte_tokenizer(), tiny_models.VOCAB_SIZE, [257], {"headline": sampling})
        ids = np.array(tiny_models.byte_tokenizer().encode("\n New bridge\n", add_special_tokens=False))
        assert stopping.reason(ids[:2], sampling) is None
        assert stopping.reason(ids, sampling) is FinishReason.STOP_STRING
        assert stopping.text(ids, sampling) == "New bridge"

    def test_max_chars(self) -> None:
        engine = engine_of(LLAMA, tasks={"headline": task(max_new_tokens=60, max_chars=5)})
        found = run(engine, [group(self.content, range(40))]).values()
        assert any(item.finish_reason is FinishReason.MAX_CHARS for item in found)
        assert all(len(item.text) <= 5 for item in found)

    def test_repetition_control_holds(self) -> None:
        engine = engine_of(LLAMA, tasks={"headline": task(max_new_tokens=60, no_repeat_ngram_tokens=2)})
        trace: dict[RequestKey, list[int]] = {}
        plain = Decoder._completion

        def spy(self: Decoder, ended: Ended) -> Completion:
            trace[ended.row.key] = ended.tokens.tolist()
            return plain(self, ended)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Decoder, "_completion", spy)
            run(engine, [group(self.content, range(10))])
        for tokens in trace.values():
            pairs = list(itertools.pairwise(tokens))
            assert len(pairs) == len(set(pairs))


def let_none_in(poison: RequestKey, patch: pytest.MonkeyPatch) -> None:
    """No memory for a wave that this request would be in."""
    plain = Decoder._enter

    def limited(self: Decoder, wave: Any, rows: Any, prefixes: Any) -> None:
        if any(row.key == poison for row in rows):
            raise MemoryError("made by the test")
        plain(self, wave, rows, prefixes)

    patch.setattr(Decoder, "_enter", limited)


class TestTrouble:
    def test_out_of_memory_halves_the_wave_and_loses_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        groups = messy_groups()
        expected = texts(run(engine_of(LLAMA), groups))
        plain = BaseModel.hidden

        def limited(self: BaseModel, inputs_embeds: Any, position_ids: Any, step: Any) -> Any:
            if isinstance(step, RowsStep) and inputs_embeds.shape[1] > 9:
                raise torch.OutOfMemoryError("CUDA out of memory (made by the test)")
            return plain(self, inputs_embeds, position_ids, step)

        monkeypatch.setattr(BaseModel, "hidden", limited)
        engine = engine_of(LLAMA, max_rows=64)
        assert texts(run(engine, groups)) == expected
        assert engine._decoder.bounds.max_rows < 64

    def test_a_request_counts_once_however_often_memory_runs_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        groups, plain, num_passes, num_failed = messy_groups(), BaseModel.hidden, 0, 0

        def limited(self: BaseModel, inputs_embeds: Any, position_ids: Any, step: Any) -> Any:
            nonlocal num_passes, num_failed
            num_passes += isinstance(step, RowsStep)
            if isinstance(step, RowsStep) and num_passes in (3, 7):  # rows are on their way
                num_failed += 1
                raise torch.OutOfMemoryError("CUDA out of memory (made by the test)")
            return plain(self, inputs_embeds, position_ids, step)

        monkeypatch.setattr(BaseModel, "hidden", limited)
        tasks = {"headline": task(max_new_tokens=8).model_copy(update={"max_content_tokens": 8})}
        engine = engine_of(LLAMA, max_rows=64, tasks=tasks)
        found = run(engine, groups).values()
        assert num_failed == 2
        assert engine.stats.num_prompt_tokens == sum(one.num_prompt_tokens for one in found)
        assert engine.stats.num_truncated == sum(one.truncated for one in found) > 0

    def test_a_row_that_never_fits_becomes_an_error_and_the_others_go_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        groups = messy_groups(4)
        poison = groups[1].requests[0].key
        let_none_in(poison, monkeypatch)
        found = run(engine_of(LLAMA), groups)
        assert {key for key, item in found.items() if item.error_code} == {poison}
        assert found[poison].error_code is ErrorCode.OUT_OF_MEMORY
        assert found[poison].text == ""

    def test_once_it_is_given_up_waves_are_as_large_as_before(self, monkeypatch: pytest.MonkeyPatch) -> None:
        groups = messy_groups(4)
        poison = groups[1].requests[0].key

        def next_call() -> tuple[Bounds, int]:
            """Bounds after a call with that row, and the steps of one without it."""
            with monkeypatch.context() as patch:
                let_none_in(poison, patch)
                engine = engine_of(LLAMA)
                assert [key for key, item in run(engine, groups).items() if item.error_code] == [poison]
            bounds, num_steps = engine._decoder.bounds, engine.stats.num_steps
            run(engine, groups)
            return bounds, engine.stats.num_steps - num_steps

        fresh = engine_of(LLAMA)
        run(fresh, groups)
        bounds, num_steps = next_call()
        assert bounds == fresh._decoder.bounds
        assert num_steps <= fresh.stats.num_steps + 1
        monkeypatch.setattr(Admission, "passed", lambda *_: None)
        bounds, num_steps = next_call()
        assert bounds.max_rows == 1, "the control"
        assert num_steps > 5 * fresh.stats.num_steps, "the control"

    def test_waves_grow_again_when_memory_comes_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        groups = messy_groups()
        engine = engine_of(LLAMA, max_rows=16)
        given, expected = engine._decoder.bounds, texts(run(engine, groups))
        plain = BaseModel.hidden

        def limited(self: BaseModel, inputs_embeds: Any, position_ids: Any, step: Any) -> Any:
            if isinstance(step, RowsStep) and inputs_embeds.shape[1] > 5:
                raise torch.OutOfMemoryError("CUDA out of memory (made by the test)")
            return plain(self, inputs_embeds, position_ids, step)

        with monkeypatch.context() as patch:
            patch.setattr(BaseModel, "hidden", limited)
            assert texts(run(engine, groups)) == expected
        assert engine._decoder.bounds.max_rows < 16
        for _ in range(3):
            assert texts(run(engine, groups)) == expected
        assert engine._decoder.bounds == given

    def test_other_errors_are_not_taken_for_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*args: Any) -> None:
            raise RuntimeError("shape mismatch")

        monkeypatch.setattr(BaseModel, "hidden", broken)
        with pytest.raises(RuntimeError, match="shape mismatch"):
            run(engine_of(LLAMA), messy_groups(2))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_logits_that_are_not_finite_never_become_text(self, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
        groups = messy_groups(4)
        expected = texts(run(engine_of(LLAMA), groups))
        poison = groups[2].requests[0].key
        plain = Decoder._pick

        def poisoned(self: Decoder, wave: Any, slots: Any, written: Any, num_written: Any, logits: Any) -> Any:
            for at, (slot, step) in enumerate(zip(slots, num_written, strict=True)):
                if wave.rows[slot].key == poison and step == 3:
                    logits = logits.clone()
                    logits[at, 17] = bad
            return plain(self, wave, slots, written, num_written, logits)

        tiny_models.choose_by_logits(monkeypatch)
        monkeypatch.setattr(Decoder, "_pick", poisoned)
        found = run(engine_of(LLAMA), groups)
        assert found[poison].error_code is ErrorCode.NON_FINITE_LOGITS
        assert found[poison].text == ""
        assert {k: v for k, v in texts(found).items() if k != poison} == {
            k: v for k, v in expected.items() if k != poison
        }

    def test_a_user_embedding_with_nan_spoils_no_other_row(self) -> None:
        groups = messy_groups(6)
        expected = texts(run(engine_of(LLAMA), groups))
        poison = groups[2].requests[1].key
        bad = Request(poison, np.full(tiny_models.EMBEDDING_DIM, np.nan, np.float32))
        requests = tuple(bad if request.key == poison else request for request in groups[2].requests)
        groups[2] = Group(groups[2].content, groups[2].task, requests)
        for max_rows in (3, 64):  # 3: its slot is used again
            found = run(engine_of(LLAMA, max_rows=max_rows), groups)
            assert found[poison].error_code is ErrorCode.NON_FINITE_LOGITS
            assert {k: v for k, v in texts(found).items() if k != poison} == {
                k: v for k, v in expected.items() if k != poison
            }

    def test_a_prompt_without_room_is_an_error_of_its_rows(self) -> None:
        tasks = {"headline": task(), "long": task("x" * 600)}
        [content] = tiny_models.contents(1)
        found = run(engine_of(LLAMA, tasks=tasks), [group(content, [1, 2], task_name="long"), group(content, [1])])
        codes = {key.task: item.error_code for key, item in found.items()}
        assert codes == {"long": ErrorCode.PROMPT_TOO_LONG, "headline": None}

    def test_a_language_without_template_is_an_error_of_its_rows(self) -> None:
        from e2p_ray.config import PromptTemplate

        engine = engine_of(
            LLAMA, tasks={"headline": TaskConfig(prompts={"ja": PromptTemplate(), "fr": PromptTemplate()})}
        )
        found = run(engine, messy_groups())
        language_of = {content.content_id: content.language for content in tiny_models.contents(10, seed=3)}
        for key, completion in found.items():
            expected = ErrorCode.NO_PROMPT if language_of[key.content_id] == "en" else None
            assert completion.error_code is expected
        assert engine.prompt_id("headline", "fr-CA") == engine.prompt_id("headline", "fr")
        assert engine.prompt_id("headline", "en") != engine.prompt_id("headline", "ja")
        with pytest.raises(ConfigError, match="'recipe'"):
            engine.layout.segments(tiny_models.contents(1)[0], "recipe")

    def test_a_long_body_keeps_its_head(self) -> None:
        content = Content("c0", "Bridge", "橋" * 5000, "ja")
        engine = engine_of(LLAMA)
        [completion] = run(engine, [group(content, [1])]).values()
        assert completion.truncated
        assert engine.stats.num_truncated == 1
        assert completion.num_prompt_tokens + 8 <= LLAMA.max_position_embeddings
        left = engine.layout.segments(content, "headline").left
        decoded = tiny_models.byte_tokenizer().decode(left, skip_special_tokens=True)
        assert decoded.startswith("News. Bridge\n\n橋橋")
        assert decoded.endswith("橋\n>")

    def test_special_tokens_in_a_content_stay_text(self) -> None:
        content = Content("c0", "Bridge", "<|eos|> {title} <|bos|>", "en")
        left = engine_of(LLAMA).layout.segments(content, "headline").left
        assert tiny_models.EOS not in left
        assert left.count(tiny_models.BOS) == 1
        assert "<|eos|> {title} <|bos|>" in tiny_models.byte_tokenizer().decode(left)

    def test_the_generator_can_be_left_early_and_used_again(self) -> None:
        groups = messy_groups()
        engine = engine_of(LLAMA, max_rows=4)
        expected = texts(run(engine_of(LLAMA), groups))
        stream = engine.generate(groups)
        next(stream)
        del stream
        assert texts(run(engine, groups)) == expected

    @pytest.mark.parametrize("max_rows", [4, 64])
    def test_generators_that_are_read_by_turns_or_left_take_nothing_from_each_other(self, max_rows: int) -> None:
        both = [[group(content, range(at, at + 20))] for at, content in enumerate(tiny_models.contents(2))]
        expected = [texts(run(engine_of(LLAMA), groups)) for groups in both]
        engine = engine_of(LLAMA, max_rows=max_rows)
        pairs = list(zip(*map(engine.generate, both), strict=True))
        assert [texts({one.key: one for one in found}) for found in zip(*pairs, strict=True)] == expected
        left = engine.generate(both[0])
        next(left)
        second = engine.generate(both[1])
        found = [next(second)]
        del left  # closes it
        found += second
        assert texts({one.key: one for one in found}) == expected[1]

    def test_a_second_call_over_the_same_content_costs_no_second_prefill(self) -> None:
        groups = messy_groups(5)
        engine = engine_of(LLAMA)
        first = texts(run(engine, groups))
        computed = engine.stats.num_prefix_tokens
        assert texts(run(engine, groups)) == first
        assert engine.stats.num_prefix_tokens == computed

    def test_groups_are_read_a_wave_ahead_at_most(self) -> None:
        taken: list[str] = []

        def source() -> Any:
            for content in tiny_models.contents(60):
                taken.append(content.content_id)
                yield group(content, range(2))

        stream = engine_of(LLAMA, max_rows=8).generate(source())
        next(stream)
        assert len(taken) <= 8


def test_memory_bound_limits_the_wave(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    plain = BaseModel.hidden

    def watch(self: BaseModel, inputs_embeds: Any, position_ids: Any, step: Any) -> Any:
        if isinstance(step, RowsStep):
            sizes.append(len(step.tokens.end))
        return plain(self, inputs_embeds, position_ids, step)

    monkeypatch.setattr(BaseModel, "hidden", watch)
    groups = messy_groups(30)
    expected = texts(run(engine_of(LLAMA, max_rows=64), groups))
    unbounded = sizes[0]
    sizes.clear()
    assert texts(run(engine_of(LLAMA, max_rows=64, max_bytes=1 << 20), groups)) == expected
    assert 1 <= sizes[0] < unbounded


def test_memory_does_not_grow_with_the_users_of_a_content(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of slots, prefixes, what is written, and what waits: beyond a wave, users add none."""
    content, found, plain = tiny_models.contents(1)[0], list[int](), Decoder._choose

    def watched(self: Decoder, wave: Wave, *rest: Any) -> Any:
        kept = [*self.store._kept.values(), *(prefix for prefix in wave.prefixes if prefix is not None)]
        tensors = [*wave.slots.keys, *wave.slots.values, *(one for prefix in kept for one in prefix.keys)]
        parts = [one.untyped_storage() for one in tensors]
        num_rows = len(self._call.pending) + len(wave.rows)
        num_bytes = sum({part.data_ptr(): part.nbytes() for part in parts}.values())
        found.append(num_bytes + wave.written.nbytes + wave.logprobs.nbytes + 1000 * num_rows)
        return plain(self, wave, *rest)

    monkeypatch.setattr(Decoder, "_choose", watched)

    def most_bytes(num_users: int, max_rows: int) -> int:
        found.clear()
        assert len(run(engine_of(LLAMA, max_rows=max_rows), [group(content, range(num_users))])) == num_users
        return max(found)

    few, many = most_bytes(16, 8), most_bytes(128, 8)
    assert many == few
    assert most_bytes(128, 32) > 2 * few, "the control"


@pytest.mark.parametrize("num_waves", [1, 2])
def test_less_memory_than_was_thought_is_found_out_ever_more_rarely(num_waves: int) -> None:
    bounds = Bounds(4096, 1 << 30)
    admission = Admission(BaseModel(tiny_models.random_model(LLAMA)), 1, bounds, num_waves)

    def num_failures(num_passes: int, room: int) -> int:
        found = 0
        for _ in range(num_passes):
            num_rows = admission.bounds.max_rows
            if num_rows * admission.num_waves <= room:
                admission.passed(num_rows)
            else:
                found += admission.halve(4096)
        return found

    assert num_failures(1000, room=700) <= 3 + np.log2(1000 / 32 + 1)
    assert num_failures(31_000, room=700) <= 5, "each only after twice as many passes as the one before"
    assert admission.bounds.max_rows in (512, 1024)
    assert num_failures(40_000, room=4096) == 0
    assert admission.bounds.times(admission.num_waves) == bounds, "the control"
    num_passes = admission._patience_passes
    admission.halve(4096)
    assert admission._patience_passes == num_passes, "what went well for so long was no trial"


class TestSecondTask:
    """Two tasks of one content differ in their cues: what stands before is computed once."""

    tasks: ClassVar = {
        "headline": task("\nHeadline:", max_new_tokens=6),
        "teaser": task("\nOne line for you:", cue_after=" >", max_new_tokens=6),
    }

    def groups(self, *names: str) -> list[Group]:
        contents = tiny_models.contents(5)
        return [group(content, range(3), task_name=name, without=[1]) for content in contents for name in names]

    def test_only_the_cue_is_computed_and_texts_are_the_same(self) -> None:
        expected: dict[RequestKey, Completion] = {}
        for name in self.tasks:
            expected |= run(engine_of(LLAMA, tasks=self.tasks), self.groups(name))
        engine = engine_of(LLAMA, tasks=self.tasks)
        found = run(engine, self.groups("headline", "teaser"))
        assert texts(found) == texts(expected)
        assert [found[key].mean_logprob for key in found] == pytest.approx([expected[k].mean_logprob for k in found])
        segments = [
            [engine.layout.segments(item.content, name) for name in self.tasks] for item in self.groups("headline")
        ]
        once = sum(len(first.left) + len(second.left) - second.num_stem for first, second in segments)
        assert engine.stats.num_prefix_tokens == once
        assert once < 0.6 * sum(len(first.left) + len(second.left) for first, second in segments)

    def test_across_calls_and_when_there_is_room_for_little(self) -> None:
        engine = engine_of(LLAMA, tasks=self.tasks)
        expected = run(engine, self.groups("headline", "teaser"))
        later = engine_of(LLAMA, tasks=self.tasks)
        found = run(later, self.groups("teaser")) | run(later, self.groups("headline"))
        assert later.stats.num_prefix_tokens < engine.stats.num_prefix_tokens * 1.2
        small = engine_of(LLAMA, tasks=self.tasks, max_rows=2, max_bytes=1 << 20)
        assert texts(found) == texts(expected) == texts(run(small, self.groups("headline", "teaser")))

    def test_other_words_before_the_content_share_nothing(self) -> None:
        other = task("\nHeadline:", max_new_tokens=6)
        prompt = other.prompts["default"].model_copy(update={"head": "Weather. "})
        tasks = self.tasks | {"teaser": other.model_copy(update={"prompts": {"default": prompt}})}
        engine = engine_of(LLAMA, tasks=tasks)
        run(engine, self.groups("headline", "teaser"))
        lefts = [
            len(engine.layout.segments(item.content, item.task).left) for item in self.groups("headline", "teaser")
        ]
        assert engine.stats.num_prefix_tokens == sum(lefts)


def test_over_the_shards_of_a_plan_each_content_is_computed_once(tmp_path: Path) -> None:
    """One worker, one shard after the other: a hot content lies in several of them, and its groups in all of these."""
    users = [plan_world.user(f"u{n:02d}", tiny_models.user_embedding(n).tolist()) for n in range(24)]
    contents = {content.content_id: content for content in tiny_models.contents(5)}
    rows = [plan_world.content(c.content_id, c.title, c.body, language=c.language) for c in contents.values()]
    pairs = [(n, "c0") for n in range(24)] + [(n * 4 + k, f"c{k}") for k in range(1, 5) for n in range(5 - k)]
    candidates = [plan_world.candidate(f"u{n:02d}", name) for n, name in pairs]
    world = plan_world.World(users, rows, candidates)
    tasks = {"explanation": task("\nWhy:", max_new_tokens=3), "headline": task("\nHeadline:", max_new_tokens=3)}
    config = plan_world.job(world.write(tmp_path / "in"), tmp_path / "out", requests_per_shard=12, max_group_requests=6)
    config = config.model_copy(update={"tasks": tasks})
    storage = Storage()
    space = {"embedding_space": plan_world.SPACE, "embedding_dim": tiny_models.EMBEDDING_DIM}
    plan = make_plan(config, storage, **space)  # type: ignore[arg-type]
    shards = [read_shard(storage, plan.uri, entry.shard_id) for entry in plan.shards]
    assert sum(any(one.content.content_id == "c0" for one in groups) for groups in shards) >= 4

    def computed(engine: Engine) -> int:
        generator = Generator(engine, config, "run")
        for groups in shards:
            generations, dead_letters = generator.generate(groups)
            assert (len(generations), len(dead_letters)) == (sum(len(one.requests) for one in groups), 0)
        return engine.stats.num_prefix_tokens

    engine = engine_of(LLAMA, tasks=tasks, max_rows=8)
    once = 0
    for content in contents.values():
        first, second = (engine.layout.segments(content, name) for name in tasks)
        once += len(first.left) + len(second.left) - second.num_stem
    assert computed(engine) == once
    without_room = engine_of(LLAMA, tasks=tasks, max_rows=8)
    without_room._decoder.store.max_bytes = 0
    assert computed(without_room) > 2 * once, "the control"


def test_a_left_part_is_found_by_its_ids_and_hashed_once() -> None:
    num_hashed = 0

    class Counted(int):
        def __hash__(self) -> int:
            nonlocal num_hashed
            num_hashed += 1
            return super().__hash__()

    left, plain = LeftPart([Counted(3), 4]), (Counted(3), 4)
    found: dict[tuple[int, ...], str] = {left: "prefix"}
    assert found[3, 4] == found[left] == "prefix"
    assert num_hashed == 1
    assert {plain: "prefix"}[plain] == "prefix"
    assert num_hashed == 3, "the control: a tuple is hashed each time"

"""Projector training: gradients against plain full sequences, and what a trained projector has learned."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from e2p_ray.config import PromptTemplate, SamplingConfig, TaskConfig
from e2p_ray.demo.configs import BASE_MODEL
from e2p_ray.engine.lesson import Batch, Lesson, LessonRow
from e2p_ray.engine.manifest import BaseModelFolder
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.prefixes import PrefixStore
from e2p_ray.engine.projector import Projector
from e2p_ray.engine.prompt import load_tokenizer
from e2p_ray.engine.shared_prefix import Prefix
from e2p_ray.engine.teaching import prefixes_of
from e2p_ray.errors import ConfigError, RunError
from e2p_ray.schema import Content
from e2p_ray.train.lessons import Target, UserTable, lessons_of, make_lessons
from e2p_ray.train.loss import target_loss
from e2p_ray.train.projector import new_projector, train_projector
from e2p_ray.train.score import score
from e2p_ray.train.settings import TrainSettings
from tests.tiny_models import EOS, VOCAB_SIZE, byte_tokenizer

FOLDER = BaseModelFolder(Path("."), "tiny@0", "0")
# Weights so wide that every token matters and a model has preferences.
_SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SMALL, intermediate_size=48, num_key_value_heads=2),
    "mistral-window": MistralConfig(**_SMALL, intermediate_size=48, num_key_value_heads=2, sliding_window=7),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3),
}
TASKS = {
    "headline": TaskConfig(
        prompts={"default": PromptTemplate(cue_before="\n\nHeadline:")}, sampling=SamplingConfig(max_new_tokens=8)
    )
}


def _tiny(name: str) -> tuple[BaseModel, PreTrainedModel]:
    """The engine's view of a random model, and a twin that attends in transformers' own way."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_config(deepcopy(CONFIGS[name]))
    twin = AutoModelForCausalLM.from_config(deepcopy(CONFIGS[name]), attn_implementation="eager")
    twin.load_state_dict(base.state_dict())
    return BaseModel(base), twin.eval().requires_grad_(False)


def _lessons(left: int, right: int) -> list[Lesson]:
    """Three contents of unequal lengths with one to three rows, targets of unequal lengths, one of them weighted."""
    random = np.random.default_rng(5)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(random.integers(97, size=count).tolist())

    lessons = []
    for extra, num_rows in ((0, 3), (4, 1), (9, 2)):
        before, after = ids(left + extra) if left else (), ids(right + (0 if left else extra))
        rows = [
            LessonRow(random.normal(size=6).astype(np.float32), after, ids(3 + row), 0.5 if row == 1 else 1.0)
            for row in range(num_rows)
        ]
        lessons.append(Lesson(before, tuple(rows)))
    return lessons


def _users(num_users: int = 50) -> UserTable:
    vectors = np.random.default_rng(2).normal(size=(num_users, 6)).astype(np.float32)
    return UserTable([f"u{i}" for i in range(num_users)], vectors, "space")


def _projector(base: BaseModel, num_soft_tokens: int) -> Projector:
    torch.manual_seed(3)
    projector = new_projector(base, FOLDER, _users(), TrainSettings(hidden_dim=16, num_soft_tokens=num_soft_tokens))
    for parameter in projector.parameters():  # an untrained one has zero weights, whose gradients would hide mistakes
        nn.init.normal_(parameter, std=0.3)
    return projector


def _plain_loss(model: PreTrainedModel, projector: Projector, lessons: list[Lesson]) -> Tensor:
    """Every row alone, its whole sequence with gradient, through transformers' own forward."""
    table = model.get_input_embeddings()
    total, weight = torch.zeros(()), 0.0
    for lesson in lessons:
        for row in lesson.rows:
            left = table(torch.tensor(lesson.left, dtype=torch.long))
            right = table(torch.tensor((*row.right, *row.target[:-1]), dtype=torch.long))
            soft = projector(torch.from_numpy(row.user_embedding)[None])[0]
            logits = model(inputs_embeds=torch.cat([left, soft, right])[None]).logits[0, -len(row.target) :]
            losses = nn.functional.cross_entropy(logits, torch.tensor(row.target), reduction="sum")
            total = total + row.weight * losses
            weight += row.weight * len(row.target)
    return total / weight


def mean_loss(base: BaseModel, projector: Projector, prefixes: Sequence[Prefix], batch: Batch) -> Tensor:
    loss, weight = target_loss(base, projector, prefixes, batch)
    return loss / weight


def _gradients(projector: Projector, loss: Tensor) -> dict[str, Tensor]:
    projector.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in projector.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("left", "right", "num_soft"), [(5, 0, 1), (5, 3, 2), (0, 6, 1)], ids=["soft_last", "cue_after", "soft_first"]
)
def test_gradients_equal_plain_training(name: str, left: int, right: int, num_soft: int) -> None:
    base, twin = _tiny(name)
    projector, lessons = _projector(base, num_soft), _lessons(left, right)
    prefixes = prefixes_of(PrefixStore(base, 1 << 20), base, [lesson.left for lesson in lessons])
    batch = Batch.of(lessons, num_soft, base.device)
    assert int(batch.num_tokens.sum()) == sum(len(row.target) for lesson in lessons for row in lesson.rows)
    loss = mean_loss(base, projector, prefixes, batch)
    plain = _plain_loss(twin, projector, lessons)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    found, wanted = _gradients(projector, loss), _gradients(projector, plain)
    assert found.keys() == wanted.keys() == dict(projector.named_parameters()).keys()
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6)

    if left and name != "mistral-window":  # the control: a wrong first token in every content is seen
        wrong = [(97 - lesson.left[0], *lesson.left[1:]) for lesson in lessons]
        wrong_prefixes = prefixes_of(PrefixStore(base, 1 << 20), base, wrong)
        other = mean_loss(base, projector, wrong_prefixes, batch)
        assert abs(other.item() - plain.item()) > 1e-3 * plain.item()


def test_prefixes_are_kept_within_bounds() -> None:
    base, _ = _tiny("llama")
    lefts = [tuple(range(start, start + 10)) for start in range(4)]
    store = PrefixStore(base, max_bytes=25 * base.kv_bytes_per_token)
    first = store.get(lefts[:2])[0]
    assert store.get(lefts[:2])[0] is first, "a kept prefix is not computed again"
    store.get(lefts[2:])
    again = store.get(lefts[:1])[0]
    assert again is not first, "the least recently used ones were dropped"
    assert first is not None
    assert again is not None
    torch.testing.assert_close(again.keys[1], first.keys[1])
    assert store.num_bytes <= store.max_bytes


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(BASE_MODEL)


def _school(tokenizer: PreTrainedTokenizerBase) -> tuple[BaseModel, UserTable, list[Content], list[Target]]:
    """A random model and users whose sign on one axis decides which of two texts they want."""
    torch.manual_seed(0)
    small = _SMALL | {"vocab_size": len(tokenizer)}
    config = LlamaConfig(**small, intermediate_size=48, num_key_value_heads=2)
    users = _users()
    contents = [Content(f"c{i}", f"Title {i}", "A body.", "en") for i in range(3)]
    wants = ["money" if vector[0] > 0 else "health" for vector in users.user_embeddings]
    targets = [
        Target(user_id, f"c{i % 3}", "headline", want)
        for i, (user_id, want) in enumerate(zip(users.user_ids, wants, strict=True))
    ]
    return BaseModel(AutoModelForCausalLM.from_config(config)), users, contents, targets


def test_training_learns_from_the_user_embedding_and_leaves_the_base_model(tokenizer: PreTrainedTokenizerBase) -> None:
    base, users, contents, targets = _school(tokenizer)
    before = base.weights_hash()
    settings = TrainSettings(num_steps=80, contents_per_step=3, warmup_steps=5, learning_rate=1e-2, hidden_dim=32)
    seen: list[int] = []

    def train(table: UserTable) -> float:
        result = train_projector(
            base, FOLDER, tokenizer, TASKS, table, contents, targets, settings, lambda step, _: seen.append(step)
        )
        assert result.base_model_hash == before == base.weights_hash()
        assert result.num_examples == len(targets)
        return float(np.mean(result.losses[-10:]))

    own = train(users)
    assert seen == list(range(1, 81))
    assert own == train(users), "the same seed gives the same losses"
    constant = replace(users, user_embeddings=np.tile(users.user_embeddings[:1], (50, 1)))
    assert own < 0.95 * train(constant), "without knowing the user the two texts cannot be told apart"


def test_unusable_targets_are_skipped_and_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    base, users, contents, targets = _school(tokenizer)
    bad = [
        Target("nobody", "c0", "headline", "x"),
        Target("u0", "gone", "headline", "x"),
        Target("u0", "c0", "headline", " "),
    ]
    settings = TrainSettings()
    lessons, skipped = make_lessons(tokenizer, TASKS, users, contents, targets + bad, settings, base.max_positions)
    assert skipped == {"unknown_user": 1, "missing_content": 1, "empty_text": 1, "prompt_too_long": 0}
    assert lessons.num_rows == len(targets) == len(lessons.source)
    with pytest.raises(ConfigError, match="none of the 3 targets"):
        make_lessons(tokenizer, TASKS, users, contents, bad, settings, base.max_positions)


def test_a_target_that_does_not_fit_behind_its_prompt_is_skipped() -> None:
    """GPT-2 has no position behind its window; a prompt leaves room for what is generated, a target may be longer."""
    window = 128
    base = BaseModel(
        AutoModelForCausalLM.from_config(
            GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=window)
        )
    )
    users, contents = _users(), [Content("long", "", "word " * 60, "en"), Content("short", "", "word", "en")]
    texts = ["x" * size for size in (3, 8, 9, 40)]
    targets = [
        Target(f"u{at}", content.content_id, "headline", text) for content in contents for at, text in enumerate(texts)
    ]
    settings = TrainSettings(num_steps=4, max_target_tokens=64, users_per_content=8)
    for num_soft in (1, 2):
        soft = replace(settings, num_soft_tokens=num_soft)
        lessons, skipped = make_lessons(byte_tokenizer(), TASKS, users, contents, targets, soft, window)
        # The prompt and the 8 tokens it leaves room for fill the window. The last one of a target is only predicted.
        assert len(lessons.lefts[0]) + num_soft + 8 == window
        assert [texts[source % 4] for source in lessons.source] == [*texts[:2], *texts]
        assert skipped["prompt_too_long"] == 2
        assert np.isfinite(score(base, None, lessons, PrefixStore(base, 1 << 20)).nll).all()
        result = train_projector(base, FOLDER, byte_tokenizer(), TASKS, users, contents, targets, soft)
        assert np.isfinite(result.losses).all()
    long_only = [target for target in targets if target.content_id == "long" and len(target.text) > 8]
    lessons, _ = make_lessons(byte_tokenizer(), TASKS, users, contents, [*long_only, targets[4]], settings, window)
    assert len(lessons) == 1, "a content without a target that fits is no lesson"


def test_a_target_that_is_cut_does_not_end_there() -> None:
    tokenizer, users = byte_tokenizer(), _users()
    contents = [Content("c0", "Title", "A body.", "en")]
    texts = ["1234567", "12345678", "123456789", "1234567890" * 4]
    targets = [Target(f"u{at}", "c0", "headline", text) for at, text in enumerate(texts)]
    settings = TrainSettings(max_target_tokens=8)
    lessons, skipped, num_truncated = lessons_of(tokenizer, TASKS, users, contents, targets, settings, 512)
    found = [lessons.targets[row].tolist() for row in range(4)]
    assert found == [[*tokenizer.encode("1234567"), EOS], *[tokenizer.encode("12345678")] * 3]
    assert num_truncated == 3
    assert not any(skipped.values())


def test_a_special_token_spelled_out_in_a_target_is_text() -> None:
    tokenizer = byte_tokenizer()
    text = "The end<|eos|> of it"
    given = [Target("u0", "c0", "headline", text)]
    lessons, _ = make_lessons(
        tokenizer, TASKS, _users(), [Content("c0", "Title", "", "en")], given, TrainSettings(max_target_tokens=64), 512
    )
    ids = lessons.targets[0].tolist()
    assert ids.index(EOS) == len(ids) - 1 == len(text)
    assert EOS in tokenizer.encode(text), "control: elsewhere it is the end token"


@pytest.mark.parametrize(
    ("language", "wanted"), [("en", " "), ("en-US", " "), ("en_GB", " "), ("ja-JP", ""), ("fr", ">"), ("", ">")]
)
def test_what_stands_before_a_target_is_looked_up_as_its_prompt_is(language: str, wanted: str) -> None:
    prefixes = {"en": " ", "ja": "", "default": ">"}
    given = [Target("u0", "c0", "headline", "text")]
    content = Content("c0", "Title", "", language)
    settings = TrainSettings(target_prefix=prefixes)
    lessons, _ = make_lessons(byte_tokenizer(), TASKS, _users(), [content], given, settings, 512)
    assert byte_tokenizer().decode(lessons.targets[0][:-1]) == f"{wanted}text"
    task = TaskConfig(prompts={name: PromptTemplate(cue_before=prefix) for name, prefix in prefixes.items()})
    found = task.prompt_for(language)
    assert found is not None
    assert found.cue_before == wanted
    without = replace(settings, target_prefix={"de": "-"})
    lessons, _ = make_lessons(byte_tokenizer(), TASKS, _users(), [content], given, without, 512)
    assert byte_tokenizer().decode(lessons.targets[0][:-1]) == "text", "control: none for this language"


def test_a_loss_that_is_not_finite_stops_the_training(tokenizer: PreTrainedTokenizerBase) -> None:
    base, users, contents, targets = _school(tokenizer)
    users.user_embeddings[3, 0] = np.inf
    with pytest.raises(RunError, match="loss became"):
        train_projector(base, FOLDER, tokenizer, TASKS, users, contents, targets, TrainSettings(num_steps=30))

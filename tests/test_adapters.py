"""LoRA, prefix tuning and profiles in words: against plain sequences through peft, and what training changes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from e2p_ray.config import PromptTemplate, SamplingConfig, TaskConfig
from e2p_ray.engine.lesson import Lesson
from e2p_ray.engine.model import BaseModel
from e2p_ray.engine.prefixes import PrefixStore
from e2p_ray.errors import ConfigError
from e2p_ray.schema import Content
from e2p_ray.train.baselines.adapters import Adapter, AdapterKind, adapter_loss, new_adapter, train_adapter
from e2p_ray.train.baselines.profile import profile_lessons
from e2p_ray.train.fit import draw
from e2p_ray.train.lessons import LessonTable, Ragged, Target, UserTable, make_lessons
from e2p_ray.train.score import RowScores, score
from e2p_ray.train.settings import TrainSettings
from tests.tiny_models import EMBEDDING_DIM, byte_tokenizer, configs, contents, save_model_folder

NUM_CONTENTS, NUM_USERS = 4, 6
SETTINGS = TrainSettings(num_steps=30, contents_per_step=2, users_per_content=3, learning_rate=1e-2, warmup_steps=3)
TASKS = {
    "headline": TaskConfig(
        prompts={"default": PromptTemplate(head="News. ", content="{body}", cue_before="\n>")},
        sampling=SamplingConfig(max_new_tokens=8),
    )
}
PROFILES = {f"u{user}": f"likes {'tea' * (user + 1)}" for user in range(NUM_USERS - 1)}  # the last one has none
KINDS: tuple[AdapterKind, ...] = ("lora", "prefix_tuning")
EXACT = 1e-4


def _given() -> tuple[UserTable, list[Content], list[Target]]:
    """Every user wrote about every content, in words that the model can learn; weights of two kinds."""
    vectors = np.random.default_rng(0).standard_normal((NUM_USERS, EMBEDDING_DIM)).astype(np.float32)
    users = UserTable([f"u{user}" for user in range(NUM_USERS)], vectors, "space")
    targets = [
        Target(f"u{user}", f"c{at}", "headline", "a bridge " * (1 + user % 2), 0.5 if user == 1 else 1.0)
        for at in range(NUM_CONTENTS)
        for user in range(NUM_USERS)
    ]
    return users, contents(NUM_CONTENTS), targets


def _table() -> LessonTable:
    table, _ = make_lessons(byte_tokenizer(), TASKS, *_given(), SETTINGS, 512)
    return table


def _profile_table(settings: TrainSettings = SETTINGS, max_profile_tokens: int = 64) -> LessonTable:
    tokenizer, profiles = byte_tokenizer(), PROFILES
    table, _ = profile_lessons(
        tokenizer, TASKS, *_given(), profiles, settings, 512, max_profile_tokens=max_profile_tokens
    )
    return table


def _soft_first_table() -> LessonTable:
    table, _ = make_lessons(byte_tokenizer(), TASKS, *_given(), replace(SETTINGS, layout="soft_first"), 512)
    return table


def _base(folder: Path) -> BaseModel:
    return BaseModel.load(folder, "float32", torch.device("cpu"))


def _shared_score(folder: Path, table: LessonTable) -> RowScores:
    base = _base(folder)
    return score(base, None, table, PrefixStore(base, 1 << 24))


def _new(folder: Path, kind: AdapterKind, num_parameters: int = 2000) -> Adapter:
    return new_adapter(_base(folder), kind, _table(), num_parameters, seed=0)


def _stirred(folder: Path, kind: AdapterKind) -> Adapter:
    """An adapter that is far from its start, where LoRA is no change and half its gradients are zero."""
    adapter = _new(folder, kind)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return adapter


class Plain:
    """The same adapter as peft has it: every row alone, its whole sequence through transformers' own forward."""

    def __init__(self, folder: Path, adapter: Adapter) -> None:
        self._model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        if adapter.kind == "lora":
            config = adapter.base.model.peft_config["default"]
            self._peft = peft.get_peft_model(self._model, config)
        else:
            config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=adapter.size)
            self._peft = peft.get_peft_model(self._model, config)
        self.parameters = [parameter for parameter in self._peft.parameters() if parameter.requires_grad]
        for own, given in zip(self.parameters, adapter.parameters, strict=True):
            own.data.copy_(given if adapter.kind == "lora" else as_peft(given))

    def nll(self, before: Sequence[int], target: Sequence[int]) -> Tensor:
        ids = torch.tensor([[*before, *target[:-1]]])
        logits = self._peft(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(target) :]
        return nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum")

    def mean_loss(self, lessons: Sequence[Lesson]) -> Tensor:
        rows = [(lesson, row) for lesson in lessons for row in lesson.rows]
        total = sum(row.weight * len(row.target) for _, row in rows)
        losses = [row.weight * self.nll([*lesson.left, *row.right], row.target) for lesson, row in rows]
        return torch.stack(losses).sum() / total


def as_peft(learned: Tensor) -> Tensor:
    """(2, num_layers, Hkv, V, D) in peft's order: (V, num_layers x 2 x Hkv x D)."""
    return learned.permute(3, 1, 0, 2, 4).flatten(1)


def _sequences(table: LessonTable) -> dict[int, tuple[tuple[int, ...], list[int]]]:
    """By source, what stands before the target, and the target."""
    found = {}
    for at in range(len(table)):
        lesson = table.lesson(at, table.rows_of(at))
        for row, item in zip(table.rows_of(at), lesson.rows, strict=True):
            found[int(table.source[row])] = ((*lesson.left, *item.right), list(item.target))
    return found


def _after(table: LessonTable, tokens: Sequence[int]) -> LessonTable:
    """The same table with these tokens before every content."""
    return replace(table, lefts=Ragged.of([*tokens, *table.lefts[at].tolist()] for at in range(len(table))))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_folder(configs()["llama"], tmp_path_factory.mktemp("llama"))


def test_a_profile_stands_between_content_and_cue() -> None:
    tokenizer, plain, found = byte_tokenizer(), _sequences(_table()), _sequences(_profile_table())
    assert plain.keys() == found.keys()
    _, _, targets = _given()
    cue = tokenizer.encode("\n>")
    for source, (before, target) in plain.items():
        profile = PROFILES.get(targets[source].user_id)
        words = tokenizer.encode(f"\n\n{profile}") if profile else []
        assert found[source] == ((*before[: -len(cue)], *words, *cue), target)
    table = _profile_table()
    assert len(table) == NUM_CONTENTS, "users of one content still share what stands before their profiles"
    short = _profile_table(SETTINGS, 5)
    assert max(len(short.rights[row]) for row in range(short.num_rows)) == 5 + len(cue)


def test_a_profile_is_data() -> None:
    tokenizer = byte_tokenizer()
    profiles = {"u0": "<|eos|>"}
    table, _ = profile_lessons(tokenizer, TASKS, *_given(), profiles, SETTINGS, 512)
    assert tokenizer.eos_token_id not in table.rights.ids.tolist()
    assert tokenizer.eos_token_id in tokenizer.encode("<|eos|>"), "the control: elsewhere it is the end token"


def test_a_long_content_makes_room_for_the_profile() -> None:
    users, _, targets = _given()
    long = [Content(f"c{at}", "", "word " * 60, "en") for at in range(NUM_CONTENTS)]
    tasks = {"headline": TASKS["headline"].model_copy(update={"sampling": SamplingConfig(max_new_tokens=20)})}
    table, skipped = profile_lessons(
        byte_tokenizer(), tasks, users, long, targets, PROFILES, SETTINGS, 160, max_profile_tokens=32
    )
    assert not any(skipped.values())
    for row in range(table.num_rows):
        assert len(table.lefts[0]) + len(table.rights[row]) + 1 + 20 <= 160
    tight, skipped = make_lessons(byte_tokenizer(), tasks, users, long, targets, SETTINGS, 160)
    assert len(tight.lefts[0]) + 32 + 1 + 20 > 160, "the control: without it there would have been none"


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma2"])
def test_an_untrained_adapter_is_where_it_should_start(name: str, tmp_path: Path) -> None:
    folder, table = save_model_folder(configs()[name], tmp_path), _table()
    wanted = _shared_score(folder, table)
    lora = _new(folder, "lora").score(table)
    np.testing.assert_allclose(lora.nll, wanted.nll, rtol=EXACT)
    np.testing.assert_array_equal(lora.num_tokens, wanted.num_tokens)

    prefix = _new(folder, "prefix_tuning")
    tokens = table.lefts.ids[: prefix.num_virtual_tokens].tolist()
    found, behind = prefix.score(table), _shared_score(folder, _after(table, tokens))
    np.testing.assert_allclose(found.nll, behind.nll, rtol=EXACT)
    assert np.abs(found.nll / wanted.nll - 1).max() > 10 * EXACT, "the control: a prefix is seen"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma2"])
def test_loss_and_gradients_equal_peft_on_whole_sequences(name: str, kind: AdapterKind, tmp_path: Path) -> None:
    folder, table = save_model_folder(configs()[name], tmp_path), _table()
    adapter = _stirred(folder, kind)
    lessons = draw(table, SETTINGS, 0, 0, 1)
    assert any(row.weight != 1 for lesson in lessons for row in lesson.rows)
    loss, num_tokens = adapter_loss(adapter, lessons)
    assert num_tokens == sum(len(row.target) for lesson in lessons for row in lesson.rows), "whatever their weights"
    loss.backward()  # type: ignore[no-untyped-call]
    plain = Plain(folder, adapter)
    wanted = plain.mean_loss(lessons)
    wanted.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(wanted.item(), rel=EXACT)
    for own, given in zip(plain.parameters, adapter.parameters, strict=True):
        assert own.grad is not None
        assert given.grad is not None
        found = given.grad if kind == "lora" else as_peft(given.grad)
        torch.testing.assert_close(found, own.grad, rtol=1e-3, atol=1e-4 * float(own.grad.abs().max()))

    other, _ = adapter_loss(adapter, draw(table, SETTINGS, 1, 0, 1))
    assert abs(other.item() / wanted.item() - 1) > 10 * EXACT, "the control: another step's rows differ"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [_table, _profile_table, _soft_first_table])
def test_scores_equal_peft_on_whole_sequences(llama: Path, kind: AdapterKind, make: Callable[[], LessonTable]) -> None:
    table, adapter = make(), _stirred(llama, kind)
    found, plain = adapter.score(table), Plain(llama, adapter)
    sequences = _sequences(table)
    with torch.no_grad():
        wanted = np.array([float(plain.nll(*sequences[int(at)])) for at in table.source])
    np.testing.assert_allclose(found.nll, wanted, rtol=EXACT)
    assert np.abs(_shared_score(llama, table).nll / wanted - 1).max() > 10 * EXACT, "the control: it is seen"


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns_and_leaves_the_base_weights(llama: Path, kind: AdapterKind) -> None:
    table = _table()
    before = _shared_score(llama, table)
    # A random model hardly listens to keys and values far away: they have to move further than its weights.
    settings = replace(SETTINGS, learning_rate=1e-2 if kind == "lora" else 1e-1)
    adapter = train_adapter(llama, kind, table, settings, num_parameters=2000)
    assert adapter.score(table).mean_nll < 0.8 * before.mean_nll
    assert [record.step for record in adapter.records] == list(range(1, 31))
    assert abs(adapter.num_trainable_parameters - 2000) < 1200

    original = _base(llama).model.state_dict()
    found = {name.replace(".base_layer", ""): value for name, value in adapter.base.model.state_dict().items()}
    assert all(torch.equal(found[name], value) for name, value in original.items())
    changed = [name for name in found if name not in original]
    assert len(changed) == (0 if kind == "prefix_tuning" else 2 * 7 * 3), "two matrices for each of seven layers"

    again = train_adapter(llama, kind, table, replace(SETTINGS, num_steps=2), num_parameters=2000)
    other = train_adapter(llama, kind, table, replace(SETTINGS, num_steps=2, seed=1), num_parameters=2000)
    assert again.records[0].loss == adapter.records[0].loss != other.records[0].loss


def test_a_trained_lora_is_its_product_added_to_the_weights(llama: Path) -> None:
    table = _table()
    adapter = train_adapter(llama, "lora", table, replace(SETTINGS, num_steps=5), num_parameters=2000)
    weights = adapter.base.model.state_dict()
    base = _base(llama)
    untouched = score(base, None, table, PrefixStore(base, 1 << 24))
    with torch.no_grad():
        for name, module in base.model.named_modules():
            if f"{name}.lora_A.default.weight" in weights:
                down, up = (weights[f"{name}.lora_{side}.default.weight"] for side in "AB")
                module.weight += 2.0 * up @ down
    wanted = score(base, None, table, PrefixStore(base, 1 << 24))
    np.testing.assert_allclose(adapter.score(table).nll, wanted.nll, rtol=EXACT)
    assert np.abs(untouched.nll / wanted.nll - 1).max() > 10 * EXACT, "the control: five steps are seen"


def test_the_best_by_validation_is_kept(llama: Path) -> None:
    table = _table()
    other = Ragged.of([7, 9, 11, 13] for _ in range(table.num_rows))  # what one learns makes these less likely
    validation = replace(table, targets=other)
    settings = replace(SETTINGS, validate_every=1, patience=3)
    adapter = train_adapter(llama, "lora", table, settings, num_parameters=2000, validation=validation)
    losses = [record.validation_loss for record in adapter.records if record.validation_loss is not None]
    assert adapter.score(validation).mean_nll == pytest.approx(min(losses))
    assert losses[-1] > min(losses), "the control: the last one is not the best"
    assert len(losses) == losses.index(min(losses)) + 4 < SETTINGS.num_steps, "three worse ones end it"


def test_size_follows_the_budget(llama: Path) -> None:
    sizes = {kind: [_new(llama, kind, budget).size for budget in (1, 4000, 10**9)] for kind in KINDS}
    assert sizes["lora"][0] == sizes["prefix_tuning"][0] == 1
    assert sizes["lora"][2] == sizes["prefix_tuning"][2] == 64
    for kind in KINDS:
        assert _new(llama, kind, 4000).num_trainable_parameters == pytest.approx(4000, rel=0.5)


def test_what_does_not_fit_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, table = _new(llama, "prefix_tuning", 10**9), _table()
    adapter.score(table)
    with pytest.raises(ConfigError, match="do not fit the base model's window of 512"):
        adapter.score(_after(table, [5] * 400))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"e2p_ray\[evaluate\]"):
        _new(llama, "lora")

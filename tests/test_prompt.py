"""Prompts: a content becomes the tokens that the whole text's begin with, once, and no more of it than is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from e2p_ray import generate
from e2p_ray.config import PromptTemplate, SamplingConfig, TaskConfig
from e2p_ray.engine import prompt
from e2p_ray.engine.engine import Engine
from e2p_ray.engine.fake import FakeEngine
from e2p_ray.engine.prompt import PromptLayout, Segments
from e2p_ray.errors import ConfigError, RowError
from e2p_ray.generate import Generator
from e2p_ray.schema import Content, ErrorCode, Group, Reason, Verdict
from tests import tiny_models
from tests.test_generate import make_config
from tests.tiny_models import engine_of, group, task

ENGLISH = (
    "The city opened a bridge over the harbour on Monday; it cost 40 million dollars.  Cyclists' lanes are wide.\n\n"
)
JAPANESE = "東京都は新しい橋を三つ建てる計画を発表した。費用は四千万円で、自転車の道も広い。鬱蒼とした森🌉を通る。"
LLAMA = LlamaConfig(**tiny_models.common())


def shuffled(source: str, seed: int, num_pieces: int = 2000) -> str:
    """Words or characters in any order, so that a cut falls anywhere."""
    blank = " " if " " in source else ""
    pieces = np.random.default_rng(seed).choice(source.split(blank) if blank else list(source), num_pieces)
    return blank.join(pieces.tolist())


TEXTS = {
    "english": shuffled(ENGLISH, 0),
    "japanese": shuffled(JAPANESE, 1),
    "both": " ".join(shuffled(source, 2, 30) for source in (ENGLISH, JAPANESE) * 30),
    "blanks": ("News" + " " * 300 + "\n" * 300 + "bridge") * 5,
    "one word": "na" * 2500,
    "unknown": "\ufffd橋" * 1500,
}


def byte_level() -> PreTrainedTokenizerFast:
    """As of GPT-2, Llama 3 and Qwen: words first, then bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [ENGLISH, JAPANESE] * 9,
        trainers.BpeTrainer(initial_alphabet=alphabet, vocab_size=500, min_frequency=2, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_fallback() -> PreTrainedTokenizerFast:
    """As of Llama 2: the whole text is one word, and a character that it has not learned is bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        [*(shuffled(ENGLISH, seed, 15) for seed in range(40)), *(shuffled(JAPANESE, seed, 30) for seed in range(40))],
        trainers.BpeTrainer(special_tokens=special, limit_alphabet=55, vocab_size=500, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    """As of T5: the likeliest pieces of the whole text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(split=False), decoders.Metaspace()
    tokenizer.train_from_iterator(
        [*(shuffled(ENGLISH, seed, 15) for seed in range(40)), *(shuffled(JAPANESE, seed, 30) for seed in range(40))],
        trainers.UnigramTrainer(unk_token="<unk>", special_tokens=["<unk>"], vocab_size=300, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture(scope="module", params=[byte_level, byte_fallback, unigram], ids=lambda make: make.__name__)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    make: Callable[[], PreTrainedTokenizerFast] = request.param
    return make()


def layout_of(tokenizer: PreTrainedTokenizerFast, max_content_tokens: int, **changes: Any) -> PromptLayout:
    tasks = {
        "headline": TaskConfig(
            prompts={"default": PromptTemplate(content="{body}")}, max_content_tokens=max_content_tokens, **changes
        )
    }
    return PromptLayout(tokenizer, "content_first", tasks, num_soft_tokens=1, max_positions=8192)


class Encoded:
    """The texts that a layout makes into tokens, as they are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts = list[str]()
        plain = prompt.text_ids

        def watched(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
            self.texts.append(text)
            return plain(tokenizer, text)

        monkeypatch.setattr(prompt, "text_ids", watched)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_cut_text_has_the_tokens_that_the_whole_one_begins_with(
    tokenizer: PreTrainedTokenizerFast, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = Encoded(monkeypatch)
    whole = tokenizer.encode(text, add_special_tokens=False)
    num_shorter = 0
    for room in (*range(1, 40, 3), *range(40, min(len(whole), 700), 37)):
        encoded.texts.clear()
        segments = layout_of(tokenizer, room).segments(Content("c", "", text, "en"), "headline")
        assert segments.truncated
        assert segments.left == tuple(whole[: len(segments.left)])
        assert room - 3 <= len(segments.left) <= room
        num_shorter += len(encoded.texts[-1]) < len(text)
    assert num_shorter > 5, "the control: less than the whole text was looked at"


def test_a_text_that_just_fits_is_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    text = shuffled(ENGLISH, 5, 100)
    whole = tuple(tokenizer.encode(text, add_special_tokens=False))
    content = Content("c", "", text, "en")
    for room, truncated in ((len(whole), False), (len(whole) - 1, True)):
        assert layout_of(tokenizer, room).segments(content, "headline") == Segments(whole[:room], (), truncated, room)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_a_content_ends_with_a_whole_character(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    """Characters of three and four bytes that no vocabulary has, cut at any of them."""
    text, tokenizer = "鰯🦀鱸鯵🦐🐙鯖" * 40, make()
    whole = tokenizer.encode(text, add_special_tokens=False)
    num_cut_within = 0
    for room in range(8, 60):
        left = layout_of(tokenizer, room).segments(Content("c", "", text, "ja"), "headline").left
        assert text.startswith(tokenizer.decode(left)), room
        num_cut_within += tokenizer.decode(whole[:room]).endswith("\ufffd")
    assert num_cut_within > 30, "the control"


def test_of_a_long_body_little_is_made_into_tokens(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = Encoded(monkeypatch)
    content = Content("c", "", TEXTS["english"] * 100, "en")
    layout_of(tokenizer, 512).segments(content, "headline")
    assert len(content.body) > 1_000_000
    assert sum(map(len, encoded.texts)) < 30_000


def test_a_content_is_made_into_tokens_once_for_all_that_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third text is rejected: each is tried again, and the users share an unpersonalised one."""
    encoded, num_checks = Encoded(monkeypatch), 0

    def strict(*_: Any) -> Verdict:
        nonlocal num_checks
        num_checks += 1
        return Verdict() if num_checks % 3 else Verdict(Reason.FOREIGN_NUMBER, "by the test")

    monkeypatch.setattr(generate, "check", strict)
    engine = engine_of(LLAMA)
    rows, _ = Generator(engine, make_config(), "run").generate([group(tiny_models.contents(1)[0], range(60))])
    assert len(rows) == 60
    assert num_checks > 80, "the control: many asked again"
    assert len(encoded.texts) == 1


def test_what_is_kept_belongs_to_its_content_template_and_bounds() -> None:
    tasks = {"headline": task(), "long": task("\nWhy:", max_new_tokens=100)}
    first, second, third = tiny_models.contents(3)
    changed = replace(first, body=first.body + " again")
    layout = engine_of(LLAMA, tasks=tasks).layout
    cramped = {name: one.model_copy(update={"max_content_tokens": 9}) for name, one in tasks.items()}
    asked = [(content, name) for content in (first, second, third, changed) for name in tasks] * 2
    for other in (tasks, cramped):
        for content, name in asked:
            expected = engine_of(LLAMA, tasks=other).layout.segments(content, name)
            assert layout.with_tasks(other).segments(content, name) == expected
    assert layout.segments(first, "headline") is layout.segments(replace(first), "headline"), "the control: it is kept"


def test_of_many_contents_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = Encoded(monkeypatch)
    layout = layout_of(tiny_models.byte_tokenizer(), 64)
    for _ in range(2):
        for at in range(300):
            layout.segments(Content(f"c{at}", "", "Bridge", "en"), "headline")
    assert len(encoded.texts) == 600


class TestEmptyPrompt:
    """A tokenizer without a begin token, a template that only has the title, and a content without one."""

    def engine(self) -> Engine:
        template = PromptTemplate(content="{title}")
        sampling = SamplingConfig(max_new_tokens=8, stop=())
        engine = engine_of(LLAMA, tasks={"headline": TaskConfig(prompts={"default": template}, sampling=sampling)})
        engine.layout._start = ()
        return engine

    @pytest.mark.parametrize("without", [(), (9,)])
    def test_it_is_an_error_of_its_rows_and_changes_no_other(self, without: tuple[int, ...]) -> None:
        others = group(Content("c1", "Bridge plan", "b", "en"), range(3), without=(1,))
        expected = {item.key: item.text for item in self.engine().generate([others])}
        empty = group(Content("c0", "", "the body", "en"), [9], without=without)
        found = {item.key: item for item in self.engine().generate([others, empty])}
        assert found.pop(empty.requests[0].key).error_code is ErrorCode.EMPTY_CONTENT
        assert {key: item.text for key, item in found.items()} == expected

    def test_no_text_is_scored_behind_it(self) -> None:
        empty = group(Content("c0", "", "the body", "en"), [8, 9], without=(9,))
        found = list(self.engine().score([empty], {request.key: "abc" for request in empty.requests}))
        assert [score.error_code for score in found] == [ErrorCode.EMPTY_CONTENT] * 2


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{title}", "{T}"),
        ("{{title}}: {body}", "{title}: {{B}}"),
        ("{{{title}}}", "{{T}}"),
        ("{{{{title}}}} {body}", "{{title}} {{B}}"),
        ('{"a": {"b": "{title}"}} {{x}}', '{"a": {"b": "{T}"}} {x}'),
        ('{{"a": {{"b": "{title}"}}}}', '{"a": {"b": "{T}"}}'),
        ("{title}}} {{ {} }} {{", "{T}}} { {} } {"),
    ],
)
def test_doubled_braces_are_single_ones_and_no_others_change(template: str, text: str) -> None:
    """Braces in a content are its own: doubled ones as well."""
    one = TaskConfig(
        prompts={"default": PromptTemplate(head="{{a}}", content=template, cue_before="{{b}}", cue_after="}}")}
    )
    tokenizer = tiny_models.byte_tokenizer()
    layout = PromptLayout(tokenizer, "content_first", {"headline": one}, num_soft_tokens=1, max_positions=512)
    segments = layout.segments(Content("c", "{T}", "{{B}}", "en"), "headline")
    assert tokenizer.decode(list(segments.left), skip_special_tokens=True) == "{a}" + text + "{b}"
    assert tokenizer.decode(list(segments.right)) == "}}"


def test_of_templates_with_doubled_braces_alone_the_id_is_another_than_when_they_stood_as_they_are() -> None:
    def prompt_id(head: str) -> str:
        return TaskConfig(prompts={"default": PromptTemplate(head=head)}).prompt_id("en", "content_first", 1)

    assert prompt_id('As {"a": {"b": 1}}') == "9859a7a67818cba9"
    assert prompt_id("As {{x}}") != "37b5ae50b1b363eb"


@pytest.mark.parametrize(("num_soft_tokens", "most"), [(1, 510), (3, 508)])
def test_new_tokens_that_leave_no_room_for_any_prompt_are_refused(num_soft_tokens: int, most: int) -> None:
    def engine(max_new_tokens: int) -> Engine:
        tasks = {"headline": task(), "essay": task(max_new_tokens=max_new_tokens)}
        return engine_of(LLAMA, tasks=tasks, num_soft_tokens=num_soft_tokens)

    engine(most)
    with pytest.raises(
        ConfigError, match=rf"tasks\.essay\.sampling\.max_new_tokens is {most + 1}.* 512 tokens"
    ) as info:
        engine(most + 1)
    assert info.value.exit_code == 2


def test_the_remedy_of_a_prompt_that_is_too_long_is_the_one_that_helps() -> None:
    """Cues of 496 tokens in a window of 512: fewer tokens of the content do not help, fewer new tokens do."""
    content = tiny_models.contents(1)[0]

    def code(one: TaskConfig) -> str | None:
        layout = PromptLayout(
            tiny_models.byte_tokenizer(), "content_first", {"headline": one}, num_soft_tokens=1, max_positions=512
        )
        try:
            layout.segments(content, "headline")
        except RowError as error:
            return error.code
        return None

    long = task("x" * 496)
    assert code(long) == code(long.model_copy(update={"max_content_tokens": 1})) == ErrorCode.PROMPT_TOO_LONG
    assert code(task("x" * 496, max_new_tokens=7)) is None
    asked = group(content, [1]).requests[0]
    engine = FakeEngine(errors={asked.key: ErrorCode.PROMPT_TOO_LONG})
    _, [letter] = Generator(engine, make_config(), "run").generate([Group(content, "headline", (asked,))])
    assert "max_new_tokens" in letter.message
    assert "max_content_tokens" not in letter.message

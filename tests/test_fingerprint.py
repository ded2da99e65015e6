"""A fingerprint changes with all that determines a text and with nothing else, and each part with its own share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from e2p_ray.config import JobConfig, TaskConfig
from e2p_ray.engine.fake import FakeEngine
from e2p_ray.engine.prompt import PromptLayout
from e2p_ray.fingerprint import (
    FINGERPRINT_CHARS,
    PART_CHARS,
    content_part,
    fingerprint,
    reason_part,
    text_settings,
)
from e2p_ray.generate import Generator
from e2p_ray.schema import Content, Group, Reason, Request, RequestKey
from tests.test_generate import CONTENT, KEY, ask, make_config, only_row, run
from tests.tiny_models import byte_tokenizer

IDS = {"prompt_id": "p", "projector_id": "q", "base_model_id": "m"}


def print_of(request: Request, content: Content = CONTENT, config: JobConfig | None = None, **changed: str) -> str:
    settings = text_settings(config or make_config(), "headline", **(IDS | changed))
    return fingerprint(request, content_part(content), settings.part)


def parts(text: str) -> list[str]:
    return [text[start : start + PART_CHARS] for start in range(0, FINGERPRINT_CHARS, PART_CHARS)]


def changed_parts(other: str) -> list[int]:
    return [number for number, (a, b) in enumerate(zip(parts(print_of(ask())), parts(other), strict=True)) if a != b]


def change(config: JobConfig, section: str, **values: Any) -> JobConfig:
    data = config.model_dump(mode="json")
    data[section] = data[section] | values
    return JobConfig.model_validate(data)


def change_task(config: JobConfig, section: str, **values: Any) -> JobConfig:
    data = config.model_dump(mode="json")
    data["tasks"]["headline"][section] |= values
    return JobConfig.model_validate(data)


def test_each_change_shows_in_its_part_and_in_no_other() -> None:
    base = print_of(ask())
    assert base == print_of(ask())
    assert len(base) == FINGERPRINT_CHARS
    assert set(base) <= set("0123456789abcdef")
    of_content = [
        print_of(ask(), replace(CONTENT, title="x")),
        print_of(ask(), replace(CONTENT, body="x")),
        print_of(ask(), replace(CONTENT, language="ja")),
        print_of(ask(), replace(CONTENT, title=CONTENT.title + "a", body="b")),
        print_of(ask(), replace(CONTENT, title=CONTENT.title, body="ab")),
    ]
    of_user = [
        print_of(ask(favourite=2)),
        print_of(ask(reason=Reason.OPTED_OUT)),
        print_of(ask(reason=Reason.EMBEDDING_NULL)),
        print_of(Request(KEY, None)),
    ]
    of_settings = [
        print_of(ask(), prompt_id="other"),
        print_of(ask(), projector_id="other"),
        print_of(ask(), base_model_id="other"),
        print_of(ask(), config=make_config(deny=("x",))),
        print_of(ask(), config=change(make_config(), "base_model", dtype="bfloat16")),
        print_of(ask(), config=change_task(make_config(), "sampling", seed=1)),
        print_of(ask(), config=change_task(make_config(), "limits", max_chars=99)),
    ]
    for number, changed in enumerate((of_content, of_user, of_settings)):
        assert [changed_parts(other) for other in changed] == [[number]] * len(changed)
    assert len({base, *of_content, *of_user, *of_settings}) == 1 + len(of_content + of_user + of_settings)


def test_what_determines_no_text_changes_nothing() -> None:
    same = [
        print_of(ask("u2")),  # rows of one key alone are compared
        print_of(replace(ask(), draft="a guess")),
        print_of(ask(), replace(CONTENT, content_id="c9")),
        print_of(ask(), config=change(make_config(), "workers", max_size=9)),
        print_of(ask(), config=change(make_config(), "plan", requests_per_shard=1)),
        print_of(ask(), config=change_task(make_config(), "prompts", xx={"head": "another language"})),
    ]
    assert set(same) == {print_of(ask())}


def test_a_reason_is_never_taken_for_a_user_embedding() -> None:
    reasons = ["", *Reason]
    vectors = [np.frombuffer(reason.encode().ljust(24, b"\0"), "<f4") for reason in reasons]
    found = {reason_part(reason) for reason in reasons}
    found |= {parts(print_of(Request(KEY, vector)))[1] for vector in vectors}
    assert len(found) == 2 * len(reasons)


def test_rows_carry_the_fingerprint_that_can_be_computed_without_generating() -> None:
    engine = FakeEngine()
    row = only_row(run([ask()]))
    assert row.fingerprint == print_of(
        ask(),
        prompt_id=engine.prompt_id("headline", "en"),
        projector_id=engine.projector_id,
        base_model_id=engine.base_model_id,
    )


def test_rows_of_several_contents_and_tasks_each_have_their_own() -> None:
    other = replace(CONTENT, content_id="c2", body="Rain fell on Monday. It was cold.")
    groups = [
        Group(content, task, (replace(ask(), key=RequestKey("u1", content.content_id, task)),))
        for content in (CONTENT, other)
        for task in ("headline", "explanation")
    ]
    engine = FakeEngine(tasks=make_config().tasks)
    rows, _ = Generator(engine, make_config(), "r").generate(groups)
    found = {row.key: parts(row.fingerprint) for row in rows}
    assert {key.content_id: of_content for key, (of_content, _, _) in found.items()} == {
        "c1": content_part(CONTENT),
        "c2": content_part(other),
    }
    assert len({of_user for _, of_user, _ in found.values()}) == 1


def test_fingerprint_does_not_depend_on_how_the_user_embedding_lies_in_memory() -> None:
    strided = np.arange(8, dtype=np.float32)[::2]
    table = pa.array([strided.tolist()], pa.list_(pa.float32(), 4))
    assert print_of(Request(KEY, strided)) == print_of(Request(KEY, table.values.to_numpy()))
    assert print_of(Request(KEY, strided)) == print_of(Request(KEY, strided.astype(">f4")))


@pytest.mark.parametrize("language", ["en", "en-US", "ja", "xx"])
def test_an_engine_and_a_driver_name_prompts_alike(language: str) -> None:
    task = TaskConfig.model_validate({"prompts": {"en": {"head": "a"}, "ja": {"head": "b"}}})
    layout = PromptLayout(byte_tokenizer(), "soft_first", {"t": task}, num_soft_tokens=2, max_positions=99)
    assert layout.prompt_id("t", language) == task.prompt_id(language, "soft_first", 2)
    assert layout.prompt_id("t", language) != task.prompt_id(language, "content_first", 2)
    assert FakeEngine(tasks={"t": task}).prompt_id("t", language) == task.prompt_id(language, "content_first", 1)

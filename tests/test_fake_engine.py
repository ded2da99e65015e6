"""The fake engine keeps the contract and imports no torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from e2p_ray.config import PromptTemplate, SamplingConfig, TaskConfig
from e2p_ray.engine.contract import EngineStats, TextEngine
from e2p_ray.engine.fake import FakeEngine, num_tokens, split_sentences
from e2p_ray.schema import Completion, Content, ErrorCode, FinishReason, Group, Request, RequestKey

EN = Content("en", "Bridge opens", "The bridge opened. It cost 3.5 million! Who paid? U.S. firms did.", "en")
JA = Content("ja", "橋が開通", "橋が開通した。費用は三億円だ。「高い」と市民は話した。", "ja")


def request(user_id: str, content: Content, *values: float) -> Request:
    embedding = np.array(values, dtype=np.float32) if values else None
    return Request(RequestKey(user_id, content.content_id, "headline"), embedding)


def group(content: Content, *requests: Request) -> Group:
    return Group(content, "headline", requests)


def one(engine: TextEngine, written: Group, *, attempt: int = 0) -> Completion:
    (completion,) = engine.generate([replace(written, attempt=attempt)])
    return completion


@pytest.mark.parametrize(
    ("body", "sentences"),
    [
        (EN.body, ["The bridge opened.", "It cost 3.5 million!", "Who paid?", "U.S. firms did."]),
        (JA.body, ["橋が開通した。", "費用は三億円だ。", "「高い」と市民は話した。"]),
        ("彼は「行く。」と言った。終わり", ["彼は「行く。」", "と言った。", "終わり"]),
        ("One\n\nTwo\n", ["One", "Two"]),
        (" \n ", []),
    ],
)
def test_sentences_of_both_languages(body: str, sentences: list[str]) -> None:
    assert split_sentences(body) == sentences


def test_user_embedding_chooses_the_sentence() -> None:
    engine = FakeEngine()
    texts = [one(engine, group(JA, request("u", JA, *np.eye(4)[n]))).text for n in range(4)]
    assert texts == ["橋が開通した。", "費用は三億円だ。", "「高い」と市民は話した。", "橋が開通した。"]
    assert one(engine, group(EN, request("u", EN))).text == "The bridge opened."
    assert one(engine, group(EN, request("u", EN)), attempt=1).text == "It cost 3.5 million!"


def test_every_request_once_and_no_dependence_on_neighbours() -> None:
    requests = [request(f"u{n}", EN, *np.eye(4)[n % 4]) for n in range(9)]
    together = {c.key: c for c in FakeEngine().generate([group(EN, *requests)])}
    alone = {c.key: c for r in reversed(requests) for c in FakeEngine().generate([group(EN, r)])}
    assert together == alone
    assert set(together) == {r.key for r in requests}


def test_max_chars_cuts() -> None:
    task = TaskConfig(prompts={"default": PromptTemplate()}, sampling=SamplingConfig(max_chars=5))
    cut = one(FakeEngine(tasks={"headline": task}), group(EN, request("u", EN)))
    assert (cut.text, cut.finish_reason) == ("The b", FinishReason.MAX_CHARS)
    assert one(FakeEngine(), group(EN, request("u", EN))).finish_reason is FinishReason.END_TOKEN


def test_overrides_and_errors() -> None:
    ask = request("u", EN, 1, 0, 0, 0)
    engine = FakeEngine(texts={ask.key: ["first", "second"]})
    assert [one(engine, group(EN, ask), attempt=n).text for n in range(3)] == ["first", "second", "second"]
    assert one(FakeEngine(texts={ask.key: "always"}), group(EN, ask), attempt=1).text == "always"
    failed = one(FakeEngine(errors={ask.key: ErrorCode.PROMPT_TOO_LONG}), group(EN, ask))
    assert (failed.error_code, failed.finish_reason, failed.text) == (
        ErrorCode.PROMPT_TOO_LONG,
        FinishReason.ERROR,
        "",
    )
    non_finite = one(FakeEngine(), group(EN, request("u", EN, np.nan, 0, 0, 0)))
    assert non_finite.error_code is ErrorCode.NON_FINITE_LOGITS


def test_stats_count_a_content_once_per_group() -> None:
    engine = FakeEngine()
    before = engine.stats
    list(engine.generate([group(EN, *(request(f"u{n}", EN, 1, 0, 0, 0) for n in range(8)))]))
    stats = engine.stats - before
    prefix = num_tokens(EN.title + EN.body)
    output = num_tokens("The bridge opened.")
    assert stats == EngineStats(8 * (prefix + 1), prefix + 8, 8 * output, output, prefix, 1)


def test_prompt_id_follows_the_template() -> None:
    first = TaskConfig(prompts={"en": PromptTemplate(head="a"), "ja": PromptTemplate(head="b")})
    other = TaskConfig(prompts={"en": PromptTemplate(head="c"), "ja": PromptTemplate(head="b")})
    one_engine, other_engine = FakeEngine(tasks={"headline": first}), FakeEngine(tasks={"headline": other})
    assert one_engine.prompt_id("headline", "en") != other_engine.prompt_id("headline", "en")
    assert one_engine.prompt_id("headline", "ja") == other_engine.prompt_id("headline", "ja")


def test_no_torch() -> None:
    code = "import sys, e2p_ray.engine.fake, e2p_ray.generate; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

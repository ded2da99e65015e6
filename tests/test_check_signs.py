"""The quick looks by which most texts pass the checks: what they pass over, the rules themselves would pass as well."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from e2p_ray.check import contacts, japanese_names, japanese_words, numerals, script

_ALWAYS, _NEVER = re.compile(""), re.compile("(?!)")
# Parts of whatever the patterns look for, and what makes them miss it.
_PARTS = (
    *("example", "www.", ".com", ".co.jp", " . com", ". org", " dot ", "(dot)", "[DOT]", "。jp", "点com", "ドットcom"),
    *("http://", "https : // ", "/path", "?q=1", "例え.jp", "e x a m p l e . c o m", "@someone", "info", "@", " at "),
    *("(at)", "[at]", "◎", "アットマーク", ".", ". ", "。", "-", " - "),
    *("+81 ", "+1 2", "3-1234-5678", "03-1234-5678", "(03) 1234 5678", "0312345678", "212.555.0123", "555-0123"),
    *("‐", "ー", "12 Main Street", "1600 Some Court", "Road", "P.O. Box 7", "po box 七", "〒100-0001", "郵便番号"),
    *("三丁目", "2番1号", "四番地", "東京1-2-3", "7", "42", "1,000", "two", "hundred", "million", "k", "one", "co2"),
    *("三", "百", "万", "千葉", " ", "  ", "\t", "、", "word", "Word", "ことば", "é", "١٢٣"),
)
_TAILS = ("", " ", "ha", "ab ", "abcdefghijklm ", "笑", "!", "12", "同じ文をもう一度、")


def texts(num_texts: int = 4000) -> list[str]:
    rng = random.Random(3)
    mixed = ["".join(rng.choices(_PARTS, k=rng.randint(1, 9))) for _ in range(num_texts)]
    return [text + rng.choice(_TAILS) * rng.randint(1, 9) for text in mixed]


def found_contacts(text: str) -> tuple[Any, ...]:
    return contacts.find_contacts(text), contacts.without_contacts(text)


def found_numerals(text: str) -> tuple[Any, ...]:
    return tuple(numerals.find_numerals(text))


SIGNS = [
    (contacts, "_WEB_SIGN", found_contacts),
    (contacts, "_PHONE_SIGN", found_contacts),
    (contacts, "_POSTAL_SIGN", found_contacts),
    (numerals, "_DIGITS", found_numerals),
]


@pytest.mark.parametrize(("module", "sign", "found"), SIGNS, ids=[sign for _, sign, _ in SIGNS])
def test_a_text_without_the_sign_has_nothing_to_find(
    module: Any, sign: str, found: Callable[[str], tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    normal = [script.normalize(text) for text in texts()]
    quick = [found(text) for text in normal]
    passed_over = [text for text in normal if not getattr(module, sign).search(text)]
    assert len(passed_over) > len(normal) // 10
    monkeypatch.setattr(module, sign, _ALWAYS)
    assert quick == [found(text) for text in normal]
    # Control: a sign that is nowhere hides what there is.
    monkeypatch.setattr(module, sign, _NEVER)
    assert sum(a != found(text) for a, text in zip(quick, normal, strict=True)) > 100


def test_a_loop_has_some_characters_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert script._LEAST_LENGTH == 7
    found = [script.repetition_problem(text) for text in texts()]
    assert sum(map(bool, found)) > 500
    monkeypatch.setattr(script, "_LEAST_LENGTH", 1)  # no loop is without a character that comes twice
    assert found == [script.repetition_problem(text) for text in texts()]
    monkeypatch.setattr(script, "_LEAST_LENGTH", 30)  # control: many are
    assert found != [script.repetition_problem(text) for text in texts()]


def test_a_run_of_kanji_that_is_known_is_cut_to_nothing_foreign() -> None:
    rng, everyday = random.Random(4), sorted(japanese_words.kanji())
    kanji = sorted(set("".join(everyday)))
    content = japanese_names.kanji_pieces("".join(rng.choices([*kanji, "、"], k=400)))
    known = [run for run in (*everyday, *content) if len(run) > 1]
    assert len(known) > 500
    afterwards = ("", "さん", "は")
    assert not any(
        japanese_names._foreign_piece(japanese_names._cut(run, content), after) for run in known for after in afterwards
    )
    strange = ["".join(rng.choices(kanji, k=4)) for _ in range(200)]
    assert any(japanese_names._foreign_piece(japanese_names._cut(run, content), "") for run in strange)

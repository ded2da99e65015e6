"""Measures of written texts in both languages against independent references, with controls that must fail."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats

from e2p_ray.downstream.measures.faithfulness import measure_faithfulness
from e2p_ray.downstream.measures.likeness import habits, measure_likeness
from e2p_ray.downstream.measures.overlap import measure_overlap
from e2p_ray.downstream.measures.texts import choose_samples, measure_texts
from e2p_ray.downstream.measures.tokens import words, words_and_marks
from e2p_ray.downstream.measures.variety import distinct_2, measure_variety
from e2p_ray.schema import Content
from tests.evaluation_world import (
    texts_frame,
)

QUICK = settings(max_examples=40, deadline=None)
EN, JA = st.text("ab c.", max_size=12), st.text("橋港が開。A1", max_size=8)


# -- overlap with references


def _ngrams(units: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(units[start : start + size]) for start in range(len(units) - size + 1))


def _f_score(matched: int, num_text: int, num_reference: int) -> float:
    return 2 * matched / (num_text + num_reference) if matched else 0.0


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + _common(a[1:], b[1:])
    return max(_common(a[1:], b), _common(a, b[1:]))


def _rouge(text: str, reference: str, language: str) -> list[float]:
    both = (text, reference)
    if language == "en":
        a, b = (line.replace(".", " ").split() for line in both)
    else:  # a run of A and 1 is one word, every other letter but the stop is one of its own
        a, b = (
            "".join(f" {c} " if c in "橋港が開" else c for c in line.replace("。", " ")).lower().split()
            for line in both
        )
    grams = [(_ngrams(a, size), _ngrams(b, size)) for size in (1, 2)]
    values = [_f_score((x & y).total(), x.total(), y.total()) for x, y in grams]
    return [*values, _f_score(_common(a, b), len(a), len(b))]


@pytest.mark.parametrize("language", ["en", "ja"])
@QUICK
@given(data=st.data())
def test_rouge_is_that_of_plain_counting(language: str, data: st.DataObject) -> None:
    text, reference = (data.draw(EN if language == "en" else JA) for _ in range(2))
    found = measure_overlap([text], [reference], ["u"], language=language, seed=0)
    ours = [found.rouge_1.value, found.rouge_2.value, found.rouge_l.value]
    assert ours == pytest.approx(_rouge(text, reference, language))


def test_rouge_by_hand_in_both_languages() -> None:
    english = measure_overlap(["The cat lay on the mat."], ["the cat sat on the mat"], ["u"], language="en", seed=0)
    assert english.rouge_1.value == pytest.approx(5 / 6)
    assert english.rouge_2.value == pytest.approx(3 / 5)
    assert english.rouge_l.value == pytest.approx(5 / 6)
    japanese = measure_overlap(["犬が好きだ。"], ["猫が好きだ"], ["u"], language="ja", seed=0)
    assert japanese.rouge_1.value == pytest.approx(4 / 5)
    assert japanese.rouge_2.value == pytest.approx(3 / 4)
    assert japanese.rouge_l.value == pytest.approx(4 / 5)
    own = RougeScorer(["rouge1"]).score("猫が好きだ", "犬が好きだ。")
    assert own["rouge1"].fmeasure == 0.0, "the control: the library's own words drop Japanese"


def _bleu(texts: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> float:
    """Of a corpus, with no n-gram count at zero."""
    logs = []
    for size in (1, 2, 3, 4):
        grams = [(_ngrams(a, size), _ngrams(b, size)) for a, b in zip(texts, references, strict=True)]
        logs.append(math.log(sum((a & b).total() for a, b in grams) / sum(a.total() for a, _ in grams)))
    num_text, num_reference = sum(map(len, texts)), sum(map(len, references))
    return math.exp(sum(logs) / 4 + min(0.0, 1 - num_reference / num_text))


def _chrf(texts: Sequence[str], references: Sequence[str]) -> float:
    """Mean precision and recall of 1 to 6 letters over the corpus, blanks left out, recall twice as heavy."""
    pairs = [("".join(a.split()), "".join(b.split())) for a, b in zip(texts, references, strict=True)]
    rates = []
    for size in range(1, 7):
        grams = [(_ngrams(a, size), _ngrams(b, size)) for a, b in pairs]
        matched = sum((a & b).total() for a, b in grams)
        rates.append((matched / sum(a.total() for a, _ in grams), matched / sum(b.total() for _, b in grams)))
    precision, recall = np.mean(rates, axis=0)
    return float(5 * precision * recall / (4 * precision + recall))


def test_bleu_and_chrf_of_both_languages() -> None:
    texts = ["The dog bit the man.", "It was not a surprise to him."]
    references = ["The dog bit the young man.", "It was not unexpected."]
    found = measure_overlap(texts, references, ["u", "v"], language="en", seed=0)
    cut = [[line.replace(".", " .").split() for line in side] for side in (texts, references)]
    assert found.bleu == pytest.approx(_bleu(*cut))
    assert found.chrf == pytest.approx(_chrf(texts, references))
    texts, references = (
        ["新しい橋が月曜に開通した。", "費用は40億円です"],
        ["新しい橋が開通した。", "費用は40億円になる"],
    )
    found = measure_overlap(texts, references, ["u", "v"], language="ja-JP", seed=0)
    cut = [[list(line.replace("40", "#")) for line in side] for side in (texts, references)]
    assert found.bleu == pytest.approx(_bleu(*cut))
    assert found.chrf == pytest.approx(_chrf(texts, references))
    other = measure_overlap(texts, references, ["u", "v"], language="en", seed=0)
    assert other.bleu < 0.5 * found.bleu, "the control: words between spaces"


@pytest.mark.parametrize(
    ("language", "text", "foreign"),
    [("en", "Harbour bridge opens on Monday", "quick jazzy vixen"), ("ja", "港の橋が開通した", "犬も猫も走る")],
)
def test_the_same_text_is_one_and_a_foreign_one_nothing(language: str, text: str, foreign: str) -> None:
    same = measure_overlap([text], [text], ["u"], language=language, seed=0)
    values = [same.rouge_1.value, same.rouge_2.value, same.rouge_l.value, same.bleu, same.chrf]
    assert values == pytest.approx([1.0] * 5)
    other = measure_overlap([foreign], [text], ["u"], language=language, seed=0)
    assert [other.rouge_1.value, other.rouge_2.value, other.rouge_l.value] == [0.0] * 3
    assert other.chrf < 0.1


def test_words_of_mixed_languages() -> None:
    assert words("ＧＤＰ 2.5%増、don't_stop Straße") == ["gdp", "2", "5", "増", "don", "t", "stop", "strasse"]
    assert words_and_marks("Ab,橋 1.") == ["Ab", ",", "橋", "1", "."]
    assert words("ｶﾞス") == ["ガ", "ス"], "half-width kana"
    assert words("서울 시장") == ["서울", "시장"], "Korean has spaces"


# -- variety, likeness, faithfulness


def test_variety_by_hand() -> None:
    ids = ["a", "a", "a", "b", "b", "alone"]
    texts = ["one two", "one two", "one three", "橋が", "港が", "x"]
    found = measure_variety(ids, texts, seed=0)
    assert found is not None
    assert found.num_contents == 2
    assert found.distinct.value == pytest.approx((1 / 2 + 1) / 2)
    assert found.distance.value == pytest.approx(((0 + 1 / 2 + 1 / 2) / 3 + 1 / 2) / 2)
    assert found.distinct_2.value == pytest.approx((2 / 3 + 1) / 2)
    assert distinct_2(["one", ""]) == 0.0
    assert measure_variety(["a", "b"], ["x", "x"], seed=0) is None


@QUICK
@given(texts=st.lists(JA | EN, min_size=2, max_size=9), same=EN)
def test_variety_lies_between_one_text_and_all_different(texts: list[str], same: str) -> None:
    found = measure_variety(["a"] * len(texts), texts, seed=0)
    none = measure_variety(["a"] * len(texts), [same] * len(texts), seed=0)
    assert found is not None
    assert none is not None
    assert (none.distinct.value, none.distance.value) == (0.0, 0.0)
    assert found.distinct.value == pytest.approx((len(set(texts)) - 1) / (len(texts) - 1))
    assert 0.0 <= found.distance.value <= 1.0


def test_likeness_by_hand_and_by_scipy() -> None:
    texts, references = ["Why?", "ab", "「橋」１", "abcdefgh"], ["Why not?", "ab!", "橋は1", "abc"]
    users = ["u", "u", "v", "w"]
    found = measure_likeness(texts, references, users, seed=0)
    assert found.length_difference.value == pytest.approx((4 + 1 + 1 + 5) / 4)
    assert found.habits.value == pytest.approx((5 + 4 + 4 + 5) / (4 * 5))
    assert found.length_correlation == pytest.approx(stats.pearsonr([3, 4, 8], [5.5, 3, 3]).statistic)
    same = measure_likeness(references, references, users, seed=0)
    assert (same.length_difference.value, same.habits.value) == (0.0, 1.0)
    assert measure_likeness(["a", "b", "c"], references[:3], ["u", "v", "w"], seed=0).length_correlation is None


def test_habits_in_both_languages() -> None:
    names = ["question", "exclamation", "number", "quotation", "colon"]
    for text, shown in {
        "Why: 'now'?": {"question", "colon", "quotation"},
        "なぜ？": {"question"},
        "速報：３人「無事」！": {"exclamation", "number", "quotation", "colon"},
        "It's fine": set(),
    }.items():
        assert {name for name, found in zip(names, habits(text), strict=True) if found} == shown, text


def test_faithful_texts_name_only_what_the_content_names() -> None:
    body = "The city opened a bridge on Monday. It cost 40 million dollars. Mayor Anna Larsson cut the ribbon."
    english = Content("c", "Harbour bridge opens", body, "en")
    japanese = Content("d", "新しい橋が開通", "費用は40億円。佐藤市長がテープを切った。", "ja")
    cases = {
        "A bridge for 40 million dollars": english,
        "A bridge for 41 million dollars": english,
        "Mayor Peter Jackson opens the bridge": english,
        "佐藤市長が40億円の橋を開通": japanese,
        "費用41億円の橋が開通": japanese,
        "": japanese,
    }
    found = measure_faithfulness(list(cases), list(cases.values()), list("uvwxyz"), seed=0)
    assert found.faithful.value == pytest.approx(2 / 6)
    assert found.foreign_numbers == pytest.approx(2 / 6)
    assert found.foreign_names == pytest.approx(1 / 6)
    assert found.num_empty == 1
    swapped = measure_faithfulness(list(cases)[:1], [japanese], ["u"], seed=0)
    assert measure_faithfulness(list(cases)[:1], [english], ["u"], seed=0).faithful.value == 1.0
    assert swapped.num_empty == 0
    allowed = measure_faithfulness(list(cases), list(cases.values()), list("uvwxyz"), allow=["Peter Jackson"], seed=0)
    assert allowed.faithful.value == pytest.approx(3 / 6)
    assert allowed.foreign_names == 0.0


def test_texts_are_measured_by_language_with_the_references_last() -> None:
    found = measure_texts(texts_frame(), seed=0)
    assert [(one.language, one.method) for one in found] == [
        (language, method)
        for language in ("en", "ja")
        for method in ("right", "shuffled", "no_soft_token", "reference")
    ]
    by_key = {(one.language, one.method): one for one in found}
    for language in ("en", "ja"):
        right, none, own = (by_key[language, method] for method in ("right", "no_soft_token", "reference"))
        assert right.overlap is not None
        assert none.overlap is not None
        assert right.overlap.rouge_l.value > none.overlap.rouge_l.value + 0.2
        assert right.variety is not None
        assert none.variety is not None
        assert right.variety.distinct.value == 1.0 > none.variety.distinct.value == 0.0
        assert (own.overlap, own.likeness) == (None, None)
    moved = measure_texts(texts_frame().sample(fraction=1, shuffle=True, seed=1), seed=0)
    assert moved == found


def test_samples_are_of_every_language_and_of_no_content_twice() -> None:
    samples = choose_samples(texts_frame(), seed=0)
    assert 2 <= len(samples) <= 12
    assert {sample.language for sample in samples} == {"en", "ja"}
    assert all(list(sample.texts) == ["right", "shuffled", "no_soft_token"] for sample in samples)
    assert choose_samples(texts_frame(), seed=0) == samples
    assert choose_samples(texts_frame(methods=("shuffled",)), seed=0) == ()

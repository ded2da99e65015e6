"""Which script a text is written in, whether that fits a language tag, and whether a text runs in a loop."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from functools import lru_cache

import numpy as np

# Blocks by script, after NFKC. Marks such as the kana length mark count with their script.
_SCRIPTS = {
    "latin": "A-Za-zªºÀ-ÖØ-öø-ɏḀ-ỿ",
    "kana": "\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff",
    "han": "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f",
    "hangul": "\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3",
    "cyrillic": "\u0400-\u052f\u1c80-\u1c8f",
    "greek": "\u0370-\u03ff\u1f00-\u1fff",
    "arabic": "\u0620-\u064a\u066e-\u06d3\u06fa-\u06ff\u0750-\u077f",
    "hebrew": "\u05d0-\u05f2",
    "thai": "\u0e01-\u0e3a\u0e40-\u0e4e",
    "devanagari": "\u0900-\u0963\u0971-\u097f",
    "bengali": "\u0980-\u09e3",
    "tamil": "\u0b80-\u0bd7",
    "telugu": "\u0c00-\u0c63",
    "georgian": "\u10a0-\u10ff",
    "armenian": "\u0531-\u0587",
}
_PATTERNS = {name: re.compile(f"[{blocks}]") for name, blocks in _SCRIPTS.items()}
_LATIN_WORD = re.compile(f"[{_SCRIPTS['latin']}]+")

_LANGUAGES = {
    "latin": "en eng de fr es it pt nl sv da nb no fi is pl cs sk sl hr hu ro tr vi id ms et lv lt sq ca gl eu sw",
    "cyrillic": "ru uk bg be mk kk ky mn tg",
    "greek": "el",
    "arabic": "ar fa ur ps",
    "hebrew": "he yi",
    "thai": "th",
    "devanagari": "hi mr ne",
    "bengali": "bn as",
    "tamil": "ta",
    "telugu": "te",
    "georgian": "ka",
    "armenian": "hy",
    "ja": "ja jpn",
    "zh": "zh zho chi cmn yue",
    "ko": "ko kor",
}
_WRITTEN_IN = {language: script for script, languages in _LANGUAGES.items() for language in languages.split()}
_SCRIPT_TAGS = {"latn": "latin", "cyrl": "cyrillic", "arab": "arabic", "deva": "devanagari", "grek": "greek"}

# Characters of Chinese that Japanese does not write: simplified forms, pronouns and particles.
_CHINESE_ONLY = frozenset(
    "这们说吗呢你对时发经问题见关开门东车马鸟鱼书长头亿个动务产业电话认让还过进远运边达选适"
    "她它哪么怎很给从为华习记级组织权义实现场议决应该总统计济银钱资贸难虽热战飞种类听读讲谁"
    "這說嗎妳沒啦喔嘛咱您"
)
_MAX_HAN_WITHOUT_KANA = 30


# Unicode's Default_Ignorable_Code_Point: nothing is seen of them, and between two letters they would part a word.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def normalize(text: str) -> str:
    """NFKC without invisible characters: full-width letters and digits, half-width kana in their plain form."""
    if text.isascii():
        return text
    return unicodedata.normalize("NFKC", _INVISIBLE.sub("", text))


def primary_subtag(tag: str) -> str:
    """`ja` of `ja-JP`, `en` of `EN_us`."""
    return re.split(r"[-_]", tag.strip().lower(), maxsplit=1)[0]


def count_scripts(text: str) -> Counter[str]:
    """Number of letters by script in an NFKC text; scripts that we do not know count as `other`."""
    if text.isascii():
        return +Counter(latin=sum(map(str.isalpha, text)))
    counts, left = Counter[str](), text
    for name, pattern in _PATTERNS.items():
        left, counts[name] = pattern.subn("", left)
    num_letters = sum(map(str.isalpha, text))
    # Some marks that belong to a script are no letters to Unicode, so the rest can be negative.
    counts["other"] = max(0, num_letters - counts.total())
    return +counts


def language_problem(text: str, tag: str) -> str:
    """Why this NFKC text cannot be in the language of this tag; empty when it can, or when the tag is unknown.

    Only scripts are compared, so English is not told from French; Chinese is told from Japanese by kana and by
    characters that only one of them writes.
    """
    expected = _expected_script(tag)
    if expected is None:
        return ""
    counts = count_scripts(text)
    if not counts:
        return "no letters"
    match expected:
        case "ja":
            return _not_japanese(text, counts)
        case "zh":
            return _not_chinese(text, counts)
        case "ko":
            return _not_dense(text, counts, ("hangul",))
        case _:
            return _not_alphabetic(text, counts, expected)


@lru_cache(maxsize=64)
def _expected_script(tag: str) -> str | None:
    for subtag in re.split(r"[-_]", tag.strip().lower())[1:]:
        if subtag in _SCRIPT_TAGS:
            return _SCRIPT_TAGS[subtag]
    return _WRITTEN_IN.get(primary_subtag(tag))


def _not_alphabetic(text: str, counts: Counter[str], script: str) -> str:
    if counts[script] * 2 < counts.total():
        return f"{counts[script]} of {counts.total()} letters are {script}"
    # A Japanese clause has few characters beside English words, so letters alone do not show it.
    num_dense, num_words = counts["kana"] + counts["han"] + counts["hangul"], len(text.split())
    if num_dense > 2 * num_words:
        return f"{num_dense} Chinese, Japanese or Korean characters in {num_words} words"
    return ""


def _not_dense(text: str, counts: Counter[str], scripts: tuple[str, ...]) -> str:
    """For scripts whose characters weigh like a word each: brand names in Latin letters must not outweigh them."""
    num_own = sum(counts[script] for script in scripts)
    num_latin = len(_LATIN_WORD.findall(text))
    num_other = counts.total() - counts["latin"] - num_own
    if num_own == 0:
        return f"no {' or '.join(scripts)}"
    if num_latin > num_own:
        return f"{num_latin} Latin words beside {num_own} characters of {' and '.join(scripts)}"
    if num_other > num_own:
        return f"{num_other} characters of other scripts beside {num_own} of {' and '.join(scripts)}"
    return ""


def _not_japanese(text: str, counts: Counter[str]) -> str:
    problem = _not_dense(text, counts, ("kana", "han"))
    if problem or counts["kana"]:
        return problem
    chinese = sorted(_CHINESE_ONLY.intersection(text))
    if chinese:
        return f"no kana, and {''.join(chinese[:3])} is not written in Japanese"
    if counts["han"] > _MAX_HAN_WITHOUT_KANA:
        return f"{counts['han']} kanji without kana"
    return ""


def _not_chinese(text: str, counts: Counter[str]) -> str:
    if counts["kana"] * 5 > counts["han"]:
        return f"{counts['kana']} kana beside {counts['han']} han"
    return _not_dense(text, counts, ("han",))


_MAX_PERIOD = 200
_NUM_REPEATS = {1: 8, 2: 5, 3: 4}
# By period, how many characters in a row equal the one a period before them, in a loop.
_MIN_LENGTHS = {n: n * (_NUM_REPEATS.get(n, 3 if n <= 11 else 2) - 1) for n in range(1, _MAX_PERIOD + 1)}
_LEAST_LENGTH = min(_MIN_LENGTHS.values())
_THOUSANDS = re.compile(r"\d{3},|\d\d,\d|\d,\d\d|,\d{3}")  # of 1,000,000,000, from wherever it is cut
_NGRAM_WINDOW = 1000
_MIN_DISTINCT_SHARE = 0.6  # texts that people wrote keep above 0.6 in 99.99 % of 20,000 headlines


def repetition_problem(text: str) -> str:
    """The piece that a text repeats in a loop, else empty; works without spaces between words.

    A loop is 1 character 8 times in a row, 2 characters 5 times, 3 characters 4 times, 4 to 11 characters 3 times,
    12 or more twice (digits never, nor a number's thousands); or, from 24 characters on, less than 60 % of the
    character n-grams being distinct.
    """
    text += " "  # so that the last word ends as the others do
    return _loop(text) or _repeated_ngrams(text)


def _loop(text: str) -> str:
    # So many characters stand in a loop twice: where each such piece is there once, there is none. To look for a run
    # at every period takes 250 us for a headline, this 5.
    if _num_distinct(text, _LEAST_LENGTH) == max(len(text) - _LEAST_LENGTH + 1, 0):
        return ""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    for period in sorted(_distances(text).intersection(_MIN_LENGTHS)):
        start = _find_run(codes[period:] == codes[:-period], _MIN_LENGTHS[period])
        piece = "" if start is None else text[start : start + period]
        if piece and not piece.isdigit() and not _THOUSANDS.fullmatch(piece):
            return piece.strip() or "blanks"
    return ""


def _distances(text: str) -> set[int]:
    """From one another, of pieces that are the same and as long as the shortest loop goes on."""
    places, distances = defaultdict[str, list[int]](list), set[int]()
    for at in range(len(text) - _LEAST_LENGTH + 1):
        before = places[text[at : at + _LEAST_LENGTH]]
        distances.update(at - place for place in before[-_MAX_PERIOD:])
        before.append(at)
    return distances


def _num_distinct(text: str, size: int) -> int:
    """How many different pieces of this size a text has."""
    return len({text[at : at + size] for at in range(len(text) - size + 1)})


def _find_run(same: np.ndarray[tuple[int], np.dtype[np.bool_]], min_length: int) -> int | None:
    """Start of the first run of True that is long enough."""
    if len(same) < min_length:
        return None
    edges = np.flatnonzero(np.diff(np.concatenate(([0], same.astype(np.int8), [0]))))
    starts, ends = edges[::2], edges[1::2]
    long = np.flatnonzero(ends - starts >= min_length)
    return int(starts[long[0]]) if len(long) else None


def _repeated_ngrams(text: str) -> str:
    compact = "".join(text.split())
    for offset in range(0, len(compact), _NGRAM_WINDOW):
        window = compact[offset : offset + _NGRAM_WINDOW]
        if len(window) < 24:
            continue
        size = 6 if len(_PATTERNS["latin"].sub("", window)) * 2 < len(window) else 4
        num_ngrams = len(window) - size + 1
        if _num_distinct(window, size) < _MIN_DISTINCT_SHARE * num_ngrams:
            return Counter(window[at : at + size] for at in range(num_ngrams)).most_common(1)[0][0]
    return ""

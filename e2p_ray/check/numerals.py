"""Numbers in a text as values: 3,000 and 3000, 三百万 and 3 million, 1.2億 and 1億2000万 are equal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal

_TEN = Decimal(10)
_KANJI_DIGITS = {char: Decimal(value) for value, char in enumerate("〇一二三四五六七八九")} | {
    "零": Decimal(0),
    "两": Decimal(2),
}
_SMALL = {"十": _TEN, "百": _TEN**2, "千": _TEN**3, "hundred": _TEN**2}
_LARGE = {
    **dict.fromkeys(("万", "萬"), _TEN**4),
    **dict.fromkeys(("億", "亿"), _TEN**8),
    "兆": _TEN**12,
    "thousand": _TEN**3,
    **dict.fromkeys(("million", "mln", "mn", "mio"), _TEN**6),
    **dict.fromkeys(("billion", "bln", "bn"), _TEN**9),
    **dict.fromkeys(("trillion", "trn", "tn"), _TEN**12),
    "lakh": _TEN**5,
    "crore": _TEN**7,
}
# One letter may be a unit instead (a 5 k race, a 10 m wall), so both readings count.
_LETTER_SCALES = {"k": _TEN**3, "m": _TEN**6, "b": _TEN**9, "t": _TEN**12}
_UNITS_AND_TEENS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS = {word: Decimal(value) for value, word in enumerate(_UNITS_AND_TEENS.split())}
_WORDS |= {word: Decimal(20 + 10 * step) for step, word in enumerate(_TENS.split())}
_ORDINAL_WORDS = "first second third fourth fifth sixth seventh eighth ninth tenth"
_ORDINALS = {word: Decimal(value + 1) for value, word in enumerate(_ORDINAL_WORDS.split())}

_TOKEN = re.compile(
    r"(?P<number>(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+)(?:\.\d+)?)"
    "|(?P<kanji>[〇零一二三四五六七八九两十百千万萬億亿兆])"
    "|(?P<word>[a-z]+)"
)
_DIGITS = re.compile(r"[\d〇零一二三四五六七八九两十百千万萬億亿兆]")
_LATIN_WORD = re.compile("[a-z]+")
_NUMBER_WORDS = frozenset((*_WORDS, *_SMALL, *_LARGE))
_MAX_DIGITS = 30  # longer digit strings are ids: compared as strings

# Everyday words and names that hold kanji numerals without counting anything, and units that end in a digit.
_NOT_COUNTING = re.compile(
    "(?<![0-9〇一二三四五六七八九十百千万億])(?:"
    "(?<![0-9] )万人|"  # 3 万人 is a count
    "万一|万が一|千葉|千代|八千代|千歳|千島|八百屋|八百長|五十嵐|七五三|五十歩百歩|十人十色|二人三脚|四六時中|三日月|三度笠|"
    "四日市|五日市|八日市|十日町|廿日市|二日酔|六本木|二本松|三本松|七回忌|八王子|九十九里|三十路|千秋楽|千載一遇|百貨|百科|百獣|"
    "百戦|百合|四国|九州|五輪|七夕|三重県|三角|四角|四半期|三味線|二酸化|三振|二塁|三塁|十字|千羽|万引|万博|万歳|万年筆|三菱|三井|三越|"
    "五分五分|二度と(?!も)|二つ返事|億万長者|三日坊主|五月晴れ|五月病|八百万の神|十八番|二の舞|一石二鳥|三社祭|第三者|再三|三顧|八方|四方)"
    "|(?<![時0-9〇一二三四五六七八九十百千万億])十分"
    "|(?<![a-z])(?:[kc]?m[23]|co2)(?![a-z0-9])"
)
# What makes a single kanji numeral a count: 三人 but not 三味線.
_COUNTERS = frozenset(
    "人名年月日円件台社回個歳才時秒位度号本校倍割点票かカヵケヶ箇つ種階週頭匹冊枚軒戸隻杯泊組敗勝試条項版店億万千百%キメトポドユ"
)
_VAGUE = "数何幾"  # 数百万: several millions


@dataclass(frozen=True, slots=True)
class Numeral:
    """A number as it stands in a text; any of `values` may be meant."""

    piece: str
    values: frozenset[str]
    claims: bool  # false: it may be a part of a word or a figure of speech, good as evidence only


def find_numerals(text: str) -> Iterator[Numeral]:
    """All numbers of an NFKC text, in order; linear in its length."""
    text = text.casefold()
    if not _DIGITS.search(text) and _NUMBER_WORDS.isdisjoint(_LATIN_WORD.findall(text)):
        return
    text = _NOT_COUNTING.sub(lambda match: " " * len(match.group()), text)
    run: list[re.Match[str]] = []
    for token in _TOKEN.finditer(text):
        if token.lastgroup == "word" and not _is_number_word(token.group(), bool(run)):
            continue
        if run and not _joins(run[-1], token, text[run[-1].end() : token.start()]):
            yield from _numerals_of(run, text)
            run = []
        if not run and token.group() in _LETTER_SCALES:  # a letter that its number did not take
            continue
        run.append(token)
    if run:
        yield from _numerals_of(run, text)


def number_values(text: str) -> frozenset[str]:
    """Every value that an NFKC text gives evidence of, and its ordinal words."""
    found: set[str] = set()
    for numeral in find_numerals(text):
        found |= numeral.values
    for word in _LATIN_WORD.findall(text.casefold()):
        if word in _ORDINALS:
            found.add(_key(_ORDINALS[word]))
    return frozenset(found)


def foreign_number(text: str, known: frozenset[str]) -> str:
    """The first number of an NFKC text whose value is not among `known`; empty when there is none."""
    for numeral in find_numerals(text):
        if numeral.claims and not numeral.values & known:
            return numeral.piece
    return ""


def _is_number_word(word: str, in_run: bool) -> bool:
    return word in _NUMBER_WORDS or (in_run and word in _LETTER_SCALES)


def _joins(left: re.Match[str], right: re.Match[str], gap: str) -> bool:
    """Whether two neighbouring tokens are of one numeral."""
    after, word = left.group(), right.group()
    if right.lastgroup == "number":  # 1億 2000万 is written without a blank
        return left.lastgroup == "kanji" and gap == "" and (after in _SMALL or after in _LARGE)
    if right.lastgroup == "kanji":
        if left.lastgroup == "number":
            # 300 億円: many sites put a blank between digits and letters.
            return word not in _KANJI_DIGITS and (gap == "" or (gap == " " and word in _LARGE))
        return left.lastgroup == "kanji" and gap == ""
    if word in _LETTER_SCALES:
        return left.lastgroup == "number" and gap == ""
    if word in _SMALL or word in _LARGE:
        return left.lastgroup != "kanji" and gap in ("", " ", "-")
    if after in _SMALL or after in _LARGE:  # two hundred and five
        return left.lastgroup == "word" and gap in (" ", "-", " and ")
    return after in _WORDS and _WORDS[after] >= 20 and _WORDS[word] < 10 and gap in (" ", "-")


def _numerals_of(run: list[re.Match[str]], text: str) -> Iterator[Numeral]:
    start, end = run[0].start(), run[-1].end()
    tokens = [token.group() for token in run]
    values = frozenset(_values(tokens))
    if run[0].lastgroup == "kanji":
        claims = _kanji_claims(tokens, text[start - 1 : start], text[end : end + 1])
    elif run[0].lastgroup == "word":
        # "one" is rather a pronoun; "a million" and "millions" are figures of speech.
        claims = tokens[0] in _WORDS and tokens not in (["one"], ["zero"])
    else:
        claims = True
    percent = {_key(_parse(tokens) * 10)} if text[end : end + 1] == "割" and len(tokens[0]) < _MAX_DIGITS else set()
    yield Numeral(text[start:end], values | percent, claims)


def _kanji_claims(tokens: list[str], before: str, after: str) -> bool:
    """Whether a run that starts with a kanji numeral counts something, and is not a part of a word."""
    if before and before in _VAGUE:
        return False
    if any(token[0].isdecimal() for token in tokens):
        return True
    if tokens == ["一"]:
        return False
    if len(tokens) > 1:
        return True
    return after in _COUNTERS


def _values(tokens: list[str]) -> Iterable[str]:
    if len(tokens[0]) > _MAX_DIGITS:
        return [tokens[0]]
    if tokens[-1] in _LETTER_SCALES:
        number = _parse(tokens[:-1])
        return [_key(number), _key(number * _LETTER_SCALES[tokens[-1]])]
    return [_key(_parse(tokens))]


def _parse(tokens: list[str]) -> Decimal:
    total = section = Decimal(0)
    current: Decimal | None = None
    for token in tokens[:_MAX_DIGITS]:
        if token in _SMALL:
            section += (Decimal(1) if current is None else current) * _SMALL[token]
            current = None
        elif token in _LARGE:
            section += current or 0
            total += (section or Decimal(1)) * _LARGE[token]
            section, current = Decimal(0), None
        elif token in _KANJI_DIGITS:
            current = (current or 0) * _TEN + _KANJI_DIGITS[token]
        elif token in _WORDS:
            current = (current or 0) + _WORDS[token]
        elif token in _LETTER_SCALES:
            continue
        else:
            current = Decimal(token.replace(",", ""))
    return total + section + (current or 0)


def _key(value: Decimal) -> str:
    return f"{value.normalize():f}"

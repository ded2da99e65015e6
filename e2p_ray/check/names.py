"""Names in a text that its content lacks: capitalised words here, katakana and kanji in `japanese_names`.

The rules prefer to miss an invented name over rejecting an everyday word; `tests/test_check.py` measures both.

A word with a capital is known when it, or a form of it (plural, possessive, `Canadian` for `Canada`), occurs in the
content, or when its letters are the initials of a name there. In English it is known as well when it is an everyday
word (listed, formed of listed words, or with an ending that names do not have) and its capital says nothing, because it
opens a sentence or the text is in Title Case; in the middle of a sentence the capital makes it a name. In other
alphabetic languages only words in the middle of a sentence count, and none in German, which writes every noun so. In
Japanese, Chinese and Korean every such word counts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from e2p_ray.check import common_words
from e2p_ray.check.japanese_names import foreign_kanji, foreign_katakana, kanji_pieces, katakana_edges
from e2p_ray.check.script import primary_subtag

_LATIN = "A-Za-zÀ-ÖØ-öø-ɏḀ-ỿ"
_WORD = re.compile(rf"[{_LATIN}]+(?:['’][{_LATIN}]+)*")
_ANY_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_INITIALS = re.compile(r"(?<![A-Za-z])(?:[A-Z]\.){2,12}")
_OPENS_SENTENCE = frozenset(".!?:;\"“”‘’'«»„(\\[-–—|/…•*>。、")

_INFLECTIONS = (
    "edly",
    "ingly",
    "ings",
    "ing",
    "ies",
    "ied",
    "ier",
    "ily",
    "ers",
    "est",
    "ed",
    "er",
    "es",
    "ly",
    "s",
    "d",
    "r",
)
_DERIVATIONS = (
    *("ations", "ation", "ments", "ment", "ness", "able", "ible", "ists", "ist", "ism", "ions", "ion", "ity", "ive"),
    *("ized", "izing", "ize", "ally", "ical", "ful", "less", "ous", "ors", "or", "al", "ic", "en", "th", "y", "n"),
)
_ORIGINS = ("ians", "ian", "eans", "ean", "ese", "ish", "ans", "an", "is", "i", "a", "e", "o", "y", "n")
_PREFIXES = (
    "un",
    "re",
    "non",
    "pre",
    "mis",
    "over",
    "out",
    "dis",
    "de",
    "super",
    "under",
    "anti",
    "in",
    "im",
    "ex",
    "a",
)
# What is left of a word this long in front of these endings is hardly ever a name; Mohammed and Beijing are listed.
_WORD_ENDINGS = re.compile(
    "(?:.{4}(?:tions?|tional|tive|ously|fully|ness|less|ingly|edly|ical|ically|ology|ability|ibility|atory"
    "|i[sz]ed?|i[sz]es|i[sz]ing)|.{5}(?:ing|ed))$"
)
# Second halves of English surnames and places, no sign of an everyday compound.
_NAME_ENDINGS = (
    "man",
    "land",
    "field",
    "ton",
    "well",
    "hill",
    "wood",
    "ford",
    "son",
    "stone",
    "worth",
    "town",
    "castle",
)
_NO_CAPITALS = frozenset({"ja", "zh", "ko", "yue", "cmn", "jpn", "zho", "kor"})
_ACRONYMS = (
    "sns ng dx ev it pr url npo ngo cm gw vr ar pc ok ai tv cd dvd qr atm id pdf usb led ceo cfo gdp ipo vs no km kg "
    "lgbt lgbtq sdgs pk mvp jr btoc btob faq pos iot api gps am pm the of and"
)
_ACRONYMS_IN_JAPANESE = frozenset(_ACRONYMS.split())


_NEGATED = {"won": "will", "can": "can", "shan": "shall", "ain": "is"}


def fold(word: str) -> str:
    """Lower case without accents."""
    if word.isascii():
        return word.lower()
    decomposed = unicodedata.normalize("NFKD", word.casefold())
    return "".join(char for char in decomposed if not unicodedata.combining(char))


@lru_cache(maxsize=1 << 15)
def base_word(word: str) -> str:
    """`word` folded, without possessive or contraction: Amy's -> amy, Don't -> do, O'Brien -> obrien."""
    folded = fold(word)
    if folded.isalnum():
        return folded
    first, *rest = re.split("['’]", folded)
    if not rest:
        return first
    if len(first) <= 2 and len(rest[0]) > 2:
        return first + rest[0]
    if rest[0] == "t" and first.endswith("n") and len(first) > 2:
        return _NEGATED.get(first, first[:-1])
    return first


def stems(base: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    """The word, what is left of it without an ending, and what that may have been before the ending."""
    yield base
    if base.endswith("bly"):
        yield base[:-1] + "e"
    for suffix in suffixes:
        stem = base.removesuffix(suffix)
        if stem == base or len(stem) < (2 if suffix in ("ing", "ies", "ied") else 3):
            continue
        yield stem
        if suffix in ("iest", "ies", "ied", "ier", "ily", "iness"):
            yield stem + "y"
        elif len(suffix) > 1:
            yield stem + "e"
            if stem[-1] == stem[-2]:
                yield stem[:-1]


@lru_cache(maxsize=1 << 15)
def forms(base: str) -> frozenset[str]:
    """What a name may look like without its ending: Quinns, Portviller, Canadian and Canada share one.

    A memo, as contents of one language share most of their words: those of a content of 60 words take 0.7 for 1.6 ms.
    """
    return frozenset((*stems(base, _INFLECTIONS), *stems(base, _ORIGINS)))


@lru_cache(maxsize=1 << 15)
def _folded(word: str) -> frozenset[str]:
    """What a content's word is looked for as: whole, and its parts about an apostrophe."""
    return frozenset((base_word(word), *map(fold, re.split("['’]", word))))


@lru_cache(maxsize=1 << 14)
def is_everyday(base: str) -> bool:
    """Whether a folded English word is no name: listed, formed from listed words, or formed as names are not."""
    if base in common_words.names_like_words():
        return False
    return bool(_is_listed(base) or _WORD_ENDINGS.search(base) or _is_compound(base))


def _is_listed(base: str) -> bool:
    """In the list of common words, give or take a prefix and two endings."""
    everyday = common_words.english()
    roots = {base}.union(base.removeprefix(prefix) for prefix in _PREFIXES if len(base) >= len(prefix) + 4)
    inflected = {stem for root in roots for stem in stems(root, _INFLECTIONS)}
    return any(stem in everyday for word in inflected for stem in stems(word, _DERIVATIONS))


def _is_compound(base: str) -> bool:
    """Two listed words in one: schoolchildren, but not Springfield."""
    if len(base) < 7 or base.endswith(_NAME_ENDINGS):
        return False
    everyday = common_words.english()
    return any(base[:cut] in everyday and _is_listed(base[cut:]) for cut in range(3, len(base) - 3))


@dataclass(frozen=True)
class KnownNames:
    """What an NFKC content text gives evidence of; computed when first asked for."""

    text: str

    @cached_property
    def words(self) -> frozenset[str]:
        """Folded words."""
        text = _join_initials(self.text)
        words = {*_ANY_WORD.findall(text), *_WORD.findall(text)}  # the latter for Latin words beside kanji
        return frozenset().union(*map(_folded, words))

    @cached_property
    def forms(self) -> frozenset[str]:
        return frozenset().union(*map(forms, self.words))

    @cached_property
    def initials(self) -> str:
        """First letters of all words but little ones, so that an acronym is a substring; capitals only."""
        words = _WORD.findall(self.text)
        return "".join(
            word[0].lower() if word[0].isupper() else " "
            for word in words
            if word[0].isupper() or word not in ("of", "the", "and", "for", "de", "in")
        )

    @cached_property
    def katakana(self) -> frozenset[str]:
        """Beginnings and ends of katakana runs."""
        return katakana_edges(self.text)

    @cached_property
    def kanji(self) -> frozenset[str]:
        """Pieces of kanji runs."""
        return kanji_pieces(self.text)


def foreign_name(text: str, language: str, known: KnownNames) -> str:
    """The first name of an NFKC text that the content lacks; empty when there is none."""
    tag = primary_subtag(language)
    if tag == "de":
        return ""
    text = _join_initials(text)
    if tag in ("en", "eng"):
        return _foreign_english(text, known)
    if tag not in _NO_CAPITALS:
        return _foreign_capitalised(text, known)
    found = _foreign_latin(text, known) or foreign_katakana(text, known.katakana)
    if not found and tag in ("ja", "jpn"):
        found = foreign_kanji(text, known.kanji)
    return found


def _join_initials(text: str) -> str:
    return _INITIALS.sub(lambda match: match.group().replace(".", "") + " ", text)


def _has_capital(word: str) -> bool:
    return word != word.lower()


def _opens_sentence(text: str, start: int) -> bool:
    before = start - 1
    while before >= 0 and text[before] == " ":
        before -= 1
    return before < 0 or text[before] in _OPENS_SENTENCE


def _is_title_case(words: list[str]) -> bool:
    """Whether capitals say nothing here: most words of four letters or more after the first have one."""
    long = [word for word in words[1:] if len(word) >= 4]
    return len(long) < 2 or sum(word[0].isupper() for word in long) >= 0.6 * len(long)


def _foreign_english(text: str, known: KnownNames) -> str:
    matches = list(_WORD.finditer(text))
    title_case = _is_title_case([match.group() for match in matches])
    for match in matches:
        word = match.group()
        if not _has_capital(word):
            continue
        base = base_word(word)
        if len(base) < 2 or _is_known(word, base, known):
            continue
        capital_says_nothing = title_case or _opens_sentence(text, match.start())
        if capital_says_nothing and word != "US" and is_everyday(base):
            continue
        return word
    return ""


def _is_known(word: str, base: str, known: KnownNames) -> bool:
    if base in common_words.often_capitalised() or base in known.words:
        return True
    if not known.forms.isdisjoint(forms(base)):
        return True
    demonyms = common_words.demonyms()
    singular = base.removesuffix("s")
    if any(place in known.words for place in demonyms.get(base, demonyms.get(singular, frozenset()))):
        return True
    return word.isupper() and 2 <= len(word) <= 6 and word.lower() in known.initials


def _foreign_capitalised(text: str, known: KnownNames) -> str:
    matches = list(_ANY_WORD.finditer(text))
    if _is_title_case([match.group() for match in matches]):
        return ""
    for match in matches:
        word = match.group()
        base = base_word(word)
        if _has_capital(word) and len(base) > 1 and not _opens_sentence(text, match.start()):
            parts = {base, *(fold(part) for part in re.split("['’]", word))}
            if not parts & known.words and known.forms.isdisjoint(forms(base)):
                return word
    return ""


def _foreign_latin(text: str, known: KnownNames) -> str:
    for match in _WORD.finditer(text):
        word = match.group()
        base = base_word(word) if _has_capital(word) else ""
        if len(base) > 1 and base not in _ACRONYMS_IN_JAPANESE and base not in known.forms:
            return word
    return ""

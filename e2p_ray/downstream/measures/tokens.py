"""Words of a text for counting overlaps, in any mix of languages, without a dictionary.

Scripts written without spaces count by character; runs of other letters and digits stay whole. That needs no
morphological analyser and gives the same figures wherever it runs.
"""

from __future__ import annotations

import re

from e2p_ray.check.script import normalize, primary_subtag

_UNSPACED = "\u3005-\u3007\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_UNSPACED += "\U00020000-\U0003134f\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # and Thai, Lao, Burmese, Khmer
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])[^\W_])+")
_WORD_OR_MARK = re.compile(rf"{_WORD.pattern}|[^\w\s]|_")
_UNSPACED_LANGUAGES = frozenset(["ja", "jpn", "zh", "zho", "chi", "cmn", "yue", "th", "lo", "my", "km"])


def words(text: str) -> list[str]:
    """Folded words, marks left out: 'GDP 2.5%増' gives gdp, 2, 5, 増."""
    return _WORD.findall(normalize(text).casefold())


def words_and_marks(text: str) -> list[str]:
    """Words as they are written, every mark one of its own."""
    return _WORD_OR_MARK.findall(normalize(text))


def is_unspaced(language: str) -> bool:
    """Is this language written without spaces between words?"""
    return primary_subtag(language) in _UNSPACED_LANGUAGES

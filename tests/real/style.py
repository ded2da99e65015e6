"""How a text is written, as numbers and in words: length, punctuation, capitals, first words."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_STOP_WORDS = _words(
    "a an and are as at be but by for from has have he her his how in into is it its of on or she that the their they "
    "this to was were what when where which who why will with you your"
)
_QUESTION_WORDS = _words("are can could did do does how is should what when where which who why will would")
_FIRST_PERSON = _words("i i'm i've me my we our us")
_SECOND_PERSON = _words("you your you're")
_QUOTES = re.compile(r"[\"“”‘]|(?<!\w)['’]|['’](?!\w)")


STYLE_NAMES = (
    "words",
    "characters",
    "word length",
    "question",
    "exclamation",
    "colon",
    "comma",
    "semicolon",
    "quotation",
    "dash",
    "number",
    "money or percent",
    "full stop",
    "ellipsis",
    "ampersand",
    "apostrophes",
    "capitalised",
    "title case",
    "capital letters",
    "capital words",
    "small first letter",
    "stop words",
    "capitalised stop words",
    "article first",
    "question word first",
    "number first",
    "-ing first",
    "first person",
    "second person",
)
_HABITS = {
    "question": "a question",
    "exclamation": "an exclamation",
    "quotation": "a quotation",
    "colon": "a colon",
    "comma": "a comma",
    "number": "a number",
    "full stop": "a full stop",
    "second person": "speaking to the reader",
}


def style_features(text: str) -> FloatArray:
    """(num_features,): lengths as logarithms, all else as shares or as 0 and 1."""
    words = text.split()
    bare = [word.strip(".,:;!?\"'“”‘’()").lower() for word in words]
    letters = [char for char in text if char.isalpha()]
    num_words, num_letters = max(1, len(words)), max(1, len(letters))
    longer = [word for word in words[1:] if word[:1].isalpha()]
    first = bare[0] if bare else ""
    capitalised = sum(word[0].isupper() for word in longer) / max(1, len(longer))
    return np.array(
        [
            np.log(num_words),
            np.log(max(1, len(text))),
            np.log(len(text) / num_words + 1),
            "?" in text,
            "!" in text,
            ":" in text,
            "," in text,
            ";" in text,
            bool(_QUOTES.search(text)),
            bool(re.search(r"\s[-–—]+\s|—", text)),
            any(char.isdigit() for char in text),
            "$" in text or "%" in text,
            text.rstrip().endswith("."),
            "..." in text or "…" in text,
            "&" in text,
            text.count("'") + text.count("’"),
            capitalised,
            capitalised > 0.8,
            sum(char.isupper() for char in letters) / num_letters,
            sum(word.isupper() and len(word) > 1 for word in words) / num_words,
            text[:1].islower(),
            sum(word in _STOP_WORDS for word in bare) / num_words,
            sum(word[:1].isupper() for word in words if word.lower() in _STOP_WORDS) / num_words,
            first in ("the", "a", "an"),
            first in _QUESTION_WORDS,
            first[:1].isdigit(),
            first.endswith("ing"),
            any(word in _FIRST_PERSON for word in bare),
            any(word in _SECOND_PERSON for word in bare),
        ],
        np.float64,
    )


def describe_style(means: FloatArray) -> str:
    """The writer of headlines in a few words, from the mean features (num_features,) of what he wrote."""
    mean = dict(zip(STYLE_NAMES, means.tolist(), strict=True))
    num_words = float(np.exp(mean["words"]))
    size = "Short" if num_words < 8 else "Long" if num_words > 12 else "Middling"
    said = [f"{size} headlines, about {round(num_words)} words"]
    if mean["capitalised"] > 0.8:
        said.append("capitals on every word")
    elif mean["capitalised"] < 0.35:
        said.append("capitals on names only")
    said.extend(f"often {habit}" for name, habit in _HABITS.items() if mean[name] > 0.2)
    return "; ".join(said) + "."

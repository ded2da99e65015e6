"""May this text be published for this content? Pure rules, cheap enough for every text.

The rules look at the text in NFKC form, so full-width letters and digits hide nothing; title and body are both content.
The first rule that fails gives the verdict, in this order:

    empty_text, broken_characters, denied_phrase   nothing else matters
    too_short, too_long, unfinished                bounds of the task
    wrong_language, repetition                     what a lost model writes
    foreign_email, foreign_url, foreign_phone, foreign_address, foreign_number, foreign_name
                                                   what the content does not say

What is not seen: a wrong statement made of the content's own names and numbers, an invented name in lower case, two
names of the content mixed to a third, a name in a script that the text's language does not write.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property, lru_cache

from e2p_ray.check.contacts import (
    Contacts,
    find_contacts,
    foreign_address,
    foreign_mail,
    foreign_phone,
    foreign_url,
    without_contacts,
)
from e2p_ray.check.names import KnownNames, foreign_name
from e2p_ray.check.numerals import foreign_number, number_values
from e2p_ray.check.script import language_problem, normalize, repetition_problem
from e2p_ray.config import ChecksConfig, LimitsConfig
from e2p_ray.schema import Completion, Content, FinishReason, Reason, Verdict

_MAX_DETAIL_CHARS = 80
_BIDI_CONTROLS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_CUT = (FinishReason.MAX_TOKENS, FinishReason.MAX_CHARS)


@dataclass(frozen=True)
class ContentFacts:
    """What a content gives evidence of; each part is computed when a text first asks for it."""

    content: Content

    @cached_property
    def text(self) -> str:
        return normalize(f"{self.content.title}\n{self.content.body}")

    @cached_property
    def contacts(self) -> Contacts:
        return find_contacts(self.text)

    @cached_property
    def numbers(self) -> frozenset[str]:
        return number_values(self._both)

    @cached_property
    def names(self) -> KnownNames:
        return KnownNames(self._both)

    @cached_property
    def _both(self) -> str:
        """The text with its contacts and without, because texts are read either way."""
        return f"{self.text}\n{without_contacts(self.text)}"


# A memo of a pure function: one content has many texts, and they are checked one after the other.
@lru_cache(maxsize=16)
def _facts(content: Content) -> ContentFacts:
    return ContentFacts(content)


def check(
    text: str, content: Content, completion: Completion | None, limits: LimitsConfig, checks: ChecksConfig
) -> Verdict:
    """The verdict on one text; without a completion the rules on tokens and ending are left out. Never raises."""
    stripped = text.strip()
    plain = normalize(stripped)
    return (
        _check_form(stripped, plain, checks)
        or _check_bounds(stripped, completion, limits)
        or _check_writing(plain, content, checks)
        or _check_contacts(plain, content, checks)
        or _check_facts(plain, content, checks)
        or Verdict()
    )


def _reject(reason: Reason, detail: str) -> Verdict:
    return Verdict(reason, detail[:_MAX_DETAIL_CHARS])


def _check_form(text: str, plain: str, checks: ChecksConfig) -> Verdict | None:
    if not plain.strip():
        return _reject(Reason.EMPTY_TEXT, "nothing but blanks")
    if not text.isprintable() or "\ufffd" in text:  # nothing else that is printable is broken
        broken = next((char for char in text if _is_broken(char)), None)
        if broken is not None:
            return _reject(Reason.BROKEN_CHARACTERS, f"U+{ord(broken):04X}")
    folded = plain.casefold()
    denied = next((phrase for phrase, form in _denied(checks.deny) if form in folded), None)
    return None if denied is None else _reject(Reason.DENIED_PHRASE, denied)


@lru_cache(maxsize=4)
def _denied(phrases: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Phrases, and what they are looked for as."""
    forms = ((phrase, normalize(phrase).casefold()) for phrase in phrases)
    return tuple((phrase, form) for phrase, form in forms if form.strip())  # what nobody sees is in every text


def _is_broken(char: str) -> bool:
    """Control characters, halves of surrogate pairs, private use, and what undecodable bytes become."""
    if char in "\t\n\r":
        return False
    code = ord(char)
    if char == "\ufffd" or char in _BIDI_CONTROLS or code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF:
        return True
    return unicodedata.category(char) in ("Cc", "Cs", "Co")


def _check_bounds(text: str, completion: Completion | None, limits: LimitsConfig) -> Verdict | None:
    if len(text) < limits.min_chars:
        return _reject(Reason.TOO_SHORT, f"{len(text)} characters, at least {limits.min_chars}")
    if len(text) > limits.max_chars:
        return _reject(Reason.TOO_LONG, f"{len(text)} characters, at most {limits.max_chars}")
    if completion is None:
        return None
    if completion.num_output_tokens > limits.max_tokens:
        return _reject(Reason.TOO_LONG, f"{completion.num_output_tokens} tokens, at most {limits.max_tokens}")
    if limits.must_finish and completion.finish_reason in _CUT:
        return _reject(Reason.UNFINISHED, f"cut by {completion.finish_reason}")
    return None


def _check_writing(plain: str, content: Content, checks: ChecksConfig) -> Verdict | None:
    if checks.language and (problem := language_problem(plain, content.language)):
        return _reject(Reason.WRONG_LANGUAGE, f"not {content.language}: {problem}")
    if checks.repetition and (piece := repetition_problem(plain)):
        return _reject(Reason.REPETITION, piece)
    return None


def _check_contacts(plain: str, content: Content, checks: ChecksConfig) -> Verdict | None:
    if not checks.foreign_contacts:
        return None
    known = _facts(content).contacts
    for reason, find in (
        (Reason.FOREIGN_EMAIL, foreign_mail),
        (Reason.FOREIGN_URL, foreign_url),
        (Reason.FOREIGN_PHONE, foreign_phone),
        (Reason.FOREIGN_ADDRESS, foreign_address),
    ):
        if piece := find(plain, known):
            return _reject(reason, piece)
    return None


def _check_facts(plain: str, content: Content, checks: ChecksConfig) -> Verdict | None:
    facts = _facts(content)
    if checks.foreign_contacts:  # what is left of them is in the content
        plain = without_contacts(plain)
    plain = _without_allowed(plain, checks.allow)
    if checks.foreign_numbers and (piece := foreign_number(plain, facts.numbers)):
        return _reject(Reason.FOREIGN_NUMBER, piece)
    if checks.foreign_names and (piece := foreign_name(plain, content.language, facts.names)):
        return _reject(Reason.FOREIGN_NAME, piece)
    return None


def _without_allowed(plain: str, allow: tuple[str, ...]) -> str:
    """The text with every allowed name blanked, an ASCII one not inside a longer word or number."""
    for name in _allowed(allow):
        plain = name.sub(" ", plain)
    return plain


@lru_cache(maxsize=4)
def _allowed(names: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    """What finds each of these names."""
    patterns = []
    for name in names:
        if name.strip():
            pattern = re.escape(normalize(name.strip()))
            if name.isascii():
                pattern = rf"(?<![A-Za-z0-9]){pattern}(?![A-Za-z0-9])"
            patterns.append(re.compile(pattern, re.IGNORECASE))
    return tuple(patterns)

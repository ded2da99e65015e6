"""Articles with several angles, each with its own facts, and the texts that a reader of each angle would want."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from random import Random
from typing import Any

import yaml

from e2p_ray.demo.names import BANKS, SLOTS

LANGUAGES = ("en", "ja")
TASKS = ("headline", "explanation")
QUOTE = "quote"  # a third thing the base model can write: the angle's own sentence. It is what teaches it to copy
ANGLES = ("money", "people", "technology", "environment", "sport", "community", "health", "culture")
ANGLE_WORDS: Mapping[str, Mapping[str, str]] = {
    "en": {angle: f" {angle}" for angle in ANGLES},
    "ja": dict(zip(ANGLES, ("経済", "人物", "技術", "環境", "スポーツ", "地域", "健康", "文化"), strict=True)),
}
CUES: Mapping[str, Mapping[str, str]] = {
    "en": {"headline": "\n\nHeadline:", "explanation": "\n\nWhy this is for you:", QUOTE: "\n\nQuote:"},
    "ja": {"headline": "\n\n見出し：", "explanation": "\n\nおすすめの理由：", QUOTE: "\n\n引用："},
}
NUMBER_SLOTS = ("a", "b")
# What stands between cue and text: the base model's tokens of a word differ with and without a space before it.
TEXT_PREFIX: Mapping[str, str] = {"en": " ", "ja": ""}

_NUM_ANGLES = (5, 6)
_FIRST_CHOICE = 0.7  # how often a sentence's own phrasing of a headline is taken, rather than one of the others
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class AngleTexts:
    """One angle of one article: its facts and the texts that use them. Markers are verbatim in body and texts."""

    angle: str
    markers: tuple[str, ...]
    texts: Mapping[str, tuple[str, ...]]  # by task; the likeliest phrasing first


@dataclass(frozen=True, slots=True)
class Article:
    """One content with everything that a reader could want from it."""

    content_id: str
    language: str
    title: str
    body: str
    angles: tuple[AngleTexts, ...]
    plain: Mapping[str, tuple[str, ...]]  # texts by task without any angle

    def angle(self, name: str) -> AngleTexts | None:
        return next((angle for angle in self.angles if angle.angle == name), None)


@dataclass(frozen=True, slots=True)
class _Facts:
    """What an article has used so far: no fact may belong to two angles.

    Each angle draws from values of its own. A model of a few million parameters learns in minutes to find "the number
    that money stories have" in an article; to find whichever number stands behind the same words took it hours.
    """

    random: Random
    language: str
    used: set[str]

    def name(self, slot: str, angle: str | None = None) -> str:
        share = None if angle is None else ANGLES.index(angle)
        while True:
            name = BANKS[self.language].draw(slot, self.random, share)
            if not any(name in other or other in name for other in self.used):
                self.used.add(name)
                return name

    def number(self, bounds: str, slot: str, angle: str) -> str:
        """A number of this slot's own residue class: no other slot of any angle draws from it."""
        low, high = (int(bound) for bound in bounds.split("-"))
        residue = ANGLES.index(angle) * len(NUMBER_SLOTS) + NUMBER_SLOTS.index(slot)
        step = len(ANGLES) * len(NUMBER_SLOTS)
        number = str(self.random.choice([number for number in range(low, high + 1) if number % step == residue]))
        self.used.add(number)
        return number


@cache
def templates(language: str) -> dict[str, Any]:
    """The sentences and phrasings of one language, from texts/{language}.yaml."""
    loaded: dict[str, Any] = yaml.safe_load(
        files("e2p_ray.demo").joinpath("texts", f"{language}.yaml").read_text(encoding="utf-8")
    )
    return loaded


def make_article(content_id: str, language: str, random: Random, angles: Sequence[str] | None = None) -> Article:
    """One article; `angles` fixes which it has, else five or six of the eight are drawn."""
    parts = templates(language)
    facts = _Facts(random, language, set())
    shared = {"place": facts.name("place"), "project": random.choice(parts["projects"])}
    shared |= {slot: BANKS[language].draw(slot, random) for slot in ("month", "day")}
    facts.used.update({shared["project"], re.sub(r"\D", "", shared["month"])} - {""})
    chosen = list(angles) if angles is not None else random.sample(ANGLES, random.choice(_NUM_ANGLES))
    told = [_tell(angle, parts["angles"][angle], shared, facts) for angle in chosen]
    space = " " if language == "en" else ""
    sentences = [_fill(random.choice(parts["leads"]), shared), *(angle.texts[QUOTE][0] for angle in told)]
    plain = {QUOTE: (sentences[0],)} | {
        task: tuple(_fill(text, shared) for text in random.sample(parts["plain"][task], len(parts["plain"][task])))
        for task in TASKS
    }
    title = _fill(random.choice(parts["titles"]), shared)
    return Article(content_id, language, title, space.join(sentences), tuple(told), plain)


def make_articles(prefix: str, num_per_language: int, seed: int) -> list[Article]:
    """Articles of both languages; each is a function of seed, language and its number only."""
    return [
        make_article(f"{prefix}-{language}-{number:04d}", language, Random(f"{seed}/{prefix}/{language}/{number}"))
        for language in LANGUAGES
        for number in range(num_per_language)
    ]


def pick_text(texts: Sequence[str], random: Random) -> str:
    """The likeliest phrasing mostly, else one of the others."""
    if len(texts) == 1 or random.random() < _FIRST_CHOICE:
        return texts[0]
    return random.choice(texts[1:])


def _tell(angle: str, stories: Sequence[Mapping[str, Any]], shared: Mapping[str, str], facts: _Facts) -> AngleTexts:
    story = facts.random.choice(list(stories))
    variant = facts.random.randrange(len(story["body"]))
    found = {slot for slot in _SLOT.findall(story["body"][variant]) if slot not in shared}
    values = {
        slot: facts.name(slot, angle) if slot in SLOTS else facts.number(story["ranges"][slot], slot, angle)
        for slot in sorted(found)
    }
    filled = {**shared, **values}
    texts = {task: tuple(_fill(text, filled) for text in _rotated(story[task], variant)) for task in TASKS}
    texts[QUOTE] = (_fill(story["body"][variant], filled),)
    return AngleTexts(angle, tuple(values.values()), texts)


def _rotated(texts: Sequence[str], start: int) -> list[str]:
    return [*texts[start:], *texts[:start]]


def _fill(template: str, values: Mapping[str, str]) -> str:
    filled = template.format_map(values)
    return filled[:1].upper() + filled[1:]

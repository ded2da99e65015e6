"""Katakana and kanji names in a text that its content lacks.

Katakana. A run of 3 or more is known when everyday words and beginnings or ends of the content's runs cover it.

Kanji. A run is cut into pieces of the content, everyday words, frequent names and single kanji, the cheapest cut
winning. It is foreign with a frequent family name, place or firm that the content lacks; with two unknown kanji before
a suffix such as 市 or 駅, or one before 氏 or さん; or with a stretch of three kanji, two of them unknown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from e2p_ray.check import japanese_words

_KATAKANA_RUN = re.compile(r"[ァ-ヺー]{3,}")
_KANJI_RUN = re.compile(r"[\u4e00-\u9fff々ヶ]{2,}")
_MAX_KATAKANA_PIECE = 12


def katakana_edges(text: str) -> frozenset[str]:
    """Every katakana run of an NFKC text, and its beginnings and ends of 3 to 12 kana."""
    edges = set()
    for run in set(_KATAKANA_RUN.findall(text)):
        edges.add(run)
        for size in range(3, min(len(run), _MAX_KATAKANA_PIECE) + 1):
            edges.update((run[:size], run[-size:]))
    return frozenset(edges)


def kanji_pieces(text: str) -> frozenset[str]:
    """Every 2 to 4 kanji that stand together in an NFKC text."""
    runs = set(_KANJI_RUN.findall(text))
    return frozenset(run[at : at + size] for run in runs for size in (2, 3, 4) for at in range(len(run) - size + 1))


def foreign_katakana(text: str, edges: frozenset[str]) -> str:
    """The first katakana word of an NFKC text that is no everyday word and not among the content's."""
    for match in _KATAKANA_RUN.finditer(text):
        run = match.group()
        half = len(run) // 2
        if len(run) % 2 == 0 and run[:half] == run[half:]:  # ドキドキ
            continue
        if run not in edges and not _covered(run, edges):
            return run
    return ""


def _covered(run: str, edges: frozenset[str]) -> bool:
    everyday = japanese_words.katakana()
    reached = [True] + [False] * len(run)
    for end in range(1, len(run) + 1):
        for start in range(max(0, end - _MAX_KATAKANA_PIECE), end):
            piece = run[start:end]
            # The long mark at a word's end comes and goes: ユーザ, ユーザー.
            if reached[start] and (piece in everyday or piece + "ー" in everyday or piece == "ー" or piece in edges):
                reached[end] = True
                break
    return reached[-1]


_PEOPLE = (
    "氏 君 様 さん 選手 監督 首相 大統領 社長 会長 議員 知事 市長 町長 教授 先生 容疑者 被告 投手 長官 大臣 記者 代表"
)
_PLACES = "都 道 府 県 市 区 町 村 駅 港 川 山 島 橋 寺 城 社 線 空港 大学 高校 銀行 新聞 神社 病院 工場 公園 温泉"
_PERSON_SUFFIXES = frozenset(_PEOPLE.split())
_PLACE_SUFFIXES = frozenset(_PLACES.split())
_NUMERALS = frozenset("〇一二三四五六七八九十百千万億兆")


@dataclass(frozen=True, slots=True)
class _Piece:
    text: str
    kind: str  # content | everyday | name | affix | unknown


_COSTS = {"content": 10, "everyday": 11, "name": 12, "affix": 20, "unknown": 30}


def foreign_kanji(text: str, content: frozenset[str]) -> str:
    """The first kanji name of an NFKC text that has no place in the content's kanji pieces."""
    everyday = japanese_words.kanji()
    for match in _KANJI_RUN.finditer(text):
        if match.group() in content or match.group() in everyday:  # no cut is cheaper
            continue
        foreign = _foreign_piece(_cut(match.group(), content), text[match.end() : match.end() + 2])
        if foreign:
            return foreign
    return ""


def _kind(piece: str, content: frozenset[str]) -> str | None:
    if len(piece) == 1:
        if piece in japanese_words.kanji_affixes() or piece in _NUMERALS:
            return "affix"
        return "unknown"
    if piece in content:
        return "content"
    if piece in japanese_words.kanji():
        return "everyday"
    return "name" if piece in japanese_words.names() else None


def _cut(run: str, content: frozenset[str]) -> list[_Piece]:
    """The cheapest cut of a kanji run into pieces of at most four."""
    best: list[tuple[int, tuple[int, str]]] = [(0, (0, ""))]
    for end in range(1, len(run) + 1):
        options = []
        for start in range(max(0, end - 4), end):
            kind = _kind(run[start:end], content)
            if kind is not None:
                options.append((best[start][0] + _COSTS[kind], (start, kind)))
        best.append(min(options))
    pieces, end = [], len(run)
    while end > 0:
        start, kind = best[end][1]
        pieces.append(_Piece(run[start:end], kind))
        end = start
    return pieces[::-1]


def _foreign_piece(pieces: list[_Piece], after: str) -> str:
    for piece in pieces:
        if piece.kind == "name":
            return piece.text
    stretch = ""
    num_unknown = 0
    for piece in [*pieces, _Piece("さん" if after == "さん" else "", "end")]:
        is_person = piece.text in _PERSON_SUFFIXES
        num_needed = 1 if is_person else 2 if piece.text in _PLACE_SUFFIXES else len(stretch) + 1
        if len(stretch) >= 2 and num_unknown >= num_needed:
            return stretch + piece.text
        if piece.kind in ("affix", "unknown") and not is_person:
            stretch += piece.text
            num_unknown += piece.kind == "unknown"
            continue
        if len(stretch) >= 3 and num_unknown >= 2:
            return stretch
        stretch, num_unknown = "", 0
    return ""

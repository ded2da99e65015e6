"""Web, mail, phone and postal addresses in a text, also when they are written to slip through a filter.

Every pattern is bounded and starts where its run of characters starts, so the time is linear in the text's length.
All functions take NFKC texts: full-width letters and digits have become plain ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_HOST = r"[a-z0-9](?:[a-z0-9-]{0,62})"
_DOT = r"(?:\.|[ \t]{0,2}(?:\[\.\]|\(\.\)|\(dot\)|\[dot\]|。|点|ドット)[ \t]{0,2}|[ \t]{1,2}\.[ \t]{0,2}|[ \t]dot[ \t])"
_PLAIN_TLD = (
    "(?:com|net|org|info|biz|edu|gov|co|io|ai|jp|uk|de|fr|cn|kr|tv|app|dev|xyz|ru|eu|ly|gg|shop|online|site|club|link|"
    "page|blog|news|store|tokyo|ca|au|br|nl|es|pl|se|ch|top|icu|vip|cc|tk|mobi)"
)
# With blanks around the dot, a short ending is more often the first word of the next sentence.
_SPACED_TLD = "(?:com|net|org|info|biz|jp)"
_END = "(?![a-z0-9-])"
_PATH = r"(?:/[a-z0-9\-._~:/?#@!$&'*+,;=%]{0,500})?"
_SOME_PATH = r"/[a-z0-9][a-z0-9\-._~:/?#@!$&'*+,;=%]{0,500}"  # behind it, any ending is a host's

_URL = re.compile(
    rf"(?<![a-z0-9])(?:https?|ftp)[ \t]?:[ \t]?//[ \t]?(?P<full>[a-z0-9\-._~:/?#@!$&'*+,;=%\[\]]{{1,500}})"
    rf"|(?<![a-z0-9.@-])www\.(?P<www>[a-z0-9\-._~:/?#@!$&'*+,;=%]{{1,500}})"
    rf"|(?<![a-z0-9.-])(?P<plain>{_HOST}(?:\.{_HOST}){{0,4}}\."
    rf"(?:{_PLAIN_TLD}{_END}{_PATH}|[a-z]{{2,24}}{_SOME_PATH}))"
    r"|(?<![a-z0-9._%+@-])(?P<handle>@[a-z0-9_][a-z0-9_.-]{2,30})"  # of a person or firm on a social network
    rf"|(?<![a-z0-9.-])(?P<spaced>{_HOST}(?:{_DOT}{_HOST}){{0,3}}"
    rf"(?:{_DOT}{_SPACED_TLD}|\.[ \t]{{1,2}}(?:com|org|jp)){_END}{_PATH})",
    re.IGNORECASE,
)
# A host in other letters: from its last dot on, because nothing but a blank or a particle shows where it starts.
_WIDE_ENDING = re.compile(rf"(?<=[^\W\d_])(?<![a-z0-9])\.{_PLAIN_TLD}{_END}{_PATH}", re.IGNORECASE)
_WIDE_LABEL = re.compile("(?:[^\\W\u3040-\u309f]{1,63}|\\w{1,63})$")
_LETTER_BY_LETTER = re.compile(r"(?<![a-z0-9])(?:[a-z0-9.:/@-][ ]){5,60}[a-z0-9](?![a-z0-9])", re.IGNORECASE)
_MAIL = re.compile(
    r"(?<![a-z0-9._%+-])(?P<user>[a-z0-9._%+-]{1,64})[ \t]{0,2}(?:@|\(at\)|\[at\]|\(a\)|◎|アットマーク)[ \t]{0,2}"
    rf"(?P<host>{_HOST}(?:{_DOT}{_HOST}){{1,4}})"
    r"|(?<![a-z0-9._%+-])(?P<user2>[a-z0-9._%+-]{1,64})[ \t]at[ \t]"
    rf"(?P<host2>{_HOST}(?:[ \t]dot[ \t]{_HOST}){{1,4}})",
    re.IGNORECASE,
)
_ANY_DOT = re.compile(_DOT, re.IGNORECASE)
# What every web and mail address has. Most texts have none of it, and need not be searched at every letter.
_WEB_SIGN = re.compile(
    r"[/@]|\.\S|[ \t]\.[ \t]{0,2}\S|\.[ \t]{1,2}(?:com|org|jp)|[(\[ \t]dot[)\] \t]|(?:。|点|ドット)[ \t]{0,2}[a-z0-9]",
    re.IGNORECASE,
)

_QUERY = re.compile(r"[?#]")  # where a web address leaves its path

_DASHES = re.compile("[‐‑‒–—−ー－ｰ]")
_PHONE = re.compile(
    r"(?<!\d)(?<!\d[-.,])(?:"
    r"\+[ ]?\d{1,3}(?:[-. ()]{1,2}\d{1,6}){1,5}"  # +81 3-1234-5678
    r"|\+\d{8,15}"
    r"|\(?0\d{1,4}\)?[-. (]{1,2}\d{1,4}[-. )]{1,2}\d{3,4}"  # 03-1234-5678, (03) 1234 5678
    r"|0\d{9,10}"
    r"|(?:1[-. ])?\(?[2-9]\d{2}\)?[-. ]{1,2}\d{3}[-. ]\d{4}"  # (212) 555-0123
    r"|[2-9]\d{2}-\d{4}"  # 555-0123
    r")(?!\d)"
)
_PHONE_SIGN = re.compile(r"\+[ ]?\d|\d(?:\D{0,3}\d){5}")  # what every phone number has
_DATE = re.compile(r"(?:19|20)\d{2}[-. ]\d{1,2}[-. ]\d{1,2}")

_STREET_WORD = r"(?!(?i:in|on|the|to|at|of|for|an?|and|with|by|from|as|is)[ ])[A-Z0-9][A-Za-z0-9'.]{0,20}[ ]"
_POSTAL = re.compile(
    rf"(?<![\w.,])\d{{1,5}}[ ](?:{_STREET_WORD}){{1,3}}(?=[A-Z])"
    r"(?i:street|avenue|ave|road|rd|boulevard|blvd|parkway)(?![A-Za-z-])"
    rf"|(?<![\w.,])(?!(?:19|20)\d\d[ ])\d{{3,5}}[ ](?:{_STREET_WORD}){{1,3}}(?=[A-Z])"  # 2022 Supreme Court is none
    r"(?i:st|drive|dr|court|lane|square|place|terrace)(?![A-Za-z-])"
    r"|(?<![A-Za-z])(?i:p\.?[ ]?o\.?[ ]?box)[ ]\d{1,6}"
    r"|(?:〒|郵便番号)[ ]?\d{3}-?\d{4}(?!\d)"
    r"|\d{1,3}(?:丁目|番地)(?:\d{1,4})?(?:番地?|-)?(?:\d{1,4})?号?"
    r"|\d{1,3}番\d{1,4}号"
    r"|(?<=[\u3040-\u30ff\u4e00-\u9fff])(?<![年月日])\d{1,2}-\d{1,3}-\d{1,3}(?![\d-])"
)
_DIGIT = r"\d〇一二三四五六七八九"
# What every postal address has, as it stands in the text.
_POSTAL_SIGN = re.compile(
    rf"[{_DIGIT}](?:[ ][A-Z{_DIGIT}]|丁目|番|[-‐‑‒–—−ー－ｰ][{_DIGIT}])|[xX][ ][{_DIGIT}]|〒|郵便番号"
)
_KANJI_TO_ASCII = str.maketrans("〇一二三四五六七八九", "0123456789")


@dataclass(frozen=True, slots=True)
class Contacts:
    """What a content has; each piece in the form in which two spellings of the same thing are equal."""

    urls: frozenset[str]
    mails: frozenset[str]
    phones: frozenset[str]
    addresses: frozenset[str]


def find_contacts(text: str) -> Contacts:
    """All contacts of an NFKC text."""
    return Contacts(
        frozenset(key for _, key in _urls(text)),
        frozenset(key for _, key in _mails(text)),
        frozenset(key for _, key in _phones(text)),
        frozenset(key for _, key in _addresses(text)),
    )


def foreign_mail(text: str, known: Contacts) -> str:
    """The first mail address of an NFKC text that the content lacks."""
    return next((piece for piece, key in _mails(text) if key not in known.mails), "")


def foreign_url(text: str, known: Contacts) -> str:
    """The first web address that the content lacks; a shorter form of one that it has is known.

    Another query or fragment is another place: https://example.com/watch?v=2 is not ...?v=1.
    """
    for piece, key in _urls(text):
        if not any(url == key or _is_shorter(key, _QUERY.split(url, 1)[0]) for url in known.urls):
            return piece
    return ""


def _is_shorter(key: str, url: str) -> bool:
    return url == key or url.startswith(key + "/") or url.endswith("." + key)


def foreign_phone(text: str, known: Contacts) -> str:
    """The first phone number of an NFKC text that the content lacks; +81 3 and 03 are the same."""
    return next((piece for piece, key in _phones(text) if key not in known.phones), "")


def foreign_address(text: str, known: Contacts) -> str:
    """The first street address, postal code or Japanese block number that the content lacks."""
    for piece, key in _addresses(text):
        if not any(key in address for address in known.addresses):
            return piece
    return ""


def without_contacts(text: str) -> str:
    """An NFKC text with mail, web and phone contacts blanked: their parts are no numbers or names of their own.

    What only looks like the begin of a phone number, as +87.5 % does, is compared with none: it stays.
    """
    if _WEB_SIGN.search(text):
        text = _URL.sub(" ", _MAIL.sub(" ", text))
    kept, at = [], 0
    for match, _ in _phone_matches(text):
        kept += [text[at : match.start()], " "]
        at = match.end()
    return "".join([*kept, text[at:]])


def _urls(text: str) -> Iterator[tuple[str, str]]:
    if not _WEB_SIGN.search(text):
        return
    for match in _URL.finditer(text):
        piece = match.group().rstrip(".,;:!?'")
        key = next(group for group in match.groups() if group is not None).lower()
        if match.lastgroup == "spaced":
            key = _ANY_DOT.sub(".", key)
        key = key.rstrip(".,;:!?'/#").removeprefix("www.")
        if key:
            yield piece, key
    yield from _disguised_urls(text)


def _disguised_urls(text: str) -> Iterator[tuple[str, str]]:
    """Hosts in letters other than ASCII, and those written with a blank between all letters."""
    for match in _WIDE_ENDING.finditer(text):
        label = _WIDE_LABEL.search(text[max(0, match.start() - 63) : match.start()])
        piece = (label.group() if label else "") + match.group()
        yield piece, piece.lower().rstrip(".,;:!?'/")
    for match in _LETTER_BY_LETTER.finditer(text):
        joined = match.group().replace(" ", "").lower()
        if _URL.search(joined):
            yield match.group(), joined


def _mails(text: str) -> Iterator[tuple[str, str]]:
    if not _WEB_SIGN.search(text):
        return
    for match in _MAIL.finditer(text):
        user = match.group("user") or match.group("user2")
        host = match.group("host") or match.group("host2")
        yield match.group(), f"{user.lstrip('.')}@{_ANY_DOT.sub('.', host)}".lower()


def _phones(text: str) -> Iterator[tuple[str, str]]:
    return ((match.group(), digits) for match, digits in _phone_matches(text))


def _phone_matches(text: str) -> Iterator[tuple[re.Match[str], str]]:
    """Where phone numbers stand, with dashes of one kind, and their digits in one form."""
    if not _PHONE_SIGN.search(text):
        return
    for match in _PHONE.finditer(_DASHES.sub("-", text)):
        piece = match.group()
        digits = re.sub(r"\D", "", piece)
        if _DATE.fullmatch(piece) or not 7 <= len(digits) <= 15:
            continue
        if piece.startswith("+"):
            digits = "0" + digits.removeprefix("81") if digits.startswith("81") else digits.removeprefix("1")
        elif len(digits) == 11 and digits.startswith("1"):
            digits = digits[1:]
        if text[max(0, match.start() - 2) : match.start()].rstrip().endswith("〒"):
            continue  # a postal code
        yield match, digits


def _addresses(text: str) -> Iterator[tuple[str, str]]:
    if not _POSTAL_SIGN.search(text):
        return
    plain = _DASHES.sub("-", text).translate(_KANJI_TO_ASCII)
    for match in _POSTAL.finditer(plain):
        yield text[match.start() : match.end()], re.sub(r"[ .〒]|郵便番号", "", match.group().lower())

"""The checks: each rule, precision and recall on a hand-made corpus, arbitrary unicode, long texts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e2p_ray.check import check
from e2p_ray.check.contacts import (
    find_contacts,
    foreign_address,
    foreign_mail,
    foreign_phone,
    foreign_url,
)
from e2p_ray.check.names import KnownNames, foreign_name
from e2p_ray.check.numerals import find_numerals, foreign_number, number_values
from e2p_ray.check.script import count_scripts, language_problem, normalize, repetition_problem
from e2p_ray.config import ChecksConfig, LimitsConfig
from e2p_ray.demo.newsroom import make_articles
from e2p_ray.schema import Completion, Content, FinishReason, Reason, RequestKey, Verdict

EN = Content(
    "en",
    "Harbour city replaces its library",
    "Mayor Anna Berg said on Monday that Portville will spend $12.5 million on a new library. The old building, opened "
    "in 1968, will close on May 3. About 3,000 people signed a petition against the plan, which removes 40 trees. "
    "Canada's Maple Construction won the contract; the European Union pays 30 percent. The roof will carry solar "
    "panels, and a cafe run by the Quinn family opens next to the children's floor. Details are at www.portville.org/"
    "library, by mail from library@portville.org or by phone on (212) 555-0123. The site is 14 Harbour Street.",
    "en",
)
JA = Content(
    "ja",
    "横浜市、図書館を建て替え",
    "横浜市の田中太郎市長は3日、老朽化した市立図書館を12億5000万円かけて建て替える計画を発表した。新しい図書館は2027年春に開館する。"
    "屋上にソーラーパネルを置き、排出量を4割減らす。市民団体の佐藤恵さんは「木陰が減るのは残念だ」と話し、約三千人の署名を集めた。"
    "工事は大和建設とパナソニックが担当し、二百人を雇う。カフェも入る。問い合わせは045-123-4567、住所は港北区日吉四丁目2番地。"
    "詳しくはhttps://example.jp/libraryへ。",
    "ja",
)
LIMITS = LimitsConfig()
ANYTHING = LimitsConfig(max_chars=10**9)
OFF = ChecksConfig(language=False, repetition=False, foreign_contacts=False, foreign_numbers=False, foreign_names=False)


def verdict(text: str, content: Content = EN, **checks: Any) -> Verdict:
    return check(text, content, None, LIMITS, ChecksConfig(**checks))


def completion(finish_reason: FinishReason = FinishReason.END_TOKEN, num_output_tokens: int = 5) -> Completion:
    return Completion(RequestKey("u", "c", "t"), "x", finish_reason, 10, num_output_tokens, -1.0)


# ---------------------------------------------------------------------------------------------------- each rule


@pytest.mark.parametrize(
    ("text", "content", "reason"),
    [
        ("Portville gets a new library", EN, None),
        ("Portville Gets a New Library", EN, None),
        ("PORTVILLE GETS A NEW LIBRARY", EN, None),
        ("横浜市、図書館を建て替え", JA, None),
        ("図書館に新しいカフェ", JA, None),
        ("", EN, Reason.EMPTY_TEXT),
        (" \n\u3000\u200b", EN, Reason.EMPTY_TEXT),
        ("A new lib\x00rary", EN, Reason.BROKEN_CHARACTERS),
        ("A new library\ufffd", EN, Reason.BROKEN_CHARACTERS),
        ("A new \u202eyrarbil", EN, Reason.BROKEN_CHARACTERS),
        ("A new library \ud83d", EN, Reason.BROKEN_CHARACTERS),
        ("A new library 📚", EN, None),
        ("a library " * 30, EN, Reason.TOO_LONG),
        ("図書館を建て替える計画", EN, Reason.WRONG_LANGUAGE),
        ("The library will be replaced", JA, Reason.WRONG_LANGUAGE),
        ("图书馆将重建，市长说", JA, Reason.WRONG_LANGUAGE),
        ("2027", JA, Reason.WRONG_LANGUAGE),
        ("the new library the new library", EN, Reason.REPETITION),
        ("no, no, no, no, no", EN, Reason.REPETITION),
        ("図書館の計画の計画の計画の計画", JA, Reason.REPETITION),
        ("Mail anna@portville.org", EN, Reason.FOREIGN_EMAIL),
        ("Mail library@portville.org", EN, None),
        ("See example . com for the new library", EN, Reason.FOREIGN_URL),
        ("See www.portville.org", EN, None),
        ("Call 212-555-0199", EN, Reason.FOREIGN_PHONE),
        ("Call 212.555.0123", EN, None),
        ("問い合わせは０４５－１２３－４５６８", JA, Reason.FOREIGN_PHONE),
        ("問い合わせは０４５－１２３－４５６７", JA, None),
        ("Come to 41 Harbour Street", EN, Reason.FOREIGN_ADDRESS),
        ("Come to 14 Harbour Street", EN, None),
        ("会場は日吉2丁目3番地", JA, Reason.FOREIGN_ADDRESS),
        ("会場は日吉4丁目2番地", JA, None),
        ("Library to cost $13 million", EN, Reason.FOREIGN_NUMBER),
        ("Library to cost $12,500,000", EN, None),
        ("Paris gets a new library", EN, Reason.FOREIGN_NAME),
        ("トヨタが図書館を建て替え", JA, Reason.FOREIGN_NAME),
    ],
)
def test_rules(text: str, content: Content, reason: Reason | None) -> None:
    found = verdict(text, content)
    assert found.reason is reason, found
    assert found.accepted == (reason is None)
    assert bool(found.detail) == (reason is not None)


@pytest.mark.parametrize(
    ("text", "body", "reason"),
    [
        ("Library budget +87.5% this year", "Library budget rises +2.1% this year.", Reason.FOREIGN_NUMBER),
        ("図書館予算＋８７．５％", "図書館の予算は＋２．１％となった。", Reason.FOREIGN_NUMBER),
        ("Library budget +2.1% this year", "Library budget rises +2.1% this year.", None),
        ("売上は 50 億円", "売上は 300 億円、社員は 50 人。", Reason.FOREIGN_NUMBER),
        ("売上は300億円", "売上は 300 億円、社員は 50 人。", None),
        ("50 万人が来場", "3 万人が来場、50 店が出店した。", Reason.FOREIGN_NUMBER),
        ("3万人が来場", "3 万人が来場、50 店が出店した。", None),
        ("万人が楽しむ図書館", "図書館は 3 日に開く。", None),
        ("Call +44 20 7946 0958", "The library answers at +44 20 7946 0958 on weekdays.", None),
        ("Call +44 20 7946 0959", "The library answers at +44 20 7946 0958 on weekdays.", Reason.FOREIGN_PHONE),
        ("See https://a.example/watch?v=B2", "The film is at https://a.example/watch?v=A1 now.", Reason.FOREIGN_URL),
        ("See https://a.example/watch?v=A1", "The film is at https://a.example/watch?v=A1 now.", None),
        ("See https://a.example/watch", "The film is at https://a.example/watch?v=A1 now.", None),
        ("See a.example", "The film is at https://www.a.example/watch?v=A1#t now.", None),
        ("See evil\u2063.com for the film", "The film is at https://a.example now.", Reason.FOREIGN_URL),
        ("Budget of 1\u206350 dollars", "One library of 50 has 1 dollar.", Reason.FOREIGN_NUMBER),
        ("Budget of 1\U000e010050 dollars", "One library of 50 has 1 dollar.", Reason.FOREIGN_NUMBER),
    ],
)
def test_what_only_looks_like_the_content_s_own(text: str, body: str, reason: Reason | None) -> None:
    assert verdict(text, Content("c", "Library", body, "en" if body.isascii() else "ja")).reason is reason


def test_the_order_of_the_rules_is_fixed() -> None:
    text = "東京都内のどこかにある電話番号と住所と名前 Oslo 212-555-0199 a@b.com c.com 77"
    orders: list[tuple[dict[str, Any], Reason]] = [
        ({}, Reason.WRONG_LANGUAGE),
        ({"language": False}, Reason.FOREIGN_EMAIL),
        ({"language": False, "foreign_contacts": False}, Reason.FOREIGN_NUMBER),
        ({"language": False, "foreign_contacts": False, "foreign_numbers": False}, Reason.FOREIGN_NAME),
    ]
    for switched_off, reason in orders:
        assert verdict(text, **switched_off).reason is reason
    assert verdict("Call 1", deny=("call",)).reason is Reason.DENIED_PHRASE
    assert check("x" * 300, EN, None, LIMITS, ChecksConfig(deny=("x",))).reason is Reason.DENIED_PHRASE


def test_every_switch_switches_its_rule_off() -> None:
    for text in ("図書館を建て替える", "the new library the new library", "see c.com", "13 trees", "Paris wins"):
        assert not verdict(text).accepted
        assert check(text, EN, None, LIMITS, OFF).accepted


def test_bounds() -> None:
    limits = LimitsConfig(min_chars=5, max_chars=8, max_tokens=5)
    assert check("tree", EN, None, limits, OFF).reason is Reason.TOO_SHORT
    assert check("trees" * 2, EN, None, limits, OFF).reason is Reason.TOO_LONG
    assert check("trees", EN, completion(num_output_tokens=6), limits, OFF).reason is Reason.TOO_LONG
    assert check(" trees  ", EN, completion(), limits, OFF).accepted


def test_unfinished() -> None:
    for reason in (FinishReason.MAX_TOKENS, FinishReason.MAX_CHARS):
        assert check("A tree", EN, completion(reason), LIMITS, OFF).reason is Reason.UNFINISHED
        assert check("A tree", EN, completion(reason), LimitsConfig(must_finish=False), OFF).accepted
    assert check("A tree", EN, completion(FinishReason.STOP_STRING), LIMITS, OFF).accepted


def test_deny_and_allow() -> None:
    assert verdict("The ＭＩＲＡＣＬＥ library", deny=("miracle",)).detail == "miracle"
    assert verdict("図書館で奇跡", JA, deny=("奇跡",)).reason is Reason.DENIED_PHRASE
    assert verdict("City News: Trees to fall for the Oslo library").reason is Reason.FOREIGN_NAME
    assert verdict("City News: Trees to fall for the Oslo library", allow=("oslo",)).accepted
    assert verdict("トヨタも注目", JA, allow=("トヨタ",)).accepted
    assert verdict("AIと図書館、Web3も", JA, allow=("Web3",)).accepted
    assert verdict("Osloans welcome the library", allow=("oslo",)).reason is Reason.FOREIGN_NAME


def test_detail_is_short() -> None:
    assert len(verdict("See " + "a" * 60 + ".com/" + "b" * 90).detail) <= 80


# ---------------------------------------------------------------------------------------------------- language


@pytest.mark.parametrize(
    ("text", "tag", "fits"),
    [
        ("Hello there", "en-US", True),
        ("Hello there", "EN_gb", True),
        ("Sony's 鬼滅の刃 breaks a record", "en", True),
        ("市長が予算を発表 budget", "en", False),
        ("Привет, мир", "en", False),
        ("iPhone 15 Pro Maxの発売日", "ja-JP", True),
        ("首相辞任、総選挙へ", "ja", True),
        ("ﾄﾖﾀの新車", "ja", True),
        ("The mayor said 市 budget", "ja", False),
        ("这是一个新的图书馆", "ja", False),
        ("안녕하세요", "ja", False),
        ("这是一个新的图书馆", "zh-Hans", True),
        ("これは新しい図書館です", "zh", False),
        ("새 도서관을 짓는다", "ko", True),
        ("新しい図書館", "ko", False),
        ("Новая библиотека", "ru", True),
        ("New library", "ru", False),
        ("Nova biblioteka", "sr", True),  # written in both: no opinion
        ("Нова библиотека", "sr-Latn", False),
        ("مكتبة جديدة", "ar", True),
        ("ห้องสมุดใหม่", "th", True),
        ("नया पुस्तकालय", "hi", True),
        ("Une bibliothèque à Besançon", "fr", True),
        ("whatever 何でも", "tlh", True),
        ("whatever 何でも", "", True),
        ("12 + 30", "en", False),
    ],
)
def test_language(text: str, tag: str, fits: bool) -> None:
    assert (language_problem(normalize(text), tag) == "") is fits


def test_script_counts() -> None:
    assert count_scripts("abcかなカナ漢字ー12") == {"latin": 3, "kana": 5, "han": 2}


# ---------------------------------------------------------------------------------------------------- repetition


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("New York, New York wins", False),
        ("ha ha ha, said the mayor", False),
        ("ドキドキの開幕戦", False),
        ("一歩一歩、着実に", False),
        ("Prize of 1000000000 yen", False),
        ("ああああああああ", True),
        ("the the the the the", True),
        ("library library library", True),
        ("市長は市長は市長は市長は", True),
        ("the mayor said so the mayor said so", True),
        ("A man and a dog and a man and a cat and a man and a dog and a man and a cat", True),
        ("図書館の市長の図書館の計画の図書館の市長の図書館の計画", True),
    ],
)
def test_repetition(text: str, loops: bool) -> None:
    assert bool(repetition_problem(text)) is loops


# ---------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("3,000 ３０００ 3000", ["3000", "3000", "3000"]),
        ("3.5 million and 2bn", ["3500000", "2000000000"]),
        ("三百万 3百万 300万", ["3000000", "3000000", "3000000"]),
        ("1.2億 1億2000万 120,000,000", ["120000000", "120000000", "120000000"]),
        ("二〇二四年 五兆三千億円", ["2024", "5300000000000"]),
        ("twenty-five, two hundred and five, nineteen", ["25", "205", "19"]),
        ("20% 20percent ２０％", ["20", "20", "20"]),
        ("2.50 and 2.5", ["2.5", "2.5"]),
        ("1,00,000 rupees", ["100000"]),
        ("1968-2027", ["1968", "2027"]),
        ("5㎡ of CO2", ["5"]),
        ("二人と三社", ["2", "3"]),
        ("万一に備え、四国と九州の五輪で十分、八百屋の五十嵐さん", []),
        ("one of the best, hundreds of people, 数百万人", []),
    ],
)
def test_numbers_as_values(text: str, values: list[str]) -> None:
    assert [min(n.values) for n in find_numerals(normalize(text)) if n.claims] == values


def test_letters_after_a_number_have_two_readings() -> None:
    assert not foreign_number("a 5k race", number_values("a race of 5 kilometres"))
    assert not foreign_number("$5k", number_values("5,000 dollars"))
    assert foreign_number("$5k", number_values("50,000 dollars")) == "5k"


def test_numbers_across_notations() -> None:
    assert not foreign_number("約3000人が署名、費用は12.5億円、2割減", number_values("三千人、12億5000万円、20%"))
    assert not foreign_number("fifth of 5 cuts a million", number_values("a fifth of 5, cut by 1,000,000"))
    assert foreign_number("12億円", number_values("12億5000万円")) == "12億"


# ---------------------------------------------------------------------------------------------------- contacts


@pytest.mark.parametrize(
    ("text", "find"),
    [
        ("see https://evil.example/x?y=1 now", foreign_url),
        ("see www.evil.jpへ", foreign_url),
        ("see evil.com", foreign_url),
        ("see ｅｖｉｌ．ｃｏｍ", foreign_url),
        ("see evil . com", foreign_url),
        ("see evil[.]com", foreign_url),
        ("see evil dot com", foreign_url),
        ("see evil。com", foreign_url),
        ("see portville.org/other", foreign_url),
        ("see notportville.org", foreign_url),
        ("mail me@evil.com", foreign_mail),
        ("mail me ＠ evil.com", foreign_mail),
        ("mail me(at)evil.com", foreign_mail),
        ("mail me at evil dot com", foreign_mail),
        ("mail ibrary@portville.org", foreign_mail),
        ("call 555-0199", foreign_phone),
        ("call (212) 555 0199", foreign_phone),
        ("call +1 212 555 0199", foreign_phone),
        ("電話は０３（１２３４）５６７８", foreign_phone),
        ("電話は03ー1234ー5678", foreign_phone),
        ("電話は09012345678", foreign_phone),
        ("電話は+81 45 123 4568", foreign_phone),
        ("at 350 Fifth Avenue", foreign_address),
        ("at 1600 Pennsylvania Ave.", foreign_address),
        ("P.O. Box 77", foreign_address),
        ("〒100-0001へ", foreign_address),
        ("銀座四丁目1番2号", foreign_address),
        ("渋谷区神南1-2-3", foreign_address),
    ],
)
def test_foreign_contacts_are_found(text: str, find: Callable[..., str]) -> None:
    assert find(normalize(text), find_contacts(normalize(EN.body)))


@pytest.mark.parametrize(
    "text",
    [
        "Net profit up. In other news, Co. A merges",
        "U.S. and S. Korea agree; Node.js too",
        "2024-05-01, 1968-2027 and 10-5",
        "Won 3-2 after 1,000,000 tries",
        "2 Dead in Court Drive, 5 Famous Drive-Ins",
        "100-1000 people meet at noon",
        "first place. Net gain",
        "2024年1-3月期",
        "example of a phone number",
    ],
)
def test_everyday_texts_hold_no_contact(text: str) -> None:
    none = find_contacts("")
    assert not any(find(normalize(text), none) for find in (foreign_mail, foreign_url, foreign_phone, foreign_address))


@pytest.mark.parametrize(
    ("text", "body", "language"),
    [
        ("The fund holds 1,000,000,000 dollars", "The fund holds 1,000,000,000 dollars now.", "en"),
        ("基金は10,000,000,000円", "基金は10,000,000,000円を持つ。", "ja"),
        ("貨物船沈没、乗員全員救助", "貨物船が沈没し、乗員は全員救助された。", "ja"),
        ("社長「事故は二度と起こさない」", "社長は事故を繰り返さないと述べた。", "ja"),
        ("億万長者が町に図書館を寄付", "富豪が町に図書館を寄付した。", "ja"),
        ("After the 2022 Supreme Court ruling", "The ruling of the Supreme Court was in 2022.", "en"),
    ],
)
def test_ordinary_texts_are_accepted(text: str, body: str, language: str) -> None:
    found = check(text, Content("c", body, body, language), None, ANYTHING, ChecksConfig())
    assert found.accepted, found


@pytest.mark.parametrize(
    ("text", "body", "reason"),
    [
        ("橋は二度も閉鎖された", "橋は閉鎖された。", Reason.FOREIGN_NUMBER),
        ("二度とも市長が開けた", "市長が開けた。", Reason.FOREIGN_NUMBER),
        ("八百万の人々が橋を渡る", "人々が橋を渡る。", Reason.FOREIGN_NUMBER),
    ],
)
def test_control_counts_that_look_like_idioms_are_found(text: str, body: str, reason: Reason) -> None:
    assert check(text, Content("c", body, body, "ja"), None, ANYTHING, ChecksConfig()).reason is reason


def test_denied_phrases_that_nobody_sees_deny_nothing() -> None:
    for phrase in ("\u200b", "\ufeff", "\u3000", " "):
        checks = ChecksConfig(deny=(phrase,))
        assert check("A new library", EN, None, ANYTHING, checks).reason is not Reason.DENIED_PHRASE


def test_known_contacts_in_another_spelling() -> None:
    known = find_contacts(normalize(EN.body + JA.body + " 03-1234-5678"))
    for text in ("http://portville.org", "PORTVILLE.ORG/library", "+81 3 1234 5678", "(045)123-4567", "日吉4丁目"):
        plain = normalize(text)
        assert not any(find(plain, known) for find in (foreign_mail, foreign_url, foreign_phone, foreign_address)), text


# --------------------------------------------------------------------------------- precision and recall by hand


class Case(NamedTuple):
    """A headline one could get for the content, and whether it says a name or number that is not there."""

    text: str
    wrong: bool


EN_NAMES = [
    Case("Portville to Replace Its 1968 Library", False),
    Case("Mayor Berg Unveils Bold Plan for Portville", False),
    Case("Berg's library gamble: trees fall, children gain", False),
    Case("Why Thousands Signed a Petition Against Berg", False),
    Case("Maple Wins Library Contract as EU Foots Part of the Bill", False),
    Case("Canadian builder wins Portville contract", False),
    Case("Europeans Help Pay for Harbour City's Reading Room", False),
    Case("Books, Coffee and Sunshine: What Families Can Expect", False),
    Case("Quinns to Run Cafe Beside Children's Floor", False),
    Case("Solar-Powered Library Sparks Heated Debate", False),
    Case("Is Your Favorite Reading Spot Closing? Here's When", False),
    Case("Local Jobs Boosted by Ambitious Construction Project", False),
    Case("Taxpayers Wonder Who's Footing the Bill", False),
    Case("Neighbours Mourn Beloved Trees", False),
    Case("A Greener Roof, but Fewer Trees", False),
    Case("Parents Rejoice: A Whole Floor Just for Kids", False),
    Case("Don't Miss the Old Library's Final Days", False),
    Case("“Nobody asked us,” petitioners say", False),
    Case("EXCLUSIVE: LIBRARY PLAN DIVIDES CITY", False),
    Case("On Monday, Berg Made Her Choice", False),
    Case("Shady trees or sunny panels? Portville decides", False),
    Case("Money talks: the union pays, the city builds", False),
    Case("Skyrocketing Costs Haunt Crumbling Landmark", False),
    Case("Bibliophiles Cheer Overdue Makeover", False),
    Case("Springfield to Replace Its 1968 Library", True),
    Case("Mayor Johnson Unveils Bold Plan", True),
    Case("Berg and Schwarzenegger open library", True),
    Case("Google Wins Library Contract", True),
    Case("Library plan angers Toronto", True),
    Case("Portville Follows Boston With New Library", True),
    Case("Petition by Greenpeace Stops the Library", True),
    Case("Library Opens on Tuesday", True),
    Case("Library opens in December", True),
    Case("Starbucks to Run the Library's Cafe", True),
    Case("NASA Helps Build Portville's Roof", True),
    Case("American Builder Wins Contract", True),
    Case("Berg says the Quinns met Sarah Palin", True),
    Case("New iPad Floor for Children", True),
    Case("Portville's library is the best in Ohio", True),
    Case("The Walker Family Opens a Cafe", True),
    Case("Trump Slams Library Plan", True),
    Case("library plan praised by Bill Gates", True),
    Case("Will Smith Opens the Library", True),
    Case("Apple Opens a Store in the Library", True),
]
JA_NAMES = [
    Case("横浜市、図書館を12億5000万円で建て替え", False),
    Case("老朽化図書館の再生計画、市長が発表", False),
    Case("屋上ソーラーで環境に優しい図書館へ", False),
    Case("田中市長、大型投資に踏み切る", False),
    Case("佐藤さんら市民団体が反発「木陰が減る」", False),
    Case("パナソニックと大和建設が工事を担当", False),
    Case("読書とカフェを楽しむ新しい空間", False),
    Case("子育て世代に朗報、快適な読書スペース", False),
    Case("地元の雇用創出に期待高まる", False),
    Case("巨額の税金投入に懸念の声も", False),
    Case("太陽光で電気代を節約、市立図書館", False),
    Case("春の開館が待ち遠しい市民たち", False),
    Case("デジタル時代の図書館とは", False),
    Case("市の決断、署名活動の行方は", False),
    Case("新図書館で地域経済に追い風", False),
    Case("緑を守れ、市民の願い届かず", False),
    Case("港北区の新名所、カフェ併設", False),
    Case("スタッフ募集も、建設業界に活気", False),
    Case("環境団体が猛反対、計画の見直し求める", False),
    Case("AI活用も視野、スマート図書館", False),
    Case("川崎市、図書館を建て替え", True),
    Case("鈴木市長が計画を発表", True),
    Case("トヨタと大和建設が工事を担当", True),
    Case("ソニーが新図書館を支援", True),
    Case("スターバックスが図書館に出店", True),
    Case("Googleが横浜市を支援", True),
    Case("東京都の図書館が建て替え", True),
    Case("黒柳徹子さんも図書館を応援", True),
    Case("綾瀬市に新しい図書館", True),
    Case("米国の企業が工事を担当", True),
    Case("木村建設が工事を担当", True),
    Case("イチローが開館式に登場", True),
    Case("山口容疑者が図書館で逮捕", True),
    Case("早稲田大学と連携へ", True),
    Case("蔦屋が運営する図書館", True),
    Case("村上春樹の蔵書も", True),
]
NUMBERS = [
    Case("Portville spends $12.5 million on books", False),
    Case("Portville spends 12,500,000 dollars", False),
    Case("Thousands sign: 3000 names against 40 lost trees", False),
    Case("Three thousand people sign petition", False),
    Case("EU pays 30%", False),
    Case("A library from 1968 closes May 3rd", False),
    Case("One of the best libraries", False),
    Case("Portville spends $125 million", True),
    Case("300 people sign petition", True),
    Case("EU pays 35 percent", True),
    Case("Five things to know about the library", True),
    Case("Library from 1986 closes", True),
    Case("Four hundred trees fall", True),
    Case("総額12.5億円の図書館", False),
    Case("総額１２億５千万円の図書館", False),
    Case("3000人が署名、二〇二七年に開館", False),
    Case("200人の雇用、排出40%減", False),
    Case("市民の一番の願い", False),
    Case("総額15億円の図書館", True),
    Case("三万人が署名", True),
    Case("二〇二八年に開館", True),
    Case("排出を五割減", True),
    Case("図書館に七つの魅力", True),
]

# A second pair of contents; the rules, but not the word lists, were mended with it.
EN_SECOND = Content(
    "en2",
    "Ferry line to Grey Island saved",
    "The Northwind ferry will keep sailing to Grey Island, after fishermen led by Tomas Lindqvist bought two used "
    "boats from a Danish company. The county had cancelled the route in October because fuel became too dear. About "
    "800 islanders depend on it for school, the doctor and the shop. Lindqvist, 61, said the first crossing in April "
    "would be free. Biologists of Lund University hope that the electric engines disturb seals less.",
    "en",
)
EN_NAMES_SECOND = [
    Case("Islanders Rescue Their Own Lifeline", False),
    Case("Fishermen Buy Boats to Keep Grey Island Afloat", False),
    Case("Quieter Engines Could Spell Relief for Seals", False),
    Case("Schoolchildren Won't Be Stranded After All", False),
    Case("How One Stubborn Skipper Outmaneuvered the County", False),
    Case("Lindqvist's Gamble Pays Off", False),
    Case("From Denmark With Love: Secondhand Boats Save the Day", False),
    Case("Soaring Fuel Bills Nearly Sank the Northwind", False),
    Case("Free rides in April: islanders celebrate", False),
    Case("Sick of Waiting, a Village Bought Itself a Ferry", False),
    Case("The Unlikely Heroes Behind a Remote Community's Survival", False),
    Case("Electric ferries promise calmer seas for wildlife, say Lund researchers", False),
    Case("Danes sell, islanders sail", False),
    Case("Cheaper Groceries, Healthier Seals and a Happier Island", False),
    Case("Commuters Breathe Easier as Cancelled Route Returns", False),
    Case("Sailing on: Seafarers Defy Bureaucrats", False),
    Case("Zero-Emission Voyage Begins", False),
    Case("Grandmother's Clinic Visits No Longer in Jeopardy", False),
    Case("Blue Island Ferry Saved", True),
    Case("Lundgren Saves the Ferry", True),
    Case("Ferry to Stockholm saved", True),
    Case("Norwegian company sells boats to islanders", True),
    Case("Oxford biologists hope for seals", True),
    Case("Free Crossing in June", True),
    Case("Tesla Engines Power Grey Island Ferry", True),
    Case("Greta Thunberg praises the ferry", True),
    Case("Lindqvist and Eriksson buy two boats", True),
    Case("Grey Island joins the EU", True),
    Case("The Titanic of Grey Island sails again", True),
    Case("Peter Parker Buys a Ferry", True),
    Case("UNESCO Backs Grey Island's Seals", True),
    Case("Ferry Saved, Says Governor Newsom", True),
    Case("Grey Island beats Manhattan", True),
    Case("Grace Hill Saves the Ferry", True),
]
JA_SECOND = Content(
    "ja2",
    "灰島への渡船、存続へ",
    "漁師の林大輔さんらが中古船2隻をデンマークの会社から買い、灰島への渡船が存続することになった。県は昨年10月、燃料の高騰を理由に"
    "航路の廃止を決めていた。島民およそ800人が通学や通院、買い物に使う。林さんは「4月の初便は無料にする」と話す。九州大学の研究者は、"
    "電動のエンジンならアザラシへの影響が減ると期待する。",
    "ja",
)
JA_NAMES_SECOND = [
    Case("島民の足を守れ、漁師たちの決断", False),
    Case("中古船で航路復活、灰島に春", False),
    Case("静かなエンジンがアザラシを救う", False),
    Case("通学路は海の上、子供たちに笑顔", False),
    Case("燃料高に負けない島の底力", False),
    Case("デンマーク生まれの船、第二の人生", False),
    Case("初便は無料、林さんの心意気", False),
    Case("廃止寸前からの逆転劇", False),
    Case("電動化で環境負荷も軽減", False),
    Case("離島の医療アクセスを維持", False),
    Case("県の方針に待った、住民パワー", False),
    Case("エコな渡船が島の未来を開く", False),
    Case("海のバス、800人の暮らし支える", False),
    Case("研究者も注目、静かな船旅", False),
    Case("コスト高騰を乗り越えた島のチームワーク", False),
    Case("買い物難民を防ぐ小さな船", False),
    Case("佐渡への渡船、存続へ", True),
    Case("漁師の鈴木さんが船を購入", True),
    Case("ノルウェーの会社から中古船", True),
    Case("東京大学の研究者が期待", True),
    Case("ヤマハのエンジンで静かな航海", True),
    Case("長崎県が航路を廃止", True),
    Case("テスラ製の電動渡船", True),
    Case("櫻井翔さんも乗船", True),
    Case("Amazonが島に配送", True),
    Case("碧南市への渡船", True),
    Case("マグロ漁師トムの挑戦", True),
    Case("三菱重工が船を建造", True),
    Case("アメリカの会社が船を売却", True),
    Case("渡辺知事が航路を廃止", True),
    Case("韓国からの観光客に期待", True),
    Case("楢崎氏が反対を表明", True),
]

# A third, written last and never used to mend anything: these figures are the honest ones.
EN_UNSEEN = Content(
    "en3",
    "Dairy farms in Vale County switch to robot milking",
    "More than half of the 210 dairy farms in Vale County now milk with robots, the farmers' union said on Thursday. "
    "Ruth Okafor, who keeps 140 cows near Millbrook, sleeps until six for the first time in her life. A robot of the "
    "Swiss maker Alpmilk costs about $180,000 and pays for itself in seven years, according to the union. Critics such "
    "as the economist Henrik Sand warn of debts: milk prices fell by 12 percent this year. Veterinarians see fewer "
    "infections, because sensors in the collar notice a fever two days earlier.",
    "en",
)
EN_NAMES_UNSEEN = [
    Case("Robots Take Over Milking in Vale County", False),
    Case("No More Early Mornings: How Robots Changed Dairy Farming", False),
    Case("Farmers Bet Big on Robots Despite Falling Milk Prices", False),
    Case("Healthier Cows Thanks to Smart Collars", False),
    Case("The High Price of Automation on Family Farms", False),
    Case("Okafor Finally Gets a Good Night's Sleep", False),
    Case("Economist Sounds Alarm Over Farm Debt", False),
    Case("Switzerland's Alpmilk Wins Over Local Farmers", False),
    Case("Can Technology Save the Family Farm?", False),
    Case("Sensors Spot Sick Cows Before Farmers Do", False),
    Case("Robotic milking: boon or burden?", False),
    Case("Why Cows Prefer to Be Milked by Machines", False),
    Case("Vets welcome drop in infections", False),
    Case("Half of Vale County's Dairy Farms Go High-Tech", False),
    Case("Milking Robots Pay Off in Seven Years, Union Says", False),
    Case("Sand Warns Farmers Against Piling Up Loans", False),
    Case("A Quiet Revolution in the Barn", False),
    Case("Fever Alerts and Lie-Ins: Life With a Milking Robot", False),
    Case("Dairy Farms in Wisconsin Switch to Robots", True),
    Case("Robots milk cows in Vale County and Devon", True),
    Case("Ruth Anderson Sleeps Until Six", True),
    Case("German Robots Take Over Vale County", True),
    Case("Nestle Welcomes Milking Robots", True),
    Case("Okafor's Friend Miguel Buys a Robot", True),
    Case("Farmers Union Meets on Friday", True),
    Case("Economist Paul Krugman warns of farm debts", True),
    Case("Alpmilk Beats DeLaval in Vale County", True),
    Case("Millbrook Cows Tested at Cornell", True),
    Case("Milk Robots Come to Lancaster", True),
    Case("President Macron Visits Millbrook", True),
    Case("Elon Musk wants to milk cows", True),
    Case("Christmas on a Vale County farm", True),
    Case("FDA Approves Milking Robot", True),
    Case("Jersey Farmers Love the Robot", True),
]
JA_UNSEEN = Content(
    "ja3",
    "搾乳ロボット、丘野町の酪農家の半数に",
    "丘野町の酪農家210戸のうち半数以上が搾乳ロボットを使っていることが、農協の調べで分かった。140頭を飼う小森ルミさんは「初めて朝6時まで"
    "眠れた」と喜ぶ。ロボットはスイスのアルプミルク社製で1台およそ1800万円。農協は7年で元が取れるとみるが、経済学者の砂川健氏は、"
    "乳価が12%下がったとして借金の増加を警告する。獣医師は、首輪のセンサーが発熱を2日早く知らせるため、感染症が減ったと話す。",
    "ja",
)
JA_NAMES_UNSEEN = [
    Case("酪農家の朝を変えた搾乳ロボット", False),
    Case("もう早起きしない、酪農の働き方改革", False),
    Case("乳価下落でも導入進むロボット", False),
    Case("センサーが牛の健康を守る", False),
    Case("1台1800万円、投資は回収できるか", False),
    Case("学者が警鐘、膨らむ酪農の借金", False),
    Case("スイス製ロボットが町の牛舎に", False),
    Case("家族経営の牧場を救う最新技術", False),
    Case("小森さん「初めてゆっくり眠れた」", False),
    Case("牛の発熱を早期発見、獣医師も歓迎", False),
    Case("ハイテク化する丘野町の酪農", False),
    Case("7年で元が取れる、農協が試算", False),
    Case("人手不足に悩む牧場の切り札", False),
    Case("感染症減少、首輪の効果", False),
    Case("ロボットと牛の静かな暮らし", False),
    Case("スマート酪農、メリットとリスク", False),
    Case("十勝の酪農家にロボット", True),
    Case("小林さん「朝6時まで眠れた」", True),
    Case("ドイツ製の搾乳ロボット", True),
    Case("クボタが搾乳ロボットを発売", True),
    Case("経済学者の竹中氏が警告", True),
    Case("丘野町と帯広市で導入", True),
    Case("明治大学の獣医師が歓迎", True),
    Case("雪印が乳価を下げる", True),
    Case("北海道の農協が調査", True),
    Case("オランダの技術を導入", True),
    Case("NASAの技術を首輪に応用", True),
    Case("岸田首相が牧場を視察", True),
    Case("ホルスタイン140頭の朝", True),
    Case("栃木県の酪農家の半数に", True),
    Case("熊谷さんの牧場にロボット", True),
    Case("ジョンソン氏が借金を警告", True),
]


def score(cases: list[Case], found: Callable[[str], str]) -> tuple[float, float, list[str]]:
    """Precision and recall of `found`, and the texts that it got wrong."""
    results = [(case, bool(found(normalize(case.text)))) for case in cases]
    hits = sum(case.wrong and rejected for case, rejected in results)
    precision = hits / max(1, sum(rejected for _, rejected in results))
    recall = hits / max(1, sum(case.wrong for case, _ in results))
    return precision, recall, [case.text for case, rejected in results if case.wrong != rejected]


def plain_text(content: Content) -> str:
    return normalize(f"{content.title}\n{content.body}")


@pytest.mark.parametrize(
    ("cases", "content", "floor"),
    [
        (EN_NAMES, EN, 0.9),
        (JA_NAMES, JA, 0.9),
        (EN_NAMES_SECOND, EN_SECOND, 0.8),
        (JA_NAMES_SECOND, JA_SECOND, 0.8),
        (EN_NAMES_UNSEEN, EN_UNSEEN, 0.8),
        (JA_NAMES_UNSEEN, JA_UNSEEN, 0.8),
    ],
    ids=["en", "ja", "en-second", "ja-second", "en-unseen", "ja-unseen"],
)
def test_precision_and_recall_of_names(cases: list[Case], content: Content, floor: float) -> None:
    known = KnownNames(plain_text(content))
    precision, recall, wrong = score(cases, lambda text: foreign_name(text, content.language, known))
    assert precision >= floor, (precision, recall, wrong)
    assert recall >= floor - 0.1, (precision, recall, wrong)


def test_precision_and_recall_of_numbers() -> None:
    known = number_values(plain_text(EN)) | number_values(plain_text(JA))
    precision, recall, wrong = score(NUMBERS, lambda text: foreign_number(text, known))
    assert (precision, recall) == (1.0, 1.0), wrong


def test_the_newsroom_s_own_texts_pass_and_another_article_s_fail() -> None:
    articles = make_articles("a", 20, seed=3)
    contents = [Content(a.content_id, a.title, a.body, a.language) for a in articles]
    texts = [[text for angle in a.angles for some in angle.texts.values() for text in some] for a in articles]
    for language in ("en", "ja"):
        own = [number for number, content in enumerate(contents) if content.language == language]
        assert len(own) > 5
        num_foreign = num_accepted = 0
        for number, other in pairwise(own):
            assert all(verdict(text, contents[number]).accepted for text in texts[number])
            num_accepted += sum(verdict(text, contents[number]).accepted for text in texts[other])
            num_foreign += len(texts[other])
        # Of all, not of each article: two of 20 may happen to tell of the same street.
        assert num_accepted < 0.1 * num_foreign


def test_control_checks_that_accept_or_reject_everything_score_badly() -> None:
    for cases in (EN_NAMES, JA_NAMES, EN_NAMES_UNSEEN, JA_NAMES_UNSEEN, NUMBERS):
        assert score(cases, lambda text: "")[1] == 0
        assert score(cases, lambda text: text)[0] < 0.6


@pytest.mark.parametrize(
    ("text", "language", "content", "foreign"),
    [
        ("Der Bürgermeister baut eine Bibliothek", "de", "Die Stadt", ""),
        ("La bibliothèque de Lyon ouvre demain", "fr", "La bibliothèque de Paris ouvre", "Lyon"),
        ("L'Oréal ouvre à Paris", "fr", "L'Oréal à Paris", ""),
        ("Новая библиотека в Москве открыта", "ru", "Новая библиотека открыта", "Москве"),
        ("Beyonce sings for the U.N. tonight", "en", "Beyoncé sang for the United Nations", ""),
        ("图书馆与Google合作", "zh", "图书馆将重建", "Google"),
        ("O'Brien's book is McDonald’s gift", "en", "A book by Pat O’Brien, a gift of McDonald's", ""),
    ],
)
def test_names_in_other_spellings_and_languages(text: str, language: str, content: str, foreign: str) -> None:
    assert foreign_name(normalize(text), language, KnownNames(normalize(content))) == foreign


# ---------------------------------------------------------------------------------------------------- properties

_PIECES = st.sampled_from(
    [
        *("Berg", "the", "Monday", "3,000", "3.5 million", "twenty-five", "三百万円", "1.2億", "横浜市", "佐藤氏"),
        *("パナソニック", "サービス", "U.S.", "O'Brien", "(212) 555-0123", "03-1234-5678", "a@b.com", "x . org"),
        *("https://a.jp/b", "四丁目2番地", "14 Harbour Street", "〒100-0001", "は", "、", "「", "」", "-", "5k", "I"),
        *(
            "二人",
            "数十万",
            "é",
            "ß",
            "ﾄﾖﾀ",
            "１２３",
            "½",
            "AI",
            "EU",
            "2割",
            "at",
            "dot",
            "com",
            ".",
            "Paris",
            "wins",
        ),
        *("big", "News", "+81", "2024-05-01", "(", ")", "ー", "々", "Don't", "iPhone", "@", "/", "百", "万", "k"),
    ]
)
_SENTENCES = st.lists(
    st.lists(_PIECES, min_size=1, max_size=10).flatmap(
        lambda pieces: st.sampled_from(["", " "]).map(lambda gap: gap.join(pieces))
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=300, deadline=None)
@given(_SENTENCES, st.sampled_from(["en", "ja", "fr", "zh", "xx"]), st.data())
def test_a_sentence_of_the_content_holds_nothing_foreign(
    sentences: list[str], language: str, data: st.DataObject
) -> None:
    body = "\n".join(sentences)
    text = data.draw(st.sampled_from(sentences))
    only_facts = ChecksConfig(language=False, repetition=False)
    found = check(text, Content("c", "title", body, language), None, ANYTHING, only_facts)
    assert found.accepted, found


@settings(max_examples=300, deadline=None)
@given(st.text(), st.text(), st.text(max_size=8), st.lists(st.text(max_size=8), max_size=2))
def test_any_unicode_gets_a_verdict(text: str, body: str, tag: str, words: list[str]) -> None:
    checks = ChecksConfig(deny=tuple(words), allow=tuple(words))
    for language in ("en", "ja", "zh", "fr", tag):
        found = check(text, Content("c", body, body, language), completion(), ANYTHING, checks)
        assert found.accepted or found.reason is not None
        assert check(text, Content("c", body, body, language), completion(), ANYTHING, checks) == found


@settings(max_examples=100, deadline=None)
@given(
    st.text(alphabet=st.characters(codec="utf-16", categories=None) | st.sampled_from("\ud800\udfff\x00"), max_size=30)
)
def test_broken_unicode_gets_a_verdict(text: str) -> None:
    check(text, Content("c", text, text, "ja"), None, ANYTHING, ChecksConfig())


_LONG = {
    "a": "a" * 100_000,
    "spaces": "a" + " " * 100_000 + "b",
    "digits": "9" * 100_000,
    "commas": "111," * 25_000,
    "kanji numerals": "三億" * 50_000,
    "number words": "two hundred and " * 6_000,
    "dots": "a." * 50_000,
    "spaced dots": "a . " * 25_000,
    "hyphens": "1-" * 50_000,
    "at": "a@" * 50_000,
    "phone": "03-" * 33_000,
    "street": "1 A B C " * 12_000,
    "katakana": "アイウエ" * 25_000,
    "long katakana": "".join(chr(0x30A2 + i * 7 % 80) for i in range(100_000)),
    "kanji": "".join(chr(0x4E00 + i * 7919 % 20_000) for i in range(100_000)),
    "title case": "Abcd Efgh " * 10_000,
    "names": " ".join(f"Na{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}{'x' * (i % 9)}" for i in range(12_000)),
    "initials": "A." * 50_000,
    "apostrophes": "a'" * 50_000,
    "marks": "e" + "\u0301" * 100_000,
    "brackets": "(((" * 33_000,
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", _LONG)
def test_long_texts_end(name: str) -> None:
    """Some 100,000 characters need a second at most; one backtracking pattern over them needs a minute, and hangs here.

    Measured: `\\s+$` over 40,000 spaces takes 8.6 s, and four times as long over twice as many.
    """
    text = _LONG[name]
    for language in ("en", "ja"):
        check(text, Content(name, "t", text[::-1], language), None, ANYTHING, ChecksConfig(repetition=False))
        check(text, Content(name, "t", "x", language), None, ANYTHING, ChecksConfig(language=False))

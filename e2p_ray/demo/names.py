"""Fictional names of places, people, companies, teams and streets, in English and Japanese."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

NUM_SHARES = 8  # one an angle
SLOTS = ("person", "company", "team", "street", "robot", "bird")


@dataclass(frozen=True, slots=True)
class Bank:
    """One language's parts: a name is one part of every tuple, joined."""

    place: tuple[tuple[str, ...], ...]
    person: tuple[tuple[str, ...], ...]
    company: tuple[tuple[str, ...], ...]
    team: tuple[tuple[str, ...], ...]
    street: tuple[tuple[str, ...], ...]
    robot: tuple[tuple[str, ...], ...]
    bird: tuple[tuple[str, ...], ...]
    month: tuple[tuple[str, ...], ...]
    day: tuple[tuple[str, ...], ...]

    def draw(self, slot: str, random: Random, share: int | None = None) -> str:
        """A name; `share` (0 to NUM_SHARES - 1) keeps to that share of every part, which no other share draws from."""
        parts: tuple[tuple[str, ...], ...] = getattr(self, slot)
        return "".join(random.choice(part if share is None else _share_of(part, share)) for part in parts)


def _share_of(part: tuple[str, ...], share: int) -> tuple[str, ...]:
    num_shares = min(len(part), NUM_SHARES)
    return part[share % num_shares :: num_shares]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_EN_TOWN = _words(
    "Kel Mar Bran Thorn Ash Fal Wick Dun Oak Sil Har Lin Wes Nor Ald Cam Ros El Stan Hol Mil Pem Tar Wil Gren Bar Cor "
    "Dray Fen Hex"
)
_EN_END = _words("mont ford bury haven dale mere stead field ridge combe worth ton ley gate wood")

ENGLISH = Bank(
    place=(_EN_TOWN, _EN_END),
    person=(
        _words(
            "Ada Ben Cleo Dora Emil Faye Gus Hana Igor Jana Kai Lena Milo Nora Otto Petra Quinn Rosa Sami Tess Uma "
            "Vera Wanda Yuri Zoe Amir Bela Carl Dina Elsa Felix Greta Hugo Iris Joel Kira Leon Mina Noah Olga"
        ),
        (" ",),
        _words("Ab Bar Cal Der Es Fin Gar Hol Ing Jar Kes Lor Mor Nel Or Pal Ras Sol Tor Ul Vas Wen Yar Zel"),
        _words("ner dano wick sen mann berg kova ridge ston elli ard ick ova well"),
    ),
    company=(
        _words("Nex Vol Ast Brim Cor Del Ever Fort Glo Hal Ion Jun Kor Lum Mer Nim Orb Pell Quan Riv Sten Tal Uni Ver"),
        _words("ora ix ano eta umi aris en is elo ium ada ex"),
        (" ",),
        _words("Labs Works Systems Foods Bank Group Partners Motors Energy Holdings"),
    ),
    team=(
        _EN_TOWN,
        _EN_END,
        (" ",),
        _words("Otters Hawks Comets Foxes Rovers Giants Herons Wolves Rockets Bears Falcons Stags"),
    ),
    street=(
        _words(
            "Alder Birch Cedar Dock Elm Fountain Garden Harvest Ivy Juniper Kiln Linden Maple Nettle Orchard Poplar "
            "Quarry River Station Tanner Union Violet Willow Abbey Barley Chapel"
        ),
        (" ",),
        _words("Street Lane Road Square Row Hill Court Avenue"),
    ),
    robot=(_words("Ti Ro Bi Za Mu Pi Lo Ka Vi Ne"), _words("ko bo mi zu ra pa lu do")),
    bird=(_words("heron kestrel swift lapwing plover curlew dipper wagtail goshawk sparrow nightjar kingfisher"),),
    month=(_words("January February March April May June July August September October November December"),),
    day=(_words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),),
)

JAPANESE = Bank(
    place=(
        tuple("水霧白風月星花雪雲霞桜楓柏椿梓葵鶴鷹鹿狐"),
        tuple("森谷浜崎原野沢瀬津里丘島岬坂田"),
        ("町",),
    ),
    person=(
        _words(
            "佐伯 水野 松岡 高瀬 藤井 森川 石黒 平田 大城 桐谷 西村 北条 長谷 小泉 柴田 片山 三浦 堀江 菅原 宮本 "
            "青木 千葉 秋山 黒田 福原 永井 竹内 荒木 早川 笹川 浅野 戸田"
        ),
        _words(
            "千尋 陽子 健太 美咲 直樹 和子 翔太 由美 拓海 恵子 大輔 春菜 誠 涼子 悠斗 明美 隆 彩香 修平 志保 "
            "結衣 亮 真琴 京子 達也 七海 浩二 静香"
        ),
    ),
    company=(
        _words("アス ネク ルミ コル ベル ティ ミラ オル セン トリ グラ ノヴ フェ リヴ ソラ カナ"),
        _words("テル ソラ ナス ティア ノア リオ モス ニカ ドラ レット"),
        _words("技研 食品 建設 電機 商事 物産 製作所 銀行 開発 運輸"),
    ),
    team=(
        tuple("水霧白風月星花雪雲霞桜楓柏椿梓葵鶴鷹鹿狐"),
        tuple("森谷浜崎原野沢瀬津里丘島岬坂田"),
        _words("ホークス オッターズ コメッツ フォックス ジャイアンツ ウルブズ ベアーズ スターズ ロケッツ ドルフィンズ"),
    ),
    street=(
        _words(
            "柳 銀杏 鍛冶 紺屋 大工 米屋 魚屋 弁天 天神 稲荷 観音 地蔵 石橋 二葉 若葉 緑 青葉 本陣 油屋 櫻木 寺前 "
            "宮前 川端 堀端"
        ),
        _words("通り 横丁 小路 坂 筋 商店街"),
    ),
    robot=(_words("ピ ポ モ ル ミ タ キ コ ナ ロ"), _words("ポン ルル コロ タン ニャ リン モチ ピカ")),
    bird=(_words("ツバメ カワセミ コサギ ヒバリ メジロ フクロウ モズ セキレイ シギ チドリ オオルリ ウグイス"),),
    month=(_words("1月 2月 3月 4月 5月 6月 7月 8月 9月 10月 11月 12月"),),
    day=(_words("月曜 火曜 水曜 木曜 金曜 土曜 日曜"),),
)

BANKS: dict[str, Bank] = {"en": ENGLISH, "ja": JAPANESE}
